"""Writing a large file piece by piece, with a journal by which a later process goes on where this one was killed."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from causallm.weights.atomic_file import atomic_file

JOURNAL = "journal.jsonl"
SYNC_BYTES = 2**25
"""Bytes after which the pieces so far are made safe: a killed run loses no more work than this and one piece."""


@dataclass(frozen=True)
class Piece:
    """A part of the file: `write` appends exactly `nbytes` bytes."""

    name: str
    nbytes: int
    write: Callable[[BinaryIO], int]


class ResumableFile:
    """A file of `head` and `pieces` in an own `folder`, and the journal beside it.

    source: what the pieces are computed from; with the head, names and sizes it decides whether a file that an earlier
    run left is a beginning of this one (`continues`). `done` of its pieces are safe. The journal is a line of JSON
    that says whose beginning it is, and one for each time that the file was flushed to the disk: how many pieces are
    whole, and where the last ends.
    """

    def __init__(self, folder: Path, name: str, source: str, head: bytes, pieces: Sequence[Piece]):
        self.path, self.journal = folder / name, folder / JOURNAL
        self._head, self._pieces = head, pieces
        self._ends = list(accumulate((piece.nbytes for piece in pieces), initial=len(head)))
        layout = json.dumps([name, source, [(piece.name, piece.nbytes) for piece in pieces]])
        self._identity = hashlib.sha256(head + layout.encode()).hexdigest()
        left = self._whole_pieces()
        self.continues, self.done = left is not None, left or 0

    def _whole_pieces(self) -> int | None:
        """How many pieces an earlier run of the same left; None where journal or file are not as they must be."""
        # What stands after the last newline was being written when the process died.
        lines = [_parsed(line) for line in _text(self.journal).split("\n")[:-1]]
        if not lines or lines[0].get("identity") != self._identity or not self.path.is_file():
            return None
        done = 0
        for line in lines[1:]:
            pieces, end = line.get("pieces"), line.get("end")
            if not isinstance(pieces, int) or not done <= pieces < len(self._ends) or end != self._ends[pieces]:
                return None
            done = pieces
        return done if self.path.stat().st_size >= self._ends[done] or not done else None

    def write(self, advance: Callable[[Piece], None]) -> None:
        """Write what is missing; `advance` is called with every piece, those of an earlier run first.

        Whatever ends this early, the pieces that were whole are kept.
        """
        whole = self.done
        with atomic_file(self.journal) as log:
            log.write(_line(identity=self._identity, **_this_process()) + self._record(whole))
        with self.path.open("r+b" if whole else "wb") as file, self.journal.open("ab") as log:
            if whole:
                file.truncate(self._ends[whole])
                file.seek(self._ends[whole])
            else:
                file.write(self._head)
            try:
                for number, piece in enumerate(self._pieces, 1):
                    if number > whole:
                        piece.write(file)
                        assert file.tell() == self._ends[number], piece.name
                        whole = number
                    if self._ends[whole] - self._ends[self.done] >= SYNC_BYTES:
                        self._secure(file, log, whole)
                    advance(piece)
                self._secure(file, log, whole)
            except BaseException:
                with suppress(OSError):
                    self._secure(file, log, whole)
                raise

    def _secure(self, file: BinaryIO, log: BinaryIO, whole: int) -> None:
        """Flush the file to the disk, then say so."""
        file.flush()
        os.fsync(file.fileno())
        log.write(self._record(whole))
        log.flush()
        self.done = whole

    def _record(self, whole: int) -> bytes:
        return _line(pieces=whole, end=self._ends[whole])


def other_writer(folder: Path) -> int | None:
    """The process that is writing a resumable file in `folder` right now, unless it is this one."""
    first = _parsed(_text(folder / JOURNAL).split("\n")[0])
    with suppress(psutil.Error, TypeError, ValueError, OverflowError):
        pid = first.get("process", os.getpid())
        if pid != os.getpid() and psutil.Process(pid).create_time() == first.get("since"):
            return int(pid)
    return None


def _this_process() -> dict[str, Any]:
    return {"process": os.getpid(), "since": psutil.Process().create_time()}


def _line(**content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parsed(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
