"""What every reader of weights offers, whatever the file: iteration, and random access by our names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Index = tuple[int | slice, ...]
"""A part of a tensor, as in `tensor[index]`."""
Fetch = Callable[[Path, int, Sequence[int], torch.dtype], Tensor]
"""Gives the contiguous tensor, of that shape and dtype, that starts at a byte of a file."""
PART_BYTES = 2**19
"""About the size of what is read and computed at once."""
BLOCK_BYTES = 2**16
"""Of what is computed at once where what is made on the way has many times its bytes."""


def rows_in_parts(rows: int, row_bytes: int, multiple: int = 1, nbytes: int | None = None) -> list[slice]:
    """Slices of about `nbytes`, else `PART_BYTES`, that are all rows; each but the last has a multiple of so many."""
    step = max((nbytes or PART_BYTES) // max(row_bytes * multiple, 1), 1) * multiple
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


@dataclass(frozen=True)
class FileRange:
    """Some bytes of a file, a tensor's values in order, or in that of the transposed tensor."""

    path: Path
    offset: int
    nbytes: int
    transposed: bool = False

    def slice_of(self, number: int, count: int) -> "FileRange":
        """One of `count` parts of equal size."""
        nbytes = self.nbytes // count
        return FileRange(self.path, self.offset + number * nbytes, nbytes, self.transposed)


class WeightReader(ABC):
    """Tensors of a checkpoint by our names (`causallm.weights.names`), read when asked for."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All names, in the file's order."""

    @abstractmethod
    def meta(self, name: str) -> Tensor:
        """Shape and dtype of a tensor, on the meta device: nothing is read."""

    def formats(self) -> Mapping[str, str]:
        """Which tensors are packed in a block format, and in which; their bytes are uint8 (rows, row_bytes)."""
        return {}

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from the file where the file holds it as it is."""

    def release(self, name: str) -> None:  # noqa: B027  most readers have nothing to give back
        """Give back what memory reading a tensor took; the tensor must not be used after. Readers that map do so."""

    def place(self, name: str) -> FileRange | None:
        """Where a file holds the tensor's values as they are; None where they must be computed."""
        return None

    @abstractmethod
    def paths(self) -> Sequence[Path]:
        """The files that tensors are read from, open from the start: they may be removed or replaced."""

    @abstractmethod
    def fetch_with(self, fetch: Fetch) -> None:
        """From now on `part` has what it needs of the files for a part of `parts`, or for rows, from `fetch`; else from
        a mapping, and that of a file which has become shorter must not be touched."""

    def part(self, name: str, index: Index) -> Tensor:
        """`tensor(name)[index]`; a reader that must compute a tensor computes no more than the part."""
        return self.tensor(name)[index] if index else self.tensor(name)

    def parts(self, name: str, index: Index = ()) -> Sequence[Index]:
        """Parts that `part(name, index)` consists of, where computing them one by one needs less memory."""
        return [index]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.tensor(name)

    def __len__(self) -> int:
        return len(self.names())
