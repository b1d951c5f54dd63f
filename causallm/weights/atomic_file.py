"""Writing a file so that its name never stands for half of it."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` when the block ends well, replacing what was there; else nothing stays.

    Until then it has a hidden name in the same folder. OSError in one line where `path` cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, name a file in it")
    temporary = temporary_beside(path)
    try:
        file = temporary.open("wb")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.strerror is None:
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: Path) -> Path:
    """The hidden name in the same folder under which this process writes `path`; it holds nothing yet.

    What earlier processes that were killed left for `path` is removed. A name says which computer and process writes,
    so that only what nobody can be writing any more is removed: of this computer, by a process that is gone.
    """
    computer = re.sub(r"\W", "-", platform.node())[:32]
    names = re.compile(rf"\.{re.escape(path.name)}\.{computer}\.([0-9]+)\.tmp")
    with suppress(OSError):
        for left in list(path.parent.iterdir()):
            writer = names.fullmatch(left.name)
            if writer and (int(writer[1]) == os.getpid() or not psutil.pid_exists(int(writer[1]))):
                _remove(left)
    return path.with_name(f".{path.name}.{computer}.{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
