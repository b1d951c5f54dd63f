"""The Triton kernels against torch's operators, under Triton's interpreter; run by test_triton_product.py.

The interpreter is chosen when triton is imported, for a whole process, so these tests have one of their own.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layers.kernels import packed_product as products
from layers.kernels import triton_product as kernels
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.packed import PackedEmbedding, PackedLinear

KINDS = tuple(kernels.WORDS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random_bytes(kind: str, rows: int, blocks: int) -> Tensor:
    """Every code and scale code there is, with float16 scales of all sizes and signs, zero and subnormal ones too."""
    block = BLOCK_FORMATS[kind]
    packed = torch.randint(256, (rows, blocks, block.nbytes), dtype=torch.uint8)
    halves = packed[..., block.halves].clone().view(torch.float16)
    halves = torch.where(halves.isfinite(), halves, torch.randn(halves.shape).half())
    halves[0, 0] = 0
    halves[-1, -1] = 3 * 2**-24
    packed[..., block.halves] = halves.view(torch.uint8)
    return packed.flatten(1)


def packed_weight(kind: str, rows: int, blocks: int) -> Tensor:
    return BLOCK_FORMATS[kind].pack(torch.randn(rows, blocks * BLOCK_FORMATS[kind].values) * torch.rand(rows, 1))


def blocks_beyond_a_tile(kind: str) -> int:
    """So many that a program has a second turn."""
    return kernels.TILE * kernels.UNIT_VALUES[kind] // BLOCK_FORMATS[kind].values + 1


def last_places(found: Tensor, expected: Tensor) -> int:
    """By how many numbers of their dtype two tensors of 16-bit floats differ at most."""
    return int((found.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max())


SIZES = [(kind, *size) for kind in KINDS for size in ((1, 1), (5, 3), (3, blocks_beyond_a_tile(kind)))]


@pytest.mark.parametrize(("kind", "rows", "blocks"), SIZES)
def test_an_expansion_is_unpack_bit_for_bit(kind: str, rows: int, blocks: int) -> None:
    weight = random_bytes(kind, rows, blocks)
    found = kernels.triton_expand(weight, kind)
    assert torch.equal(found, BLOCK_FORMATS[kind].unpack(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_an_expansion_rounds_to_short_floats(kind: str) -> None:
    weight = packed_weight(kind, 2, 3)
    unpack = partial(BLOCK_FORMATS[kind].unpack, weight)
    assert torch.equal(kernels.triton_expand(weight, kind, torch.float16), unpack(torch.float16))
    # The interpreter cuts bf16 off, where a GPU rounds to the nearest.
    assert last_places(kernels.triton_expand(weight, kind, torch.bfloat16), unpack(torch.bfloat16)) <= 1


@pytest.mark.parametrize(("kind", "rows", "blocks"), SIZES)
@pytest.mark.parametrize("tokens", [1, 11])
def test_a_product_is_that_with_the_unpacked_weight(kind: str, rows: int, blocks: int, tokens: int) -> None:
    weight = packed_weight(kind, rows, blocks)
    x = torch.randn(tokens, blocks * BLOCK_FORMATS[kind].values)
    wide = BLOCK_FORMATS[kind].unpack(weight).double()
    error = (kernels.triton_product(x, weight, kind) - x.double() @ wide.T).abs()
    assert (error <= 1e-6 * (x.double().abs() @ wide.abs().T)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_any_bytes(kind: str) -> None:
    weight = random_bytes(kind, 6, 5)
    x = torch.randn(2, 5 * BLOCK_FORMATS[kind].values)
    wide = BLOCK_FORMATS[kind].unpack(weight).double()
    error = (kernels.triton_product(x, weight, kind) - x.double() @ wide.T).abs()
    assert (error <= 1e-6 * (x.double().abs() @ wide.abs().T)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_activations_are_multiplied_in_fp32(kind: str, dtype: torch.dtype) -> None:
    weight = packed_weight(kind, 5, 2)
    x = torch.randn(2, 2 * BLOCK_FORMATS[kind].values).to(dtype)
    found = kernels.triton_product(x, weight, kind)
    assert found.dtype == dtype
    exact = x.double() @ BLOCK_FORMATS[kind].unpack(weight).double().T
    # One place for the rounding of the result, which the interpreter does not do to the nearest.
    assert ((found - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_many_rows_of_a_weight_take_another_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed_weight("Q4_0", 9, 2), torch.randn(1, 64)
    few = kernels.triton_product(x, weight, "Q4_0")
    monkeypatch.setattr(kernels, "MANY", 8)
    torch.testing.assert_close(kernels.triton_product(x, weight, "Q4_0"), few)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_bytes_that_lie_oddly_are_copied(kind: str) -> None:
    weight = packed_weight(kind, 3, 2)
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), weight.flatten()))[1:].view_as(weight)
    wide = torch.stack((weight, weight), 1)[:, 1]
    for other in (odd, wide):
        assert torch.equal(kernels.triton_expand(other, kind), BLOCK_FORMATS[kind].unpack(weight))


def test_nothing_is_launched_for_nothing() -> None:
    weight = packed_weight("Q8_0", 3, 2)
    assert kernels.triton_product(torch.empty(0, 64), weight, "Q8_0").shape == (0, 3)
    assert kernels.triton_expand(weight[:0], "Q8_0").shape == (0, 64)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Layers take the course of a GPU; the kernels called, each with the dtype it was given."""
    calls: list[tuple[str, Any]] = []

    def product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
        calls.append(("product", x.dtype))
        return kernels.triton_product(x, weight, kind)

    def expand(weight: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        calls.append(("expand", dtype))
        return kernels.triton_expand(weight, kind, dtype)

    both = SimpleNamespace(triton_product=product, triton_expand=expand, WORDS=kernels.WORDS)
    monkeypatch.setattr(products, "triton_kernels", lambda device, kind: both if kind in both.WORDS else None)
    monkeypatch.setattr(products, "_product_on_cpu", products._product_elsewhere)
    monkeypatch.setattr("layers.packed.expanded", both.triton_expand)
    return calls


def layer_and_input(tokens: int, dtype: torch.dtype) -> tuple[PackedLinear, Tensor, Tensor]:
    weight, bias = torch.randn(6, 64), torch.randn(6)
    layer = PackedLinear.from_float(weight, bias, "Q8_0")
    x = torch.randn(tokens, 1, 64).to(dtype)
    return layer, x, functional.linear(x.float(), layer.dequantize(), bias)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_multiplies_few_rows_as_they_are(dtype: torch.dtype, launched: list[tuple[str, Any]]) -> None:
    layer, x, expected = layer_and_input(products.FEW_ROWS_CUDA, dtype)
    launched.clear()
    found = layer(x)
    assert launched == [("product", dtype)]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1 if dtype != torch.float32 else 1e-5, rtol=0.02)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("card", [False, True])
def test_a_layer_expands_its_weight_for_many_rows(
    dtype: torch.dtype, card: bool, launched: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the dtype of short activations; for fp32 to bf16 where the card has it."""
    monkeypatch.setattr(products, "_has_bf16", lambda device: card)
    layer, x, expected = layer_and_input(products.FEW_ROWS_CUDA + 1, dtype)
    launched.clear()
    found = layer(x)
    wide = torch.bfloat16 if card and dtype == torch.float32 else dtype
    assert launched == [("expand", wide)]
    assert found.dtype == dtype
    exact = wide == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if exact else 0.3, rtol=1e-5 if exact else 0.05)


def test_what_learns_gets_gradients_through_the_expansion(launched: list[tuple[str, Any]]) -> None:
    layer, x, _ = layer_and_input(2, torch.float32)
    launched.clear()
    x = nn.Parameter(x)
    layer(x).sum().backward()
    assert launched == [("expand", torch.float32)]
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], layer.dequantize().sum(0))


def test_an_embedding_expands_the_rows_it_is_asked_for(launched: list[tuple[str, Any]]) -> None:
    table = torch.randn(10, 256)
    layer = PackedEmbedding(10, 256, 1.0, "Q6_K", torch.float32)
    layer.weight.data = BLOCK_FORMATS["Q6_K"].pack(table)
    found = layer(torch.tensor([[3, 9, 3]]))
    assert launched == [("expand", torch.float32)]
    assert torch.equal(found[0], BLOCK_FORMATS["Q6_K"].unpack(layer.weight[[3, 9, 3]]))
