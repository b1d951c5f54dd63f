"""Which pieces of documents make a window: cut wherever a window ends, or whole wherever they fit in one."""

from bisect import bisect_left, insort
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

Piece = tuple[int, int]
"""The first token in the file, and the one after the last."""


class Packing(Protocol):
    """Windows of one length out of a file of documents; number n of an epoch is the same whoever asks."""

    per_epoch: int

    def pieces(self, epoch: int, place: int) -> list[Piece]:
        """What window `place` of the epoch is made of: at most length + 1 tokens, as targets lie one further."""
        ...


class CutPacking:
    """Documents end to end, in an order of each epoch's own, cut into windows: no token is lost, beginnings are."""

    def __init__(self, starts: np.ndarray, length: int, seed: int, shuffle: bool):
        self.starts, self.length, self.seed, self.shuffle = starts, length, seed, shuffle
        self.per_epoch = (int(starts[-1]) - 1) // length
        self._layout = lru_cache(2)(self._make_layout)

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents, and where each begins in the row of all."""
        count = len(self.starts) - 1
        order = np.random.default_rng((self.seed, epoch)).permutation(count) if self.shuffle else np.arange(count)
        lengths = np.diff(self.starts)[order]
        return order, np.concatenate(([0], np.cumsum(lengths)))

    def pieces(self, epoch: int, place: int) -> list[Piece]:
        """The documents, or parts of them, between the window's ends in the row of all."""
        order, begins = self._layout(epoch)
        start, end = place * self.length, (place + 1) * self.length + 1
        first, last = np.searchsorted(begins, [start, end - 1], side="right") - 1
        found = []
        for index in range(first, last + 1):
            origin = self.starts[order[index]] - begins[index]
            found.append((int(origin + max(start, begins[index])), int(origin + min(end, begins[index + 1]))))
        return found


class WholePacking:
    """Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): no document that fits in a window is cut.

    A longer one is cut into windows and a rest. Which lengths lie together is the same in each epoch, so that it has as
    many windows; which documents of these lengths do, and the order of the windows, differ.
    """

    def __init__(self, starts: np.ndarray, length: int, seed: int, shuffle: bool):
        self.seed, self.shuffle = seed, shuffle
        # A part goes on at the target of the one before, so that no target is lost; one token has none.
        parts = [
            (first, min(first + length + 1, end))
            for start, end in pairwise(starts.tolist())
            for first in range(start, max(start + 1, end - 1), length)
        ]
        self._parts = np.array(parts, dtype=np.int64).reshape(-1, 2)
        self._lengths = self._parts[:, 1] - self._parts[:, 0]
        self._bins = best_fit(sorted(self._lengths.tolist(), reverse=True), length + 1)
        self.per_epoch = len(self._bins)
        self._layout = lru_cache(2)(self._make_layout)

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the windows, and the part in each place of the row sorted by length."""
        draw = np.random.default_rng((self.seed, epoch))
        count = len(self._lengths)
        ties = draw.permutation(count) if self.shuffle else np.arange(count)
        order = draw.permutation(self.per_epoch) if self.shuffle else np.arange(self.per_epoch)
        return order, np.lexsort((ties, -self._lengths))

    def pieces(self, epoch: int, place: int) -> list[Piece]:
        """Documents, or parts of those that are longer than a window."""
        order, parts = self._layout(epoch)
        chosen = self._parts[parts[self._bins[order[place]]]]
        return [(int(first), int(end)) for first, end in chosen]


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """The indices of the lengths (longest first, none over size) that lie together, each where it leaves least room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append(index)
        insort(rooms, (room - length, chosen))
    return bins


PACKINGS: dict[str, type[CutPacking] | type[WholePacking]] = {"cut": CutPacking, "whole": WholePacking}
"""By the name that data.packing has."""
