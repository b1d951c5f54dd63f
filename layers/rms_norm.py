"""Root-mean-square normalisation, and Gemma's variant whose weight counts from one."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from layers.kernels.native_norm import native_norm
from layers.precision import at_least_float32


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, epsilon: float, dtype: torch.dtype | None = None):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        if (rows := native_norm(x, self.weight, self.epsilon, 0.0)) is not None:
            return rows
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose stored weight is the difference from one, computed in at least fp32, as Gemma defines it."""

    def __init__(self, dim: int, epsilon: float, dtype: torch.dtype | None = None):
        super().__init__(dim, epsilon, dtype)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        if (rows := native_norm(x, self.weight, self.epsilon, 1.0)) is not None:
            return rows
        dtype = at_least_float32(x.dtype)
        scale = self.weight.to(dtype) + 1.0
        return functional.rms_norm(x.to(dtype), self.weight.shape, scale, self.epsilon).to(x.dtype)
