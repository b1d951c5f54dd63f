"""Pieces whose bytes in memory are not those in the file: cast, or computed by the reader."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from causallm.storage.disk import PIECE_BYTES, Disk
from causallm.storage.layout import Piece
from causallm.storage.pages import PAGE, Pages, whole_pages
from causallm.weights.reader import FileRange, WeightReader


class Computing:
    """Makes such pieces from what `disk` or `reader` reads; memory for what is read is kept for the next one."""

    def __init__(self, reader: WeightReader, disk: Disk):
        self._reader, self._disk, self._scratch = reader, disk, threading.local()

    def work(self, piece: Piece, target: Tensor) -> Callable[[], None]:
        """What fills `target`, to be done in the background."""
        return lambda: self.fill(piece, target)

    @torch.inference_mode()
    def fill(self, piece: Piece, target: Tensor) -> None:
        """Give `target`, the piece's view of memory, its values."""
        if piece.place is not None:
            self._cast(piece, piece.place, (target.mT if piece.transposed else target).view(-1))
            return
        index = () if piece.expert is None else (piece.expert,)
        self._disk.check()
        target.copy_(self._reader.part(piece.name, index))
        self._reader.release(piece.name)
        self._disk.check()

    def _cast(self, piece: Piece, place: FileRange, target: Tensor) -> None:
        """Both in the order of the file; a part at a time, so that little memory is needed."""
        itemsize = piece.stored.itemsize
        held: Pages | None = getattr(self._scratch, "pages", None)
        if held is None:
            held = self._scratch.pages = Pages(PIECE_BYTES + 2 * PAGE)
        for begin in range(0, len(target), PIECE_BYTES // itemsize):
            part = target[begin : begin + PIECE_BYTES // itemsize]
            offset = place.offset + begin * itemsize
            first = offset // PAGE * PAGE
            self._disk.read_now(place.path, first, held.view(0, whole_pages(offset - first + len(part) * itemsize)))
            stored = held.tensor(offset - first, (len(part) * itemsize,), torch.uint8)
            part.copy_((stored.clone() if offset % itemsize else stored).view(piece.stored))
