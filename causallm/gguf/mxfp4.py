"""MXFP4 as ggml stores it, made into Q8_0: the same values in twice the bytes, for which there are kernels."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from causallm.gguf.tensor_types import MXFP4_BYTES
from causallm.weights.mxfp4 import FP4, SCALE_BIAS
from causallm.weights.reader import BLOCK_BYTES, rows_in_parts

Q8_0_BYTES = 34

HALVES = (FP4 * 2).to(torch.int8)
"""What each code of four bits stands for, in halves: whole numbers up to 12."""


def mxfp4_as_q8_0(packed: UInt8[Tensor, "*rows row_bytes"]) -> UInt8[Tensor, "*rows q8_0_bytes"]:
    """Rows of blocks (a power of two, then 32 codes of which the low nibbles are the first half) as rows of Q8_0.

    Exact: Q8_0's scale is half the power of two, a float16 number down to 2 ** -24, and below that nothing counts.
    ValueError where it is too large for float16.
    """
    blocks = packed.reshape(-1, MXFP4_BYTES)
    made = torch.empty(len(blocks), Q8_0_BYTES, dtype=torch.uint8)
    for part in rows_in_parts(len(blocks), Q8_0_BYTES, nbytes=BLOCK_BYTES):
        made[part] = _converted(blocks[part])
    return made.view(*packed.shape[:-1], packed.shape[-1] // MXFP4_BYTES * Q8_0_BYTES)


def _converted(blocks: UInt8[Tensor, "blocks block_bytes"]) -> UInt8[Tensor, "blocks q8_0_bytes"]:
    powers = blocks[:, :1].int() - SCALE_BIAS
    scales = torch.ldexp(torch.full(powers.shape, 0.5), powers).half()
    if not scales.isfinite().all():
        raise ValueError("MXFP4 scales beyond float16 cannot be held as Q8_0")
    codes = HALVES[torch.cat((blocks[:, 1:] & 0x0F, blocks[:, 1:] >> 4), -1).int()]
    return torch.cat((scales.view(torch.uint8), codes.view(torch.uint8)), 1)
