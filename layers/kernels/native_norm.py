"""RMSNorm by the native kernel, which is what norms are in the native halves of blocks too."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from layers.kernels import native

CODES = {dtype: native.KINDS[kind] for dtype, kind in native.FLOATS.items()}
"""Numbers of the dtypes that vectors may have."""


class StoredArguments(ctypes.Structure):
    """struct stored: a vector of weights, or none."""

    _fields_ = [("values", native.Address), ("kind", ctypes.c_int)]


class NormArguments(ctypes.Structure):
    """struct norm."""

    _fields_ = [("weight", StoredArguments), ("epsilon", ctypes.c_float), ("offset", ctypes.c_float)]


def native_norm(
    x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "dim"], epsilon: float, offset: float
) -> Float[Tensor, "*rows dim"] | None:
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset) over the last dimension, in fp32, rounded once to x's dtype.

    None where the kernel does not serve: off the CPU, for a gradient, or where a weight would first be rounded.
    """
    if (
        not x.is_cpu
        or x.dtype not in CODES
        or weight.dtype not in CODES
        or x.dtype not in (torch.float32, weight.dtype)
        or x.shape[-1:] != weight.shape
        or not (x.is_contiguous() and weight.is_contiguous())
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        or torch.compiler.is_compiling()
        or type(x) is not Tensor  # but one that only stands for numbers
        or _transformed()
        or native.library() is None
    ):
        return None
    out = torch.empty_like(x)
    norm = NormArguments(StoredArguments(weight.data_ptr(), CODES[weight.dtype]), epsilon, offset)
    native.normalise(norm, x, out)
    return out


def _transformed() -> bool:
    """Whether derivatives go forward, or torch.func transforms a function: both see torch's operators alone."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
