"""Weights and configuration in GGUF: files of the gguf package read by us, and ours by it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import gguf_oracle
import numpy as np
import pytest
import torch
from conftest import Checkpoints, save_random_model
from converting import logits
from embedding_folders import save_embedding_model
from families import FAMILIES, GPT_OSS, MODELS, SIZES, prompt, relative_error
from gguf import GGMLQuantizationType as Type
from packed_weights import packed_weight
from safetensors.torch import load_file

from causallm.embedding_model import EmbeddingModel
from causallm.gguf.format import read_gguf
from causallm.gguf.mxfp4 import mxfp4_as_q8_0
from causallm.gguf.rope_keys import divisors_as_scaling, divisors_of
from causallm.loading import build_model, find_source
from causallm.packing import choose_formats, pack_layers, packed_tensors
from causallm.weights.convert import Written, convert
from causallm.weights.loader import load_weights
from causallm.weights.quantize import quantize
from layers.kernels.block_formats import BLOCK_FORMATS, writable
from layers.rope import Rope

REFUSED = {
    "llama MQA, head_dim 12": "hidden_act 'gelu'",
    "gpt-oss tied, clamping": "swiglu_limit 0.7",
    "dynamic": "rope_type 'dynamic'",
    "yarn, not truncated": "truncate false",
    "longrope": "rope_type 'longrope'",
    "longrope with attention factor": "rope_type 'longrope'",
    "gemma3, dynamic on full layers": "rope_type 'dynamic'",
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}


def loaded(path: Path) -> Any:
    """Our model of a GGUF file, without tokenizer."""
    source = find_source(path)
    model = build_model(source)
    weights = source.weights(model)
    pack_layers(model, choose_formats(model, weights.formats()))
    load_weights(model, weights)
    return model.eval()


def assert_same_weights(packed: Any, floats: Any) -> None:
    """What packed rows stand for is what the other model has, and there are packed rows."""
    rows, expected = packed_tensors(packed), dict(floats.named_parameters())
    assert rows
    for name, parameter in packed.named_parameters():
        values = rows[name].dequantize() if name in rows else parameter
        torch.testing.assert_close(values, expected[name].detach(), rtol=0, atol=0, msg=name)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Hugging Face folder and the gguf package's file of the same model, by the name in `gguf_oracle.MODELS`."""
    root, made = tmp_path_factory.mktemp("gguf"), dict[str, tuple[Path, Path]]()

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            arch, class_name, settings = gguf_oracle.MODELS[name]
            folder = root / str(len(made))
            save_random_model(folder, 5, class_name, **settings)
            gguf_oracle.write(folder, folder.with_suffix(".gguf"), arch)
            made[name] = folder, folder.with_suffix(".gguf")
        return made[name]

    return make


@pytest.mark.parametrize("name", gguf_oracle.MODELS)
def test_a_file_of_the_gguf_package_has_the_folders_logits(name: str, written: Any) -> None:
    folder, path = written(name)
    assert relative_error(loaded(path)(prompt()), logits(folder)) < 1e-5


@pytest.mark.parametrize("name", gguf_oracle.MODELS)
def test_our_file_is_that_of_the_gguf_package(name: str, written: Any, tmp_path: Path) -> None:
    folder, path = written(name)
    convert(folder, tmp_path / "x.gguf")
    ours, theirs = gguf.GGUFReader(tmp_path / "x.gguf"), gguf.GGUFReader(path)
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        other = expected[tensor.name]
        assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape)), tensor.name
        np.testing.assert_allclose(tensor.data, other.data, rtol=1e-5, err_msg=tensor.name)
    for key in (key for key in theirs.fields if not key.startswith("GGUF.")):
        assert ours.fields[key].types == theirs.fields[key].types, key
        assert ours.fields[key].contents() == pytest.approx(theirs.fields[key].contents()), key


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_what_we_write_we_read(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    convert(checkpoints.folder(name), tmp_path / "x.gguf")
    assert relative_error(loaded(tmp_path / "x.gguf")(prompt()), checkpoints.ours(name)(prompt())) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_has_no_key_for_is_refused(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        convert(checkpoints.folder(name), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "what"),
    {
        "mistral": "does not act on a sliding window",
        "qwen3-moe": "loads no file with layers without experts",
        "gemma3 score softcap": "does not act on attn_logit_softcapping and query_pre_attn_scalar",
        "qwen3": "loads no file with biases of attention",
    }.items(),
)
def test_what_llama_cpp_does_otherwise_is_warned_about(
    name: str, what: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"llama.cpp {what}"):
        convert(checkpoints.folder(name), tmp_path / "x.gguf")


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_there_and_back_is_exact(name: str, dtype: torch.dtype, checkpoints: Checkpoints, tmp_path: Path) -> None:
    convert(checkpoints.folder(name), tmp_path / "there", None, dtype)
    steps: list[Written] = []
    convert(tmp_path / "there", tmp_path / "x.gguf", progress=steps.append)
    convert(tmp_path / "x.gguf", tmp_path / "back")
    there, back = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "back"))
    assert sum(step.nbytes for step in steps) == steps[0].total
    assert there.keys() == back.keys()
    for key in there:
        # Gemma's norms plus one are rounded to float32 in the file: exact for the narrow dtypes but near zero.
        gemma_norm = name.startswith("gemma3") and key.endswith("norm.weight")
        assert back[key].dtype == dtype
        torch.testing.assert_close(back[key], there[key], rtol=0, atol=1e-6 if gemma_norm else 0)


@pytest.mark.parametrize("kind", writable())
def test_packed_tensors_stay_packed_byte_for_byte(kind: str, tmp_path: Path) -> None:
    save_random_model(tmp_path / "floats", 3, "LlamaConfig", **WIDE)
    quantize(tmp_path / "floats", tmp_path / "packed", kind)
    convert(tmp_path / "packed", tmp_path / "x.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    packed = load_file(tmp_path / "packed" / "packed.safetensors")
    down = stored["blk.0.ffn_down.weight"]
    assert down.tensor_type == Type[kind]
    assert list(down.shape) == [512, 256]
    assert down.data.tobytes() == packed["layers.0.mlp.down_proj.weight"].numpy().tobytes()
    assert stored["output_norm.weight"].tensor_type == Type.F32
    model, folder_model = loaded(tmp_path / "x.gguf"), find_source(tmp_path / "packed")
    for name, weight in model.named_parameters():
        if weight.dtype == torch.uint8:
            torch.testing.assert_close(weight.detach(), packed[name], rtol=0, atol=0)
    assert find_source(tmp_path / "x.gguf").runtime_json()["model_tensor_type"] == f"{kind}-FP32"
    reference = build_model(folder_model)
    weights = folder_model.weights(reference)
    pack_layers(reference, weights.formats())
    load_weights(reference, weights)
    torch.testing.assert_close(model(prompt()), reference.eval()(prompt()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma3", "gpt-oss"])
def test_packed_files_of_the_gguf_package_are_read(name: str, kind: str, tmp_path: Path) -> None:
    arch, class_name, settings = gguf_oracle.MODELS[name]
    width = max(64, BLOCK_FORMATS[kind].values)
    sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": width // 4} | (
        {"moe_intermediate_size": BLOCK_FORMATS[kind].values} if name == "qwen3moe" else {}
    )
    save_random_model(tmp_path / "f", 5, class_name, **{**settings, **sizes})
    unpacked: dict[str, Any] = {}

    def pack(theirs: str, values: Any) -> Any:
        packed = packed_weight(kind, values.size // values.shape[-1], values.shape[-1]).numpy()
        packed = packed.reshape(*values.shape[:-1], -1)
        unpacked[theirs] = gguf.quants.dequantize(packed, Type[kind])
        return packed, Type[kind]

    def rounded(theirs: str, values: Any) -> Any:
        return unpacked[theirs].astype(np.float32), Type.F32

    gguf_oracle.write(tmp_path / "f", tmp_path / "packed.gguf", arch, pack)
    gguf_oracle.write(tmp_path / "f", tmp_path / "floats.gguf", arch, rounded)
    packed, floats = loaded(tmp_path / "packed.gguf"), loaded(tmp_path / "floats.gguf")
    assert_same_weights(packed, floats)
    convert(tmp_path / "packed.gguf", tmp_path / "folder", None, torch.float32)
    assert relative_error(logits(tmp_path / "folder"), floats(prompt())) < 1e-5


def test_packed_rows_are_mapped_not_copied(tmp_path: Path) -> None:
    save_random_model(tmp_path / "f", 5, "Qwen3Config", hidden_size=64, intermediate_size=64, head_dim=16)
    gguf_oracle.write(
        tmp_path / "f", tmp_path / "x.gguf", "QWEN3", lambda _, v: (gguf.quants.quantize(v, Type.Q8_0), Type.Q8_0)
    )
    source = find_source(tmp_path / "x.gguf")
    reader = source.weights(build_model(source))
    pointers = [reader.tensor("layers.0.mlp.up_proj.weight").data_ptr() for _ in range(2)]
    assert pointers[0] == pointers[1]


def test_mxfp4_becomes_q8_0_without_loss(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(rows, Type.MXFP4)
    ours = BLOCK_FORMATS["Q8_0"].unpack(mxfp4_as_q8_0(torch.from_numpy(packed)))
    np.testing.assert_array_equal(ours.numpy(), gguf.quants.dequantize(packed, Type.MXFP4))
    packed[0, 0] = 255
    with pytest.raises(ValueError, match="beyond float16"):
        mxfp4_as_q8_0(torch.from_numpy(packed))


def test_gpt_oss_with_mxfp4_experts_runs(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    save_random_model(tmp_path / "f", 5, "GptOssConfig", **{**GPT_OSS, **sizes})
    unpacked: dict[str, Any] = {}

    def pack(theirs: str, values: Any) -> Any:
        if "exps" not in theirs:
            return None
        packed = gguf.quants.quantize(values, Type.MXFP4)
        unpacked[theirs] = gguf.quants.dequantize(packed, Type.MXFP4).astype(np.float32)
        return packed, Type.MXFP4

    gguf_oracle.write(tmp_path / "f", tmp_path / "p.gguf", "GPT_OSS", pack)
    gguf_oracle.write(
        tmp_path / "f", tmp_path / "f.gguf", "GPT_OSS", lambda n, v: (unpacked[n], Type.F32) if n in unpacked else None
    )
    assert_same_weights(loaded(tmp_path / "p.gguf"), loaded(tmp_path / "f.gguf"))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_own_scaling_is_recognised(factor: float) -> None:
    rope = Rope("llama3", 128, 500000.0, factor, original_positions=8192)
    found = divisors_as_scaling(divisors_of(rope), 500000.0, 128)
    assert found == {
        "rope_type": "llama3",
        "factor": pytest.approx(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = divisors_as_scaling(divisors_of(Rope("llama3", 128, 500000.0, factor, original_positions=4096)), 5e5, 128)
    assert other["rope_type"] == "longrope"


def test_a_tensor_that_the_family_has_not_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    gguf_oracle.write(checkpoints.folder("qwen2"), tmp_path / "x.gguf", "QWEN2")
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content.replace(b"qwen2", b"llama"))
    with pytest.raises(ValueError, match=r"x.gguf: tensor blk.0.attn_k.bias is not one of llama with these settings"):
        loaded(tmp_path / "x.gguf")


def test_an_embedding_model_keeps_its_pooling(tmp_path: Path) -> None:
    save_embedding_model(tmp_path / "model", "Qwen3Config", dense=False)
    convert(tmp_path / "model", tmp_path / "x.gguf")
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields["qwen3.pooling_type"].contents() == gguf.PoolingType.MEAN
    ours = loaded(tmp_path / "x.gguf")
    assert isinstance(ours, EmbeddingModel)
    torch.testing.assert_close(ours(prompt()), logits(tmp_path / "model"))


def test_a_model_that_ggml_has_not_is_refused(tmp_path: Path) -> None:
    save_embedding_model(tmp_path / "model", "Gemma3TextConfig")
    with pytest.raises(ValueError, match="Gemma3TextModel cannot be written as GGUF"):
        convert(tmp_path / "model", tmp_path / "x.gguf")


def test_configuration_of_the_folder_comes_back(checkpoints: Checkpoints, tmp_path: Path) -> None:
    convert(checkpoints.folder("mistral without window"), tmp_path / "x.gguf")
    content = find_source(tmp_path / "x.gguf").config_json()
    expected = json.loads((checkpoints.folder("mistral without window") / "config.json").read_text())
    same = [key for key in SIZES if not key.endswith("token_id")]
    assert {key: content[key] for key in same} == {key: expected[key] for key in same}
    assert content["rms_norm_eps"] == expected["rms_norm_eps"]
    assert content["tie_word_embeddings"] is True
    assert content["dtype"] == "float32"


def test_sampling_and_ends_come_back(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1] / "res" / "tiny-stories"
    shutil.copytree(root, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "x.gguf")
    content = find_source(tmp_path / "x.gguf").generation_json()
    expected = json.loads((root / "generation_config.json").read_text())
    del expected["pad_token_id"]
    assert content == {key: pytest.approx(value) for key, value in expected.items()}
    assert content["do_sample"] is True
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["general.file_type"].contents() == 32
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2
    assert read_gguf(tmp_path / "x.gguf").metadata["general.architecture"] == "qwen3"
    assert math.isclose(fields["general.sampling.temp"].contents(), expected["temperature"], rel_tol=1e-6)
