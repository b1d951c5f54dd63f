"""A head that is read in parts: each gives the logits of some tokens, so that no memory holds the whole of it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causallm.storage.layout import Layout, Piece, lay_out
from causallm.storage.storage import HEAD, Storage
from causallm.weights.reader import FileRange

ROWS = 64
"""Of which a part has a multiple, so that the kernels take the rows together as they do those of the whole."""


def head_parts(piece: Piece, most: int) -> dict[int, Layout]:
    """The rows of a head's weight in parts of at most `most` bytes, by the numbers of their units; {} where it cannot
    be parted, for the file has it otherwise than in rows."""
    place, count = piece.place, piece.shape[0]
    if place is None or place.transposed:
        return {}
    rows = max(most // (piece.nbytes // count) // ROWS, 1) * ROWS
    stored = place.nbytes // count
    parts = {}
    for number, first in enumerate(range(0, count, rows)):
        taken = min(rows, count - first)
        where = FileRange(place.path, place.offset + first * stored, taken * stored)
        part = Piece(piece.name, None, (taken, *piece.shape[1:]), piece.dtype, piece.stored, where)
        parts[HEAD - 1 - number] = lay_out([part])
    return parts


class HeadInParts(nn.Module):
    """In the place of `head`, a linear layer or an embedding that is the head too; the same logits.

    The layers of its parts are copies of `head` whose weight is there while their unit is in memory.
    """

    def __init__(self, head: Any, units: Sequence[int], layouts: Sequence[Layout]):
        super().__init__()
        self.units = tuple(units)
        self._parts = tuple(_part(head, layout.pieces[0]) for layout in layouts)
        self.storage = Storage()

    def owner(self, unit: int) -> dict[str, nn.Parameter | None]:
        """What holds the weight of a part."""
        return self._parts[self.units.index(unit)]._parameters

    def forward(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        logits = []
        for unit, part in zip(self.units, self._parts, strict=True):
            with self.storage.resident(unit):
                logits.append(part.project(hidden) if hasattr(part, "project") else part(hidden))
        return torch.cat(logits, -1)


def _part(head: Any, piece: Piece) -> Any:
    part = copy.copy(head)
    empty = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
    part._parameters = {**head._parameters, "weight": nn.Parameter(empty, requires_grad=False)}
    return part
