"""The quantize verb: what is packed, in what, that the folder runs, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from embedding_folders import save_embedding_model
from families import FAMILIES, prompt, relative_error
from sample_tokenizers import byte_level, save
from text_models import save_text_model

from causallm import load_model
from causallm.cli import main
from causallm.config.pooling import PoolingConfig
from causallm.loading import build_model
from causallm.packing import choose_formats, pack_layers, packed_tensors
from causallm.weights.convert import convert
from causallm.weights.loader import assign, load_weights
from causallm.weights.open import open_weights
from causallm.weights.quantize import FILES, quantize
from causallm.weights.safetensors_reader import SafetensorsReader
from layers.kernels.block_formats import BLOCK_FORMATS, writable
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


@pytest.mark.parametrize("kind", writable())
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


@pytest.mark.parametrize("kind", writable())
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


def test_a_format_that_is_only_read_is_refused_before_anything_is_packed(source: Path) -> None:
    with pytest.raises(ValueError, match=r"IQ4_XS can be read but not written; Q8_0, Q4_0, .* can be"):
        load_model(source, fc_layer_dtype="IQ4_XS")


def test_rows_that_do_not_fill_a_block_get_another_format_with_one_warning(tmp_path: Path) -> None:
    save_text_model(tmp_path / "floats", hidden_size=96, intermediate_size=80, num_attention_heads=4, head_dim=32)
    with pytest.warns(UserWarning, match="Q4_K needs") as caught:
        formats = quantize(tmp_path / "floats", tmp_path / "packed", "Q4_K")
    assert sorted(str(warning.message) for warning in caught) == [
        "Q4_K needs rows of a multiple of 256: Q5_0 instead for 14 weights",
        "Q4_K needs rows of a multiple of 256: not packed instead for 2 weights",
    ]
    assert set(formats.values()) == {"Q5_0"}
    assert not any("down_proj" in name for name in formats)
    load_model(tmp_path / "packed")


def test_verify_prints_errors_perplexity_and_divergence(source: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 4)
    out = tmp_path / "packed"
    assert main(["quantize", str(source), "-o", str(out), "--fc_dtype", "Q8_0", "--verify", "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "packed: 15 in Q8_0" in printed
    assert re.search(
        r"perplexity: [\d.]+ before \(in float32\), [\d.]+ packed \(activations in float32\), [+-]", printed
    )
    kl = float(printed.split("KL divergence: ")[1].split()[0])
    assert 0 < kl < 0.01


@pytest.mark.filterwarnings("ignore:llama.cpp has no rules")
@pytest.mark.parametrize("name", ["one.safetensors", "x.gguf"])
def test_verify_reads_a_source_that_is_one_file(name: str, source: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(source, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "one.safetensors")
    if name == "x.gguf":
        convert(source, tmp_path / "m" / name)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 4)
    quantized = ("quantize", str(tmp_path / "m" / name), "-o", str(tmp_path / "packed"), "--fc_dtype", "Q8_0")
    assert main([*quantized, "--verify", "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "Q8_0: 15 weights" in printed
    assert 0 < float(printed.split("KL divergence: ")[1].split()[0]) < 0.01


@pytest.mark.filterwarnings("ignore:llama.cpp has no rules")
@pytest.mark.parametrize("family", ["LlamaConfig", "Qwen3Config"])
def test_a_gguf_file_is_packed_as_the_folder_that_it_was_made_from(family: str, tmp_path: Path) -> None:
    save_text_model(tmp_path / "m", family, head_dim=64, tie_word_embeddings=False, **WIDE)
    convert(tmp_path / "m", tmp_path / "x.gguf")
    types = ("Q4_0", "Q6_K", "Q8_0")
    expected = quantize(tmp_path / "m", tmp_path / "a", *types)
    assert quantize(tmp_path / "x.gguf", tmp_path / "b", *types) == expected
    ours, theirs = (SafetensorsReader({tmp_path / name / FILE: ""}) for name in "ba")
    assert ours.formats() == theirs.formats()
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in theirs.names())
    models = [load_model(tmp_path / name) for name in "ab"]
    assert models[0].generate_text("Once", max_new_tokens=8) == models[1].generate_text("Once", max_new_tokens=8)


@pytest.mark.filterwarnings("ignore:llama.cpp has no rules")
def test_a_gguf_file_of_an_embedding_model_keeps_its_pooling(tmp_path: Path) -> None:
    settings = {"vocab_size": 422, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    save_embedding_model(tmp_path / "m", "Qwen3Config", dense=False, **settings)
    save(byte_level(), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "x.gguf")
    quantize(tmp_path / "x.gguf", tmp_path / "packed", "Q8_0")
    texts = ["Once upon a time", "girl"]
    assert load_model(tmp_path / "packed").pooling == PoolingConfig("mean")
    found, expected = (load_model(tmp_path / name).encode(texts) for name in ("packed", "m"))
    assert relative_error(found, expected) < 0.05
    convert(tmp_path / "x.gguf", tmp_path / "floats")
    torch.testing.assert_close(load_model(tmp_path / "floats").encode(texts), expected)


def test_a_head_that_is_the_embedding_has_no_format_of_its_own(source: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="^lmhead_dtype Q6_K is not acted on: .*, which gets Q4_0$"):
        quantize(source, tmp_path / "a", "Q8_0", "Q4_0", "Q6_K")
    assert load_model(tmp_path / "a").embed_tokens.kind == "Q4_0"
    assert json.loads((tmp_path / "a" / "nntr_config.json").read_text())["lmhead_dtype"] == "Q4_0"
    quantize(source, tmp_path / "b", "Q8_0", "Q4_0", "Q4_0")
    quantize(source, tmp_path / "c", "Q8_0", None, "Q8_0")


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["quantize", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.filterwarnings("ignore:llama.cpp has no rules")
def test_mistakes_are_one_line_and_leave_nothing(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "packed"
    assert "unknown format 'IQ4_NL'" in refusal(capsys, source, "-o", out, "--fc_dtype", "IQ4_NL")
    assert "--text belongs to --verify" in refusal(capsys, source, "-o", out, "--text", "x")
    assert not list(tmp_path.iterdir())
    quantize(source, out, "Q8_0")
    assert "is packed already (15 tensors in Q8_0); " in refusal(capsys, out, "-o", tmp_path / "again")
    convert(out, tmp_path / "x.gguf")
    line = refusal(capsys, tmp_path / "x.gguf", "-o", tmp_path / "again")
    assert "x.gguf is packed already (15 tensors in Q8_0); packing again would lose more: quantize the float" in line
    (tmp_path / "x.gguf").unlink()
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
