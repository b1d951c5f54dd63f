"""gpt-oss's fused experts packed: the layer against floats of the same values, and every way into a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints, save_random_model
from families import prompt, relative_error
from safetensors.torch import load_file, save_file
from test_quantize import without_tokenizer
from test_weights_mxfp4 import packed as mxfp4  # noqa: F401  a fixture
from text_models import save_text_model

from causallm import load_model
from causallm.bench import count_parameters, name_dtypes
from causallm.cli import main
from causallm.loading import build_model
from causallm.packing import choose_formats, pack_weight, packed_shape, packed_tensors, unpack_weight
from causallm.weights.fidelity import tensor_errors
from causallm.weights.loader import assign
from causallm.weights.open import open_weights
from causallm.weights.quantize import quantize
from layers.expert_store import ExpertStore
from layers.gpt_oss_moe import GptOssExperts, GptOssMoe
from layers.kernels.block_formats import BLOCK_FORMATS, writable
from layers.kernels.packed_product import expanded
from layers.linear import FullyConnected
from layers.packed_experts import PackedGptOssExperts

EXPERTS, DIM, HIDDEN = 5, 256, 512
NAMES = ("gate_up_proj", "down_proj")
GPT_OSS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def experts(dim: int = DIM, hidden: int = HIDDEN) -> GptOssExperts:
    made = GptOssExperts(EXPERTS, dim, hidden, alpha=1.702, limit=7.0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.05
        parameter.requires_grad_(False)
    return made


def packed_and_rounded(floats: GptOssExperts, kinds: dict[str, str]) -> tuple[PackedGptOssExperts, GptOssExperts]:
    """Packed experts, and floats that hold what these stand for."""
    packed, state = PackedGptOssExperts.in_place_of(floats, kinds), floats.state_dict()
    rounded = GptOssExperts(EXPERTS, floats.down_proj.shape[2], floats.down_proj.shape[1], alpha=1.702, limit=7.0)
    bytes_of = {name: pack_weight(state[name], kind) for name, kind in kinds.items()}
    packed.load_state_dict({**state, **bytes_of})
    rounded.load_state_dict({**state, **{name: unpack_weight(bytes_of[name], kinds[name]) for name in kinds}})
    return packed, rounded


@pytest.mark.parametrize("kind", writable())
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_results_are_those_of_the_unpacked_values(kind: str, names: tuple[str, ...], tokens: int) -> None:
    packed, rounded = packed_and_rounded(experts(), dict.fromkeys(names, kind))
    assert isinstance(packed, ExpertStore)
    assert len(packed) == EXPERTS
    router = FullyConnected.from_float(torch.randn(EXPERTS, DIM))
    x = torch.randn(2, tokens, DIM)
    with torch.inference_mode():
        found, exact = (GptOssMoe(router, store, 2)(x) for store in (packed, rounded))
    # One byte a value of the activations of a few tokens, bfloat16 of many.
    assert (found - exact).norm() < 0.015 * exact.norm()


@pytest.mark.parametrize("kind", writable())
def test_a_row_is_an_output_of_one_expert(kind: str) -> None:
    weight = experts().gate_up_proj
    packed = pack_weight(weight, kind)
    assert packed.shape == packed_shape(weight.shape, kind)
    for expert in range(EXPERTS):
        assert torch.equal(packed[expert], BLOCK_FORMATS[kind].pack(weight[expert].T.contiguous()))
    assert torch.equal(unpack_weight(packed, kind)[3], BLOCK_FORMATS[kind].unpack(packed[3]).T)


def test_activations_keep_their_dtype() -> None:
    packed, _ = packed_and_rounded(experts(), dict.fromkeys(NAMES, "Q8_0"))
    (_, expert), *_ = packed.fetch([3])
    for dtype in (torch.float32, torch.bfloat16):
        assert expert(torch.randn(2, DIM, dtype=dtype)).dtype == dtype


def test_packed_experts_can_be_made_on_meta() -> None:
    with torch.device("meta"):
        made = PackedGptOssExperts(2, 2880, 2880, 1.7, 7.0, dict.fromkeys(NAMES, "Q4_0"))
    assert made.gate_up_proj.shape == (2, 5760, 90 * 18)
    assert made.down_proj.is_meta
    assert not made.down_proj.requires_grad


def save(folder: Path, **settings: Any) -> Path:
    save_random_model(folder, 3, "GptOssConfig", **{**GPT_OSS, **settings})
    return folder


@pytest.mark.parametrize("kind", writable())
def test_a_packed_model_is_the_one_of_the_unpacked_values(kind: str, tmp_path: Path, monkeypatch) -> None:
    source = save(tmp_path / "source", hidden_size=256, intermediate_size=256, head_dim=64)
    formats = quantize(source, tmp_path / "packed", kind)
    assert {formats[f"layers.1.mlp.experts.{name}"] for name in NAMES} == {kind}
    model, floats = without_tokenizer(tmp_path / "packed"), without_tokenizer(source)
    for name, packed in packed_tensors(model).items():
        assert packed.shape == floats.get_parameter(name).shape
        assert torch.equal(packed.parameter, pack_weight(floats.get_parameter(name), kind))
        assign(floats, name, packed.dequantize())
    # Without the rounding of activations, which makes routers of random models choose other experts.
    for module in ("packed", "packed_experts"):
        target = f"layers.{module}.packed_product"
        monkeypatch.setattr(target, lambda x, weight, kind: x @ expanded(weight, kind).T)
    assert relative_error(model(prompt(time=12)), floats(prompt(time=12))) < 5e-4


def test_rows_that_are_no_blocks_of_256_get_smaller_blocks(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    with pytest.warns(UserWarning, match="Q4_K needs rows of a multiple of 256: Q5_0 instead for 12 weights"):
        formats = quantize(source, tmp_path / "packed", "Q4_K", "FP32")
    assert {formats[f"layers.0.mlp.experts.{name}"] for name in NAMES} == {"Q5_0"}


def test_experts_are_packed_while_loading(tmp_path: Path) -> None:
    save_text_model(tmp_path / "source", "GptOssConfig", **GPT_OSS)
    quantize(tmp_path / "source", tmp_path / "packed", "Q4_0")
    stored, made = load_model(tmp_path / "packed"), load_model(tmp_path / "source", model_tensor_type="Q4_0-FP32")
    assert isinstance(made.layers[0].mlp.experts, PackedGptOssExperts)
    ids = torch.arange(9)[None]
    assert torch.equal(stored(ids), made(ids))


def test_published_checkpoints_are_packed_from_their_mxfp4(mxfp4: Path, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "source"
    source.mkdir()
    state = load_file(mxfp4 / "model.safetensors")
    # Powers of two that a float16 scale can hold.
    save_file(
        {name: 115 + t % 16 if "scales" in name else t for name, t in state.items()}, source / "model.safetensors"
    )
    (source / "config.json").write_bytes((mxfp4 / "config.json").read_bytes())
    quantize(source, tmp_path / "packed", "Q8_0", "BF16", "BF16")
    reader = open_weights(source, build_model(source))
    packed = packed_tensors(without_tokenizer(tmp_path / "packed"))
    for name in (f"layers.1.mlp.experts.{name}" for name in NAMES):
        assert torch.equal(packed[name].parameter, pack_weight(reader.tensor(name), "Q8_0"))


def test_verify_and_inspect_know_packed_experts(tmp_path: Path, capsys) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "packed"
    assert main(["quantize", str(source), "-o", str(out), "--fc_dtype", "Q8_0", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "packed: 14 in Q8_0" in printed
    assert "Q8_0: 14 weights, " in printed
    errors = {error.name: error.relative for error in tensor_errors(source, out)}
    state = load_file(source / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    change = unpack_weight(pack_weight(state, "Q8_0"), "Q8_0") - state
    assert errors["layers.1.mlp.experts.down_proj"] == pytest.approx(float(change.norm() / state.norm()), rel=1e-4)
    assert main(["inspect", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in shown["weights"]}
    row = rows["layers.1.mlp.experts.gate_up_proj"]
    assert (row["shape"], row["dtype"]) == ([4, 64, 192], "Q8_0")
    assert row["bytes"] == 4 * 192 * 2 * 34
    assert rows["layers.1.mlp.router.weight"]["dtype"] == "float32"
    model, floats = without_tokenizer(out), without_tokenizer(source)
    assert shown["parameters"] == count_parameters(model) == count_parameters(floats)
    assert shown["bytes"] == sum(parameter.nbytes for parameter in model.parameters())
    assert name_dtypes(model) == "Q8_0+float32"


def test_norms_routers_and_biases_stay_floats(checkpoints: Checkpoints) -> None:
    model = build_model(checkpoints.folder("gpt-oss"), None, model_tensor_type="Q8_0-FP32", embedding_dtype="FP32")
    with pytest.warns(UserWarning, match="not packed instead for 4 weights"):
        formats = choose_formats(model, {})
    assert not [name for name in formats if "norm" in name or "router" in name or "bias" in name]
    assert "layers.0.mlp.experts.gate_up_proj" in formats


def test_a_misshapen_packed_expert_tensor_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    quantize(source, tmp_path / "packed", "Q8_0")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.* has shape"):
        without_tokenizer(tmp_path / "packed")
