"""A file in memory without reading it: tensors are views of the mapping, pages come in when they are touched."""

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Private pages count as memory that might be written, so that the kernel refuses to map a file larger than RAM;
# this flag says that they need no reserve. mmap names it from Python 3.13 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """Copy-on-write mapping of `path`: a tensor may be written to, which never changes the file.

    The mapping lives as long as a tensor that views it. FileNotFoundError names a missing file.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        self.path, self.size = path, path.stat().st_size
        with path.open("rb") as file:
            # An empty file cannot be mapped; it has no tensors either.
            self._bytes = _in_large_pages(mmap.mmap(file.fileno(), 0, **_private())) if self.size else bytearray()

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The contiguous tensor that starts at byte `offset`; a copy only where the offset is not aligned."""
        count = math.prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset % dtype.itemsize == 0:
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset)
        else:
            nbytes = count * dtype.itemsize
            flat = torch.frombuffer(self._bytes, dtype=torch.uint8, count=nbytes, offset=offset).clone().view(dtype)
        return flat.view(tuple(shape))

    def release(self, offset: int, nbytes: int) -> None:
        """Give back the memory of whole pages in this range; nobody may use a tensor in it any more."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and isinstance(self._bytes, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED, start, length)


def _in_large_pages(mapping: mmap.mmap) -> mmap.mmap:
    """Have a touched page brought in with the 2 MB around it, where Linux's file system can (ext4 from 6.16 on): a file
    that is not in the system's cache comes in three times as fast."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # A kernel without huge pages.
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _private() -> dict[str, Any]:
    if sys.platform == "win32":
        return {"access": mmap.ACCESS_COPY}
    return {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
