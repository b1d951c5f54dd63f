"""Key-value caches of one attention layer: growing, fixed-length and sliding.

Columns number the positions of the padded sequence that all rows of a batch share: 0 is the first ever seen.
`update` says which columns its keys stand for, in order, as a tuple of ranges; masks are built from those alone, so
that attention asks a cache and does not know its kind.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Columns = tuple[range, ...]


class Room(NamedTuple):
    """Memory, (batch, kv_heads, capacity, head_dim), of which new tokens may see the first `past` slots, which stand
    for `columns`; their own begin at `slot`."""

    keys: Tensor
    values: Tensor
    past: int
    slot: int
    columns: Columns


class KVCache:
    """Grows in steps of `step` columns as needed. Keys are kept after rotation.

    `offset` is the number of columns seen. Not limited by itself; the caller checks lengths.
    """

    step = 256

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capacity: int = 0,
    ):
        self.offset = 0
        self._keys = torch.empty(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self._keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return self._keys.nbytes + self._values.nbytes

    def update(
        self,
        keys: Float[Tensor, "batch kv_heads time head_dim"],
        values: Float[Tensor, "batch kv_heads time head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads past head_dim"], Float[Tensor, "batch kv_heads past head_dim"], Columns]:
        """Append; returns all keys and values held (views, no copy) and their columns."""
        room = self.claim(keys.shape[2])
        new = slice(room.slot, room.slot + keys.shape[2])
        room.keys[:, :, new] = keys
        room.values[:, :, new] = values
        return room.keys[:, :, : room.past], room.values[:, :, : room.past], room.columns

    def takes(self, time: int) -> bool:
        """Whether `time` new columns come to lie in a row, among all that they may see, so that `claim` serves."""
        return True

    def claim(self, time: int) -> Room:
        """Count `time` new columns, which the caller writes, as seen."""
        start, end = self.offset, self.offset + time
        self._reserve(end)
        self.offset = end
        return Room(self._keys, self._values, end, start, (range(end),))

    def _reserve(self, columns: int) -> None:
        if columns <= self._keys.shape[2]:
            return
        # A quarter more than needed: appending costs a constant amount on average and wastes little.
        capacity = -(-(columns + columns // 4) // self.step) * self.step
        self._keys, self._values = (self._grown(held, capacity) for held in (self._keys, self._values))

    def _grown(self, held: Tensor, capacity: int) -> Tensor:
        batch, kv_heads, _, head_dim = held.shape
        grown = held.new_empty(batch, kv_heads, capacity, head_dim)
        grown[:, :, : self.offset] = held[:, :, : self.offset]
        return grown

    def truncate(self, columns: int) -> None:
        """Forget everything from column `columns` on; ValueError if those before are not all held."""
        if not 0 <= columns <= self.offset:
            raise ValueError(f"cannot truncate a cache of {self.offset} positions to {columns}")
        self.offset = columns

    def state(self) -> dict[str, Tensor]:
        """A copy of the keys and values in use, (batch, kv_heads, columns held, head_dim), oldest first."""
        return {"keys": self._in_order(self._keys).clone(), "values": self._in_order(self._values).clone()}

    def restore(self, state: dict[str, Tensor], offset: int) -> None:
        """Take over what `state` gave when `offset` columns had been seen; ValueError if it does not fit."""
        keys, values = state["keys"].to(self._keys), state["values"].to(self._values)
        batch, kv_heads, _, head_dim = self._keys.shape
        held = self._held(offset)
        expected = [batch, kv_heads, held, head_dim]
        for part in (keys, values):
            if list(part.shape) != expected:
                raise ValueError(f"the state has shape {list(part.shape)}, this cache at {offset} needs {expected}")
        # As if the columns before those held had come and gone.
        self.offset = offset - held
        self.update(keys, values)

    def _held(self, offset: int) -> int:
        """How many columns are still held once `offset` have been seen."""
        return offset

    def _in_order(self, held: Tensor) -> Tensor:
        return held[:, :, : self.offset]


class StaticKVCache(KVCache):
    """All of `capacity` columns is allocated at once and never moves; a column beyond is a ValueError."""

    def _reserve(self, columns: int) -> None:
        if columns > self._keys.shape[2]:
            raise ValueError(f"the cache holds {self._keys.shape[2]} positions, but {columns} are needed")


class SlidingKVCache(KVCache):
    """Holds the last `window` columns and no more: a ring that single tokens overwrite in place.

    rollback: how many columns of an update of several can be taken back right after it; for that many the columns that
    it pushed out of the window are kept aside. A single token pushes its own out for good.
    """

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
        keys: Float[Tensor, "batch kv_heads time head_dim"],
        values: Float[Tensor, "batch kv_heads time head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads past head_dim"], Float[Tensor, "batch kv_heads past head_dim"], Columns]:
        """Append; returns what the new columns may attend to, which for several new ones is held plus new."""
        time = keys.shape[2]
        if self.takes(time):
            return super().update(keys, values)
        first = self.offset - self._held(self.offset)
        keys = torch.cat((self._in_order(self._keys), keys.to(self._keys)), 2)
        values = torch.cat((self._in_order(self._values), values.to(self._values)), 2)
        self.offset += time
        self._reserve(self.window)
        self._store(keys[:, :, -self.window :], values[:, :, -self.window :], self.offset - self.window)
        if self.rollback:
            self._keep_aside(keys[:, :, : -self.window], values[:, :, : -self.window])
        return keys, values, (range(first, self.offset),)

    def takes(self, time: int) -> bool:
        return time == 1 or self.offset + time <= self.window

    def claim(self, time: int) -> Room:
        if time != 1:
            return super().claim(time)
        slot = self.offset % self.window
        self._reserve(min(self.offset + 1, self.window))
        self.offset += 1
        self._aside = None
        held = self._held(self.offset)
        lap = self.offset - 1 - slot
        columns: Columns = (range(lap, self.offset),)
        if held > slot + 1:
            columns += (range(lap - self.window + slot + 1, lap - self.window + held),)
        return Room(self._keys, self._values, held, slot, columns)

    def _reserve(self, columns: int) -> None:
        if columns > self._keys.shape[2]:
            capacity = min(-(-(columns + columns // 4) // self.step) * self.step, self.window)
            self._keys, self._values = (self._grown(held, capacity) for held in (self._keys, self._values))

    def _grown(self, held: Tensor, capacity: int) -> Tensor:
        batch, kv_heads, slots, head_dim = held.shape
        grown = held.new_empty(batch, kv_heads, capacity, head_dim)
        grown[:, :, :slots] = held
        return grown

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

    def restore(self, state: dict[str, Tensor], offset: int) -> None:
        super().restore(state, offset)
        # What came and went before the state is not known.
        self._aside = None

    def truncate(self, columns: int) -> None:
        first = max(columns - self.window, 0)
        lost = self.offset - self._held(self.offset) - first
        kept = (0 if self._aside is None else self._aside[0].shape[2]) - lost
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
