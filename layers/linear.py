"""Fully connected layers; every kind has the same interface, so that callers never ask which it is."""

import math
import platform
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from layers.kernels import native
from layers.kernels.many_rows import in_eights

FEW_ROWS = 8
"""Up to so many fp32 rows a product on the CPU is split by hand; measured on two cores, 3072 x 1024."""
SPLIT_DTYPES = (torch.float32, torch.float64)
"""Those split so; float64 only to be what float32 is, for derivatives are checked in it."""


ONEDNN = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
"""Whether many fp32 rows go to oneDNN's product: torch asks MKL, which on AMD processors is half as fast."""


def project(
    x: Float[Tensor, "*rows in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, "out_features"] | None = None,
) -> Float[Tensor, "*rows out_features"]:
    """x W^T + b in the weight's dtype, the result in x's."""
    if torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, bias)
    if _multiplies_natively(x, weight):
        exact = native.linear(x.reshape(-1, x.shape[-1]).float(), weight, native.FLOATS[weight.dtype])
        result = (exact if bias is None else exact + bias).to(x.dtype)
        return result.view(*x.shape[:-1], weight.shape[0])
    rows = x.to(weight.dtype)
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return functional.linear(rows, weight, bias).to(x.dtype)
    if rows.numel() > FEW_ROWS * rows.shape[-1]:
        return in_eights(lambda many: _many(many, weight, bias), rows).to(x.dtype)
    if rows.dtype in SPLIT_DTYPES and weight.is_contiguous():
        return _split(rows, weight, bias).to(x.dtype)
    return functional.linear(rows, weight, bias).to(x.dtype)


def _many(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """On a CPU."""
    if not ONEDNN or rows.dtype != torch.float32:
        return functional.linear(rows, weight, bias)
    product = _OneDnn.apply if torch.is_grad_enabled() else _onednn
    return product(rows, weight, bias)


def _multiplies_natively(x: Tensor, weight: Tensor) -> bool:
    """A few rows on a CPU without a gradient, for which the native kernels read the weight at the memory's speed."""
    return (
        x.device.type == "cpu"
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and x.dtype == weight.dtype
        and x.shape[-1] == weight.shape[1]
        and x.dtype in native.FLOATS
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and native.library() is not None
    )


def _split(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """MKL gives a product of a few rows to a single thread, which reads half of what the memory delivers; as a batch
    of row blocks of W it is given to all."""
    out_features, in_features = weight.shape
    parts = math.gcd(out_features, 16)
    columns = rows.reshape(-1, in_features).t().expand(parts, -1, -1)
    products = torch.bmm(weight.view(parts, -1, in_features), columns)
    result = products.flatten(0, 1).t().reshape(*rows.shape[:-1], out_features)
    return result if bias is None else result + bias


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _OneDnn(torch.autograd.Function):
    """The operator has no derivative of its own: dx = dy W, dW = dy^T x, db = sum dy."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _onednn(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn(gradient.contiguous(), weight.t()) if needs_rows else None,
            flat.t() @ rows.flatten(0, -2) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


class FullyConnected(nn.Module):
    """y = x W^T + b with a float weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        return project(x, self.weight, self.bias)

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        """The weight as plain floats."""
        return self.weight.detach()

    @classmethod
    def from_float(
        cls,
        weight: Float[Tensor, "out_features in_features"],
        bias: Float[Tensor, "out_features"] | None = None,
    ) -> "FullyConnected":
        """A layer of this kind that holds `weight` without copying it."""
        out_features, in_features = weight.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, bias is not None, weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        return layer
