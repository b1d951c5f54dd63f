"""NNTrainer's quantized .bin: bytes against a second description of the layout, back to plain blocks, and refusals."""

import json
from pathlib import Path
from typing import Any

import nntr_oracle
import numpy as np
import pytest
import torch
from conftest import save_random_model
from converting import loaded
from families import prompt
from safetensors.torch import load_file
from test_quantize import without_tokenizer
from text_models import save_text_model

from causallm import load_model
from causallm.cli import main
from causallm.loading import build_model
from causallm.packing import pack_weight, packed_tensors
from causallm.weights.convert import convert
from causallm.weights.fidelity import tensor_errors
from causallm.weights.nntr_bin import NntrReader
from causallm.weights.open import open_weights
from causallm.weights.q4_0x8 import deinterleave, interleave
from causallm.weights.quantize import FILES, NNTRAINER_NEEDS, quantize
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.packed_experts import PackedGptOssExperts

FILE = FILES["bin"]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2 biased, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3 tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeConfig", MOE),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def save(folder: Path, name: str, **settings: Any) -> Path:
    class_name, own = MODELS[name]
    save_random_model(folder, 3, class_name, **{**SIZES, **own, **settings})
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("embedding", ["Q4_0", "FP32"])
def test_the_bytes_are_nntrainers(name: str, embedding: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = save(tmp_path / "source", name)
    head = "tied" not in name and name != "gemma3"
    quantize(source, tmp_path / "packed", "Q4_0", embedding, "Q4_0" if head else None, output_format="bin")
    written = (tmp_path / "packed" / FILE).read_bytes()
    expected = nntr_oracle.expected_packed_bin(source, embedding, head=head)
    assert len(written) == len(expected)
    assert written == expected


def test_a_q6_k_embedding_is_plain_rows(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = save(tmp_path / "source", "qwen3 tied", hidden_size=256)
    quantize(source, tmp_path / "packed", "Q4_0", "Q6_K", "Q6_K", output_format="bin")
    start = np.frombuffer((tmp_path / "packed" / FILE).read_bytes()[: 96 * 210], np.uint8).reshape(96, 210)
    values = torch.from_numpy(gguf.quants.dequantize(start, gguf.GGMLQuantizationType.Q6_K))
    table = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert (values - table).norm() < 0.02 * table.norm()
    assert torch.equal(loaded_packed(tmp_path / "packed").embed_tokens.dequantize(), values)


def loaded_packed(folder: Path) -> Any:
    return without_tokenizer(folder)


@pytest.mark.parametrize("name", MODELS)
def test_reading_back_gives_the_plain_blocks_and_the_same_logits(name: str, tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", name), tmp_path / "packed"
    formats = quantize(source, out, "Q4_0", output_format="bin")
    floats, reader = loaded(source), open_weights(out, build_model(out))
    assert isinstance(reader, NntrReader)
    assert dict(reader.formats()) == formats
    for parameter_name, parameter in floats.named_parameters():
        tensor = reader.tensor(parameter_name)
        assert tensor.shape == reader.meta(parameter_name).shape
        if parameter_name in formats:
            assert torch.equal(tensor, pack_weight(parameter, "Q4_0")), parameter_name
        else:
            torch.testing.assert_close(tensor, parameter.detach(), rtol=0, atol=2**-22)
    quantize(source, tmp_path / "native", "Q4_0")
    ours, native = loaded_packed(out), loaded_packed(tmp_path / "native")
    assert set(packed_tensors(ours)) == set(packed_tensors(native)) == set(formats)
    if name != "gemma3":  # Its norms are stored as 1 + w, which rounds.
        assert torch.equal(ours(prompt(time=9)), native(prompt(time=9)))


def test_the_parts_of_fused_experts_are_those_of_the_whole(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", "gpt-oss"), tmp_path / "packed"
    quantize(source, out, "Q4_0", output_format="bin")
    convert(source, tmp_path / "source" / "model.bin")
    for folder, file in ((out, FILE), (source, "model.bin")):
        reader = NntrReader(folder / file, build_model(folder))
        for name in ("layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"):
            assert torch.equal(reader.part(name, (2,)), reader.tensor(name)[2])
            assert torch.equal(reader.part(name, (2, slice(1, None, 2))), reader.tensor(name)[2, 1::2])
    assert isinstance(loaded_packed(out).layers[0].mlp.experts, PackedGptOssExperts)
    assert {error.name for error in tensor_errors(source, out)} >= {"layers.1.mlp.experts.gate_up_proj"}
    assert max(error.relative for error in tensor_errors(source, out)) < 0.12


def test_a_folder_made_so_runs_and_nntrainer_finds_its_keys(tmp_path: Path, capsys) -> None:
    source, out = tmp_path / "source", tmp_path / "packed"
    save_text_model(
        source, "Qwen3Config", head_dim=64, tie_word_embeddings=True, hidden_size=256, intermediate_size=512,
        nntr={"sample_input": "Hello", "num_to_generate": 7},
    )  # fmt: skip
    options = ["--embd_dtype", "Q6_K", "--lmhead_dtype", "Q6_K", "--output_format", "bin", "--verify"]
    assert main(["quantize", str(source), "-o", str(out), *options]) == 0
    assert "1 in Q6_K, 14 in Q4_0" in capsys.readouterr().out
    content = json.loads((out / "nntr_config.json").read_text())
    assert content == {
        **NNTRAINER_NEEDS,
        "sample_input": "Hello",
        "num_to_generate": 7,
        "max_seq_len": 512,
        "init_seq_len": 256,
        "model_file_name": FILE,
        "model_tensor_type": "Q4_0-FP32",
        "fc_layer_dtype": "Q4_0",
        "embedding_dtype": "Q6_K",
        "lmhead_dtype": "Q6_K",
    }
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {path.name for path in source.iterdir()} - {"model.safetensors"} | {FILE}
    )
    model = load_model(out)
    assert (model.embed_tokens.kind, model.layers[0].mlp.up_proj.kind) == ("Q6_K", "Q4_0")
    assert model.generate_text("Once", max_new_tokens=4) != ""


REFUSED = (
    ({"fc": "Q8_0"}, {}, r"has no Q8_0 for embed_tokens.weight \(embedding\), only Q4_0, Q6_K, FP32, FP16"),
    ({"fc": "Q4_K", "embedding": "FP32"}, {}, r"has no Q4_K for layers\.0\.self_attn\.q_proj\.weight \(linear\)"),
    ({"fc": "Q4_0", "head": "Q6_K"}, {"hidden_size": 256}, r"has no Q6_K for lm_head\.weight \(lm_head\)"),
    ({"fc": "Q4_0", "embedding": "Q6_K"}, {}, r"Q6_K needs rows of a multiple of 256, .* embed_tokens.* 96 x 64"),
    ({"fc": "Q4_0"}, {"intermediate_size": 100}, r"multiples of 32, and layers.0.mlp.up_proj.weight is 100 x 64"),
    ({"fc": "Q4_0", "embedding": "BF16"}, {}, r"embedding_dtype: NNTrainer's .bin has FP32, FP16 as floats, not BF16"),
)


@pytest.mark.parametrize(("types", "settings", "message"), REFUSED)
def test_what_the_format_cannot_hold_is_refused_by_name(types: Any, settings: Any, message: str, tmp_path) -> None:
    source = save(tmp_path / "source", "llama", **settings)
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "packed", **types, output_format="bin")
    with pytest.raises(ValueError, match=r"unknown output format 'gguf', expected one of safetensors, bin"):
        quantize(source, tmp_path / "packed", "Q4_0", output_format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_of_the_wrong_size_is_refused_with_the_sizes(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", "llama"), tmp_path / "packed"
    quantize(source, out, "Q4_0", output_format="bin")
    whole = (out / FILE).read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        (out / FILE).write_bytes(content)
        match = rf"{FILE}: {len(content)} bytes, but .* \(FP32\), or packed: .* says it is {len(whole)} bytes"
        with pytest.raises(ValueError, match=match):
            loaded_packed(out)
    (out / FILE).write_bytes(whole)
    with pytest.raises(ValueError, match=r"or packed: NNTrainer's .bin has no Q8_0 for embed_tokens.weight"):
        loaded(out, fc_layer_dtype="Q8_0", embedding_dtype="Q8_0")
    with pytest.raises(ValueError, match="is packed already"):
        quantize(out, tmp_path / "again", "Q8_0")


def test_a_float_file_is_packed_while_loading_where_the_configuration_asks(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    expected = loaded(source)
    convert(source, source / "model.bin")
    (source / "nntr_config.json").write_text('{"model_file_name": "model.bin", "model_tensor_type": "Q8_0-FP32"}')
    model = loaded_packed(source)
    for name, packed in packed_tensors(model).items():
        assert torch.equal(packed.parameter, BLOCK_FORMATS["Q8_0"].pack(expected.get_parameter(name)))
    quantize(source, tmp_path / "packed", "Q4_0", output_format="bin")
    assert packed_tensors(loaded_packed(tmp_path / "packed"))


def test_interleaving_is_undone() -> None:
    plain = torch.randint(0, 256, (24, 5 * 18), dtype=torch.uint8)
    stored = interleave(plain)
    assert stored.numpy().tobytes() == nntr_oracle.q4_0x8(plain.numpy())
    assert torch.equal(deinterleave(stored), plain)
    for refused in (interleave, deinterleave):
        with pytest.raises(ValueError, match="groups of 8 rows, and 12 rows"):
            refused(plain[:12])
