"""Where the experts of a mixture-of-experts layer live; a layer asks for those it chose and does not know."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

Expert = Callable[[Tensor], Tensor]


@runtime_checkable
class ExpertStore(Protocol):
    """What routing needs of a store."""

    def __len__(self) -> int:
        """How many experts there are."""
        ...

    def fetch(self, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Yield each asked-for expert with its number, in whatever order suits the store."""
        ...


class ResidentExperts(nn.ModuleList):
    """All experts in memory, as ordinary modules named by their number."""

    def fetch(self, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Yield each asked-for expert with its number."""
        for expert_id in expert_ids:
            yield expert_id, self[expert_id]


@runtime_checkable
class Fetch(Protocol):
    """Experts on their way into memory.

    All of them stay as they are until the second `begin` of the same cache after theirs, whichever layer asks: so the
    next can be on their way while these are used.
    """

    @property
    def ready(self) -> Mapping[int, Expert]:
        """Those that were in memory already, by number."""
        ...

    def wait(self) -> Mapping[int, Expert]:
        """Block until the others are read; those others by number, none where all were ready. Called once."""
        ...


@runtime_checkable
class ExpertCache(Protocol):
    """Memory with room for some of the experts of one or several layers.

    An expert that it gives is a module of the type of its layer's template, and its parameters are views of one slot
    of the memory: a slot is always the same module with the same addresses, what lies there changes when another
    expert is read into it. They want no gradient, and begin at multiples of 64 bytes, as torch's own tensors do, since
    torch's products of floats may round otherwise elsewhere.
    """

    @property
    def most(self) -> int:
        """How many different experts one `begin` may ask for, at least one."""
        ...

    def begin(self, layer: int, expert_ids: Sequence[int]) -> Fetch:
        """Start to read all that are missing of these different experts of a layer, together."""
        ...


class FetchedExperts(nn.Module):
    """Experts that are read into memory when a token chose them.

    template: one expert, its weights on meta, which tells the type, shapes and kinds of all; no child of this module,
    and its weights are no parameters of the model. count: how many experts there are. Whoever owns the memory sets
    `cache`, and `layer`, the number by which the cache knows this one.
    """

    def __init__(self, template: nn.Module, count: int):
        super().__init__()
        self._template, self._count = (template,), count
        self.cache: ExpertCache | None = None
        self.layer = 0

    @property
    def template(self) -> nn.Module:
        """One expert without weights."""
        return self._template[0]

    def __len__(self) -> int:
        return self._count

    def begin(self, expert_ids: Sequence[int]) -> Fetch:
        """Start to read what is missing of at most `cache.most` different experts.

        RuntimeError where no cache is attached.
        """
        return self._attached().begin(self.layer, expert_ids)

    def parts(self, expert_ids: Sequence[int]) -> Iterator[Mapping[int, Expert]]:
        """Yield these different experts as they come to lie in memory, some by number at a time.

        What a part holds may be gone when the next is asked for. More than `cache.most` go in groups, of which the next
        is being read while one is used. RuntimeError where no cache is attached.
        """
        most = self._attached().most
        groups = deque(expert_ids[first : first + most] for first in range(0, len(expert_ids), most))
        fetch = self.begin(groups.popleft()) if groups else None
        while fetch is not None:
            if fetch.ready:
                yield fetch.ready
            following = self.begin(groups.popleft()) if groups else None
            if read := fetch.wait():
                yield read
            fetch = following

    def fetch(self, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Yield each of these different experts with its number; it may be gone when the next is asked for.

        Those that are in memory come first. RuntimeError where no cache is attached.
        """
        for part in self.parts(expert_ids):
            yield from part.items()

    def _attached(self) -> ExpertCache:
        if self.cache is None:
            raise RuntimeError(f"the experts of layer {self.layer} have no cache to be read into: attach one first")
        return self.cache
