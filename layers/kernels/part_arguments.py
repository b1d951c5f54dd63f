"""Layers, norms and activations as addresses and numbers, in the structs of half_arguments.h."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from layers.activation import ACTIVATIONS
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.native import FLOATS, KINDS, Address, Size
from layers.kernels.native_norm import CODES, NormArguments, StoredArguments
from layers.linear import FullyConnected
from layers.packed import PackedLinear
from layers.reshaped_rms_norm import OffsetReshapedRMSNorm, ReshapedRMSNorm
from layers.rms_norm import OffsetRMSNorm, RMSNorm
from layers.swiglu import SwiGLU

CACHE_CODES = {**CODES, torch.int8: KINDS["Q8_0"]}
"""Of the dtypes that a cache may have: int8 has scales apart."""
ACTIVATION_CODES = {
    id(ACTIVATIONS[name]): code for name, code in (("silu", 0), ("swish", 0), ("gelu_pytorch_tanh", 1), ("gelu_new", 1))
}
HEAD_NORMS = (ReshapedRMSNorm, OffsetReshapedRMSNorm)
BLOCK_NORMS = (RMSNorm, OffsetRMSNorm)


class UnknownPartError(Exception):
    """A part of the half is of a kind that the kernels do not know."""


class LayerArguments(ctypes.Structure):
    """struct layer."""

    _fields_ = [
        ("weight", Address),
        ("bias", StoredArguments),
        ("rows", Size),
        ("columns", Size),
        ("kind", ctypes.c_int),
    ]


def activation_code(activation: nn.Module) -> int:
    """The number of what a SwiGLU does; UnknownPartError where it is none that the kernels know."""
    if not isinstance(activation, SwiGLU) or type(activation) is not SwiGLU:
        raise UnknownPartError
    if id(activation.activation) not in ACTIVATION_CODES:
        raise UnknownPartError
    return ACTIVATION_CODES[id(activation.activation)]


def width(norm: Any) -> int:
    """Of the vectors that a norm takes."""
    if not isinstance(norm, RMSNorm):
        raise UnknownPartError
    return norm.weight.shape[0]


def stored(tensor: Tensor | None, count: int) -> StoredArguments:
    """A vector of `count` weights; UnknownPartError where it is none."""
    if tensor is None:
        return StoredArguments()
    if tensor.shape != (count,) or tensor.dtype not in CODES or not tensor.is_contiguous():
        raise UnknownPartError
    return StoredArguments(tensor.data_ptr(), CODES[tensor.dtype])


def layer(module: nn.Module, rows: int, columns: int) -> LayerArguments:
    """A linear layer of that many outputs and inputs; UnknownPartError where it is none."""
    if not isinstance(module, FullyConnected | PackedLinear) or type(module) not in (FullyConnected, PackedLinear):
        raise UnknownPartError
    kind = module.kind if isinstance(module, PackedLinear) else FLOATS.get(module.weight.dtype, "")
    return layer_of(module.weight, kind, module.bias, rows, columns)


def layer_of(weight: Tensor, kind: str, bias: Tensor | None, rows: int, columns: int) -> LayerArguments:
    """The same from a weight of which `kind` says how its rows are stored."""
    held = BLOCK_FORMATS[kind].row_bytes(columns) if kind in BLOCK_FORMATS else columns
    if kind not in KINDS or weight.shape != (rows, held) or not weight.is_contiguous():
        raise UnknownPartError
    return LayerArguments(weight.data_ptr(), stored(bias, rows), rows, columns, KINDS[kind])


def norm(module: nn.Module | None, kinds: tuple[type[RMSNorm], ...], dim: int) -> NormArguments:
    """A norm of one of these classes; an absent one has no weight."""
    if module is None or type(module) is nn.Identity:
        return NormArguments()
    if type(module) not in kinds or not isinstance(module, RMSNorm) or not isinstance(module.epsilon, float):
        raise UnknownPartError
    return NormArguments(stored(module.weight, dim), module.epsilon, float(isinstance(module, OffsetRMSNorm)))
