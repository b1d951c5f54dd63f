"""Products with packed weights: kernels for a few rows, expansion to bf16 for many, torch's operators elsewhere."""

import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from layers.kernels import native
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.many_rows import in_eights
from layers.precision import multiplies_bf16_fast

FEW_ROWS = {**dict.fromkeys(BLOCK_FORMATS, 20), "Q8_0": 48, "Q4_0": 48}
"""Rows up to which the native product is the faster where processors have no panels; beyond, expanding the weight
costs less than it saves. Measured on two cores, 3072 x 1024; us, native / expanded, Q4_0: 51/383 for one row, 622/652
for 48."""

FEW_ROWS_CUDA = 16
"""The same for Triton's product on a GPU. Reckoned, not measured: a row costs it some four instructions a weight, an
expansion moves eight times the bytes of a 4-bit weight; they meet at about 8 rows on an H200, at 40 on an RTX 4090."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_product(
    x: Float[Tensor, "*rows in_features"], weight: UInt8[Tensor, "out_features row_bytes"], kind: str
) -> Float[Tensor, "*rows out_features"]:
    """x W^T for a weight in one of `BLOCK_FORMATS`, in x's dtype.

    On a CPU rows are rounded to int8, one scale for 32 values, as llama.cpp does; sums are in fp32. Without AVX2 that
    holds for up to `FEW_ROWS` rows; more, and the weight, are multiplied in bf16 where the processor does that fast. On
    a GPU up to `FEW_ROWS_CUDA` rows are multiplied as they are, with sums in fp32, by Triton where it is installed and
    knows the format; with more, fp32 activations and the weight are rounded to bf16 where the GPU has that (others
    multiply in their own dtype). Elsewhere, and where x needs a gradient, the weight is expanded to x's dtype.
    ValueError where the shapes do not fit.
    """
    if BLOCK_FORMATS[kind].row_bytes(x.shape[-1]) != weight.shape[1]:
        held = BLOCK_FORMATS[kind].row_values(weight.shape[1])
        raise ValueError(f"rows of {x.shape[-1]} values do not fit a {kind} weight of {held} columns")
    if torch.compiler.is_compiling():
        return torch.ops.causallm.packed_product(x, weight, kind)
    return _product(x, weight, kind)


def _product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return functional.linear(x, _expanded_elsewhere(weight, kind, x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    product = _product_on_cpu if x.device.type == "cpu" else _product_elsewhere
    return product(rows, weight, kind).view(*x.shape[:-1], weight.shape[0])


def _product_on_cpu(rows: Tensor, weight: Tensor, kind: str) -> Tensor:
    if len(rows) > FEW_ROWS[kind] and not native.has_panels():
        wide = torch.bfloat16 if multiplies_bf16_fast() else rows.dtype
        floats = expanded(weight, kind, wide)
        return in_eights(lambda many: functional.linear(many, floats), rows.to(wide)).to(rows.dtype)
    if native.library() is None:
        return packed_product_twin(rows, weight, kind).to(rows.dtype)
    return native.linear(rows if rows.dtype in native.FLOATS else rows.float(), weight, kind).to(rows.dtype)


def _product_elsewhere(rows: Tensor, weight: Tensor, kind: str) -> Tensor:
    """By Triton where it serves."""
    kernels = triton_kernels(rows.device, kind)
    if kernels is not None and len(rows) <= FEW_ROWS_CUDA and rows.dtype in TRITON_DTYPES:
        return kernels.triton_product(rows, weight, kind)
    wide = torch.bfloat16 if rows.dtype == torch.float32 and _has_bf16(rows.device) else rows.dtype
    return functional.linear(rows.to(wide), _expanded_elsewhere(weight, kind, wide)).to(rows.dtype)


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU multiplies bf16 matrices faster than fp32 ones; NVIDIA's do from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def triton_kernels(device: torch.device, kind: str) -> ModuleType | None:
    """The module of Triton kernels where they serve; not while a model is compiled, which knows torch's operators."""
    kernels = _triton_kernels() if device.type == "cuda" and not torch.compiler.is_compiling() else None
    return kernels if kernels is not None and kind in kernels.WORDS else None


@cache
def _triton_kernels() -> ModuleType | None:
    if find_spec("triton") is None:
        warnings.warn("packed weights are slow on a GPU without triton; install it with causallm[cuda]", stacklevel=2)
        return None
    from layers.kernels import triton_product

    return triton_product


def _expanded_elsewhere(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Not by the native kernels."""
    kernels = triton_kernels(weight.device, kind)
    if kernels is not None and dtype in TRITON_DTYPES:
        return kernels.triton_expand(weight, kind, dtype)
    return BLOCK_FORMATS[kind].unpack(weight, dtype)


def expanded(
    weight: UInt8[Tensor, "rows row_bytes"], kind: str, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows columns"]:
    """The values of a packed weight, fp32 exactly or rounded to another dtype."""
    packed = BLOCK_FORMATS[kind]
    if weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or native.library() is None:
        return _expanded_elsewhere(weight, kind, dtype)
    return native.expand(weight.contiguous(), kind, packed.row_values(weight.shape[1]), dtype)


def packed_product_twin(
    rows: Float[Tensor, "rows in_features"], weight: UInt8[Tensor, "out_features row_bytes"], kind: str
) -> Float[Tensor, "rows out_features"]:
    """What the native product computes, by torch's operators; they differ in the order of fp32 sums alone."""
    return functional.linear(rounded(rows.float()), BLOCK_FORMATS[kind].unpack(weight))


def rounded(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Each 32 values as int8 times their largest magnitude / 127, half to even."""
    blocks = rows.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    # A quotient that is rounded once: torch's `127 / largest` is 127 times the rounded reciprocal.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return ((blocks * inverse).round() * (largest / 127)).flatten(-2)


@torch.library.custom_op("causallm::packed_product", mutates_args=())
def _operator(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return _product(x, weight, kind)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
