"""The key-value cache of a layer whose attention slides: a ring that holds a window and no more."""

from collections.abc import Mapping

import torch
from jaxtyping import Num
from torch import Tensor

from layers.kv_cache import Columns, KVCache, Room


class SlidingKVCache(KVCache):
    """Holds the last `window` columns and no more: a ring that single tokens overwrite in place.

    rollback: for that many the columns that updates of several push out of the window are kept aside. A single token
    pushes its own out for good, and those kept before it.
    """

    rollback: int

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        window: int = 1,
        rollback: int = 0,
    ):
        super().__init__(batch, kv_heads, head_dim, dtype, device)
        self.window, self.rollback = window, rollback
        self._aside: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(part.nbytes for part in self._aside or ())

    def update(
        self,
        keys: Num[Tensor, "batch kv_heads time head_dim"],
        values: Num[Tensor, "batch kv_heads time head_dim"],
    ) -> tuple[Num[Tensor, "batch kv_heads past head_dim"], Num[Tensor, "batch kv_heads past head_dim"], Columns]:
        """Append; returns what the new columns may attend to, which for several new ones is held plus new."""
        time = keys.shape[2]
        if self.takes(time):
            return super().update(keys, values)
        first = self.offset - self._held(self.offset)
        keys = torch.cat((self._in_order(self._keys), keys.to(self._keys)), 2)
        values = torch.cat((self._in_order(self._values), values.to(self._values)), 2)
        before = self._with_aside(keys[:, :, : -self.window], values[:, :, : -self.window])
        # Nothing aside until all is done: an interruption in between leaves a cache that knows it cannot go back.
        self._aside = None
        self.offset += time
        self.reserve(self.window)
        self._store(keys[:, :, -self.window :], values[:, :, -self.window :], self.offset - self.window)
        if self.rollback:
            self._keep_aside(*before)
        return keys, values, (range(first, self.offset),)

    def takes(self, time: int) -> bool:
        return time == 1 or self.offset + time <= self.window

    def claim(self, time: int) -> Room:
        if time != 1:
            return super().claim(time)
        slot = self.offset % self.window
        self.reserve(self.offset + 1)
        self.offset += 1
        self._aside = None
        held = self._held(self.offset)
        lap = self.offset - 1 - slot
        columns: Columns = (range(lap, self.offset),)
        if held > slot + 1:
            columns += (range(lap - self.window + slot + 1, lap - self.window + held),)
        return Room(self._keys, self._values, held, slot, columns)

    def reserve(self, columns: int) -> None:
        if min(columns, self.window) > self._keys.shape[2]:
            self._grow(min(-(-(columns + columns // 4) // self.step) * self.step, self.window))

    def _held(self, offset: int) -> int:
        return min(offset, self.window)

    def _in_order(self, held: Tensor) -> Tensor:
        if self.offset <= self.window:
            return held[:, :, : self.offset]
        return held[:, :, : self.window].roll(-(self.offset % self.window), 2)

    def _store(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Lay at most `window` columns from column `first` on out, so that column c is in slot c % window."""
        slot = first % self.window
        split = self.window - slot
        for held, new in ((self._keys, keys), (self._values, values)):
            held[:, :, slot : slot + new.shape[2]] = new[:, :, :split]
            held[:, :, : max(new.shape[2] - split, 0)] = new[:, :, split:]

    def _keep_aside(self, keys: Tensor, values: Tensor) -> None:
        """Remember the last `rollback` of these columns, which end where the window begins; copies, not views."""
        first = max(keys.shape[2] - self.rollback, 0)
        self._aside = (keys[:, :, first:].clone(), values[:, :, first:].clone())

    def _with_aside(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The columns kept aside, and after them these."""
        if self._aside is None:
            return keys, values
        return torch.cat((self._aside[0], keys), 2), torch.cat((self._aside[1], values), 2)

    def state(self, back: bool = False) -> dict[str, Tensor]:
        state = super().state()
        if back:
            state["keys"], state["values"] = self._with_aside(state["keys"], state["values"])
        return state

    def restore(self, state: Mapping[str, Tensor], offset: int) -> None:
        super().restore(state, offset)
        self._aside = None
        before = state["keys"].shape[2] - self._held(offset)
        if before and self.rollback:
            keys, values = state["keys"].to(self._keys), state["values"].to(self._values)
            self._keep_aside(keys[:, :, :before], values[:, :, :before])

    def _in_use(self, saved: Tensor, held: int, offset: int) -> Tensor:
        return saved[:, :, saved.shape[2] - held :] if held < saved.shape[2] <= offset else saved

    def _kept_at(self, columns: int) -> tuple[int, int]:
        """Cut to `columns`: how many columns the window gets back from those kept aside, and how many would be left
        there, less than 0 where they do not suffice."""
        lost = self.offset - self._held(self.offset) - max(columns - self.window, 0)
        return lost, (0 if self._aside is None else self._aside[0].shape[2]) - lost

    def reaches(self, columns: int) -> bool:
        return columns == self.offset or (super().reaches(columns) and self._kept_at(columns)[1] >= 0)

    def truncate(self, columns: int) -> None:
        first = max(columns - self.window, 0)
        lost, kept = self._kept_at(columns)
        if 0 <= columns < self.offset and kept < 0:
            raise ValueError(
                f"a sliding cache of window {self.window} at {self.offset} positions cannot go back to {columns}: "
                "the positions before its window are gone"
            )
        super().truncate(columns)
        if lost and self._aside is not None:
            keys, values = self._aside
            window = slice(kept, kept + self.window)
            self._store(keys[:, :, window], values[:, :, window], first)
            self._keep_aside(keys[:, :, :kept], values[:, :, :kept])
