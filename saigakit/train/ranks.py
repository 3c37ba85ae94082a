"""What the processes of a training run agree on: one that went on or stopped alone would leave the others waiting."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from saigakit.errors import SaigaError

if TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")


def any_of(here: Sequence[bool], args: "TrainingArguments") -> list[bool]:
    """Each answer is true where it is true in some process."""
    if args.world_size == 1:
        return list(here)
    import torch

    flags = torch.tensor([float(flag) for flag in here], device=args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def mean(here: float, args: "TrainingArguments") -> float:
    if args.world_size == 1:
        return here
    import torch

    total = torch.tensor(here, dtype=torch.float64, device=args.device)
    torch.distributed.all_reduce(total)
    return float(total.item() / args.world_size)


def gathered(here: T, args: "TrainingArguments") -> list[T]:
    """What each process has, in their order; the same list in all."""
    if args.world_size == 1:
        return [here]
    import torch

    there: list[T] = [here] * args.world_size
    torch.distributed.all_gather_object(there, here)
    return there


def by_first(act: Callable[[], object], args: "TrainingArguments") -> None:
    """The first process acts and the others wait. Its SaigaError is raised in all, and its other errors end it."""
    problem: list[str | None] = [None]
    if args.process_index == 0:
        try:
            act()
        except SaigaError as error:
            problem = [str(error)]
    if args.world_size > 1:
        import torch

        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise SaigaError(problem[0])


def leave_together() -> None:
    """At the very end: one that is gone first breaks the connections of the others, and gloo aborts them."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
