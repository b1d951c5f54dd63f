"""Pieces whose bytes in memory are not those in the file: cast, or computed by the reader."""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from causallm.storage.disk import PIECE_BYTES, THREADS, Disk
from causallm.storage.layout import Piece
from causallm.weights.reader import BLOCK_BYTES, PART_BYTES, FileRange, WeightReader
from layers.pages import PAGE, Pages, whole_pages

PART_SHARE, BLOCK_SHARE = 4, 32
"""Bytes that a thread needs for each of a part, and of a block of it (measured: 27, of MXFP4)."""
CAST_BYTES = PIECE_BYTES + 2 * PAGE


def scratch_bytes(pieces: Iterable[Piece]) -> int:
    """What all threads together need to make these pieces, beside the memory of the pieces."""
    computed = read = 0
    for piece in pieces:
        if piece.place is None:
            part = min(piece.nbytes, PART_BYTES)
            computed = max(computed, PART_SHARE * part + BLOCK_SHARE * min(part, BLOCK_BYTES))
            read = max(read, part + 2 * PAGE)
        elif not piece.plain:
            read = max(read, min(piece.place.nbytes + 2 * PAGE, CAST_BYTES))
    return THREADS * (computed + read)


class Computing:
    """Makes such pieces from what `disk` or `reader` reads."""

    def __init__(self, reader: WeightReader, disk: Disk):
        self._reader, self._reads = reader, Reads(disk)
        reader.fetch_with(self._reads.fetch)

    def work(self, piece: Piece, target: Tensor) -> Callable[[], None]:
        """What fills `target`, to be done in the background."""
        return lambda: self.fill(piece, target)

    @torch.inference_mode()
    def fill(self, piece: Piece, target: Tensor) -> None:
        """Give `target`, the piece's view of memory, its values."""
        if piece.place is not None:
            self._cast(piece, piece.place, (target.mT if piece.transposed else target).view(-1))
            return
        index, whole = ((), target) if piece.expert is None else ((piece.expert,), target[0])
        for part in self._reader.parts(piece.name, index):
            whole[part[len(index) :]].copy_(self._reader.part(piece.name, part))

    def _cast(self, piece: Piece, place: FileRange, target: Tensor) -> None:
        """Both in the order of the file; a part at a time, so that little memory is needed."""
        itemsize = piece.stored.itemsize
        for begin in range(0, len(target), PIECE_BYTES // itemsize):
            part = target[begin : begin + PIECE_BYTES // itemsize]
            offset = place.offset + begin * itemsize
            stored = self._reads.read(place.path, offset, len(part) * itemsize)
            part.copy_((stored.clone() if offset % itemsize else stored).view(piece.stored))


class Reads:
    """Reads at any byte of a file; OSError where it was changed. Each thread has memory for them, used again."""

    def __init__(self, disk: Disk):
        self._disk, self._kept = disk, threading.local()

    def read(self, path: Path, offset: int, nbytes: int) -> UInt8[Tensor, "nbytes"]:
        """Up to `PIECE_BYTES`, until the same thread reads again."""
        held: Pages | None = getattr(self._kept, "pages", None)
        if held is None:
            held = self._kept.pages = Pages(CAST_BYTES)
        first = offset // PAGE * PAGE
        self._disk.read_now(path, first, held.view(0, whole_pages(offset - first + nbytes)))
        return held.tensor(offset - first, (nbytes,), torch.uint8)

    def fetch(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `causallm.weights.reader.Fetch`."""
        fetched = torch.empty(tuple(shape), dtype=dtype)
        whole = fetched.view(-1).view(torch.uint8)
        for begin in range(0, len(whole), PIECE_BYTES):
            part = whole[begin : begin + PIECE_BYTES]
            part.copy_(self.read(path, offset + begin, len(part)))
        return fetched
