"""Windows of one length made of shuffled documents, each knowing where documents begin in it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from causallm.training.packing import PACKINGS, Packing
from causallm.training.token_file import TokenFile

IGNORED = -100
"""The target of a position that the loss does not count, torch's ignore_index."""


@dataclass(frozen=True)
class Batch:
    """ids and targets of some windows; documents numbers the document of each token within its window."""

    ids: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]
    documents: Int[Tensor, "batch time"]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(self.ids.to(device), self.targets.to(device), self.documents.to(device))


class Windows:
    """All windows of a token file; number n is the same whoever asks, so that a position in the data is a number.

    A target is the next token of the same document; where documents leave room at a window's end nothing counts.
    `packing` names how documents become windows, `source` the data in the error for too few.
    """

    def __init__(
        self,
        data: TokenFile,
        length: int,
        seed: int,
        shuffle: bool = True,
        source: str = "the data",
        packing: str = "cut",
    ):
        self.data, self.length = data, length
        if data.tokens == 0:
            raise ValueError(f"{source}: the data is empty, expected text")
        if data.tokens <= length:
            raise ValueError(f"{source}: the data has {data.tokens} tokens, expected more than context_length {length}")
        self.packing: Packing = PACKINGS[packing](data.starts, length, seed, shuffle)
        self.per_epoch = self.packing.per_epoch

    def batch(self, numbers: range) -> Batch:
        """The windows of these numbers; numbers beyond an epoch go on in the next."""
        parts = [self._window(number) for number in numbers]
        ids, targets, documents = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
        return Batch(ids, targets, documents)

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, document = np.zeros((2, self.length + 1), dtype=np.int64)
        counted = np.zeros(self.length + 1, dtype=bool)
        end = 0
        pieces = self.packing.pieces(*divmod(number, self.per_epoch))
        for index, (first, last) in enumerate(pieces):
            begin, end = end, end + last - first
            ids[begin:end] = self.data.ids[first:last]
            counted[begin:end] = self.data.counts[first:last] != 0
            document[begin:end] = index
        document[end:] = len(pieces)
        counts = counted[1:] & (document[1:] == document[:-1])
        return ids[:-1], np.where(counts, ids[1:], IGNORED), document[:-1]
