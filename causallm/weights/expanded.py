"""Packed weights as floats, for files that hold no others."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from causallm.packing import unpack_weight
from causallm.weights.reader import Fetch, WeightReader
from layers.kernels.block_formats import BLOCK_FORMATS


class ExpandedReader(WeightReader):
    """Another reader, with each packed tensor expanded to `dtype` when it is read."""

    def __init__(self, inner: WeightReader, dtype: torch.dtype):
        self.inner, self.dtype, self._formats = inner, dtype, dict(inner.formats())

    def names(self) -> Sequence[str]:
        return self.inner.names()

    def meta(self, name: str) -> Tensor:
        meta = self.inner.meta(name)
        if name not in self._formats:
            return meta
        *experts, rows, row_bytes = meta.shape
        columns = BLOCK_FORMATS[self._formats[name]].row_values(row_bytes)
        shape = (*experts, columns, rows) if experts else (rows, columns)
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        tensor = self.inner.tensor(name)
        return unpack_weight(tensor, self._formats[name]).to(self.dtype) if name in self._formats else tensor

    def paths(self) -> Sequence[Path]:
        return self.inner.paths()

    def fetch_with(self, fetch: Fetch) -> None:
        self.inner.fetch_with(fetch)

    def release(self, name: str) -> None:
        self.inner.release(name)
