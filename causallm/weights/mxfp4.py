"""gpt-oss checkpoints as published: expert weights in MXFP4, given as plain floats one tensor at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from causallm.weights.reader import BLOCK_BYTES, Fetch, FileRange, Index, WeightReader, rows_in_parts

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32

# OCP Microscaling Formats 1.0, table 5.5: sign, two exponent bits, one mantissa bit.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
SCALE_BIAS = 127
# The two values of each byte, as one number of 64 bits: looking up half as many takes half the time.
PAIRS = torch.stack((FP4.repeat(16), FP4.repeat_interleave(16)), -1).view(torch.int64).flatten()


class Mxfp4Reader(WeightReader):
    """Another reader, with each pair `x_blocks` (experts, out, in / 32, 16) and `x_scales` (experts, out, in / 32),
    both uint8, as one tensor `x` (experts, in, out) of `dtype`. Exact for every float dtype but float16, where a
    value may round or overflow.
    """

    def __init__(self, inner: WeightReader, dtype: torch.dtype):
        self.inner, self.dtype = inner, dtype
        held = set(inner.names())
        self._packed = {
            name.removesuffix(BLOCKS)
            for name in held
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in held
        }
        for name in self._packed:
            blocks, scales = inner.meta(name + BLOCKS).shape, inner.meta(name + SCALES).shape
            if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != BLOCK // 2:
                raise ValueError(
                    f"tensors {name}{BLOCKS} {list(blocks)} and {name}{SCALES} {list(scales)} do not fit together"
                )

    @staticmethod
    def applies(inner: WeightReader) -> bool:
        """Whether `inner` has packed tensors."""
        return any(name.endswith(BLOCKS) for name in inner.names())

    def names(self) -> Sequence[str]:
        scales = {name + SCALES for name in self._packed}
        return [self._plain(name) for name in self.inner.names() if name not in scales]

    def _plain(self, name: str) -> str:
        return name.removesuffix(BLOCKS) if name.removesuffix(BLOCKS) in self._packed else name

    def meta(self, name: str) -> Tensor:
        if name not in self._packed:
            return self.inner.meta(name)
        experts, rows, groups, _ = self.inner.meta(name + BLOCKS).shape
        return torch.empty(experts, groups * BLOCK, rows, dtype=self.dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        if name not in self._packed:
            return self.inner.tensor(name)
        values = torch.empty_like(self.meta(name), device="cpu")
        for expert in range(len(values)):
            values[expert] = self._expert(name, expert, slice(None))
        self.release(name)
        return values

    def place(self, name: str) -> FileRange | None:
        return None if name in self._packed else self.inner.place(name)

    def paths(self) -> Sequence[Path]:
        return self.inner.paths()

    def release(self, name: str) -> None:
        for held in (name + BLOCKS, name + SCALES) if name in self._packed else (name,):
            self.inner.release(held)

    def fetch_with(self, fetch: Fetch) -> None:
        self.inner.fetch_with(fetch)

    def part(self, name: str, index: Index) -> Tensor:
        if name not in self._packed:
            return self.inner.part(name, index)
        if index and isinstance(index[0], int):
            expert, rest = index[0], index[1:]
            if len(rest) == 2 and isinstance(rest[1], slice):
                return self._expert(name, expert, rest[1])[rest[0]]
            return self._expert(name, expert, slice(None))[rest]
        return super().part(name, index)

    def parts(self, name: str, index: Index = ()) -> Sequence[Index]:
        if name not in self._packed or len(index) > 1:
            return super().parts(name, index)
        experts, columns, rows = self.meta(name).shape
        steps = rows_in_parts(rows, columns * self.dtype.itemsize)
        return [(expert, slice(None), step) for expert in index or range(experts) for step in steps]

    def _expert(self, name: str, expert: int, rows: slice) -> Tensor:
        """The columns of one expert that are these rows of the file's."""
        blocks, scales = (self.inner.part(name + held, (expert, rows)) for held in (BLOCKS, SCALES))
        return expand(blocks, scales, self.dtype).t()


def expand(
    blocks: UInt8[Tensor, "rows groups half"], scales: UInt8[Tensor, "rows groups"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows values"]:
    """The values of MXFP4 rows: each byte is two of them, low nibble first, times 2 ** (scale - 127)."""
    rows, groups, half = blocks.shape
    values = torch.empty(rows, groups * 2 * half, dtype=dtype)
    for part in rows_in_parts(rows, groups * 2 * half * dtype.itemsize, nbytes=BLOCK_BYTES):
        pairs = PAIRS[blocks[part].int()].view(torch.float32)
        values[part] = torch.ldexp(pairs, scales[part, :, None].int() - SCALE_BIAS).flatten(-2)
    return values
