"""How the tensors of a GGUF file become ours and ours become those, one object for both directions.

A tensor may be floats or the bytes of packed rows: what goes by whole rows holds for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from causallm.weights.mapped_reader import StoredTensor
from causallm.weights.reader import Index


class Change:
    """The tensor as it is."""

    dimensions: ClassVar[Sequence[int]] = (1, 2, 3)
    """How many dimensions GGUF's tensors may have."""

    def multiple(self) -> int:
        """Of what the number of their rows must be a multiple."""
        return 1

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours from GGUF's."""
        return tensors[0]

    def part(self, stored: Sequence[StoredTensor], index: Index) -> Tensor:
        """Of ours that part, from no more of GGUF's than needed."""
        return self.read([tensor[index] for tensor in stored])

    def group(self, rows: int) -> int:
        """How many of so many rows of ours are made together; the rows of fused experts are an expert's."""
        return 1

    def write(self, tensor: Tensor) -> Sequence[Tensor]:
        """GGUF's from ours."""
        return [tensor]


@dataclass(frozen=True)
class RotaryPairs(Change):
    """Each head's rows (first half, second half) stand as pairs of one of each (ggml's "normal" rotary order)."""

    heads: int
    dimensions: ClassVar[Sequence[int]] = (1, 2)

    def multiple(self) -> int:
        return 2 * self.heads

    def read(self, tensors: Sequence[Shaped[Tensor, "rows ..."]]) -> Shaped[Tensor, "rows ..."]:
        rows = tensors[0]
        halves = rows.reshape(self.heads, rows.shape[0] // self.heads // 2, 2, -1).transpose(1, 2)
        return halves.reshape(rows.shape)

    def part(self, stored: Sequence[StoredTensor], index: Index) -> Tensor:
        if not index or not isinstance(index[0], slice):
            return self.read([stored[0][()]])[index]
        rows, size = stored[0].shape[0], self.group(stored[0].shape[0])
        first, last, step = index[0].indices(rows)
        begin, end = first // size, max(-(-last // size), first // size + 1)
        some = RotaryPairs(end - begin).read([stored[0][(slice(begin * size, end * size),)]])
        return some[(slice(first - begin * size, max(last, first) - begin * size, step), *index[1:])]

    def group(self, rows: int) -> int:
        return rows // self.heads

    def write(self, tensor: Shaped[Tensor, "rows ..."]) -> Sequence[Shaped[Tensor, "rows ..."]]:
        pairs = tensor.reshape(self.heads, 2, tensor.shape[0] // self.heads // 2, -1).transpose(1, 2)
        return [pairs.reshape(tensor.shape)]


class FromOne(Change):
    """Norm weights that count from one there and from zero here (Gemma)."""

    dimensions: ClassVar[Sequence[int]] = (1,)

    def read(self, tensors: Sequence[Float[Tensor, "dim"]]) -> Float[Tensor, "dim"]:
        return tensors[0].float() - 1

    def write(self, tensor: Float[Tensor, "dim"]) -> Sequence[Float[Tensor, "dim"]]:
        return [tensor.float() + 1]


class GateAndUp(Change):
    """Two tensors (experts, hidden, ...) as the alternating columns of one (experts, ..., 2 hidden) (gpt-oss).

    Packed rows stay rows: (experts, 2 hidden, row_bytes).
    """

    dimensions: ClassVar[Sequence[int]] = (2, 3)

    def read(self, tensors: Sequence[Shaped[Tensor, "experts hidden ..."]]) -> Shaped[Tensor, "experts ..."]:
        return _columns(torch.stack(tuple(tensors), 2).flatten(1, 2))

    def part(self, stored: Sequence[StoredTensor], index: Index) -> Tensor:
        if not index or not isinstance(index[0], int):
            return self.read([tensor[()] for tensor in stored])[index]
        expert, rest = index[0], index[1:]
        axis = _rows_axis(stored[0])
        columns = rest[axis] if len(rest) > axis else slice(None)
        if isinstance(columns, int):
            return self.read([tensor[(expert,)][None] for tensor in stored])[0][rest]
        first, last, step = columns.indices(2 * stored[0].shape[1])
        begin = first // 2
        some = self.read([tensor[(expert, slice(begin, -(-last // 2)))][None] for tensor in stored])[0]
        return some[(*rest[:axis], slice(first - 2 * begin, last - 2 * begin, step), *rest[axis + 1 :])]

    def group(self, rows: int) -> int:
        return 2

    def write(self, tensor: Shaped[Tensor, "experts ..."]) -> Sequence[Shaped[Tensor, "experts hidden ..."]]:
        rows = _columns(tensor)
        return [rows[:, ::2], rows[:, 1::2]]


class Transposed(Change):
    """(experts, out, in) there, (experts, in, out) here (gpt-oss); packed rows are outputs in both."""

    dimensions: ClassVar[Sequence[int]] = (3,)

    def read(self, tensors: Sequence[Shaped[Tensor, "experts out_features ..."]]) -> Shaped[Tensor, "experts ..."]:
        return _columns(tensors[0])

    def part(self, stored: Sequence[StoredTensor], index: Index) -> Tensor:
        if not index or not isinstance(index[0], int):
            return self.read([stored[0][()]])[index]
        expert, rest = index[0], index[1:]
        axis = _rows_axis(stored[0])
        if len(rest) <= axis or not isinstance(rest[axis], slice):
            return self.read([stored[0][(expert,)][None]])[0][rest]
        some = self.read([stored[0][(expert, rest[axis])][None]])[0]
        return some[(*rest[:axis], slice(None), *rest[axis + 1 :])]

    def write(self, tensor: Shaped[Tensor, "experts ..."]) -> Sequence[Shaped[Tensor, "experts out_features ..."]]:
        return [_columns(tensor)]


def _rows_axis(stored: StoredTensor) -> int:
    """Where ours of one expert has the rows that it has there."""
    return 1 if len(stored.shape) == 3 and stored.dtype != torch.uint8 else 0


def _columns(experts: Tensor) -> Tensor:
    return experts if experts.dtype == torch.uint8 else experts.transpose(1, -1)
