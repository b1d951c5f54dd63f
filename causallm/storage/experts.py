"""Experts of all layers in one memory of slots: those used last stay, the others are read when they are chosen."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from causallm.storage.background import URGENT, Ticket
from causallm.storage.computing import Computing
from causallm.storage.disk import Disk
from causallm.storage.layout import Piece
from layers.expert_store import Expert
from layers.pages import PAGE, Pages, whole_pages

ALIGNMENT = 64
Key = tuple[int, int]
"""Layer and number of an expert."""


@dataclass(frozen=True)
class ExpertShape:
    """What the experts of some layers have in common: one without weights, its parameters' names, and where in a slot
    each of them starts."""

    template: nn.Module
    names: tuple[str, ...]
    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, template: nn.Module, pieces: Sequence[Piece]) -> "ExpertShape":
        """pieces: those of one such expert, a parameter each; places are chosen so that its direct reads fall right."""
        starts, end = list[int](), 0
        for piece in pieces:
            aligned = piece.place is not None and piece.place.offset % ALIGNMENT == 0
            starts.append(end + (piece.place.offset % PAGE if piece.place is not None and aligned else 0))
            end += whole_pages(piece.nbytes) + 2 * PAGE
        return cls(template, tuple(name for name, _ in template.named_parameters()), tuple(starts), end)


class CachedExperts:
    """Room for `slots` experts, an `ExpertCache` for the layers of a model.

    shapes: of each layer; pieces: what an expert of a layer consists of, in the order of its parameters. What one
    `begin` gives stays until the second `begin` after it.
    """

    def __init__(
        self,
        disk: Disk,
        computing: Computing,
        shapes: Mapping[int, ExpertShape],
        pieces: Callable[[int, int], Sequence[Piece]],
        slots: int,
        most: int,
    ):
        self._disk, self._computing, self._shapes, self._pieces = disk, computing, shapes, pieces
        self._slot_bytes = max(shape.nbytes for shape in shapes.values())
        self._memory, self.most = Pages(slots * self._slot_bytes), most
        self._free, self._held = list(range(slots - 1, -1, -1)), OrderedDict[Key, int]()
        self._modules: dict[tuple[int, int], nn.Module] = {}
        self._under_way: list[tuple[Ticket, Sequence[Key]]] = []
        self._torn = False
        self.waited, self.hits, self.misses = 0.0, 0, 0

    def begin(self, layer: int, expert_ids: Sequence[int]) -> "CachedFetch":
        """Start to read all that are missing of these different experts of a layer, together."""
        if self._torn:
            self._forget_all()
        keys = [(layer, number) for number in expert_ids]
        for ticket, others in self._under_way[:-1] + [last for last in self._under_way[-1:] if {*keys} & {*last[1]}]:
            self.settle(ticket, others)
        held = [key for key in keys if key in self._held]
        missing = [key for key in keys if key not in self._held]
        self._torn = True  # until all is done: an interruption may come in between
        for key in held:
            self._held.move_to_end(key)
        for key in missing:
            self._held[key] = self._free.pop() if self._free else self._held.popitem(last=False)[1]
        self.hits, self.misses = self.hits + len(held), self.misses + len(missing)
        ticket = self._read(missing)
        self._under_way.append((ticket, missing))
        self._torn = False
        return CachedFetch(self, held, missing, ticket)

    def module(self, key: Key) -> Expert:
        """The expert that lies in a slot, as a module."""
        slot, shape = self._held[key], self._shapes[key[0]]
        module = self._modules.get((slot, id(shape)))
        if module is None:
            module = copy.deepcopy(shape.template)
            for name, piece, start in zip(shape.names, self._pieces(*key), shape.starts, strict=True):
                tensor = piece.view(self._memory, slot * self._slot_bytes + start)
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
            self._modules[slot, id(shape)] = module
        return module

    def settle(self, ticket: Ticket, missing: Sequence[Key]) -> None:
        """Wait for reads whose memory others may take now, or who may use it, also where nobody waited for them; the
        slots of experts that could not be read are free."""
        ticket.settle()
        if all(other is not ticket for other, _ in self._under_way):
            return
        self._torn = True
        self._under_way = [(other, keys) for other, keys in self._under_way if other is not ticket]
        if ticket.failed:
            self._free += [self._held.pop(key) for key in missing]
        self._torn = False

    def _forget_all(self) -> None:
        """Begin anew, after an interruption that left it uncertain what is where."""
        self._disk.settle()
        slots = self._memory.nbytes // self._slot_bytes
        self._held.clear()
        self._free, self._under_way, self._torn = list(range(slots - 1, -1, -1)), [], False

    def _read(self, keys: Sequence[Key]) -> Ticket:
        places, starts, computing = [], [], []
        for key in keys:
            shape, slot = self._shapes[key[0]], self._held[key] * self._slot_bytes
            for piece, start in zip(self._pieces(*key), shape.starts, strict=True):
                if piece.plain and piece.place is not None:
                    places.append((piece.place.path, piece.place.offset, piece.place.nbytes))
                    starts.append(slot + start)
                else:
                    computing.append(self._computing.work(piece, piece.view(self._memory, slot + start)))
        return self._disk.read_exactly(places, self._memory, starts, URGENT, computing)


class CachedFetch:
    """Experts on their way, a `Fetch`."""

    def __init__(self, cache: CachedExperts, held: Sequence[Key], missing: Sequence[Key], ticket: Ticket):
        self._cache, self._missing, self._ticket = cache, missing, ticket
        self.ready: Mapping[int, Expert] = {key[1]: cache.module(key) for key in held}

    def wait(self) -> Mapping[int, Expert]:
        """Block until the others are read. An OSError names the file that could not be read."""
        try:
            self._cache.waited += self._ticket.wait()
        except Exception:
            self._cache.settle(self._ticket, self._missing)
            raise
        return {key[1]: self._cache.module(key) for key in self._missing}
