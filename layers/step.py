"""What all layers of one forward step share: positions, rotary tables and masks, each computed once a kind."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layers.kv_cache import Columns
from layers.rope import ROTARY_BLOCK, Rope, inverse_frequencies, rotary_block, rotary_tables

MASK_BLOCK = 2**18
"""Numbers of a mask that are made at once: what is compared for each takes several times the memory of the mask."""


@dataclass(frozen=True)
class Mask:
    """Which keys the tokens of a step may see.

    bias: what to add to their scores, 0 or -inf; None where every key may be seen.
    plain: True where a token sees its own key and all before it, and the last keys are the step's own.
    causal_time: tokens of the step where later keys are hidden from earlier tokens, else 0.
    """

    bias: Float[Tensor, "batch_or_1 1 time past"] | None = None
    plain: bool = False
    causal_time: int = 0

    def hidden_keys(self, queries: int) -> int:
        """How many keys at the end none of the step's first `queries` tokens may see."""
        return self.causal_time - queries if self.causal_time else 0


class Step:
    """Positions of the tokens in one forward call, and the tables that follow from them.

    offset: columns already in the cache. padding: padded columns on the left of each row (None: none).
    rope_length: tokens that the sequence will have when its prompt is complete, for the rotary kinds that depend on
    it, so that a prompt given in chunks is rotated as one given whole; None: the end of this step.
    documents: which document of its row each token is of, where a row holds several, as in training; a document sees
    and counts itself alone.
    """

    def __init__(
        self,
        offset: int,
        time: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        padding: Int[Tensor, "batch"] | None = None,
        causal: bool = True,
        rope_length: int | None = None,
        documents: Int[Tensor, "batch time"] | None = None,
    ):
        self.offset, self.time, self.end = offset, time, offset + time
        self.dtype, self.device, self.causal = dtype, device, causal
        self.padding = None if padding is None else padding[:, None]
        self.rope_length = rope_length or self.end
        columns = torch.arange(offset, self.end, device=device)[None]
        self.positions = columns if self.padding is None else columns - self.padding
        self.documents = documents
        if documents is not None:
            begins = documents != documents.roll(1, 1)
            begins[:, 0] = True
            self.positions = columns - torch.where(begins, columns, 0).cummax(1).values
        self._rotary: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, Columns], Mask] = {}

    def rotary(
        self, rope: Rope
    ) -> tuple[Float[Tensor, "batch_or_1 time 1 head_dim"], Float[Tensor, "batch_or_1 time 1 head_dim"]]:
        """Cosines and signed sines for `layers.rope.rotate`."""
        tables = self._rotary.get(rope)
        if tables is None:
            tables = self._rotary[rope] = self._kept_tables(rope) or self._tables(rope)
        return tables

    def _tables(self, rope: Rope) -> tuple[Tensor, Tensor]:
        frequencies = self._frequencies(rope).to(self.device)
        return rotary_tables(frequencies, self.positions, rope.attention_factor, self.dtype)

    def _kept_tables(self, rope: Rope) -> tuple[Tensor, Tensor] | None:
        """Those of a token whose position is its column, from a block of them, on a CPU; None elsewhere."""
        plain = self.time == 1 and self.padding is None and self.documents is None and not rope.depends_on_length
        # A positions tensor of another class is one that only stands for numbers.
        if (
            not plain
            or type(self.positions) is not Tensor
            or not self.positions.is_cpu
            or torch.compiler.is_compiling()
        ):
            return None
        block, row = divmod(self.offset, ROTARY_BLOCK)
        cosines, sines = rotary_block(rope, block, self.dtype)
        return cosines[:, row : row + 1], sines[:, row : row + 1]

    def _frequencies(self, rope: Rope) -> Float[Tensor, "rows half"]:
        if self.padding is None or not rope.depends_on_length:
            return inverse_frequencies(rope, self.rope_length)[None]
        lengths = (self.rope_length - self.padding[:, 0]).tolist()
        return torch.stack([inverse_frequencies(rope, length) for length in lengths])

    def mask(self, window: int | None, columns: Columns) -> Mask:
        """Which keys each token may see: not after it, less than `window` before it, and no padding."""
        key = (window, columns)
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, columns)
        return self._masks[key]

    def _make_mask(self, window: int | None, columns: Columns) -> Mask:
        oldest = min(keys.start for keys in columns)
        alone = self.padding is None and self.documents is None
        everything = alone and (window is None or self.end - oldest <= window)
        if everything and (self.time == 1 or not self.causal):
            return Mask()
        queries, keys = self.positions[:, :, None], self._key_positions(columns)
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        rows, past = max(len(queries), len(keys)), keys.shape[2]
        bias = torch.zeros(rows, self.time, past, dtype=dtype, device=self.device)
        size = max(MASK_BLOCK // (rows * past), 1)
        for start in range(0, self.time, size):
            block = slice(start, start + size)
            hidden = ~self._allowed(queries[:, block], keys, window)
            if self.documents is not None:
                hidden |= self.documents[:, block, None] != self.documents[:, None, :]
            bias[:, block].masked_fill_(hidden, -torch.inf)
        return Mask(bias[:, None], everything and self.causal, self.time if self.causal else 0)

    def _allowed(
        self, queries: Int[Tensor, "batch_or_1 time 1"], keys: Int[Tensor, "batch_or_1 1 past"], window: int | None
    ) -> Bool[Tensor, "batch_or_1 time past"]:
        distance = queries - keys
        allowed = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            allowed = allowed & (distance.abs() < window)
        # A padded token sees itself, so that no row of the softmax is empty.
        return allowed & (keys >= 0) | (queries < 0) & (distance == 0)

    def _key_positions(self, columns: Columns) -> Int[Tensor, "batch_or_1 1 past"]:
        if self.documents is not None:
            return self.positions[:, None, :]
        keys = torch.cat([torch.arange(c.start, c.stop, device=self.device) for c in columns])
        return keys[None, None] if self.padding is None else (keys - self.padding)[:, None]
