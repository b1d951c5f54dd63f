"""Rotary position embedding: the six kinds of frequencies and the rotation itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Everything that fixes one rotary embedding; hashable, so that a step computes its tables once.

    Field names and meaning are those of `rope_parameters` in Hugging Face configs. `kind` is one of `ROPE_KINDS`.
    """

    kind: str
    head_dim: int
    theta: float = 10000.0
    factor: float = 1.0
    max_positions: int = 2048
    original_positions: int = 2048
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """True for the kinds whose frequencies change with the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


def _plain(rope: Rope, theta: float) -> Float[Tensor, "half"]:
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device="cpu") / rope.head_dim
    return 1.0 / theta**exponents


def _default(rope: Rope, length: int) -> Float[Tensor, "half"]:
    return _plain(rope, rope.theta)


def _linear(rope: Rope, length: int) -> Float[Tensor, "half"]:
    """Position interpolation, arXiv 2306.15595."""
    return _plain(rope, rope.theta) / rope.factor


def _dynamic(rope: Rope, length: int) -> Float[Tensor, "half"]:
    """NTK-aware scaling that grows with the length; the base is raised once the trained length is passed."""
    stretch = rope.factor * max(length, rope.max_positions) / rope.max_positions - (rope.factor - 1)
    return _plain(rope, rope.theta * stretch ** (rope.head_dim / (rope.head_dim - 2)))


def _llama3(rope: Rope, length: int) -> Float[Tensor, "half"]:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    frequencies = _plain(rope, rope.theta)
    turns = rope.original_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, blend.clamp(0, 1))


def _yarn(rope: Rope, length: int) -> Float[Tensor, "half"]:
    """YaRN, arXiv 2309.00071, section 3.2: a linear ramp between interpolated and kept frequencies."""

    def dimension(turns: float) -> float:
        return rope.head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    frequencies = _plain(rope, rope.theta)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _longrope(rope: Rope, length: int) -> Float[Tensor, "half"]:
    """LongRoPE, arXiv 2402.13753: searched factors, one set within the original length and one beyond."""
    factors = rope.long_factor if length > rope.original_positions else rope.short_factor
    return _plain(rope, rope.theta) / torch.tensor(factors, dtype=torch.float32, device="cpu")


ROPE_KINDS: dict[str, Callable[[Rope, int], Float[Tensor, "half"]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def inverse_frequencies(rope: Rope, length: int) -> Float[Tensor, "half"]:
    """Radians per position for each pair of dimensions, fp32 on the CPU; `length` is the sequence's, in tokens."""
    return ROPE_KINDS[rope.kind](rope, length)


def rotary_tables(
    frequencies: Float[Tensor, "rows half"],
    positions: Int[Tensor, "batch time"],
    attention_factor: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch time 1 head_dim"], Float[Tensor, "batch time 1 head_dim"]]:
    """Cosines and signed sines for `rotate`; `rows` is 1, or the batch where rows differ in length."""
    angles = positions[:, :, None].float() * frequencies[:, None, :]
    cosines, sines = angles.cos() * attention_factor, angles.sin() * attention_factor
    cosines, sines = torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
    return cosines.to(dtype)[:, :, None], sines.to(dtype)[:, :, None]


ROTARY_BLOCK = 64
"""Positions whose tables are made at once where tokens come one at a time: one alone takes nearly as long."""


@lru_cache(maxsize=8)
def rotary_block(
    rope: Rope, number: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "1 block 1 head_dim"], Float[Tensor, "1 block 1 head_dim"]]:
    """`rotary_tables` on the CPU for the `ROTARY_BLOCK` positions of a block, for kinds that no length changes."""
    with torch.inference_mode(False):
        positions = torch.arange(number * ROTARY_BLOCK, (number + 1) * ROTARY_BLOCK, device="cpu")[None]
        return rotary_tables(inverse_frequencies(rope, 0)[None], positions, rope.attention_factor, dtype)


def rotate(
    x: Float[Tensor, "batch time heads head_dim"],
    cosines: Float[Tensor, "batch_or_1 time 1 head_dim"],
    sines: Float[Tensor, "batch_or_1 time 1 head_dim"],
) -> Float[Tensor, "batch time heads head_dim"]:
    """Rotate dimension i against i + head_dim / 2, RoFormer (arXiv 2104.09864) in GPT-NeoX's order."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
