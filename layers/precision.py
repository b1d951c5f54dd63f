"""The precision for what short floats would spoil: sums of squares and probabilities."""

from functools import cache

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the shorter float types; float64 stays, so that derivatives can be checked in it."""
    return torch.promote_types(dtype, torch.float32)


@cache
def multiplies_bf16_fast() -> bool:
    """Whether this processor has instructions for products of bf16 matrices, several times as fast as fp32 ones."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
