"""tools/make_random_model.py: every shape it knows can be made small, loads strictly and runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from causallm import load_model
from causallm.loading import build_model
from causallm.packing import packed_tensors
from causallm.transformer import Transformer
from causallm.weights.convert import convert
from layers.kernels.block_formats import writable

TOOL = Path(__file__).resolve().parents[1] / "tools" / "make_random_model.py"
SHAPES = json.loads(TOOL.with_name("random_model_shapes.json").read_text())
PARAMETERS = {
    "qwen3-0.6b": 0.596e9,
    "qwen3-1.7b": 1.72e9,
    "qwen3-4b": 4.02e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen2-0.5b": 0.494e9,
    "llama-3.2-1b": 1.236e9,
    "gemma3-270m": 0.268e9,
    "gemma3-1b": 1.0e9,
    "gpt-oss-20b": 20.9e9,
}
"""As their model cards state them."""
SMALL = {
    "hidden_size": 256,
    "vocab_size": 300,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
SMALL_MOE = {
    **SMALL,
    "intermediate_size": 256,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
SMALL_GPT_OSS = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}


def make(folder: Path, shape: str, changes: dict[str, int], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on a changed shape; the model is folder/made."""
    (folder / "config.json").write_text(json.dumps({**SHAPES[shape], **changes}))
    command = [sys.executable, str(TOOL), str(folder / "config.json"), "-o", str(folder / "made"), "--layers", "2"]
    environment = {"PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run([*command, *options], capture_output=True, text=True, cwd=TOOL.parents[1], env=environment)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_has_the_published_number_of_parameters(name, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    model = build_model(tmp_path)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == pytest.approx(PARAMETERS[name], rel=0.01)


def test_every_shape_is_published_in_res() -> None:
    assert sorted(SHAPES) == sorted(
        path.parent.name for path in (TOOL.parents[1] / "res").glob("*/nntr_config.json") if "tiny" not in str(path)
    )


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(20)[None])


def test_a_made_folder_runs(tmp_path) -> None:
    changes = {"hidden_size": 32, "vocab_size": 300, "head_dim": 8, "intermediate_size": 48}
    assert make(tmp_path, "gemma3-270m", changes).returncode == 0
    model = load_model(tmp_path / "made")
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    assert model.norm.weight.abs().max() == 0
    assert model.embed_tokens.weight.float().std() == pytest.approx(0.02, rel=0.07)
    assert isinstance(model.generate_text("hello", max_new_tokens=3), str)
    again = make(tmp_path, "gemma3-270m", changes)
    assert again.returncode == 2
    assert "not empty" in again.stderr


@pytest.mark.parametrize("kind", writable())
def test_a_packed_folder_is_made_of_blocks_as_spread_as_floats(kind, tmp_path) -> None:
    done = make(tmp_path, "qwen3-0.6b", SMALL, "--format", kind)
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "made")
    packed = packed_tensors(model)
    assert len(packed) == 1 + 2 * 7
    assert packed.pop("embed_tokens.weight").kind == "Q6_K"
    assert {tensor.kind for tensor in packed.values()} == {kind}
    values = [tensor.dequantize().flatten() for tensor in packed.values()]
    assert [own.std().item() for own in values] == pytest.approx([0.02] * len(values), rel=0.07)
    assert abs(torch.cat(values).mean()) < 0.0003
    assert (model.norm.weight == 1).all()
    assert logits_of(model).isfinite().all()
    assert logits_of(model).std() > 0.1


@pytest.mark.parametrize(("shape", "changes"), [("qwen3-30b-a3b", SMALL_MOE), ("gpt-oss-20b", SMALL_GPT_OSS)])
def test_packed_experts_go_through_gguf_unchanged(shape, changes, tmp_path) -> None:
    done = make(tmp_path, shape, changes, "--format", "Q4_0")
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "made")
    kinds = {name: tensor.kind for name, tensor in packed_tensors(model).items()}
    assert {kinds.pop("embed_tokens.weight"), kinds.pop("lm_head.weight")} == {"Q6_K"}
    assert set(kinds.values()) == {"Q4_0"}
    assert sum("experts" in name for name in kinds) == (2 * 6 * 3 if shape.startswith("qwen3") else 2 * 2)
    with pytest.warns(UserWarning, match=r"llama\.cpp"):  # of the byte tokenizer, and of what it does not know
        convert(tmp_path / "made", tmp_path / "x.gguf")
    assert torch.equal(logits_of(load_model(tmp_path / "x.gguf")), logits_of(model))


def test_the_same_seed_makes_the_same_packed_file(tmp_path) -> None:
    files = []
    for name, seed in (("one", "1"), ("two", "1"), ("three", "2")):
        (tmp_path / name).mkdir()
        assert make(tmp_path / name, "qwen3-0.6b", SMALL, "--format", "Q4_0", "--seed", seed).returncode == 0
        files.append((tmp_path / name / "made" / "packed.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]
