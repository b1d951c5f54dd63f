"""Any kind of key-value cache in 8 bits: a byte a number and one scale for the key, or value, of a token and head."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from layers.kv_cache import Columns, KVCache, Room

SCALE = torch.float32
LARGEST = 127


def position_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that the key, or the value, of one token and head takes in a cache of `dtype`."""
    return head_dim * dtype.itemsize + (SCALE.itemsize if dtype == torch.int8 else 0)


def quantize(
    x: Float[Tensor, "batch kv_heads time head_dim"],
) -> tuple[Int8[Tensor, "batch kv_heads time head_dim"], Float[Tensor, "batch kv_heads time 1"]]:
    """Codes and scales: x is about codes * scales, the largest magnitude of each head_dim numbers exactly."""
    x = x.to(SCALE)
    scales = x.abs().amax(-1, keepdim=True) / LARGEST
    # Numbers that are all 0 have scale 0; any divisor will do for them.
    codes = (x / torch.where(scales == 0, 1.0, scales)).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


class Int8KVCache(KVCache):
    """Two caches of one kind, for codes (int8) and scales (`SCALE`, head_dim 1), that always do the same.

    What is appended is quantised; `update` gives everything back as floats of the dtype it came in, so attention
    computes as ever, on keys and values of 8 bits. The native kernels read the codes themselves, for a token or a few.
    """

    def __init__(self, codes: KVCache, scales: KVCache):
        self._codes, self._scales = codes, scales
        self.offset, self.limit, self.rollback = codes.offset, codes.limit, codes.rollback

    @property
    def dtype(self) -> torch.dtype:
        return self._codes.dtype

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def update(
        self,
        keys: Float[Tensor, "batch kv_heads time head_dim"],
        values: Float[Tensor, "batch kv_heads time head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads past head_dim"], Float[Tensor, "batch kv_heads past head_dim"], Columns]:
        """Append; returns floats, a copy of what is held, and their columns."""
        (key_codes, key_scales), (value_codes, value_scales) = quantize(keys), quantize(values)
        key_scales, value_scales, _ = self._scales.update(key_scales, value_scales)
        key_codes, value_codes, columns = self._codes.update(key_codes, value_codes)
        self.offset = self._codes.offset
        return (key_codes * key_scales).to(keys.dtype), (value_codes * value_scales).to(values.dtype), columns

    def reserve(self, columns: int) -> None:
        self._codes.reserve(columns)
        self._scales.reserve(columns)

    def takes(self, time: int) -> bool:
        return self._codes.takes(time)

    def holds(self, batch: int, kv_heads: int, head_dim: int) -> bool:
        return self._codes.holds(batch, kv_heads, head_dim)

    def claim(self, time: int) -> Room:
        """The caller writes codes and scales."""
        room, scales = self._codes.claim(time), self._scales.claim(time)
        self.offset = self._codes.offset
        return room._replace(scales=(scales.keys, scales.values))

    def give_back(self, time: int) -> None:
        self._codes.give_back(time)
        self._scales.give_back(time)
        self.offset = self._codes.offset

    def reaches(self, columns: int) -> bool:
        return self._codes.reaches(columns)

    def truncate(self, columns: int) -> None:
        self._codes.truncate(columns)
        self._scales.truncate(columns)
        self.offset = columns

    def state(self, back: bool = False) -> dict[str, Tensor]:
        """Codes under "keys" and "values", scales under "key_scales" and "value_scales"."""
        scales = self._scales.state(back)
        return {**self._codes.state(back), "key_scales": scales["keys"], "value_scales": scales["values"]}

    def restore(self, state: Mapping[str, Tensor], offset: int) -> None:
        for name in ("keys", "values"):
            scales = state.get(f"{name[:-1]}_scales")
            if state[name].dtype != torch.int8 or scales is None or scales.shape[:3] != state[name].shape[:3]:
                raise ValueError(f"the state's {name} are no bytes with a scale each, as a cache of 8 bits holds them")
        self._codes.restore(state, offset)
        self._scales.restore({"keys": state["key_scales"], "values": state["value_scales"]}, offset)
        self.offset = offset
