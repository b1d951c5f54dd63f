"""Memory of the process's own, taken from the system in whole pages: huge ones, where it has them."""

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

PAGE = 4096
"""What a direct read's place in the file, its place in memory and its size are multiples of."""
HUGE_PAGE = 2**21
SLAB = 32 * HUGE_PAGE
LINE = 64
"""Of the processor's caches."""
# What mmap shares by default, for processes that fork, does not come in huge pages.
PRIVATE: dict[str, Any] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def whole_pages(nbytes: int) -> int:
    """The bytes of as many pages as hold so many."""
    return -(-nbytes // PAGE) * PAGE


class Pages:
    """`nbytes` bytes that start on a page; they take memory when they are first written to.

    Where the system has huge pages they are asked for: with them the processor translates fewer addresses, and a sum
    over weights runs a tenth faster. MemoryError where there is no such memory.
    """

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        huge = nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
        try:
            self._bytes = mmap.mmap(-1, max(nbytes, 1) + (HUGE_PAGE if huge else 0), **PRIVATE)
        except OSError:
            raise MemoryError(f"no memory for {nbytes} bytes") from None
        address = torch.frombuffer(self._bytes, dtype=torch.uint8).data_ptr()
        self._start = -address % HUGE_PAGE if huge else 0
        if huge:
            with suppress(OSError):  # A kernel without huge pages.
                # Whole ones: what is left over takes no more of another than it needs.
                self._bytes.madvise(mmap.MADV_HUGEPAGE, self._start, nbytes // HUGE_PAGE * HUGE_PAGE)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes to be written to."""
        begin = self._start + offset
        return memoryview(self._bytes)[begin : begin + nbytes]

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The contiguous tensor at byte `offset`, a multiple of the dtype's size; it keeps the memory alive."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=self._start + offset)
        return flat.view(tuple(shape))


def empty_pair(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two uninitialised tensors; on the CPU, where they fill a huge page, one after the other in huge pages.

    What will not be written to should not be asked for: of a huge page all is in memory once any of it is.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    nbytes += -nbytes % LINE
    huge = 2 * nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE") and not torch.compiler.is_compiling()
    if torch.device(device).type != "cpu" or not huge:
        return torch.empty(*shape, dtype=dtype, device=device), torch.empty(*shape, dtype=dtype, device=device)
    pages = Pages(2 * nbytes)
    return pages.tensor(0, shape, dtype), pages.tensor(nbytes, shape, dtype)


class Slabs:
    """Tensors one after the other in large pieces of memory, so that small ones share huge pages; none is given back
    before all tensors of its piece are gone."""

    def __init__(self) -> None:
        self._pages, self._end = Pages(0), 0

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy as `dtype` in the CPU's memory, its dimensions in the order that `Tensor.to` lays them out in."""
        nbytes = tensor.numel() * dtype.itemsize
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor.to("cpu", dtype, copy=True)
        if self._end + nbytes > self._pages.nbytes:
            self._pages, self._end = Pages(max(nbytes, SLAB)), 0
        strides = torch.empty_like(tensor, dtype=dtype, device="meta").stride()
        flat = self._pages.tensor(self._end, (tensor.numel(),), dtype)
        self._end += nbytes + -nbytes % LINE
        return flat.as_strided(tensor.shape, strides).copy_(tensor)
