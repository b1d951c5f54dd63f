"""Blocks that are read from the disk just before they are computed, while those before them are computed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causallm.storage.background import AHEAD, Ticket
from causallm.storage.computing import Computing
from causallm.storage.counts import StorageCounts
from causallm.storage.disk import Disk
from causallm.storage.experts import CachedExperts
from causallm.storage.layout import Layout
from causallm.storage.storage import HEAD, Storage
from causallm.weights.reader import WeightReader
from layers.pages import Pages


@dataclass(frozen=True)
class Binding:
    """A parameter of the model: the dictionary and the name that it is held under, and what stands for it there while
    its bytes are in memory and while they are not."""

    owner: dict[str, nn.Parameter | None]
    name: str
    loaded: nn.Parameter
    empty: nn.Parameter


class StreamedBlocks(Storage):
    """Units of weights (blocks, parts of the head) that share a piece of memory, the arena; other units stay in memory.

    Every unit has a fixed place in the arena. They are used in the same order in every pass, so that a unit is read
    ahead as soon as those whose place it takes have been used; at most `lookahead` besides the one in use. Between
    uses a unit's parameters are on the meta device: who looks at them finds no numbers rather than wrong ones.
    """

    def __init__(
        self,
        reader: WeightReader,
        disk: Disk,
        computing: Computing,
        units: Mapping[int, Layout],
        bindings: Mapping[int, Sequence[Binding]],
        arena: Pages,
        starts: Mapping[int, int],
        lookahead: int,
        experts: CachedExperts | None = None,
        positions: int | None = None,
    ):
        self._reader, self._disk, self._computing = reader, disk, computing
        self._units, self._bindings = units, bindings
        self._arena, self._starts, self._lookahead = arena, starts, max(lookahead, 1)
        self._experts, self.positions = experts, positions
        self._blocks, self._heads = in_order(units)
        self.whole, self.keeps_head = not self._blocks, not self._heads
        self._tickets: dict[int, Ticket] = {}
        self._torn = False
        self._next = next(iter((*self._blocks, *self._heads)), HEAD)
        self._head_too, self._waited, self._passes = True, 0.0, 0
        self._read_before = disk.counts.nbytes, disk.counts.seconds

    @contextmanager
    def resident(self, unit: int) -> Iterator[None]:
        if unit not in self._units:
            yield
            return
        self._bring(unit)
        for binding in self._bindings[unit]:
            binding.owner[binding.name] = binding.loaded
        try:
            yield
        finally:
            for binding in self._bindings[unit]:
                binding.owner[binding.name] = binding.empty
            del self._tickets[unit]
            self._read_ahead()

    def check_gradient(self, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a gradient would flow through weights that are read from the disk and gone when it comes back; load "
                "the model without memory_budget and fsu to train it"
            )

    def begin(self, head: bool) -> None:
        self._head_too, self._passes = head, self._passes + 1

    def counts(self) -> StorageCounts:
        experts = self._experts
        return StorageCounts(
            read_bytes=self._disk.counts.nbytes - self._read_before[0],
            read_seconds=self._disk.counts.seconds - self._read_before[1],
            waited_seconds=self._waited + (experts.waited if experts else 0.0),
            passes=self._passes,
            hits=experts.hits if experts else 0,
            misses=experts.misses if experts else 0,
        )

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        assert self.expected is not None
        for name in sorted(self.expected):
            self._disk.check()
            yield name, self._reader.tensor(name).to(self.expected[name].dtype)
            self._reader.release(name)

    def close(self) -> None:
        """Wait for what is being read and close the files; the model cannot run any more."""
        self._disk.close()

    def _bring(self, unit: int) -> None:
        """Wait until a unit is in memory, asking for it where nobody has."""
        if self._torn:
            self._disk.settle()
            self._tickets, self._torn = {}, False
        if unit not in self._tickets:
            self._drop(list(self._tickets))
            self._next = unit
        else:
            before = list(self._tickets)
            self._drop(before[: before.index(unit)])
        self._read_ahead()
        try:
            self._waited += self._tickets[unit].wait()
        except BaseException:
            self._drop(list(self._tickets))
            raise

    def _drop(self, units: Sequence[int]) -> None:
        """Forget units that nobody will use; their places are free once they have been read."""
        for unit in units:
            # Not before it has ended, also where this is interrupted; of errors whoever asks again is told.
            self._tickets[unit].settle()
            del self._tickets[unit]

    def _read_ahead(self) -> None:
        """Ask for the units that come next, as far as there is room."""
        while len(self._tickets) <= self._lookahead and self._next not in self._tickets and self._fits(self._next):
            unit, layout, start = self._next, self._units[self._next], self._starts[self._next]
            computing = [
                self._computing.work(piece, piece.view(self._arena, start + place)) for piece, place in layout.computed
            ]
            self._torn = True  # until it is noted: an interruption may come in between
            self._tickets[unit] = self._disk.read(layout.spans, self._arena, start, AHEAD, computing)
            self._torn = False
            self._next = self._following(unit)

    def _fits(self, unit: int) -> bool:
        begin, end = self._range(unit)
        return all(last <= begin or first >= end for first, last in map(self._range, self._tickets))

    def _range(self, unit: int) -> tuple[int, int]:
        return self._starts[unit], self._starts[unit] + self._units[unit].nbytes

    def _following(self, unit: int) -> int:
        order = [*self._blocks, *(self._heads if self._head_too or unit < 0 or not self._blocks else ())]
        return order[(order.index(unit) + 1) % len(order)]


def in_order(units: Iterable[int]) -> tuple[list[int], list[int]]:
    """Blocks, and parts of the head, in the order of their use."""
    return sorted(unit for unit in units if unit >= 0), sorted((unit for unit in units if unit < 0), reverse=True)


def place_in_arena(units: Mapping[int, Layout], arena_bytes: int) -> dict[int, int]:
    """Where each unit starts in the arena: one behind the other in the order of their use, from its beginning again
    where one does not fit. ValueError where one does not fit at all."""
    starts, end = dict[int, int](), 0
    blocks, heads = in_order(units)
    for unit in [*blocks, *heads]:
        nbytes = units[unit].nbytes
        if nbytes > arena_bytes:
            raise ValueError(f"a unit of {nbytes} bytes does not fit into {arena_bytes}")
        starts[unit] = end if end + nbytes <= arena_bytes else 0
        end = starts[unit] + nbytes
    return starts


def parameters_in(memory: Pages, start: int, layout: Layout) -> list[nn.Parameter]:
    """The pieces of a layout as parameters that view the memory."""
    return [
        nn.Parameter(piece.view(memory, start + place), requires_grad=False)
        for piece, place in zip(layout.pieces, layout.starts, strict=True)
    ]
