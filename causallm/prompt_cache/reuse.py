"""What a cache holds, in tokens, and using of it what the next prompt has in common with it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from causallm.prompt_lookup import rotates_alike
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
        a rotary kind turns a prompt of the new length otherwise.
        """
        common = min(common_columns(self.ids, prompts), max(map(len, prompts)) - 1)
        if common <= 0 or not self._serves(model, prompts, common):
            return model.make_cache(len(prompts), capacity, rollback), 0
        fits = capacity is None and all(
            layer.limit is None and (layer.rollback is None or layer.rollback >= rollback) for layer in self.cache
        )
        if keep or not fits:
            return self._copy(model, common, capacity, rollback), common
        self.truncate(common)
        return self.cache, common

    def _serves(self, model: Transformer, prompts: Sequence[Sequence[int]], columns: int) -> bool:
        ropes = {model.config.rope(layer_id) for layer_id in range(len(model.layers))}
        rotated = self.rope_length or self.columns
        return all(layer.reaches(columns) for layer in self.cache) and all(
            rotates_alike(ropes, rotated - padding, len(prompt))
            for padding, prompt in zip(self.padding, prompts, strict=True)
        )

    def _copy(self, model: Transformer, columns: int, capacity: int | None, rollback: int) -> list[KVCache]:
        held = self.cache[0].offset
        room = None if capacity is None else max(capacity, held)
        # What lets the copy go back to `columns` must have room in it.
        back = max(rollback, *(layer.rollback or 0 for layer in self.cache))
        copies = model.make_cache(len(self.ids), room, back)
        for layer, copy in zip(self.cache, copies, strict=True):
            copy.restore(layer.state(back=True), held)
            copy.truncate(columns)
        return copies


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
