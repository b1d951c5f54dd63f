"""Safetensors files, one or shards with an index: tensors mapped from the file, not copied.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header with dtype, shape
and byte range of each tensor, then the bytes.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causallm.config import read_json
from causallm.weights.mapped_reader import MappedReader, StoredTensor
from causallm.weights.names import is_computed, module_name
from causallm.weights.reader import Fetch, FileRange, Index
from layers.kernels.block_formats import BLOCK_FORMATS

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FORMATS_KEY = "formats"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""


@dataclass(frozen=True)
class Header:
    """A file's header: entries by name, free text, and where the bytes start."""

    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int


class SafetensorsReader(MappedReader):
    """The tensors of several files; `prefix` is put before each name of a file.

    The whole of every header is checked before anything is read; FileNotFoundError and ValueError name the file.
    """

    def __init__(self, files: Mapping[Path, str]):
        self.files = dict(files)
        self._headers = {path: read_header(path) for path in self.files}
        super().__init__(self.files)
        self._places: dict[str, tuple[Path, Mapping[str, Any]]] = {}
        for path, prefix in self.files.items():
            for name, entry in self._headers[path].tensors.items():
                ours = module_name(prefix + name)
                if is_computed(ours):
                    continue
                if ours in self._places:
                    raise ValueError(f"tensor {name} appears twice: in {self._places[ours][0]} and in {path}")
                self._places[ours] = path, entry

    @classmethod
    def from_folder(cls, folder: Path, extra: Mapping[Path, str] | None = None) -> "SafetensorsReader":
        """The weights of a Hugging Face folder, and `extra` files; FileNotFoundError names what is missing."""
        index = folder / INDEX
        if index.is_file():
            return _indexed(index, extra or {})
        if not (folder / SINGLE).is_file():
            raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
        return cls({folder / SINGLE: "", **(extra or {})})

    def metadata(self) -> Mapping[str, str]:
        """The free-text header of the first file."""
        return self._headers[next(iter(self.files))].metadata

    def formats(self) -> Mapping[str, str]:
        """The first file's header names them as JSON under `FORMATS_KEY`; ValueError where that is damaged."""
        path = next(iter(self.files))
        try:
            formats = json.loads(self.metadata().get(FORMATS_KEY, "{}"))
            unknown = [kind for name, kind in formats.items() if kind not in BLOCK_FORMATS or name not in self._places]
        except (json.JSONDecodeError, AttributeError, TypeError):
            raise ValueError(f"{path}: the header's {FORMATS_KEY} cannot be read") from None
        if unknown:
            raise ValueError(
                f"{path}: the header's {FORMATS_KEY} has '{unknown[0]}', expected tensors in {', '.join(BLOCK_FORMATS)}"
            )
        return formats

    def names(self) -> Sequence[str]:
        return list(self._places)

    def meta(self, name: str) -> Tensor:
        entry = self._places[name][1]
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")

    def tensor(self, name: str) -> Tensor:
        return self._stored(name, self._map)[()]

    def part(self, name: str, index: Index) -> Tensor:
        return self._stored(name, self._fetch)[index]

    def _stored(self, name: str, fetch: Fetch) -> StoredTensor:
        path, entry = self._places[name]
        start = self._headers[path].start + entry["data_offsets"][0]
        return StoredTensor(fetch, path, start, entry["shape"], DTYPES[entry["dtype"]])

    def place(self, name: str) -> FileRange:
        path, entry = self._places[name]
        begin, end = entry["data_offsets"]
        return FileRange(path, self._headers[path].start + begin, end - begin)

    def release(self, name: str) -> None:
        where = self.place(name)
        self._mapped[where.path].release(where.offset, where.nbytes)


def _indexed(index: Path, extra: Mapping[Path, str]) -> SafetensorsReader:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: weight_map is missing or empty")
    if outside := [shard for shard in shards.values() if Path(str(shard)).name != shard]:
        raise ValueError(f"{index}: weight_map names '{outside[0]}', expected a file beside the index")
    reader = SafetensorsReader({**{index.parent / shard: "" for shard in sorted(set(shards.values()))}, **extra})
    for name, shard in shards.items():
        if name not in reader._headers[index.parent / shard].tensors:
            raise ValueError(f"{index}: tensor {name} should be in {shard}, but is not")
    return reader


def read_header(path: Path) -> Header:
    """The checked header; ValueError when the file is shorter or longer than it says, or is none at all."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    actual = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else actual
        if size + 8 > actual:
            raise ValueError(f"{path}: not a safetensors file, or cut off in its header ({actual} bytes)")
        text = file.read(size)
    try:
        tensors = json.loads(text)
        metadata = tensors.pop("__metadata__", None) or {}
        ends = [_end(path, name, entry) for name, entry in tensors.items()]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a safetensors file: its header cannot be read") from None
    expected = 8 + size + max(ends, default=0)
    if actual != expected:
        raise ValueError(f"{path}: truncated or damaged: {actual} bytes, its header says {expected}")
    return Header(tensors, metadata, 8 + size)


def _end(path: Path, name: str, entry: Mapping[str, Any]) -> int:
    """Where a tensor's bytes end; ValueError where its shape and dtype do not fill them."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}, known are {', '.join(DTYPES)}")
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or not all(isinstance(number, int) for number in (*offsets, *entry["shape"])):
        raise TypeError(f"tensor {name} has no two offsets or no whole numbers")
    begin, end = offsets
    needed = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    if begin < 0 or end - begin != needed:
        raise ValueError(f"{path}: tensor {name} has {end - begin} bytes, its shape and dtype need {needed}")
    return int(end)
