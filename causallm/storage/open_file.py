"""A file open for reading at any place, past the system's cache of files or through it, and watched for changes."""

import errno
import os
import threading
import weakref
from pathlib import Path

from layers.pages import PAGE, Pages


class OpenFile:
    """One file open for reading at any place by several threads."""

    def __init__(self, path: Path, direct: bool):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        self.path, self.direct = path, direct and hasattr(os, "O_DIRECT") and _reads_direct(path)
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (os.O_DIRECT if self.direct else 0)
        self._descriptor = os.open(path, flags)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        if direct and not self.direct:
            _bypass_cache(self._descriptor)
        self._lock = threading.Lock()
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target`; what lies beyond the file's end stays as it is."""
        wanted, done = min(len(target), self._state[0] - offset), 0
        while done < wanted:
            try:
                count = self._read_some(offset + done, target[done:])
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or errno.EIO), str(self.path)) from None
            if not count:
                break
            done += count
        if done < wanted:
            raise self._changed()
        self.check()

    def check(self) -> None:
        """OSError where the file was changed."""
        if self._now() != self._state:
            raise self._changed()

    def _changed(self) -> OSError:
        what = "the file was changed while the model ran from it; load it again"
        return OSError(errno.EIO, what, str(self.path))

    def _read_some(self, offset: int, target: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            content = os.read(self._descriptor, len(target))
        target[: len(content)] = content
        return len(content)


def _reads_direct(path: Path) -> bool:
    """Whether the file system gives a page past its cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.preadv(descriptor, [Pages(PAGE).view(0, PAGE)], 0)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _bypass_cache(descriptor: int) -> None:
    """macOS's way: what is read does not stay in the system's cache."""
    try:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined,unused-ignore]
    except (ImportError, AttributeError, OSError):
        return
