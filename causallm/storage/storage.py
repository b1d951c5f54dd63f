"""What a model asks of the place where its weights live; here they are all in memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from causallm.storage.counts import StorageCounts

HEAD = -1
"""The unit that is the head; the others are blocks, by their number."""


class Storage:
    """Everything in memory: the model's parameters are what they are."""

    whole = True
    """Whether all blocks are in memory at once, so that they may be computed in one call."""
    keeps_head = True
    """Whether the head is, too."""
    positions: int | None = None
    """Positions of all rows together that there is room for in caches; None: no limit but the memory."""

    expected: Mapping[str, Tensor] | None = None
    """All weights by name, on meta those that are not in memory; None: they are the model's parameters."""
    packed: Mapping[str, Any] | None = None
    """Those that are packed, as `causallm.packing.packed_tensors` tells them."""
    planned_bytes: int | None = None
    """Memory that was planned for the process."""

    @contextmanager
    def resident(self, unit: int) -> Iterator[None]:
        """Inside, the weights of a block (or `HEAD`) are in memory."""
        yield

    def check_gradient(self, x: Tensor) -> None:
        """RuntimeError where a gradient would flow back through weights that are gone by then."""

    def begin(self, head: bool) -> None:
        """A pass over all blocks begins; `head`: it ends with the head."""

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """All weights in the order of their names, each until the next is asked for."""
        yield from sorted(model.named_parameters())

    def counts(self) -> StorageCounts | None:
        """What came from the disk since the model was loaded; None where nothing ever does."""
        return None
