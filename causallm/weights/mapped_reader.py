"""What readers of files have in common: tensors mapped from them, and parts of tensors, mapped or read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causallm.weights.mapped_file import MappedFile
from causallm.weights.reader import Fetch, Index, WeightReader


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it; `stored[index]` fetches of the first dimensions that are cut no more than needed."""

    fetch: Fetch
    path: Path
    offset: int
    shape: Sequence[int]
    dtype: torch.dtype

    def __getitem__(self, index: Index) -> Tensor:
        offset, shape, rest = self.offset, tuple(self.shape), list(index)
        while rest and isinstance(number := rest[0], int):
            offset += range(shape[0])[number] * math.prod(shape[1:]) * self.dtype.itemsize
            shape, rest = shape[1:], rest[1:]
        if rest and isinstance(cut := rest[0], slice):
            rows = range(shape[0])[cut]
            first, last = (rows[0], rows[-1] + 1) if rows else (0, 0)
            offset += first * math.prod(shape[1:]) * self.dtype.itemsize
            shape, rest = (last - first, *shape[1:]), [slice(None, None, rows.step), *rest[1:]]
        return self.fetch(self.path, offset, shape, self.dtype)[tuple(rest)]


class MappedReader(WeightReader):
    """Maps files at once: one that is removed or replaced later is read on as it was."""

    def __init__(self, paths: Iterable[Path]):
        self._mapped = {path: MappedFile(path) for path in paths}
        self._fetch: Fetch = self._map

    def paths(self) -> Sequence[Path]:
        return list(self._mapped)

    def fetch_with(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def _map(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._mapped[path].tensor(offset, shape, dtype)
