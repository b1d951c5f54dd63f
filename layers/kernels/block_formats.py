"""ggml's quantized block formats as plain torch: rows of floats to the bytes of a GGUF tensor, and back.

A row is a run of blocks and a block is its scales beside its codes, laid out as in ggml-common.h with little-endian
halves. The codes are those of ggml's quantize_row_*_ref on a machine that does not fuse multiply and add, which is
what llama.cpp's own x86 builds use; the values are those of its dequantize_row_*, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from layers.kernels.k_quants import pack_q4_k, pack_q5_k, pack_q6_k, unpack_q4_k, unpack_q5_k, unpack_q6_k
from layers.kernels.read_only_blocks import unpack_iq4_xs, unpack_q3_k
from layers.kernels.small_blocks import (
    pack_q4_0,
    pack_q4_1,
    pack_q5_0,
    pack_q5_1,
    pack_q8_0,
    unpack_iq4_nl,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q5_0,
    unpack_q5_1,
    unpack_q8_0,
)

SLAB_VALUES = 1 << 18
"""Values worked on at a time: the intermediates stay near the cache, and small beside any table worth packing."""


@dataclass(frozen=True)
class BlockFormat:
    """One block format: `values` floats become `nbytes` bytes, whatever the rest of the row holds.

    The float16 scales of a block are its bytes `halves`. pack_blocks is None where the format is only read.
    """

    name: str
    values: int
    nbytes: int
    halves: slice
    pack_blocks: Callable[[Tensor], Tensor] | None
    unpack_blocks: Callable[[Tensor], Tensor]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values; ValueError where they do not fill whole blocks."""
        if columns % self.values:
            raise ValueError(f"{self.name} packs blocks of {self.values} values, and {columns} columns are no multiple")
        return columns // self.values * self.nbytes

    def row_values(self, row_bytes: int) -> int:
        """Values in a row of `row_bytes` bytes; ValueError where they do not fill whole blocks."""
        if row_bytes % self.nbytes:
            raise ValueError(f"{self.name} has blocks of {self.nbytes} bytes, and {row_bytes} bytes are no multiple")
        return row_bytes // self.nbytes * self.values

    def writer(self) -> Callable[[Tensor], Tensor]:
        """`pack_blocks`; ValueError where the format is only read."""
        if self.pack_blocks is None:
            raise ValueError(f"{self.name} can be read but not written; {', '.join(writable())} can be")
        return self.pack_blocks

    def pack(self, weight: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows row_bytes"]:
        """The rows as ggml's bytes, rounded from their float32 values.

        ValueError where a row is not whole blocks, where the format is only read, and where a block's scale is not
        finite in float16: for what is not a number, and for magnitudes from 65,520 (Q4_1, Q5_1: their minimum) or half
        a million (Q4_0) to a few millions (Q8_0, Q4_K) or more (Q6_K) on.
        """
        pack_blocks = self.writer()
        rows, columns = weight.shape
        packed = weight.new_empty((rows, self.row_bytes(columns)), dtype=torch.uint8)
        for slab in _slabs(rows, columns):
            blocks = weight[slab].detach().float().reshape(-1, self.values)
            packed_blocks = pack_blocks(blocks)
            if not packed_blocks[:, self.halves].clone().view(torch.float16).isfinite().all():
                peak = blocks.abs().max().item()
                raise ValueError(f"{self.name} has float16 scales and cannot hold magnitudes up to {peak:g}")
            packed[slab] = packed_blocks.view(-1, packed.shape[1])
        return packed

    def unpack(
        self, packed: UInt8[Tensor, "rows row_bytes"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "rows columns"]:
        """The values of packed rows, computed in float32; ValueError where a row is not whole blocks."""
        rows, row_bytes = packed.shape
        weight = packed.new_empty((rows, self.row_values(row_bytes)), dtype=dtype)
        for slab in _slabs(rows, weight.shape[1]):
            blocks = packed[slab].reshape(-1, self.nbytes)
            weight[slab] = self.unpack_blocks(blocks).view(-1, weight.shape[1])
        return weight


def _slabs(rows: int, columns: int) -> list[slice]:
    step = max(1, SLAB_VALUES // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows if columns else 0, step)]


BLOCK_FORMATS: dict[str, BlockFormat] = {
    block_format.name: block_format
    for block_format in (
        BlockFormat("Q8_0", 32, 34, slice(0, 2), pack_q8_0, unpack_q8_0),
        BlockFormat("Q4_0", 32, 18, slice(0, 2), pack_q4_0, unpack_q4_0),
        BlockFormat("Q4_1", 32, 20, slice(0, 4), pack_q4_1, unpack_q4_1),
        BlockFormat("Q5_0", 32, 22, slice(0, 2), pack_q5_0, unpack_q5_0),
        BlockFormat("Q5_1", 32, 24, slice(0, 4), pack_q5_1, unpack_q5_1),
        BlockFormat("IQ4_NL", 32, 18, slice(0, 2), None, unpack_iq4_nl),
        BlockFormat("Q3_K", 256, 110, slice(108, 110), None, unpack_q3_k),
        BlockFormat("Q4_K", 256, 144, slice(0, 4), pack_q4_k, unpack_q4_k),
        BlockFormat("Q5_K", 256, 176, slice(0, 4), pack_q5_k, unpack_q5_k),
        BlockFormat("Q6_K", 256, 210, slice(208, 210), pack_q6_k, unpack_q6_k),
        BlockFormat("IQ4_XS", 256, 136, slice(0, 2), None, unpack_iq4_xs),
    )
}
"""Every format by ggml's name for it."""


def writable() -> list[str]:
    """The formats that weights can be packed in."""
    return [name for name, block_format in BLOCK_FORMATS.items() if block_format.pack_blocks]
