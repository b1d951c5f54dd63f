"""Reading ranges of files into memory in the background, by a few threads, urgent ones first."""

import ctypes
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from causallm.storage.background import AHEAD, Background, Ticket, Work
from causallm.storage.layout import Span
from causallm.storage.open_file import OpenFile
from layers.pages import PAGE, Pages, whole_pages

THREADS = 4
PIECE_BYTES = 2**22
"""Bytes of one read, so that several threads work on one unit."""


class DiskCounts:
    """Bytes read, and the seconds in which at least one read was under way, since the start."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seconds, self._under_way, self._since = 0.0, 0, 0.0
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Until now."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._under_way else 0.0)

    def begin(self) -> None:
        """A read starts."""
        with self._lock:
            if not self._under_way:
                self._since = time.perf_counter()
            self._under_way += 1

    def end(self, nbytes: int) -> None:
        """A read has ended."""
        with self._lock:
            self._under_way -= 1
            self.nbytes += nbytes
            if not self._under_way:
                self._seconds += time.perf_counter() - self._since


class Disk:
    """Reads of the given files. direct: past the system's cache of files, where the file system can do that.

    Files are opened at once and stay open: one that is removed or replaced by another goes on being read as it was.
    One that is changed in place is an OSError that names it, and so is a read that fails or comes short.
    FileNotFoundError names a missing file.
    """

    def __init__(self, paths: Sequence[Path], direct: bool, threads: int = THREADS):
        self.counts = DiskCounts()
        self._files = {path: OpenFile(path, direct) for path in dict.fromkeys(paths)}
        self._background = Background(threads)
        # Also when the program ends: torch aborts in a thread that goes on after it.
        self._end = weakref.finalize(self, self._background.end)

    @property
    def direct(self) -> bool:
        """Whether all files are read past the system's cache."""
        return all(file.direct for file in self._files.values())

    def close(self) -> None:
        """End the threads when what was asked for is read, and close the files; nothing can be asked for after."""
        self.settle()
        self._end()
        for file in self._files.values():
            file.close()

    def read(
        self,
        spans: Sequence[Span],
        memory: Pages,
        offset: int = 0,
        priority: int = AHEAD,
        computing: Sequence[Work] = (),
    ) -> Ticket:
        """Start to read spans into `memory` from `offset`, a whole page, on, and do other work in the background."""
        pieces = [
            Span(span.path, span.offset + begin, min(PIECE_BYTES, span.nbytes - begin), span.start + begin)
            for span in spans
            for begin in range(0, span.nbytes, PIECE_BYTES)
        ]
        reads = [self._reading(piece, memory.view(offset + piece.start, piece.nbytes)) for piece in pieces]
        return self._ask([*reads, *computing], priority)

    def read_exactly(
        self,
        places: Sequence[tuple[Path, int, int]],
        memory: Pages,
        starts: Sequence[int],
        priority: int,
        computing: Sequence[Work] = (),
    ) -> Ticket:
        """Start to read bytes (file, offset, count) to exactly these places in `memory`, and do other work.

        A direct read needs whole pages: there must be room for the rest of the page where a place starts and of the
        two where it ends.
        """
        reads = [
            self._reading_exactly(path, place, nbytes, memory, start)
            for (path, place, nbytes), start in zip(places, starts, strict=True)
        ]
        return self._ask([*computing, *reads], priority)

    def settle(self) -> None:
        """Wait until all that was asked for has ended."""
        self._background.settle()

    def check(self) -> None:
        """OSError where a file was changed: what is mapped from one that became shorter must not be touched."""
        for file in self._files.values():
            file.check()

    def read_now(self, path: Path, offset: int, target: memoryview) -> None:
        """Read in the calling thread; place, size and target are whole pages."""
        self._check_open()
        self._read(self._files[path], offset, target)

    def _ask(self, works: Sequence[Work], priority: int) -> Ticket:
        self._check_open()
        return self._background.ask(works, priority)

    def _check_open(self) -> None:
        if not self._end.alive:
            raise RuntimeError("the model's files are closed, so that it cannot run any more: load it again")

    def _reading(self, span: Span, target: memoryview) -> Work:
        return lambda: self._read(self._files[span.path], span.offset, target)

    def _reading_exactly(self, path: Path, place: int, nbytes: int, memory: Pages, start: int) -> Work:
        def work() -> None:
            file = self._files[path]
            if not file.direct:
                self._read(file, place, memory.view(start, nbytes))
                return
            before, first = place % PAGE, start // PAGE * PAGE
            target = memory.view(first, whole_pages(before + nbytes))
            self._read(file, place - before, target)
            if first + before != start:
                base = ctypes.addressof(ctypes.c_char.from_buffer(target))
                ctypes.memmove(base + start - first, base + before, nbytes)

        return work

    def _read(self, file: "OpenFile", offset: int, target: memoryview) -> None:
        self.counts.begin()
        try:
            file.read(offset, target)
        finally:
            self.counts.end(len(target))
