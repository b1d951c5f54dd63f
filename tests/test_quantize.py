"""The quantize verb: what is packed, in what, that the folder runs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from families import FAMILIES, prompt, relative_error
from text_models import save_text_model

from causallm import load_model
from causallm.cli import main
from causallm.loading import build_model
from causallm.packing import choose_formats, pack_layers, packed_tensors
from causallm.weights.loader import assign, load_weights
from causallm.weights.open import open_weights
from causallm.weights.quantize import FILES, quantize
from causallm.weights.safetensors_reader import SafetensorsReader
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.packed_product import expanded
from layers.packed import PackedEmbedding, PackedLinear

FILE = FILES["safetensors"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_text_model(folder, "Qwen3Config", head_dim=64, tie_word_embeddings=True, **WIDE)
    return folder


def without_tokenizer(folder: Path) -> Any:
    model = build_model(folder)
    reader = open_weights(folder, model)
    pack_layers(model, choose_formats(model, reader.formats()))
    load_weights(model, reader)
    return model.eval()


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_a_packed_folder_holds_the_packed_weights_and_runs(kind: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    formats = quantize(source, out, kind)
    model, floats = load_model(out), load_model(source, dtype="float32")
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear | PackedEmbedding)}
    assert set(formats) == {f"{name}.weight" for name in packed}
    assert len(formats) == 1 + 2 * 7
    for name, layer in packed.items():
        weight = floats.get_submodule(name).weight
        assert torch.equal(layer.weight, BLOCK_FORMATS[kind].pack(weight)), name
    assert model.generate_text("Once", max_new_tokens=4) != ""


@pytest.mark.filterwarnings("ignore:Q8_0 needs rows")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_packed_and_read_back(
    family: str, tmp_path: Path, checkpoints: Checkpoints, monkeypatch
) -> None:
    quantize(checkpoints.folder(family), tmp_path / "packed", "Q8_0")
    model, floats = without_tokenizer(tmp_path / "packed"), without_tokenizer(checkpoints.folder(family))
    packed = packed_tensors(model)
    assert packed
    for name, layer in packed.items():
        assign(floats, name, layer.dequantize())
    # Without the rounding of activations, which random models blow up, the same numbers.
    for module in ("packed", "packed_experts"):
        target = f"layers.{module}.packed_product"
        monkeypatch.setattr(target, lambda x, weight, kind: x @ expanded(weight, kind).T)
    ids = prompt()
    assert relative_error(model(ids), floats(ids)) < 5e-5


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_rounding_of_activations_costs_little_and_decoding_differs_little(kind: str, tmp_path: Path) -> None:
    save_text_model(tmp_path / "floats", "Qwen3Config", head_dim=64, tie_word_embeddings=True, **WIDE)
    quantize(tmp_path / "floats", tmp_path / "packed", kind)
    model, floats = load_model(tmp_path / "packed"), load_model(tmp_path / "floats", dtype="float32")
    for name, layer in packed_tensors(model).items():
        assign(floats, name, layer.dequantize())
    ids = torch.arange(30)[None] + 5
    exact, cache = floats(ids), model.make_cache()
    steps = torch.cat([model(ids[:, place : place + 1], cache) for place in range(30)], 1)
    for found in (model(ids), steps):
        assert (found - exact).norm() < 0.03 * exact.norm()


def test_the_types_of_linear_embedding_and_head(tmp_path: Path) -> None:
    save_text_model(tmp_path / "floats", head_dim=64, tie_word_embeddings=False, **WIDE)
    quantize(tmp_path / "floats", tmp_path / "packed", "Q4_0", "Q8_0", "Q6_K")
    model = load_model(tmp_path / "packed")
    assert (model.embed_tokens.kind, model.lm_head.kind) == ("Q8_0", "Q6_K")
    assert {layer.kind for layer in model.layers.modules() if isinstance(layer, PackedLinear)} == {"Q4_0"}
    quantize(tmp_path / "floats", tmp_path / "head", "FP32", "FP32", "Q4_K")
    assert list(SafetensorsReader({tmp_path / "head" / FILE: ""}).formats()) == ["lm_head.weight"]


def test_float_weights_are_packed_while_loading_where_the_configuration_asks(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "packed", "Q4_0")
    stored, made = load_model(tmp_path / "packed"), load_model(source, model_tensor_type="Q4_0-FP32")
    ids = torch.arange(9)[None]
    assert torch.equal(stored(ids), made(ids))


def test_rows_that_do_not_fill_a_block_get_another_format_with_one_warning(tmp_path: Path) -> None:
    save_text_model(tmp_path / "floats", hidden_size=96, intermediate_size=80, num_attention_heads=4, head_dim=32)
    with pytest.warns(UserWarning, match="Q4_K needs") as caught:
        formats = quantize(tmp_path / "floats", tmp_path / "packed", "Q4_K")
    assert sorted(str(warning.message) for warning in caught) == [
        "Q4_K needs rows of a multiple of 256: Q8_0 instead for 14 weights",
        "Q4_K needs rows of a multiple of 256: not packed instead for 2 weights",
    ]
    assert set(formats.values()) == {"Q8_0"}
    assert not any("down_proj" in name for name in formats)
    load_model(tmp_path / "packed")


def test_verify_prints_errors_perplexity_and_divergence(source: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 4)
    out = tmp_path / "packed"
    assert main(["quantize", str(source), "-o", str(out), "--fc_dtype", "Q8_0", "--verify", "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "packed: 15 in Q8_0" in printed
    assert "perplexity: " in printed
    kl = float(printed.split("KL divergence: ")[1].split()[0])
    assert 0 < kl < 0.01


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["quantize", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_mistakes_are_one_line_and_leave_nothing(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "packed"
    assert "unknown format 'Q5_0'" in refusal(capsys, source, "-o", out, "--fc_dtype", "Q5_0")
    assert "--text belongs to --verify" in refusal(capsys, source, "-o", out, "--text", "x")
    assert not list(tmp_path.iterdir())
    quantize(source, out, "Q8_0")
    assert "is packed already" in refusal(capsys, out, "-o", tmp_path / "again")
    assert "exists and is not an empty folder" in refusal(capsys, source, "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_disk_that_is_full_at_once_leaves_nothing(source: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causallm.weights.quantize.write_tensor", full)
    with pytest.raises(OSError, match=r"cannot write .*packed: No space left on device$"):
        quantize(source, tmp_path / "packed", "Q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("formats", ['{"embed_tokens.weight": "Q9"}', '{"nothing": "Q8_0"}', "[1]", "{"])
def test_a_damaged_list_of_formats_is_refused(formats: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    quantize(source, out, "Q8_0")
    content = (out / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["formats"] = formats
    text = json.dumps(header).encode()
    (out / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ValueError, match="the header's formats"):
        load_model(out)
