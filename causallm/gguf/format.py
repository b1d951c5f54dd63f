"""The container: a header of typed keys and a list of tensors, then the tensors' bytes.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Every count and length is checked against the size of
the file before it is used, so that a damaged file is an error and never a large allocation.
"""

import math
import mmap
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causallm.gguf.tensor_types import TYPE_NAMES, row_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 32
MAX_DIMENSIONS = 4

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""The value types that are one number, with struct's letters."""
SMALLEST_FILE = 4 + 4 + 8 + 8
SMALLEST_KEY = 8 + 4 + 1
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape in torch's order (rows last but one), ggml's type, and the place of its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The checked content of a header; offsets of tensors count from the start of the file."""

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path`; FileNotFoundError or a ValueError that names the file and what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < SMALLEST_FILE or file.read(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read(path, _Cursor(content, path, len(MAGIC)))


def _read(path: Path, cursor: "_Cursor") -> GgufFile:
    version = cursor.number("I")
    if version not in VERSIONS:
        reason = (
            "big-endian files are not read" if version & 0xFFFF == 0 else f"expected {VERSIONS[0]} or {VERSIONS[1]}"
        )
        raise ValueError(f"{path}: GGUF version {version}: {reason}")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    cursor.expect(keys * SMALLEST_KEY + tensors * SMALLEST_TENSOR, f"{keys} keys and {tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{path}: key {key} appears twice")
        metadata[key] = cursor.value()
    listed = [_Listed(cursor.text(), *_dimensions(cursor)) for _ in range(tensors)]
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"{path}: {ALIGNMENT_KEY} is {alignment!r}, expected a power of two from 8 on")
    start = -(-cursor.position // alignment) * alignment
    infos = [_placed(path, cursor.size, start, alignment, one) for one in listed]
    if len({info.name for info in infos}) != len(infos):
        raise ValueError(f"{path}: two tensors have the same name")
    return GgufFile(path, cursor.size, metadata, {info.name: info for info in infos})


@dataclass(frozen=True)
class _Listed:
    """A tensor as the header lists it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _dimensions(cursor: "_Cursor") -> tuple[tuple[int, ...], int, int]:
    """Shape, type and offset; ggml counts dimensions from the one that lies together."""
    count = cursor.number("I")
    if not 1 <= count <= MAX_DIMENSIONS:
        raise cursor.damaged(f"a tensor with {count} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(count))
    return shape[::-1], cursor.number("I"), cursor.number("Q")


def _placed(path: Path, size: int, start: int, alignment: int, listed: _Listed) -> TensorInfo:
    kind = TYPE_NAMES.get(listed.kind, f"number {listed.kind}")
    try:
        nbytes = math.prod(listed.shape[:-1]) * row_bytes(kind, listed.shape[-1])
    except ValueError as error:
        raise ValueError(f"{path}: tensor {listed.name}: {error}") from None
    begin = start + listed.offset
    if not nbytes or listed.offset % alignment or begin + nbytes > size:
        raise ValueError(
            f"{path}: truncated or damaged: tensor {listed.name} {list(listed.shape)} of type {kind} would be the "
            f"{nbytes} bytes from {begin} on, the file has {size}"
        )
    return TensorInfo(listed.name, listed.shape, kind, begin, nbytes)


class _Cursor:
    """Reads values one after the other; ValueError where the file ends before the value does."""

    def __init__(self, content: mmap.mmap, path: Path, position: int):
        self._content, self._path = content, path
        self.size, self.position = len(content), position

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: truncated or damaged: its header has {what} at byte {self.position}")

    def expect(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.position:
            raise self.damaged(f"{what}, which do not fit in its {self.size} bytes,")

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.size - self.position:
            self.expect(nbytes, f"{nbytes} bytes of something")
        self.position += nbytes
        return self._content[self.position - nbytes : self.position]

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))
        return _shortest(value) if letter == "f" else value

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("text that is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"a value of type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            self.expect(count * 8, f"{count} texts")
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise self.damaged(f"an array of type {kind}")
        return self._numbers(SCALARS[kind], count)

    def _numbers(self, letter: str, count: int) -> list[Any]:
        self.expect(count * struct.calcsize("<" + letter), f"{count} numbers")
        values = struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize("<" + letter)))
        return list(values)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-6 rather than 9.99999997e-07."""
    short = float(f"{value:.7g}")
    return short if array("f", [short])[0] == value else value
