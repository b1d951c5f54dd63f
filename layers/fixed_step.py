"""A step of one token a row whose shapes and addresses never change: recorded once, the same work serves any position.

The position is a tensor, so nothing that depends on it may decide about shapes: the step sees all slots of a cache's
memory, those not yet used behind the mask, and writes into the slot that follows from the position.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from layers.kv_cache import Columns, KVCache
from layers.rope import Rope, inverse_frequencies
from layers.step import Mask, Step


class FixedStep(Step):
    """column: of the new tokens in the padded sequence. padding: padded columns on the left of each row.

    frequencies: of every rotary embedding that the layers use, as `frequencies_at` gives them.
    """

    def __init__(
        self,
        column: Int[Tensor, "1"],
        padding: Int[Tensor, "batch"] | None,
        frequencies: Mapping[Rope, Tensor],
        dtype: torch.dtype,
    ):
        super().__init__(0, 1, dtype, column.device, padding=padding)
        self.column, self._known = column, frequencies
        self.positions = column[None] if self.padding is None else column - self.padding

    def slot(self, window: int | None) -> Int[Tensor, "1"]:
        """Where a cache keeps the new tokens: one of a window is a ring."""
        return self.column if window is None else self.column % window

    def _frequencies(self, rope: Rope) -> Float[Tensor, "rows half"]:
        return self._known[rope]

    def _kept_tables(self, rope: Rope) -> None:
        """None: which block the position lies in is not known."""

    def _make_mask(self, window: int | None, columns: Columns) -> Mask:
        slots = torch.arange(columns[0].stop, device=self.device)
        # Each slot of a ring holds the last column that belongs there, which may be before the first.
        keys = slots if window is None else self.column - (self.column - slots) % window
        keys = keys[None] if self.padding is None else keys - self.padding
        hidden = (keys < 0) | (keys > self.positions)
        bias = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
        return Mask(bias[:, None, None])


class FixedCache(KVCache):
    """The memory of a cache, (batch, kv_heads, slots, head_dim), of which a `FixedStep` sees all.

    What no token was put into yet must be finite, or even hidden it would spoil the sums. The cache whose memory it is
    counts the tokens.
    """

    def __init__(
        self,
        keys: Num[Tensor, "batch kv_heads slots head_dim"],
        values: Num[Tensor, "batch kv_heads slots head_dim"],
        slot: Int[Tensor, "1"],
    ):
        self._keys, self._values, self._slot = keys, values, slot

    def update(
        self,
        keys: Num[Tensor, "batch kv_heads 1 head_dim"],
        values: Num[Tensor, "batch kv_heads 1 head_dim"],
    ) -> tuple[Num[Tensor, "batch kv_heads slots head_dim"], Num[Tensor, "batch kv_heads slots head_dim"], Columns]:
        """Put the new token into its slot; returns all slots."""
        self._keys.index_copy_(2, self._slot, keys.to(self._keys.dtype))
        self._values.index_copy_(2, self._slot, values.to(self._values.dtype))
        return self._keys, self._values, (range(self._keys.shape[2]),)

    def takes(self, time: int) -> bool:
        """Never: which slot is next is known on the device alone."""
        return False


def frequencies_at(rope: Rope, length: int, padding: Sequence[int] | None) -> Float[Tensor, "rows half"]:
    """Radians per position, on the CPU, for a padded sequence of `length` columns: one row, or one for each row of a
    batch where they differ."""
    if padding is None or not rope.depends_on_length:
        return inverse_frequencies(rope, length)[None]
    return torch.stack([inverse_frequencies(rope, length - padded) for padded in padding])
