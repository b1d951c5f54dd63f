"""Random packed weights: bytes of ggml's block formats made as such, at the speed of the random numbers."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from layers.kernels.block_formats import BLOCK_FORMATS

SAMPLE_BLOCKS = 1 << 13
MINIMUM_RATIOS = {"Q4_K": 7.5, "Q5_K": 15.5, "Q4_1": -7.5, "Q5_1": -15.5}
"""What a second scale is to the first: K formats subtract it times as random a number, the others add it. It is the
mean of the codes, and so values are zero on average."""


class RandomBlocks:
    """Packed weights of mean 0 and standard deviation `deviation`; the same for the same seed and order of calls."""

    def __init__(self, seed: int, deviation: float):
        self._bits = np.random.SFC64(seed)
        self._generator = np.random.Generator(self._bits)
        self._deviation = deviation

    def make(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Bytes of a packed tensor of this shape (..., row_bytes), uint8, in the format `kind`.

        All codes and sub-scales are random bytes. A block's float16 scale has a magnitude 0.75 to 1.25 times that
        which gives the deviation, and a random sign: else codes, which are -8 to 7, would pull all values one way.
        """
        blocks = _random_bytes(self._bits, torch.Size(shape).numel()).reshape(-1, BLOCK_FORMATS[kind].nbytes)
        spread = self._generator.random(len(blocks), dtype=np.float32) - 0.5
        _set_scales(blocks, kind, (spread + np.copysign(0.75, spread)) * (self._deviation / _unit_deviation(kind)))
        return torch.from_numpy(blocks.reshape(shape))


def _random_bytes(bits: np.random.SFC64, count: int) -> np.ndarray:
    return bits.random_raw(-(-count // 8)).view(np.uint8)[:count]


def _set_scales(blocks: np.ndarray, kind: str, scales: np.ndarray) -> None:
    """Put each block's scale, and the second one of formats that have it, where they belong."""
    place = BLOCK_FORMATS[kind].halves
    halves = np.stack((scales, scales * MINIMUM_RATIOS.get(kind, 0.0)), 1)[:, : (place.stop - place.start) // 2]
    blocks[:, place] = halves.astype("<f2").view(np.uint8)


@cache
def _unit_deviation(kind: str) -> float:
    """The standard deviation of random blocks whose scales have the root mean square that `make` gives to 1."""
    blocks = _random_bytes(np.random.SFC64(0), SAMPLE_BLOCKS * BLOCK_FORMATS[kind].nbytes).reshape(SAMPLE_BLOCKS, -1)
    # Of 0.75 to 1.25, all equally likely, the mean square is 1 + 0.25^2 / 3.
    _set_scales(blocks, kind, np.full(SAMPLE_BLOCKS, (1 + 0.25**2 / 3) ** 0.5))
    return BLOCK_FORMATS[kind].unpack(torch.from_numpy(blocks)).square().mean().sqrt().item()
