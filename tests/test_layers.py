"""Norms, activations, embeddings, linears and mixtures of experts against transformers' modules or their formulas."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_kernels import needs_kernels
from torch import Tensor, nn
from torch.autograd import forward_ad

from layers.activation import ACTIVATIONS
from layers.embedding_layer import EmbeddingLayer
from layers.expert_store import Expert, ExpertStore, ResidentExperts
from layers.gpt_oss_moe import GptOssExperts, GptOssMoe
from layers.kernels import native
from layers.linear import FullyConnected
from layers.lm_head import LmHead, softcap
from layers.moe_routing import mix_experts
from layers.qwen_moe import QwenMoe
from layers.registry import LayerRegistry
from layers.reshaped_rms_norm import OffsetReshapedRMSNorm, ReshapedRMSNorm
from layers.rms_norm import OffsetRMSNorm, RMSNorm
from layers.swiglu import ClampedSwiGLU, SwiGLU
from layers.tie_word_embedding import TieWordEmbedding


def filled(module: nn.Module) -> Any:
    """The module with random parameters that need no gradient."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(False)
    return module


def rms(x: Tensor, epsilon: float) -> Tensor:
    return x.double() / (x.double().pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_is_its_formula(epsilon: float, scale: float) -> None:
    norm, x = filled(RMSNorm(24, epsilon)), scale * torch.randn(2, 3, 24)
    torch.testing.assert_close(norm(x), (rms(x, epsilon) * norm.weight).float())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_offset_rms_norm_counts_its_weight_from_one(scale: float) -> None:
    norm, x = filled(OffsetRMSNorm(24, 1e-6)), scale * torch.randn(2, 3, 24)
    torch.testing.assert_close(norm(x), (rms(x, 1e-6) * (1 + norm.weight)).float())


@needs_kernels
@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
def test_norms_by_the_kernel_are_torchs(kind: type[RMSNorm], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, served = filled(kind(52, 1e-6)), torch.randn(2, rows, 52), []
    run = native.normalise
    monkeypatch.setattr(native, "normalise", lambda *arguments: (served.append(1), run(*arguments))[1])
    found = norm(x)
    assert served == [1]
    norm.weight.requires_grad_(True)
    torch.testing.assert_close(found, norm(x).detach(), rtol=1e-6, atol=0.0)
    with torch.no_grad():
        torch.testing.assert_close(norm(x.mT.contiguous().mT), found, rtol=1e-6, atol=0.0)
        assert norm(x.double()).dtype == torch.float64
    assert served == [1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
def test_norms_can_be_transformed(kind: type[RMSNorm]) -> None:
    norm, x, tangent = filled(kind(32, 1e-6)), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(norm(given), given, torch.ones_like(x))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, tangent))).tangent
    assert found is not None
    torch.testing.assert_close(found.sum(), (expected * tangent).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
def test_norms_of_short_floats_err_by_one_rounding_at_most(kind: type[RMSNorm], dtype: torch.dtype) -> None:
    """x^2 would overflow fp16, and its mean lose digits in bf16, were they not computed in fp32."""
    norm = filled(kind(256, 1e-6))
    exact, x = kind(256, 1e-6), (300 * torch.randn(5, 256)).to(dtype)
    exact.weight, norm.weight = (nn.Parameter(norm.weight.to(t), requires_grad=False) for t in (torch.float32, dtype))
    exact.weight.data.copy_(norm.weight)
    found, expected = norm(x), exact(x.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gemma_norm_is_that_of_transformers_in_bf16() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    reference = filled(Gemma3RMSNorm(64, 1e-6)).bfloat16()
    norm = OffsetRMSNorm(64, 1e-6)
    norm.weight = reference.weight
    x = torch.randn(50, 64).bfloat16()
    assert (norm(x) == reference(x)).float().mean() > 0.99


@pytest.mark.parametrize("offset", [False, True])
def test_reshaped_norms_normalise_each_head(offset: bool) -> None:
    norm = filled((OffsetReshapedRMSNorm if offset else ReshapedRMSNorm)(8, 1e-6))
    x = torch.randn(2, 3, 5 * 8)
    expected = rms(x.view(2, 3, 5, 8), 1e-6) * (norm.weight + offset)
    torch.testing.assert_close(norm(x), expected.float().view(2, 3, 40))


def test_new_norms_change_nothing_but_the_length() -> None:
    x = torch.randn(2, 16)
    for kind in (RMSNorm, OffsetRMSNorm):
        torch.testing.assert_close(kind(16, 1e-6)(x), rms(x, 1e-6).float())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_transformers_means_by_the_name(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 200)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)
    up = torch.randn(200)
    torch.testing.assert_close(SwiGLU(name)(x, up), ACT2FN[name](x) * up, rtol=1e-6, atol=1e-6)


def test_clamped_swiglu_is_its_formula() -> None:
    gate, up = torch.tensor([-9.0, -1.0, 0.5, 9.0]), torch.tensor([-9.0, 0.3, 9.0, 0.3])
    clamped_gate, clamped_up = torch.tensor([-9.0, -1.0, 0.5, 2.0]), torch.tensor([-2.0, 0.3, 2.0, 0.3])
    expected = clamped_gate / (1 + (-1.7 * clamped_gate).exp()) * (clamped_up + 1)
    torch.testing.assert_close(ClampedSwiGLU(1.7, 2.0)(gate, up), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_rows_of_its_table_times_the_rounded_scale(dtype: torch.dtype) -> None:
    scale = 3072**0.5
    layer, ids = filled(EmbeddingLayer(11, 6, scale, dtype)), torch.tensor([[3, 0], [10, 3]])
    found = layer(ids)
    assert found.dtype == dtype
    assert torch.equal(found, layer.weight[ids] * torch.tensor(scale).to(dtype))


def test_embedding_answers_in_the_dtype_of_the_activations() -> None:
    layer = filled(EmbeddingLayer(11, 6, dtype=torch.float16, activation_dtype=torch.float32))
    found = layer(torch.tensor([[1, 2]]))
    assert found.dtype == torch.float32
    assert torch.equal(found, layer.weight[[1, 2]].float()[None])


def test_a_tied_table_projects_without_its_scale() -> None:
    layer, hidden = filled(TieWordEmbedding(11, 6, scale=7.0)), torch.randn(2, 3, 6)
    torch.testing.assert_close(layer.project(hidden), hidden @ layer.weight.T)
    assert torch.equal(layer(torch.tensor([[4]]))[0, 0], 7.0 * layer.weight[4])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [FullyConnected, LmHead])
def test_linears_share_one_interface(kind: type[FullyConnected], bias: bool) -> None:
    weight, offset = torch.randn(5, 3), torch.randn(5) if bias else None
    layer = kind.from_float(weight, offset)
    assert type(layer) is kind
    assert (layer.in_features, layer.out_features) == (3, 5)
    assert layer.dequantize().data_ptr() == weight.data_ptr()
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layer(x), x @ weight.T + (0.0 if offset is None else offset))
    assert dict(layer.named_parameters()).keys() == ({"weight", "bias"} if bias else {"weight"})


def test_a_linear_computes_in_its_weights_dtype_and_answers_in_the_inputs() -> None:
    layer = FullyConnected.from_float(torch.randn(5, 3).bfloat16())
    x = torch.randn(2, 3)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), (x.bfloat16() @ layer.weight.T).float())


def test_softcap_is_its_formula() -> None:
    x = torch.linspace(-100, 100, 50)
    torch.testing.assert_close(softcap(x, 5.0), 5 * torch.tanh(x / 5))
    assert softcap(x, 5.0).abs().max() <= 5
    assert softcap(x, None) is x


class Doublers:
    """A store of experts, the n-th of which multiplies by n, that answers in reverse and keeps a diary."""

    def __init__(self, count: int):
        self.count = count
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def fetch(self, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        self.asked.append(list(expert_ids))
        for expert_id in reversed(expert_ids):
            yield expert_id, partial(torch.mul, torch.tensor(float(expert_id)))


def test_mixing_sends_each_token_to_its_experts_once() -> None:
    store = Doublers(6)
    assert isinstance(store, ExpertStore)
    x, weights = torch.randn(4, 3), torch.rand(4, 2)
    chosen = torch.tensor([[5, 0], [2, 5], [5, 2], [1, 2]])
    expected = (weights * chosen).sum(1, keepdim=True) * x
    torch.testing.assert_close(mix_experts(x, chosen, weights, store), expected)
    assert store.asked == [[0, 1, 2, 5]]


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("num_chosen", [1, 3, 6])
def test_qwen_moe_is_that_of_transformers(num_chosen: int, norm_topk_prob: bool) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=8,
        moe_intermediate_size=5,
        num_experts=6,
        num_experts_per_tok=num_chosen,
        norm_topk_prob=norm_topk_prob,
    )
    config._experts_implementation = "eager"
    reference = filled(Qwen3MoeSparseMoeBlock(config))
    gates_ups = reference.experts.gate_up_proj
    experts = ResidentExperts(
        GatedMlp(gates_ups[n, :5], gates_ups[n, 5:], reference.experts.down_proj[n]) for n in range(6)
    )
    ours = QwenMoe(FullyConnected.from_float(reference.gate.weight), experts, num_chosen, norm_topk_prob)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-5)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor):
        super().__init__()
        self.gate, self.up, self.down = (FullyConnected.from_float(weight) for weight in (gate, up, down))
        self.activation = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x), self.up(x)))


@pytest.mark.parametrize("num_chosen", [1, 3, 6])
def test_gpt_oss_moe_is_that_of_transformers(num_chosen: int) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(
        hidden_size=8, intermediate_size=5, num_local_experts=6, num_experts_per_tok=num_chosen, swiglu_limit=1.5
    )
    config._experts_implementation = "eager"
    reference = filled(GptOssMLP(config))
    experts = GptOssExperts(6, 8, 5, config.swiglu_alpha, 1.5)
    assert isinstance(experts, ExpertStore)
    experts.load_state_dict(reference.experts.state_dict())
    router = FullyConnected.from_float(reference.router.weight, reference.router.bias)
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        ours = GptOssMoe(router, experts, num_chosen)(x)
    torch.testing.assert_close(ours, reference(x)[0], rtol=1e-4, atol=1e-5)


def test_the_registry_makes_what_was_registered_last() -> None:
    registry = LayerRegistry()
    registry.register("norm", RMSNorm)
    registry.register("linear", FullyConnected)
    registry.register("norm", OffsetRMSNorm)
    assert type(registry.create("norm", dim=4, epsilon=1e-6)) is OffsetRMSNorm
    with pytest.raises(ValueError, match="unknown layer type 'swiglu'; registered are: linear, norm"):
        registry.create("swiglu")


def test_layers_can_be_made_on_meta() -> None:
    with torch.device("meta"):
        made = [RMSNorm(4, 1e-6), OffsetRMSNorm(4, 1e-6), FullyConnected(4, 4), TieWordEmbedding(4, 4)]
        made.append(GptOssExperts(2, 4, 4, 1.7, 7.0))
    assert all(parameter.is_meta for layer in made for parameter in layer.parameters())
    assert not any(list(layer.buffers()) for layer in made)
