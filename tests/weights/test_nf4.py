import subprocess
import sys

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from saigakit.weights import nf4


@pytest.mark.parametrize("number_format", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(384, 128), (130, 72), (1, 40), (3000, 1024)])
def test_blocks_equal_those_of_the_matrix_quantised_at_once(shape, number_format):
    matrix = np.random.default_rng(4).normal(0, 0.02, shape).astype(np.float32)
    held = torch.from_numpy(matrix).to(getattr(torch, number_format))
    whole = dequantize_4bit(*quantize_4bit(held, blocksize=64, compress_statistics=True, quant_type="nf4"))
    scales = nf4.block_scales(lambda rows: matrix[rows], shape, number_format)
    for first in range(0, shape[0], 64):
        rows = slice(first, min(first + 64, shape[0]))
        blocks = slice(first * shape[1] // 64, -(-rows.stop * shape[1] // 64))
        found = nf4.round_trip(matrix[rows], scales[blocks], number_format)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, whole[rows].float().numpy())


def test_refuses_the_scales_of_other_rows():
    with pytest.raises(ValueError, match="3 scales for 128 numbers"):
        nf4.round_trip(np.zeros((2, 64), np.float32), torch.ones(3), "float16")


@pytest.mark.slow
def test_bitsandbytes_does_not_warn_about_kernels_that_are_not_needed():
    """On a CPU with AVX512-BF16 its first product would print a warning into 03_merge_gguf."""
    code = (
        "import logging\nfrom saigakit.weights import nf4\nnf4.import_bitsandbytes()\n"
        "from bitsandbytes.backends.cpu import ops\nops.logger.warning('Failed to load')\nprint(ops.logger.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bitsandbytes.") and done.stderr == ""
