"""An embedding whose table stays in the file: only the rows of the tokens at hand are read."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causallm.storage.layout import Piece
from causallm.storage.open_file import OpenFile
from causallm.weights.reader import WeightReader


class RowsOfFile(nn.Module):
    """In the place of `table`, an embedding layer without numbers; the same vectors to the last bit.

    Where the table is the head too, `head` projects, or the table itself: whoever calls `project` has brought it in.
    """

    def __init__(self, table: Any, read: Callable[[list[int]], Tensor], head: nn.Module | None = None):
        super().__init__()
        self._table, self._read, self._head = (table,), read, (head,)

    @property
    def table(self) -> Any:
        """The layer that this one stands for; no child, since its weight is no parameter while it is not in memory."""
        return self._table[0]

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        rows, numbers = torch.unique(ids, return_inverse=True)
        if rows[0] < 0 or rows[-1] >= self.table.num_embeddings:
            last = self.table.num_embeddings - 1
            raise IndexError(f"token ids {int(rows[0])} to {int(rows[-1])}, expected 0 to {last}")
        part = copy.copy(self.table)
        part._parameters = {"weight": nn.Parameter(self._read(rows.tolist()), requires_grad=False)}
        return part(numbers)

    def project(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """Logits: hidden times the transposed table."""
        head = self._head[0]
        return self.table.project(hidden) if head is None else head(hidden)


def row_reader(piece: Piece, reader: WeightReader) -> Callable[[list[int]], Tensor]:
    """What reads rows of a table, (rows, columns) of the piece's dtype, from where the file has it."""
    place, count = piece.place, piece.shape[0]
    if place is None or place.transposed:

        def compute(numbers: list[int]) -> Tensor:
            return torch.cat([reader.part(piece.name, (slice(row, row + 1),)).to(piece.dtype) for row in numbers])

        return compute
    file, nbytes = OpenFile(place.path, direct=False), place.nbytes // count

    def read(numbers: list[int]) -> Tensor:
        content = bytearray(len(numbers) * nbytes)
        view = memoryview(content)
        for index, row in enumerate(numbers):
            file.read(place.offset + row * nbytes, view[index * nbytes : (index + 1) * nbytes])
        rows = torch.frombuffer(content, dtype=piece.stored).view(len(numbers), *piece.shape[1:])
        return rows.to(piece.dtype)

    return read
