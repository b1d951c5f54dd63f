"""ggml's quantized block formats as plain torch: rows of floats to the bytes of a GGUF tensor, and back.

A row is a run of blocks and a block is its scales beside its codes, laid out as in ggml-common.h with little-endian
halves. The codes are those of ggml's quantize_row_*_ref on a machine that does not fuse multiply and add, which is
what llama.cpp's own x86 builds use; the values are those of its dequantize_row_*, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from layers.kernels.k_quants import divide, inverse_of, pack_q4_k, pack_q6_k, unpack_q4_k, unpack_q6_k

SLAB_VALUES = 1 << 18
"""Values worked on at a time: the intermediates stay near the cache, and small beside any table worth packing."""


@dataclass(frozen=True)
class BlockFormat:
    """One block format: `values` floats become `nbytes` bytes, whatever the rest of the row holds.

    The float16 scales of a block are its bytes `halves`.
    """

    name: str
    values: int
    nbytes: int
    halves: slice
    pack_blocks: Callable[[Tensor], Tensor]
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

    def pack(self, weight: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows row_bytes"]:
        """The rows as ggml's bytes, rounded from their float32 values.

        ValueError where a row is not whole blocks, and where a block's scale is not finite in float16: for what is not
        a number, and for magnitudes from half a million (Q4_0) to a few millions (Q8_0, Q4_K) or more (Q6_K) on.
        """
        rows, columns = weight.shape
        packed = weight.new_empty((rows, self.row_bytes(columns)), dtype=torch.uint8)
        for slab in _slabs(rows, columns):
            blocks = weight[slab].detach().float().reshape(-1, self.values)
            packed_blocks = self.pack_blocks(blocks)
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


def _pack_q8_0(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 34"]:
    scale = divide(blocks.abs().amax(1, keepdim=True), 127.0)
    scaled = blocks * inverse_of(scale)
    whole = scaled.trunc()
    # Halves go away from zero, as in C's roundf; torch.round sends them to the even neighbour.
    codes = whole + ((scaled - whole) * 2).trunc()
    return torch.cat((scale.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), 1)


def _unpack_q8_0(blocks: UInt8[Tensor, "blocks 34"]) -> Float32[Tensor, "blocks 32"]:
    return blocks[:, 2:].view(torch.int8) * blocks[:, :2].clone().view(torch.float16).float()


def _pack_q4_0(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 18"]:
    # The value of largest magnitude gets code 0, that is -8, and so no rounding error. Adding zero makes -0 a +0.
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) + 0.0
    scale = divide(peak, -8.0)
    codes = (blocks * inverse_of(scale) + 8.5).clamp(0, 15).to(torch.uint8)
    return torch.cat((scale.half().view(torch.uint8), codes[:, :16] | codes[:, 16:] << 4), 1)


def _unpack_q4_0(blocks: UInt8[Tensor, "blocks 18"]) -> Float32[Tensor, "blocks 32"]:
    codes = torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1).view(torch.int8) - 8
    return codes * blocks[:, :2].clone().view(torch.float16).float()


BLOCK_FORMATS: dict[str, BlockFormat] = {
    block_format.name: block_format
    for block_format in (
        BlockFormat("Q8_0", 32, 34, slice(0, 2), _pack_q8_0, _unpack_q8_0),
        BlockFormat("Q4_0", 32, 18, slice(0, 2), _pack_q4_0, _unpack_q4_0),
        BlockFormat("Q4_K", 256, 144, slice(0, 4), pack_q4_k, unpack_q4_k),
        BlockFormat("Q6_K", 256, 210, slice(208, 210), pack_q6_k, unpack_q6_k),
    )
}
"""Every format by ggml's name for it."""
