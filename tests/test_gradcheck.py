"""Derivatives of every layer against finite differences, in float64."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import layers
from causallm.blocks import Mlp
from layers import mha_core
from layers.activation import ACTIVATIONS
from layers.embedding_layer import EmbeddingLayer
from layers.expert_store import ResidentExperts
from layers.gpt_oss_moe import GptOssExperts, GptOssMoe
from layers.kernels.block_formats import writable
from layers.kernels.packed_product import FEW_ROWS as FEW_PACKED_ROWS
from layers.linear import FEW_ROWS, FullyConnected, project
from layers.lm_head import LmHead, softcap
from layers.mha_core import MHACore, attend
from layers.moe_routing import mix_experts
from layers.packed import PackedEmbedding, PackedLinear
from layers.precision import at_least_float32
from layers.qwen_moe import QwenMoe
from layers.reshaped_rms_norm import OffsetReshapedRMSNorm, ReshapedRMSNorm
from layers.rms_norm import OffsetRMSNorm, RMSNorm
from layers.rope import Rope, inverse_frequencies, rotary_tables, rotate
from layers.step import Mask, Step
from layers.swiglu import ClampedSwiGLU, SwiGLU
from layers.tie_word_embedding import TieWordEmbedding

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare the derivative by every float input; one float32 rounding on the way is 0.06 off, the limit is 1e-7."""
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    assert function(*inputs).dtype == F64
    assert gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def check_module(module: nn.Module, *inputs: Tensor, call: Callable[..., Tensor] | None = None) -> None:
    """`check` the module, or `call` that uses it, by the inputs and all parameters, which are made random first.

    gradcheck changes its tensors in place, so the module need not be handed those that it holds.
    """
    call = call or module
    check(lambda *tensors: call(*tensors[: len(inputs)]), *inputs, *randomised(module).parameters())


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


IDS = torch.tensor([[3, 0, 3], [6, 3, 5]])

LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "rms norm": lambda: (RMSNorm(5, 1e-6), (randn(2, 3, 5),)),
    "rms norm, large epsilon": lambda: (RMSNorm(5, 0.5), (randn(2, 3, 5),)),
    "offset rms norm": lambda: (OffsetRMSNorm(5, 1e-6), (randn(2, 3, 5),)),
    "reshaped rms norm": lambda: (ReshapedRMSNorm(4, 1e-6), (randn(2, 3, 8),)),
    "offset reshaped rms norm": lambda: (OffsetReshapedRMSNorm(4, 1e-6), (randn(2, 3, 8),)),
    "embedding": lambda: (EmbeddingLayer(7, 4), (IDS,)),
    "scaled embedding": lambda: (EmbeddingLayer(7, 4, scale=3.3), (IDS,)),
    "linear, few rows": lambda: (FullyConnected(3, 8, bias=True), (randn(2, 3),)),
    "linear, many rows": lambda: (FullyConnected(3, 8, bias=True), (randn(FEW_ROWS + 1, 3),)),
    "head": lambda: (LmHead(3, 7), (randn(2, FEW_ROWS, 3),)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    layer, inputs = LAYERS[name]()
    check_module(layer, *inputs)


def layer_classes() -> Iterator[type[nn.Module]]:
    """All layers with a forward of their own."""
    for found in pkgutil.iter_modules(layers.__path__):
        module = importlib.import_module(f"layers.{found.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__:
                yield from [value] if "forward" in vars(value) else []


def test_no_layer_is_forgotten() -> None:
    """The table above and the tests below name every class; a new layer comes here as well."""
    checked = {type(make()[0]) for make in LAYERS.values()}
    checked |= {SwiGLU, ClampedSwiGLU, MHACore, QwenMoe, GptOssMoe, GptOssExperts, PackedLinear, PackedEmbedding}
    assert set(layer_classes()) - checked == set()


@pytest.mark.parametrize("kind", writable())
@pytest.mark.parametrize("rows", [2, max(FEW_PACKED_ROWS.values()) + 1])
def test_packed_layers_hand_gradients_through(kind: str, rows: int) -> None:
    """By the input and the bias: the packed weight itself is frozen."""
    layer = PackedLinear.from_float(randn(3, 256), randn(3), kind)
    bias = torch.nn.Parameter(randn(3))
    layer.bias = bias
    check(lambda x, _: layer(x), randn(rows, 256), bias)
    table = PackedEmbedding(3, 256, 1.0, kind, F64)
    table.weight = layer.weight
    check(table.project, randn(rows, 256))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_swiglu(activation: str) -> None:
    check_module(SwiGLU(activation), randn(3, 4), randn(3, 4))


def test_clamped_swiglu() -> None:
    """Inside, above and below the limit, not on it: there it has no derivative."""
    values = torch.tensor([-3.0, -1.9, -0.4, 0.7, 1.9, 3.0], dtype=F64)
    gate, up = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    check_module(ClampedSwiGLU(1.702, 2.0), gate, up)


def test_softcap() -> None:
    check(partial(softcap, cap=1.5), 2 * randn(3, 4))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("out_features", [5, 16])
def test_project(out_features: int, rows: int, contiguous: bool) -> None:
    weight = randn(out_features, 3) if contiguous else randn(3, out_features).T
    check(project, randn(rows, 3), weight)
    check(project, randn(rows, 3), weight, randn(out_features))


def test_a_tied_table_gets_the_derivatives_of_both_its_uses() -> None:
    tied = TieWordEmbedding(7, 4, scale=3.3)
    check_module(tied, randn(2, 4), call=tied.project)
    check_module(tied, IDS, call=lambda ids: tied.project(tied(ids).tanh()))


@pytest.mark.parametrize("batch", [1, 2])
def test_rotate(batch: int) -> None:
    """By the tables too, one for all rows or one each."""
    frequencies = inverse_frequencies(Rope("default", 6), 3)[None]
    positions = torch.arange(3) + torch.arange(batch)[:, None]
    check(rotate, randn(2, 3, 2, 6), *rotary_tables(frequencies, positions, 1.2, F64))


ATTENTION: dict[str, tuple[int | None, float | None, bool]] = {
    "plain": (None, None, False),
    "window": (3, None, False),
    "softcap": (None, 0.9, False),
    "sinks": (None, None, True),
    "all": (3, 0.9, True),
}
HEADS, KV_HEADS, HEAD_DIM, TIME = 4, 2, 2, 4


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 2])], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("query_block", [3, TIME])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(
    name: str, query_block: int, causal: bool, padding: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads in groups, one block of queries and two."""
    monkeypatch.setattr(mha_core, "QUERY_BLOCK", query_block)
    window, score_softcap, with_sinks = ATTENTION[name]
    core = MHACore(HEADS, KV_HEADS, HEAD_DIM, Rope("default", HEAD_DIM), 0.8, window, score_softcap)
    step = Step(0, TIME, F64, torch.device("cpu"), padding=padding, causal=causal)
    widths = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    inputs = [randn(2, TIME, width) for width in widths] + [randn(HEADS)] * with_sinks
    check(lambda query, key, value, sinks=None: core(query, key, value, step, None, sinks), *inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_token(masked: bool) -> None:
    allowed = torch.tensor([[True, False, True, True], [False, False, True, True]])[:, None, None]
    mask = Mask(torch.zeros(allowed.shape, dtype=F64).masked_fill(~allowed, -torch.inf)) if masked else Mask()
    past = (2, KV_HEADS, 4, HEAD_DIM)
    check(partial(attend, mask=mask, scale=0.8), randn(2, HEADS, 1, HEAD_DIM), randn(*past), randn(*past))


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 2])], ids=["full", "padded"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_in_shorter_floats(dtype: torch.dtype, window: int | None, padding: Tensor | None) -> None:
    """Finite differences say nothing here, but float64's derivatives do; some of these take a fused operator."""
    shapes = [(2, HEADS, TIME, HEAD_DIM)] + [(2, KV_HEADS, TIME, HEAD_DIM)] * 2
    short = [torch.randn(shape).to(dtype) for shape in shapes]
    derivatives = []
    for inputs in (short, [x.double() for x in short]):
        mask = Step(0, TIME, inputs[0].dtype, torch.device("cpu"), padding=padding).mask(window, (range(TIME),))
        leaves = [x.requires_grad_() for x in inputs]
        derivatives.append(torch.autograd.grad(attend(*leaves, mask, 0.8).double().square().sum(), leaves))
    for found, expected in zip(*derivatives, strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()


DIM, HIDDEN, EXPERTS, TOKENS = 3, 2, 4, 5


def mlps() -> ResidentExperts:
    sizes = ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    return ResidentExperts(Mlp(*(FullyConnected(*size) for size in sizes), SwiGLU()) for _ in range(EXPERTS))


def fused() -> GptOssExperts:
    return GptOssExperts(EXPERTS, DIM, HIDDEN, alpha=1.702, limit=7.0)


@pytest.mark.parametrize("make", [mlps, fused])
def test_mixing_by_tokens_weights_and_experts(make: Callable[[], Any]) -> None:
    experts, chosen = make(), torch.tensor([[0, 2], [2, 3], [3, 2], [0, 3], [2, 0]])
    inputs = randn(TOKENS, DIM), torch.rand(TOKENS, 2, dtype=F64)
    check_module(experts, *inputs, call=lambda x, weights: mix_experts(x, chosen, weights, experts))


def mixtures(num_chosen: int) -> dict[str, nn.Module]:
    return {
        "qwen": QwenMoe(FullyConnected(DIM, EXPERTS), mlps(), num_chosen, norm_topk_prob=False),
        "qwen, normalised": QwenMoe(FullyConnected(DIM, EXPERTS), mlps(), num_chosen, norm_topk_prob=True),
        "gpt-oss": GptOssMoe(FullyConnected(DIM, EXPERTS, bias=True), fused(), num_chosen),
    }


def router_of(mixture: Any) -> Any:
    return mixture.router if isinstance(mixture, GptOssMoe) else mixture.gate


@pytest.mark.parametrize("num_chosen", [1, 2, EXPERTS])
@pytest.mark.parametrize("name", mixtures(1))
def test_mixtures_of_experts_by_router_too(name: str, num_chosen: int) -> None:
    """Which experts are chosen has no derivative; the scores are far enough apart that the steps change no choice."""
    mixture, x = mixtures(num_chosen)[name], randn(1, TOKENS, DIM)
    check_module(mixture, x)
    assert router_of(mixture)(x).sort(-1).values.diff(dim=-1).min() > 1e-4


@pytest.mark.parametrize("name", mixtures(1))
def test_an_expert_gets_the_sum_of_what_its_tokens_give(name: str) -> None:
    mixture, x = randomised(mixtures(2)[name]), randn(1, 16, DIM)
    assert router_of(mixture)(x).topk(2).indices.flatten().bincount(minlength=EXPERTS).min() > 1
    together = gradients(mixture, x)
    apart = [gradients(mixture, token) for token in x.split(1, 1)]
    for whole, *parts in zip(together, *apart, strict=True):
        torch.testing.assert_close(whole, torch.stack(parts).sum(0))


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Of a loss that is a sum over tokens; zeros for parameters that have no part in it."""
    return torch.autograd.grad(module(x).square().sum(), list(module.parameters()), materialize_grads=True)


def test_precision_is_raised_and_never_lowered() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, F64)
    assert [at_least_float32(dtype) for dtype in dtypes] == [torch.float32] * 3 + [F64]
