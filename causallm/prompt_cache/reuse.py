"""What a cache holds, in tokens, and using of it what the next prompt has in common with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causallm.prompt_lookup import rotates_alike
from causallm.storage.step_memory import planned_capacity
from causallm.transformer import Transformer
from layers.kv_cache import KVCache

ROLLBACK = 128
"""Positions that a cache made to be kept can go back in sliding layers: a chat template's end, a word cut otherwise."""


@dataclass
class PromptCache:
    """Caches, one a layer, and the token ids that they hold, a list for each row, without padding.

    Rows are padded on the left to the length of the longest, as `causallm.prompt_ids.left_pad` does. rope_length: the
    shortest sequence that keys were rotated for, in columns (None: the sequence itself), of which the rotary kinds that
    depend on the length take account.
    """

    ids: list[list[int]]
    cache: list[KVCache]
    rope_length: int | None = None

    @property
    def columns(self) -> int:
        """How many positions of the padded rows are held."""
        return max(map(len, self.ids))

    @property
    def padding(self) -> list[int]:
        """Columns on the left of each row that are no tokens."""
        return [self.columns - len(row) for row in self.ids]

    @torch.inference_mode()
    def truncate(self, columns: int) -> None:
        """Hold no more than the first `columns`; ValueError where a sliding layer cannot go back so far."""
        for layer in self.cache:
            layer.truncate(columns)
        self.ids = [row[: max(columns - padding, 0)] for row, padding in zip(self.ids, self.padding, strict=True)]

    def clear(self) -> None:
        """Hold nothing more; the caches are not touched, for somebody else may go on with them."""
        self.cache, self.ids = [], [[] for _ in self.ids]

    @torch.inference_mode()
    def reuse(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        capacity: int | None = None,
        rollback: int = 0,
        keep: bool = False,
    ) -> tuple[list[KVCache], int]:
        """A cache that holds the beginning of all `prompts`, and how many columns that is; at least one is left over.

        It is the cache held here, cut to that, and so are the ids, for what comes after is the caller's; or a copy,
        where `keep` says so or the cache held has not the `capacity` or `rollback` of `Transformer.make_cache`. Nothing
        is reused, and a new cache given, where rows begin at other columns, a sliding layer cannot go back so far or
        a rotary kind turns a prompt of the new length otherwise. Under a memory budget, which has no room for two, the
        cache held here is used up in any case.
        """
        common, alone = min(common_columns(self.ids, prompts), max(map(len, prompts)) - 1), _alone(model)
        if common <= 0 or not self._serves(model, prompts, common):
            if alone:
                self.clear()
            return model.make_cache(len(prompts), capacity, rollback), 0
        fits = all(_fits(layer, capacity, rollback) for layer in self.cache)
        if not alone and (keep or not fits):
            copies = list(self._copies(model, capacity, rollback))
            for layer in copies:
                layer.truncate(common)
            return copies, common
        if not fits:
            for number, layer in enumerate(self._copies(model, capacity, rollback)):
                self.cache[number] = layer
        self.rope_length = self.rope_length or self.columns
        self.truncate(common)
        return self.cache, common

    def states(self, model: Transformer) -> list[dict[str, Tensor]]:
        """What each layer holds, a copy; under a memory budget the cache held here is used up."""
        if not _alone(model):
            return [layer.state() for layer in self.cache]
        layers = self.cache
        self.clear()
        return [layers.pop(0).state() for _ in range(len(layers))]

    def _serves(self, model: Transformer, prompts: Sequence[Sequence[int]], columns: int) -> bool:
        ropes = {model.config.rope(layer_id) for layer_id in range(len(model.layers))}
        rotated = self.rope_length or self.columns
        return all(layer.reaches(columns) for layer in self.cache) and all(
            rotates_alike(ropes, rotated - padding, len(prompt))
            for padding, prompt in zip(self.padding, prompts, strict=True)
        )

    def _copies(self, model: Transformer, capacity: int | None, rollback: int) -> Iterator[KVCache]:
        held = self.cache[0].offset
        room = None if capacity is None else max(capacity, held)
        # What lets the copy go back must have room in it.
        back = max(rollback, *(layer.rollback or 0 for layer in self.cache))
        for number, copy in enumerate(model.make_cache(len(self.ids), room, back)):
            copy.restore(self.cache[number].state(back=True), held)
            yield copy


def check_room(model: Transformer, path: Path, rows: int, columns: int) -> None:
    """ValueError where a memory budget was planned for fewer positions than a file holds."""
    room = planned_capacity(model, rows)
    if room is not None and columns > room:
        raise ValueError(
            f"{path} holds {columns} positions of each row, but the memory was planned for {room}; raise max_seq_len "
            "(--max-length)"
        )


def _alone(model: Transformer) -> bool:
    """Whether a memory budget has room for one cache only."""
    return planned_capacity(model) is not None


def _fits(layer: KVCache, capacity: int | None, rollback: int) -> bool:
    """Whether a layer's cache is what `Transformer.make_cache` gives, or has more room."""
    if layer.rollback is not None:
        return layer.rollback >= rollback
    return layer.limit is None if capacity is None else (layer.limit or 0) >= capacity


def common_columns(held: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> int:
    """Columns that two lists of rows, padded on the left, begin with alike; 0 where rows begin at other columns."""
    if (
        not held
        or not wanted
        or [max(map(len, held)) - len(row) for row in held] != [max(map(len, wanted)) - len(row) for row in wanted]
    ):
        return 0
    longest = max(map(len, held))
    return min(longest - len(row) + common_prefix(row, other) for row, other in zip(held, wanted, strict=True))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)
