"""Products with packed weights: native for a few rows, expanded to bf16 for many, torch's operators everywhere else."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from layers.kernels import native
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.precision import multiplies_bf16_fast

FEW_ROWS = {"Q8_0": 48, "Q4_0": 48, "Q4_K": 20, "Q6_K": 20}
"""Rows up to which the native product is the faster; beyond, expanding the weight costs less than it saves.

Measured on two cores with AVX-512, 3072 x 1024; us, native / expanded, Q4_0: 51/383 for one row, 622/652 for 48."""


def packed_product(
    x: Float[Tensor, "*rows in_features"], weight: UInt8[Tensor, "out_features row_bytes"], kind: str
) -> Float[Tensor, "*rows out_features"]:
    """x W^T for a weight in one of `BLOCK_FORMATS`, in x's dtype.

    On a CPU up to `FEW_ROWS` rows are rounded to int8, one scale for 32 values, as llama.cpp does; sums are in fp32.
    More rows and the weight are multiplied in bf16 where the processor does that fast. Elsewhere, and where x needs a
    gradient, the weight is expanded to x's dtype. ValueError where the shapes do not fit.
    """
    if BLOCK_FORMATS[kind].row_bytes(x.shape[-1]) != weight.shape[1]:
        held = BLOCK_FORMATS[kind].row_values(weight.shape[1])
        raise ValueError(f"rows of {x.shape[-1]} values do not fit a {kind} weight of {held} columns")
    if torch.compiler.is_compiling():
        return torch.ops.causallm.packed_product(x, weight, kind)
    return _product(x, weight, kind)


def _product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return functional.linear(x, BLOCK_FORMATS[kind].unpack(weight, x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW_ROWS[kind]:
        wide = torch.bfloat16 if multiplies_bf16_fast() else x.dtype
        return functional.linear(x.to(wide), expanded(weight, kind, wide)).to(x.dtype)
    if native.library() is None:
        product = packed_product_twin(rows, weight, kind)
    else:
        product = native.linear(rows.float(), weight, kind)
    return product.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def expanded(
    weight: UInt8[Tensor, "rows row_bytes"], kind: str, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows columns"]:
    """The values of a packed weight, fp32 exactly or rounded to another dtype."""
    packed = BLOCK_FORMATS[kind]
    if weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or native.library() is None:
        return packed.unpack(weight, dtype)
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
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((blocks * inverse).round() * (largest / 127)).flatten(-2)


@torch.library.custom_op("causallm::packed_product", mutates_args=())
def _operator(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return _product(x, weight, kind)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
