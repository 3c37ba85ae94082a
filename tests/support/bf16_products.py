"""Emulate a CPU with AMX, which multiplies float32 matrices in bf16 when torch allows it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OPERANDS = {  # indices of the operands
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.addmm_: (1, 2),
    torch.ops.aten.baddbmm: (1, 2),
}


class Bf16Products(TorchDispatchMode):
    """`rounded` counts the products whose operands were rounded to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        operands = _OPERANDS.get(operator.overloadpacket, ())
        if operands and torch.get_float32_matmul_precision() == "medium" and args[operands[0]].dtype == torch.float32:
            self.rounded += 1
            args = [arg.bfloat16().float() if index in operands else arg for index, arg in enumerate(args)]
        return operator(*args, **(kwargs or {}))
