"""A key-value cache that knows whose tokens it holds, so that of the next sequence only what is new is computed."""

import copy
from collections.abc import Sequence

import torch

from causallm.prompt_cache import PromptCache
from causallm.prompt_cache.reuse import common_prefix
from causallm.prompt_lookup import rotates_alike
from causallm.transformer import Transformer
from layers.kv_cache import KVCache

State = dict[str, torch.Tensor]


class KeptCache:
    """The cache of one sequence after the other, and the ids of the tokens in it.

    `reuse`, then `generate` with the cache it gives, then `keep`. In between nothing counts as held, so that an
    interruption, wherever it comes, costs a new prefill and never a wrong answer.

    Sliding layers cannot go back beyond their window; `mark` keeps what they hold at one place, normally the end of the
    prompt, to which they can. Where a rotary kind depends on the length, only a cache that was rotated as the new
    sequence will be is used again.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._ropes = {model.config.rope(layer_id) for layer_id in range(len(model.layers))}
        self._ids: list[int] = []
        self._layers: list[KVCache] = []
        self._kind: tuple[int | None, int] = (None, 0)
        self._rotated_for = 0
        self._mark: tuple[int, dict[int, State]] | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens that the cache holds, oldest first."""
        return list(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(layer.nbytes for layer in self._layers)

    def reuse(self, ids: Sequence[int], capacity: int | None = None, rollback: int = 0) -> tuple[list[KVCache], int]:
        """A cache, one object a layer, that holds a beginning of `ids`, and how many tokens that is.

        At least one token is left to compute. capacity, rollback: see `Transformer.make_cache`; a cache of another
        capacity or less rollback is not used again.
        """
        held, self._ids = self._ids, []
        common = min(common_prefix(held, ids), len(ids) - 1)
        fits = self._kind[0] == capacity and self._kind[1] >= rollback
        if not fits or not rotates_alike(self._ropes, self._rotated_for, len(ids)):
            common = 0
        reused = self._go_back(common) if common else 0
        if not reused:
            self._mark, self._kind, self._rotated_for = None, (capacity, rollback), len(ids)
            self._layers = self._model.make_cache(1, capacity, rollback)
        return self._layers, reused

    def adopt(self, held: PromptCache, capacity: int | None = None) -> None:
        """Hold a copy of a prompt cache of one row in place of what is held; ValueError for one of several.

        capacity: as in the calls of `reuse` to come. Under a memory budget it is no copy, nothing is left in `held`.
        """
        if len(held.ids) != 1:
            raise ValueError(f"the prompt cache has {len(held.ids)} rows, a conversation goes on from one")
        rollback, ids = max((layer.rollback or 0 for layer in held.cache), default=0), held.ids[0]
        # A token more than is held: one is always left to compute.
        self._layers, count = held.reuse(self._model, [[*ids, 0]], capacity, rollback, keep=True)
        self._ids, self._mark, self._kind = ids[:count], None, (capacity, rollback)
        self._rotated_for = held.rope_length or len(ids)
        if held.cache is self._layers:
            held.clear()

    def as_prompt_cache(self, ids: Sequence[int]) -> PromptCache:
        """What is held of `ids`, not a copy: the rest is forgotten. ValueError where that is nothing."""
        self.keep(self._ids[: common_prefix(self._ids, ids)])
        if not self._ids:
            raise ValueError("there is no cache to save: nothing of the conversation has been computed yet")
        return PromptCache([self.ids], self._layers, self._rotated_for)

    @torch.inference_mode()
    def mark(self) -> None:
        """Remember what sliding layers hold now, in place of what was remembered before."""
        states = {i: layer.state() for i, layer in enumerate(self._layers) if _slides(layer)}
        self._mark = (self._layers[0].offset, states)

    def keep(self, ids: Sequence[int], torn: bool = False) -> None:
        """Say that the cache holds `ids`; what it has beyond them is forgotten.

        torn: a step was broken off in the middle, so that what sliding layers hold is uncertain.
        """
        self._ids = list(ids[: self._go_back(len(ids), torn)])

    def copy(self) -> "KeptCache":
        """Another cache that holds the same tokens."""
        other = copy.copy(self)
        with torch.inference_mode():
            other._layers = self._model.make_cache(1, *self._kind) if self._ids else []
            for layer, held in zip(other._layers, self._layers, strict=False):
                layer.restore(held.state(), held.offset)
        return other

    @torch.inference_mode()
    def _go_back(self, columns: int, torn: bool = False) -> int:
        """Go back to `columns` tokens, or to the mark if that lies before; returns where, 0 where neither is possible.

        A mark that lies behind is of a sequence that is no more.
        """
        if self._mark is not None and self._mark[0] > columns:
            self._mark = None
        if all(layer.reaches(columns) and not (torn and _slides(layer)) for layer in self._layers):
            for layer in self._layers:
                layer.truncate(columns)
            return columns
        if self._mark is None:
            return 0
        place, states = self._mark
        for i, layer in enumerate(self._layers):
            if i in states:
                layer.restore(states[i], place)
            else:
                layer.truncate(place)
        return place


def _slides(layer: KVCache) -> bool:
    """Whether there are positions that it cannot go back to."""
    return layer.rollback is not None
