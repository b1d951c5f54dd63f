"""How fast the disk that holds a model is read: what running it from there, larger than memory, is measured against."""

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import FileIO
from mmap import mmap
from pathlib import Path

from layers.pages import Pages

PIECE = 4 * 2**20
"""Bytes of one read: as large as reads of whole blocks of a model."""
EXPERT = 5 * 2**19
"""Bytes of one read the size of one expert, 2.5 MiB: Qwen3-30B-A3B in Q4_0. Of whole pages, as `PIECE` is."""
THREADS = 4
SMALLEST = 64 * 2**20
"""Bytes of a file that is worth measuring with, and of the temporary one where there is none."""
SUFFIXES = (".safetensors", ".gguf", ".bin")
F_NOCACHE = 48
"""macOS, sys/fcntl.h."""


def disk_bandwidth(path: Path, seconds: float = 0.5, piece: int = PIECE) -> float:
    """Bytes a second that come from the disk at `path`: a file, or a folder, of which the largest weights are read.

    Four threads read pieces of `piece` bytes, a multiple of 4096, at random places of the file, none twice, for
    `seconds` or until all are read. The system's page cache is left out (O_DIRECT on Linux, F_NOCACHE on macOS);
    where that cannot be, the file is dropped from it first. Solid state disks give large pieces in any order at the
    same rate, turning ones give less than in order. A small file flatters, for the disk's own cache may hold it; so
    does the cache of a virtual machine's host, and a sparse file. Where no file has 64 MiB, a temporary one is
    written beside it and removed: those flatter the most. OSError where nothing can be read or written.
    """
    with large_file(path) as file:
        places = list(range(0, file.stat().st_size - piece + 1, piece))
        random.shuffle(places)
        return _read(file, places, seconds, piece)


def cached_bandwidth(path: Path) -> float:
    """Bytes a second of reading what the system's page cache holds of a file, or of a folder's largest weights."""
    with large_file(path) as file, FileIO(file) as source:
        buffer = bytearray(min(SMALLEST, file.stat().st_size))
        seconds = []
        for _ in range(3):
            source.seek(0)
            begin = time.perf_counter()
            source.readinto(buffer)
            seconds.append(time.perf_counter() - begin)
        return len(buffer) / min(seconds)


@contextmanager
def large_file(path: Path) -> Iterator[Path]:
    """A file to measure with at `path`, so that several figures share a temporary one; see `disk_bandwidth`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path} to measure its disk with")
    folder = path if path.is_dir() else path.parent
    candidates = [file for file in folder.iterdir() if file.suffix in SUFFIXES] if path.is_dir() else [path]
    sizes = {file: file.stat().st_size for file in candidates if file.is_file()}
    largest = max(sizes, key=lambda file: sizes[file], default=None)
    if largest is not None and sizes[largest] >= SMALLEST:
        yield largest
        return
    descriptor, name = tempfile.mkstemp(prefix=".bandwidth-", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            noise = os.urandom(PIECE)  # what a file system could not compress
            for _ in range(SMALLEST // PIECE):
                file.write(noise)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        os.unlink(name)


def _read(path: Path, places: list[int], seconds: float, piece: int) -> float:
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for _ in range(THREADS)]
        buffers = [Pages(piece).view(0, piece) for _ in files]  # as weights are read to: fewer pages, larger requests
        left, begin = iter(places), time.perf_counter()

        def read_until_the_end(file: FileIO, buffer: memoryview) -> int:
            done = 0
            for place in left:
                file.seek(place)
                done += file.readinto(buffer) or 0
                if time.perf_counter() - begin > seconds:
                    break
            return done

        with ThreadPoolExecutor(THREADS) as pool:
            done = sum(pool.map(read_until_the_end, files, buffers))
        return done / (time.perf_counter() - begin)


def _open(path: Path) -> FileIO:
    """The file, not through the page cache where the file system allows it."""
    if hasattr(os, "O_DIRECT"):
        file = None
        try:
            file = FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
            with mmap(-1, 4096) as buffer:
                file.readinto(buffer)
            file.seek(0)
            return file
        except OSError:  # some refuse to open, others to read
            if file is not None:
                file.close()
    file = FileIO(path)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(file.fileno(), F_NOCACHE, 1)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file
