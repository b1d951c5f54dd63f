"""Halves of decoder blocks in one native call: what they give, and that they serve only while nothing has changed."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_random_model
from families import SLIDING
from test_kernels import LEVELS, needs_kernels
from torch import Tensor, nn

from causallm import causal_lm
from causallm.loading import build_model
from causallm.packing import choose_formats, pack_layers, packed_tensors
from causallm.weights.loader import load_weights
from causallm.weights.open import open_weights
from layers.kernels import halves, native
from layers.linear import FullyConnected
from layers.lm_head import LmHead
from layers.packed import PackedLinear
from layers.rms_norm import RMSNorm
from layers.swiglu import SwiGLU

pytestmark = needs_kernels

TOLERANCE = 2e-5
"""Of fp32 logits, relative to the largest: the order of sums differs, and these models amplify it."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama MQA": ("LlamaConfig", {"head_dim": 32, "num_key_value_heads": 1, "hidden_size": 96}),
    "qwen2 sliding": ("Qwen2Config", {**SLIDING, "hidden_size": 64, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "num_hidden_layers": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                                     "head_dim": 16, "mlp_only_layers": [1]}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20,
                                    "attn_logit_softcapping": 2.0,
                                    "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4,
                                 "num_experts_per_tok": 2}),
    "gpt-oss clamping": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3,
                                          "swiglu_limit": 0.7, "swiglu_alpha": 1.3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("halves")

    def folder(name: str) -> Path:
        path = root / name.replace(" ", "_")
        if not path.exists():
            class_name, settings = SHAPES[name]
            save_random_model(path, 5, class_name, intermediate_size=64, **settings)
        return path

    return folder


def load(folder: Path, dtype: str = "float32", **nntr: Any) -> Any:
    model = build_model(folder, None if nntr else dtype, **nntr)
    reader = open_weights(folder, model)
    pack_layers(model, choose_formats(model, reader.formats()))
    load_weights(model, reader)
    return model.eval()


class Calls:
    """How many halves the kernels did, and a switch that keeps them from serving."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.halves, self.most, self.allowed = 0, 0, True
        run, serves = native.run_halves, halves._serves

        def counted(part: Any, count: int, tokens: Any) -> None:
            self.halves += count
            self.most = max(self.most, count)
            run(part, count, tokens)

        monkeypatch.setattr(native, "run_halves", counted)
        monkeypatch.setattr(halves, "_serves", lambda x: self.allowed and serves(x))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def steps(model: Any, sizes: tuple[int, ...], batch: int = 1, padding: Tensor | None = None, **cache: Any) -> Tensor:
    """Logits of random tokens given in steps of these sizes."""
    ids = torch.randint(0, 97, (batch, sum(sizes)), generator=torch.Generator().manual_seed(3))
    caches = model.make_cache(batch, **cache)
    with torch.inference_mode():
        return torch.cat([model(part, caches, padding=padding) for part in ids.split(list(sizes), 1)], 1)


def both(model: Any, calls: Calls, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """With the kernels, and by the modules alone."""
    before = calls.halves
    calls.allowed = True
    fused = steps(model, *args, **kwargs)
    assert calls.halves > before
    calls.allowed = False
    counted = calls.halves
    alone = steps(model, *args, **kwargs)
    assert calls.halves == counted
    calls.allowed = True
    return fused, alone


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
def test_halves_are_what_the_modules_do(name: str, level: int, folders: Any, calls: Calls) -> None:
    native.choose(level)
    model = load(folders(name))
    sizes = (12, *(1,) * 14, 3, 8, 1)
    fused, alone = both(model, calls, sizes)
    native.choose(native.AVX512)
    assert difference(fused, alone) < TOLERANCE
    # All blocks and the head at once, but for gpt-oss's float experts, which lie transposed.
    assert calls.most == (1 if "gpt-oss" in name else 2 * len(model.layers) + 1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packed_weights(name: str, kind: str, folders: Any, calls: Calls) -> None:
    model = load(folders(name), fc_layer_dtype=kind, model_tensor_type=f"{kind}-FP32")
    fused, alone = both(model, calls, (4, *(1,) * 10, 4))
    assert calls.most == 2 * len(model.layers) + 1
    # A value on the edge between two int8 codes may fall to either side.
    assert difference(fused, alone) < 2e-2
    assert (fused - alone).abs().median() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("settings", [
    {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float16"},
    {"fc_layer_dtype": "Q8_0", "embedding_dtype": "Q8_0", "lmhead_dtype": "Q4_0", "model_tensor_type": "Q8_0-FP32"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_head_gives_the_bits_that_it_gives_alone(
    name: str, settings: dict[str, Any], folders: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a prompt, or where it is read from a disk, it is a layer by itself."""
    model = load(folders(name), **settings)
    sizes = (3, *(1,) * 6, 2)
    together = steps(model, sizes, 2)
    assert calls.most == 2 * len(model.layers) + 1
    calls.most = 0
    monkeypatch.setattr(causal_lm, "run_to_logits", lambda *arguments: None)
    alone = steps(model, sizes, 2)
    assert calls.most == 2 * len(model.layers)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("level", LEVELS)
def test_clamped_gates_on_any_processor(level: int, folders: Any, calls: Calls) -> None:
    native.choose(level)
    test_packed_weights("gpt-oss clamping", "Q8_0", folders, calls)
    native.choose(native.AVX512)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["Q8_0", "bfloat16"])
def test_prompts_are_no_further_from_fp32(name: str, kind: str, folders: Any, calls: Calls) -> None:
    if kind == "bfloat16":
        exact, model = load(folders(name)), load(folders(name), kind)
    else:
        model = load(folders(name), fc_layer_dtype=kind, model_tensor_type=f"{kind}-FP32")
        exact = load(folders(name))
        unpack(model, exact)
    truth = steps(exact, (40, 1, 12))
    fused, alone = both(model, calls, (40, 1, 12))
    error, usual = ((found.float() - truth).square().mean() for found in (fused, alone))
    # A bias is added in bf16 too.
    assert error < 2.5 * usual


def unpack(model: Any, floats: Any) -> None:
    """Give a float model the values that a packed one has."""
    for name, packed in packed_tensors(model).items():
        floats.get_parameter(name).data.copy_(packed.dequantize())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_short_floats_come_nearer_to_fp32(name: str, dtype: str, folders: Any, calls: Calls) -> None:
    exact = steps(load(folders(name)), (12, *(1,) * 20))
    fused, alone = both(load(folders(name), dtype), calls, (12, *(1,) * 20))
    assert (fused.float() - exact).square().mean() < 1.05 * (alone.float() - exact).square().mean()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2 sliding"])
def test_a_padded_batch_and_a_fixed_cache(name: str, folders: Any, calls: Calls) -> None:
    model = load(folders(name))
    padding = torch.tensor([0, 3, 5])
    fused, alone = both(model, calls, (9, 1, 1, 2, *(1,) * 10), 3, padding)
    real = torch.arange(fused.shape[1])[None] >= padding[:, None]
    assert difference(fused[real], alone[real]) < TOLERANCE
    fused, alone = both(model, calls, (9, *(1,) * 10), capacity=19)
    assert difference(fused, alone) < TOLERANCE


def test_any_number_of_threads_gives_the_same(folders: Any, calls: Calls) -> None:
    model = load(folders("llama MQA"))
    one = steps(model, (12, *(1,) * 5))
    torch.set_num_threads(3)
    try:
        three = steps(model, (12, *(1,) * 5))
    finally:
        torch.set_num_threads(1)
    # The prompt's products are torch's, which may part their sums otherwise.
    assert calls.halves > 0
    assert difference(three, one) < TOLERANCE


def changed_weight(model: Any) -> None:
    model.layers[0].mlp.up_proj.weight = nn.Parameter(model.layers[0].mlp.up_proj.weight * 2, requires_grad=False)


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        model.layers[1].input_layernorm.weight.mul_(3)


def changed_data(model: Any) -> None:
    model.layers[1].self_attn.q_proj.weight.data = model.layers[1].self_attn.q_proj.weight.data.flip(0).contiguous()


class Doubled(nn.Module):
    """A linear layer with something around it, as an adapter is."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def changed_module(model: Any) -> None:
    model.layers[0].self_attn.v_proj = Doubled(model.layers[0].self_attn.v_proj)


def changed_norm(model: Any) -> None:
    model.layers[0].post_attention_layernorm = copy.deepcopy(model.layers[1].input_layernorm)


def changed_block(model: Any) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def hooked(model: Any) -> None:
    model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: output * 2)


def hooked_block(model: Any) -> None:
    model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def changed_expert(model: Any) -> None:
    model.layers[0].mlp.experts[2].up_proj = Doubled(model.layers[0].mlp.experts[2].up_proj)


def changed_expert_weight(model: Any) -> None:
    for expert in model.layers[0].mlp.experts:
        expert.down_proj.weight = nn.Parameter(expert.down_proj.weight * 2, requires_grad=False)


def changed_expert_data(model: Any) -> None:
    for expert in model.layers[2].mlp.experts:
        expert.down_proj.weight.data = expert.down_proj.weight.data * 2


def hooked_expert(model: Any) -> None:
    for expert in model.layers[2].mlp.experts:
        expert.down_proj.register_forward_hook(lambda module, args, output: output * 2)


EXPERT_CHANGES = [changed_expert, changed_expert_weight, changed_expert_data, hooked_expert]
CHANGES = [
    changed_weight,
    changed_in_place,
    changed_data,
    changed_module,
    changed_norm,
    changed_block,
    hooked,
    hooked_block,
]


@pytest.mark.parametrize("change", [*CHANGES, *EXPERT_CHANGES])
def test_a_change_is_noticed(change: Callable[[Any], None], folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3-moe" if change in EXPERT_CHANGES else "qwen3"))
    sizes = (5, *(1,) * 4)
    before = steps(model, sizes)
    change(model)
    fused = steps(model, sizes)
    calls.allowed = False
    alone = steps(model, sizes)
    assert difference(fused, alone) < TOLERANCE
    assert difference(before, alone) > 1e-3


def test_gradients_are_not_lost(folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3"))
    ids = torch.randint(0, 97, (1, 3))
    steps(model, (3, 1))
    weight = model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    gradients = []
    for allowed in (True, False):
        calls.allowed = allowed
        weight.grad = None
        model(ids, model.make_cache(1)).square().sum().backward()
        gradients.append(weight.grad)
    assert difference(*gradients) < TOLERANCE
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("change", [
    lambda model: model.lm_head.bfloat16(),
    lambda model: model.norm.bfloat16(),
    lambda model: setattr(model.norm, "__class__", LouderNorm),
    lambda model: setattr(model, "lm_head", Doubled(model.lm_head)),
], ids=["head of bf16", "norm of bf16", "own norm", "adapted head"])  # fmt: skip
def test_blocks_are_one_call_whatever_follows_them(change: Callable[[Any], None], folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3"))
    steps(model, (3, 1))
    change(model)
    calls.most = 0
    fused, alone = both(model, calls, (3, 1, 1))
    assert calls.most == 2 * len(model.layers)
    assert difference(fused, alone) < TOLERANCE


def test_a_hook_on_a_tied_embedding_sees_the_tokens_alone(folders: Any, calls: Calls) -> None:
    model = load(folders("gemma3"))
    assert model.config.tie_word_embeddings
    before = steps(model, (3, 1))
    model.embed_tokens.register_forward_hook(lambda module, args, output: output * 2)
    fused, alone = both(model, calls, (3, 1, 1))
    assert calls.most == 2 * len(model.layers) + 1
    assert difference(fused, alone) < TOLERANCE
    assert difference(fused[:, :4], before) > 1e-3


def test_copies_and_casts_are_models_of_their_own(folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3"))
    before = steps(model, (5, 1))
    twin = copy.deepcopy(model)
    twin.layers[0].mlp.up_proj.weight.data.zero_()
    assert difference(steps(twin, (5, 1)), before) > 1e-3
    assert torch.equal(steps(model, (5, 1)), before)
    model.double().float()
    assert difference(steps(model, (5, 1)), before) < TOLERANCE


@pytest.mark.usefixtures("untyped")
def test_sizes_that_do_not_match_are_torchs_errors(folders: Any, calls: Calls) -> None:
    model, other = load(folders("qwen3")), load(folders("llama MQA"))
    steps(model, (3, 1))
    ids = torch.randint(0, 97, (4, 1))
    for cache in (model.make_cache(1), other.make_cache(4), model.make_cache(4)[:1]):
        with pytest.raises((RuntimeError, IndexError, ValueError)), torch.inference_mode():
            model(ids, cache)
    with pytest.raises(RuntimeError), torch.inference_mode():
        model(ids, model.make_cache(4), padding=torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_full_cache_is_an_error_before_anything_is_done(name: str, folders: Any, calls: Calls) -> None:
    model = load(folders(name))
    cache = model.make_cache(1, 12)
    ids = torch.randint(0, 97, (1, 12))
    with torch.inference_mode():
        model(ids, cache)
        for calls.allowed in (True, False):
            with pytest.raises(ValueError, match="12 positions"):
                model(ids[:, :1], cache)
    assert [layer.offset for layer in cache] == [12] * len(cache)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_fp16_activations_over_packed_weights(name: str, folders: Any, calls: Calls) -> None:
    model = load(folders(name), fc_layer_dtype="Q8_0", model_tensor_type="Q8_0-FP16")
    calls.allowed = False
    usual = steps(model, (12, 1, 1))
    calls.allowed = True
    found = steps(model, (12, 1, 1))
    assert found.dtype == torch.float16
    assert difference(found.float(), usual.float()) < 0.05


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_model_is_freed(name: str, folders: Any, calls: Calls) -> None:
    model = load(folders(name))
    steps(model, (12, 1))
    block = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert block() is None


def pruned(model: Any) -> None:
    mlp = model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = nn.Parameter(layer.weight[:32].clone(), requires_grad=False)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :32].clone(), requires_grad=False)


def transposed(model: Any) -> None:
    for block in model.layers:
        block.self_attn.k_proj.weight.data = block.self_attn.k_proj.weight.data.t()


def another_scale(model: Any) -> None:
    model.layers[0].self_attn.core.scale *= 4


def another_epsilon(model: Any) -> None:
    model.layers[0].input_layernorm.epsilon = 1.0


def own_forward(model: Any) -> None:
    layer = model.layers[0].mlp.up_proj
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def strided_norm(model: Any) -> None:
    norm = model.layers[0].input_layernorm
    norm.weight.data = norm.weight.data.repeat_interleave(2).mul_(torch.arange(len(norm.weight) * 2) % 7)[::2]


def more_experts(model: Any) -> None:
    for layer_id in (0, 2):
        model.layers[layer_id].mlp.num_chosen = 4


def other_activation(model: Any) -> None:
    for expert in list(model.layers[0].mlp.experts)[1:]:
        expert.activation = SwiGLU("gelu_pytorch_tanh")


def changed_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2, requires_grad=False)


def another_head(model: Any) -> None:
    model.lm_head = Doubled(model.lm_head)


class LouderNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed_head(model: Any) -> None:
    class Louder(LmHead):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.lm_head = Louder.from_float(model.lm_head.weight)


def hooked_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def another_last_norm(model: Any) -> None:
    model.norm = copy.deepcopy(model.norm)
    model.norm.weight.data.mul_(torch.arange(len(model.norm.weight)) % 3)


def hooked_last_norm(model: Any) -> None:
    model.norm.register_forward_hook(lambda module, args, output: output * 2)


CHANGES += [pruned, transposed, another_scale, another_epsilon, own_forward, strided_norm]
CHANGES += [changed_head, another_head, subclassed_head, hooked_head, another_last_norm, hooked_last_norm]
EXPERT_CHANGES += [more_experts, other_activation]


@pytest.mark.parametrize("change", [*CHANGES[8:], *EXPERT_CHANGES[4:]])
def test_a_change_of_another_kind_is_noticed(change: Callable[[Any], None], folders: Any, calls: Calls) -> None:
    test_a_change_is_noticed(change, folders, calls)


def test_global_hooks_see_everything(folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3"))
    before = steps(model, (5, 1))
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, SwiGLU) else None
    )
    try:
        assert difference(steps(model, (5, 1)), before) > 1e-3
    finally:
        hook.remove()


def test_experts_packed_in_part(folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3-moe"))
    for expert in list(model.layers[0].mlp.experts)[1:]:
        expert.up_proj = PackedLinear.from_float(expert.up_proj.weight)
    fused, alone = both(model, calls, (5, *(1,) * 4))
    assert difference(fused, alone) < 1e-2


def test_a_layer_of_doubles_is_left_to_torch(folders: Any, calls: Calls) -> None:
    model = load(folders("qwen3"))
    before = steps(model, (5, 1))
    model.layers[0].mlp.up_proj.double()
    assert difference(steps(model, (5, 1)), before) < TOLERANCE


def test_many_tokens_go_to_the_modules(folders: Any, calls: Calls) -> None:
    steps(load(folders("qwen3")), (halves.FEW_TOKENS + 1,))
    assert calls.halves == 0


def test_a_subclassed_part_is_called(folders: Any, calls: Calls) -> None:
    class Louder(FullyConnected):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = load(folders("qwen3"))
    weight = model.layers[0].mlp.down_proj.weight
    before = steps(model, (5, 1))
    model.layers[0].mlp.down_proj = Louder.from_float(weight)
    assert difference(steps(model, (5, 1)), before) > 1e-3
