"""NNTrainer's and llama.cpp's x86 order of Q4_0 bytes: eight rows interleaved, so that a kernel reads them at once.

For each group of 8 rows and each block of 32 columns there are 144 bytes: the 8 float16 scales, then the first 8
code bytes of each row, then the last 8 of each; every code byte has its two high bits flipped (XOR 0x88), which makes
signed nibbles of codes 0..15. Format: make_block_q4_0x8 of llama.cpp's repack.cpp with an interleaving of 8.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

ROWS = 8
SIGN_BITS = -0x7778
"""0x8888, as a signed number of 16 bits; the work is done on pairs of bytes."""
HALF = 4
BLOCK = 1 + 2 * HALF
"""Pairs in half a block's codes, and in a block: its scale and two halves."""


def interleave(packed: UInt8[Tensor, "rows row_bytes"]) -> UInt8[Tensor, "rows row_bytes"]:
    """Plain Q4_0 rows in the interleaved order, as many bytes; ValueError where the rows are no groups of 8."""
    stored = torch.empty_like(packed, memory_format=torch.contiguous_format)
    scales, codes = _interleaved(stored)
    plain = _plain(packed.contiguous())
    scales.copy_(plain[..., 0])
    codes.copy_(plain[..., 1:].unflatten(-1, (2, HALF))).bitwise_xor_(SIGN_BITS)
    return stored


def deinterleave(stored: UInt8[Tensor, "rows row_bytes"]) -> UInt8[Tensor, "rows row_bytes"]:
    """The plain Q4_0 rows of what `interleave` gave."""
    packed = torch.empty_like(stored, memory_format=torch.contiguous_format)
    scales, codes = _interleaved(stored.contiguous())
    plain = _plain(packed)
    plain[..., 0] = scales
    plain[..., 1:].unflatten(-1, (2, HALF)).copy_(codes).bitwise_xor_(SIGN_BITS)
    return packed


def _plain(packed: Tensor) -> Tensor:
    """A view of plain rows: (groups, 8, blocks, scale and codes)."""
    return packed.view(torch.int16).view(packed.shape[0] // ROWS, ROWS, -1, BLOCK)


def _interleaved(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Views of interleaved rows: scales (groups, 8, blocks) and codes (groups, 8, blocks, 2, half)."""
    rows, row_bytes = stored.shape
    if rows % ROWS:
        raise ValueError(f"q4_0x8 interleaves groups of {ROWS} rows, and {rows} rows are no multiple")
    blocks = stored.view(torch.int16).view(rows // ROWS, row_bytes // (2 * BLOCK), ROWS * BLOCK)
    codes = blocks[..., ROWS:].unflatten(-1, (2, ROWS, HALF)).permute(0, 3, 1, 2, 4)
    return blocks[..., :ROWS].transpose(1, 2), codes
