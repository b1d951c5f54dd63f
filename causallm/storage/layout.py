"""Which bytes of files a unit of weights is made of, and where each of its tensors lies in the memory it is read to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causallm.weights.reader import FileRange
from layers.pages import PAGE, Pages, whole_pages

GAP = 2**16
"""Bytes between two tensors of a file that are read with them rather than with a second request."""
ALIGNMENT = 64
"""Of tensors that are computed."""


@dataclass(frozen=True)
class Piece:
    """A tensor of the model, or `expert`'s slice of one: its name in the reader and what it is in memory.

    place: where a file has its values in order, of dtype `stored`; None where they must be computed (transposed rows,
    formats that memory does not have). transposed: whether the last two dimensions lie in memory the other way round,
    as they do where the reader's tensor is in memory as a whole: products of strided weights round otherwise.
    """

    name: str
    expert: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    place: FileRange | None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """In memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: Pages, start: int) -> Tensor:
        """The tensor that starts at a byte of `memory`, strided as the file's."""
        if self.transposed:
            *outer, rows, columns = self.shape
            return memory.tensor(start, (*outer, columns, rows), self.dtype).mT
        return memory.tensor(start, self.shape, self.dtype)

    @property
    def plain(self) -> bool:
        """Whether the file's bytes are those in memory."""
        return self.place is not None and self.stored == self.dtype and self.place.offset % self.dtype.itemsize == 0


@dataclass(frozen=True)
class Span:
    """Bytes to be read at once: where in which file, and at which byte of the unit's memory, a whole page, they go."""

    path: Path
    offset: int
    nbytes: int
    start: int


@dataclass(frozen=True)
class Layout:
    """Pieces, the byte of the unit's memory where each starts, the reads that bring them, and the memory's size."""

    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]
    spans: tuple[Span, ...]
    nbytes: int

    @property
    def computed(self) -> list[tuple[Piece, int]]:
        """The pieces that no read of spans brings, with their starts."""
        return [(piece, start) for piece, start in zip(self.pieces, self.starts, strict=True) if not piece.plain]

    @property
    def read_bytes(self) -> int:
        """What is read from files; what is transposed or unpacked counts as what it becomes."""
        computed = (piece.place.nbytes if piece.place else piece.nbytes for piece, _ in self.computed)
        return sum(span.nbytes for span in self.spans) + sum(computed)


def lay_out(pieces: Sequence[Piece]) -> Layout:
    """The layout of a unit. Reads are of whole pages, and of neighbours at once; what is between them comes along."""
    placed = sorted(
        (number for number, piece in enumerate(pieces) if piece.plain),
        key=lambda number: (str(pieces[number].place.path), pieces[number].place.offset),  # type: ignore[union-attr]
    )
    starts, spans, end = dict[int, int](), list[Span](), 0
    for number in placed:
        place = pieces[number].place
        assert place is not None
        first, last = place.offset // PAGE * PAGE, whole_pages(place.offset + place.nbytes)
        joined = spans[-1] if spans else None
        if joined is None or joined.path != place.path or first > joined.offset + joined.nbytes + GAP:
            spans.append(Span(place.path, first, last - first, end))
        else:
            nbytes = max(last - joined.offset, joined.nbytes)
            spans[-1] = Span(joined.path, joined.offset, nbytes, joined.start)
        starts[number] = spans[-1].start + place.offset - spans[-1].offset
        end = spans[-1].start + spans[-1].nbytes
    for number, piece in enumerate(pieces):
        if not piece.plain:
            starts[number], end = end, end + -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(pieces), tuple(starts[number] for number in range(len(pieces))), tuple(spans), whole_pages(end))
