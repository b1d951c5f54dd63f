"""Key-value caches of one attention layer: growing and fixed-length; `layers.sliding_cache` has those of a window, and
`layers.int8_cache` packs any of them.

Columns number the positions of the padded sequence that all rows of a batch share: 0 is the first ever seen.
`update` says which columns its keys stand for, in order, as a tuple of ranges; masks are built from those alone, so
that attention asks a cache and does not know its kind.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor

from layers.pages import empty_pair

Columns = tuple[range, ...]


class Room(NamedTuple):
    """Memory, (batch, kv_heads, capacity, head_dim), of which new tokens may see the first `past` slots, which stand
    for `columns`; their own begin at `slot`. `scales`, (batch, kv_heads, capacity, 1) each: of keys and values that
    are codes."""

    keys: Tensor
    values: Tensor
    past: int
    slot: int
    columns: Columns
    scales: tuple[Tensor, Tensor] | None = None

    def floats(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values that new tokens may see: views of floats, codes as `dtype`."""
        keys, values = (part[:, :, : self.past] for part in (self.keys, self.values))
        if self.scales is None:
            return keys, values
        key_scales, value_scales = (part[:, :, : self.past] for part in self.scales)
        return (keys * key_scales).to(dtype), (values * value_scales).to(dtype)


class KVCache:
    """Grows in steps of `step` columns as needed. Keys are kept after rotation.

    `offset` is the number of columns seen. Not limited by itself; the caller checks lengths.
    limit: the most columns it takes. rollback: how many columns `truncate` takes back for certain right after an update
    of several. None: any number.
    """

    step = 256
    limit: int | None = None
    rollback: int | None = None

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

    def holds(self, batch: int, kv_heads: int, head_dim: int) -> bool:
        """Whether keys and values are of these sizes, in the CPU's memory."""
        held = self._keys.shape
        return self._keys.is_cpu and (held[0], held[1], held[3]) == (batch, kv_heads, head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return self._keys.nbytes + self._values.nbytes

    def update(
        self,
        keys: Num[Tensor, "batch kv_heads time head_dim"],
        values: Num[Tensor, "batch kv_heads time head_dim"],
    ) -> tuple[Num[Tensor, "batch kv_heads past head_dim"], Num[Tensor, "batch kv_heads past head_dim"], Columns]:
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
        self.reserve(end)
        self.offset = end
        return Room(self._keys, self._values, end, start, (range(end),))

    def give_back(self, time: int) -> None:
        """Undo a `claim` of `time` columns; the same ones must come again at once."""
        self.offset -= time

    def reserve(self, columns: int) -> None:
        """Have memory for `columns` columns, where it may hold so many, and what it holds now stays."""
        if columns <= self._keys.shape[2]:
            return
        # A quarter more than needed: appending costs a constant amount on average and wastes little.
        self._grow(-(-(columns + columns // 4) // self.step) * self.step)

    def _grow(self, capacity: int) -> None:
        """Move what is held to memory for `capacity` columns."""
        batch, kv_heads, slots, head_dim = self._keys.shape
        used = min(self.offset, slots)
        keys, values = empty_pair((batch, kv_heads, capacity, head_dim), self.dtype, self._keys.device)
        keys[:, :, :used] = self._keys[:, :, :used]
        values[:, :, :used] = self._values[:, :, :used]
        self._keys, self._values = keys, values

    def reaches(self, columns: int) -> bool:
        """Whether `truncate(columns)` can be done."""
        return 0 <= columns <= self.offset

    def truncate(self, columns: int) -> None:
        """Forget everything from column `columns` on; ValueError if those before are not all held."""
        if not 0 <= columns <= self.offset:
            raise ValueError(f"cannot truncate a cache of {self.offset} positions to {columns}")
        self.offset = columns

    def state(self, back: bool = False) -> dict[str, Tensor]:
        """A copy of the keys and values in use, (batch, kv_heads, columns held, head_dim), oldest first.

        back: with the columns before them that `truncate` could still bring back into use.
        """
        return {"keys": self._in_order(self._keys).clone(), "values": self._in_order(self._values).clone()}

    def restore(self, state: Mapping[str, Tensor], offset: int) -> None:
        """Take over what `state` gave when `offset` columns had been seen; ValueError if it does not fit."""
        batch, kv_heads, _, head_dim = self._keys.shape
        held = self._held(offset)
        expected = [batch, kv_heads, held, head_dim]
        keys, values = (self._in_use(state[name], held, offset) for name in ("keys", "values"))
        for part in (keys, values):
            if list(part.shape) != expected:
                raise ValueError(f"the state has shape {list(part.shape)}, this cache at {offset} needs {expected}")
        # As if the columns before those held had come and gone.
        self.offset = offset - held
        self.update(keys.to(self._keys), values.to(self._values))

    def _in_use(self, saved: Tensor, held: int, offset: int) -> Tensor:
        """Of a state's columns those that are in use; all, where it has none before them."""
        return saved

    def _held(self, offset: int) -> int:
        """How many columns are still held once `offset` have been seen."""
        return offset

    def _in_order(self, held: Tensor) -> Tensor:
        return held[:, :, : self.offset]


class StaticKVCache(KVCache):
    """All of `capacity` columns is allocated at once and stays where it is once it holds any; more are a ValueError."""

    _settled = False

    @property
    def limit(self) -> int:  # type: ignore[override]
        return self._keys.shape[2]

    def takes(self, time: int) -> bool:
        return self.offset + time <= self._keys.shape[2]

    def reserve(self, columns: int) -> None:
        if columns > self._keys.shape[2]:
            raise ValueError(f"the cache holds {self._keys.shape[2]} positions, but {columns} are needed")
        if not self._settled and self._keys.is_cpu and 2 * columns >= self._keys.shape[2]:
            # Huge pages for what the first tokens will fill: by half at least.
            self._grow(self._keys.shape[2])
        self._settled = True
