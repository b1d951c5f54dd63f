"""GGUF's container: what the gguf package writes and reads, and files that are damaged or of another kind."""

import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import save_random_model
from families import GEMMA, GPT_OSS, MOE
from sample_tokenizers import byte_fallback

from causallm.cli import main
from causallm.gguf.format import read_gguf
from causallm.gguf.serialise import header
from causallm.gguf.source import is_gguf
from causallm.loading import load_model
from causallm.weights.convert import convert

VALUES: dict[str, Any] = {
    "a.text": "déjà vu",
    "a.true": True,
    "a.whole": 7,
    "a.real": 1e-6,
    "a.texts": ["", "one", "▁two"],
    "a.wholes": [1, -2, 3],
    "a.reals": [0.5, -1e6],
    "a.flags": [True, False],
    "general.sampling.top_k": 40,
}


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a family, with a tokenizer, as a GGUF file of ours."""
    root = tmp_path_factory.mktemp("files")
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", {}),
        "qwen3moe": ("Qwen3MoeConfig", {**MOE, "norm_topk_prob": True}),
        "gemma3": ("Gemma3TextConfig", {**GEMMA, "query_pre_attn_scalar": 16}),
        "gpt-oss": ("GptOssConfig", GPT_OSS),
    }

    def make(name: str) -> Path:
        path = root / f"{name}.gguf"
        if not path.exists():
            class_name, settings = families[name]
            save_random_model(root / name, 1, class_name, **{**settings, "vocab_size": 450, "num_hidden_layers": 2})
            byte_fallback().save(str(root / name / "tokenizer.json"))
            (root / name / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
            convert(root / name, path)
        return path

    return make


def test_values_and_tensors_as_the_gguf_package_writes_them(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint64("n.u64", 2**40)
    writer.add_int8("n.i8", -3)
    writer.add_float64("n.f64", 0.1)
    writer.add_float32("n.f32", 1e-6)
    writer.add_array("n.texts", ["a", "ü"])
    writer.add_array("n.reals", [0.25, 4.0])
    writer.add_custom_alignment(64)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("first", values)
    writer.add_tensor("second", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "x.gguf")
    assert {key: value for key, value in file.metadata.items() if key.startswith("n.")} == {
        "n.u64": 2**40, "n.i8": -3, "n.f64": 0.1, "n.f32": 1e-6, "n.texts": ["a", "ü"], "n.reals": [0.25, 4.0],
    }  # fmt: skip
    first, second = file.tensors["first"], file.tensors["second"]
    assert (first.shape, first.kind, second.kind, second.offset % 64) == ((2, 3), "F32", "F16", 0)
    content = (tmp_path / "x.gguf").read_bytes()
    assert content[first.offset : first.offset + first.nbytes] == values.tobytes()


def test_the_gguf_package_reads_our_header(tmp_path: Path) -> None:
    tensors = [("b.weight", (3, 4), "F32", 48), ("a.weight", (5,), "F16", 10)]
    values = np.arange(12, dtype=np.float32)
    body = values.tobytes() + bytes(16) + np.arange(5, dtype=np.float16).tobytes()
    (tmp_path / "x.gguf").write_bytes(header(VALUES, tensors) + body + bytes(22))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert all(reader.fields[name].contents() == pytest.approx(value) for name, value in VALUES.items())
    assert reader.fields["general.sampling.top_k"].types == [gguf.GGUFValueType.INT32]
    assert [list(tensor.shape) for tensor in reader.tensors] == [[4, 3], [5]]
    np.testing.assert_array_equal(reader.tensors[0].data, values.reshape(3, 4))
    assert read_gguf(tmp_path / "x.gguf").metadata == VALUES


def changed(path: Path, folder: Path, change: Callable[[bytearray], Any]) -> Path:
    content = bytearray(path.read_bytes())
    content = change(content) or content
    (folder / "changed.gguf").write_bytes(content)
    return folder / "changed.gguf"


def replace(old: bytes, new: bytes) -> Callable[[bytearray], bytearray]:
    def change(content: bytearray) -> bytearray:
        assert content.count(old) >= 1
        return content.replace(old, new, 1)

    return change


def key(name: str, value: bytes) -> bytes:
    return name.encode() + value


UINT32 = struct.pack("<I", 4)
DAMAGE: dict[str, tuple[Callable[[bytearray], Any], str]] = {
    "no magic": (lambda content: b"GGML" + content[4:], "not a GGUF file"),
    "nothing": (lambda content: b"\0"[:0] or bytearray(1), "not a GGUF file"),
    "version 1": (lambda content: content[:4] + struct.pack("<I", 1) + content[8:], "GGUF version 1: expected 2 or 3"),
    "big-endian": (lambda content: content[:4] + struct.pack(">I", 3) + content[8:], "big-endian files are not read"),
    "cut off": (lambda content: content[:-100], "truncated or damaged: tensor"),
    "cut off in the header": (lambda content: content[:2000], "truncated or damaged"),
    "a trillion tensors": (lambda content: content[:8] + struct.pack("<Q", 10**12) + content[16:], "do not fit"),
    "a trillion keys": (lambda content: content[:16] + struct.pack("<Q", 10**12) + content[24:], "do not fit"),
    "a long text": (lambda content: content[:24] + struct.pack("<Q", 2**60) + content[32:], "truncated or damaged"),
    "an unknown architecture": (
        replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0mamba"),
        "architecture 'mamba'; known",
    ),
    "blocks": (
        replace(
            key("llama.block_count", UINT32 + struct.pack("<I", 2)), key("llama.block_count", UINT32 + b"\xff" * 4)
        ),
        "block_count is 4294967295, but there are tensors of 2 blocks",
    ),
    "heads": (
        replace(
            key("llama.attention.head_count", UINT32 + struct.pack("<I", 4)),
            key("llama.attention.head_count", UINT32 + struct.pack("<I", 2**31)),
        ),
        "num_attention_heads is 2147483648, but no tensor is longer",
    ),
    "a missing tensor": (
        replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"),
        "tensor blk.1.ffn_up.weight is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_clear_line(name: str, model_file: Callable[[str], Path], tmp_path: Path) -> None:
    change, what = DAMAGE[name]
    path = changed(model_file("llama"), tmp_path, change)
    with pytest.raises(ValueError, match=what) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("number", "name"), [(10, "Q2_K"), (16, "IQ2_XXS"), (21, "IQ3_S"), (99, "number 99")])
def test_other_tensor_types_are_refused_by_name(
    number: int, name: str, model_file: Callable[[str], Path], tmp_path: Path
) -> None:
    old = b"token_embd.weight" + struct.pack("<IQQI", 2, 32, 450, 0)
    path = changed(model_file("llama"), tmp_path, replace(old, old[:-4] + struct.pack("<I", number)))
    with pytest.raises(
        ValueError, match=rf"token_embd.weight: type {name} cannot be read; those that can are F32, F16"
    ):
        load_model(path)


def test_parts_and_projectors_are_refused(tmp_path: Path) -> None:
    for values, what in (({"split.count": 3}, "one of 3 parts"), ({"general.type": "mmproj"}, "type is 'mmproj'")):
        content = header({"general.architecture": "llama", **values}, [("x", (8,), "F32", 32)])
        (tmp_path / "x.gguf").write_bytes(content + bytes(32))
        with pytest.raises(ValueError, match=what):
            load_model(tmp_path / "x.gguf")


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model(tmp_path / "x.gguf")
    assert main(["owner/x.gguf", "hi"]) == 2
    assert "there is no file owner" in capsys.readouterr().err


def test_a_gguf_file_is_known_by_its_name_or_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF and more")
    (tmp_path / "other").write_bytes(b"else")
    (tmp_path / "folder.gguf").mkdir()
    found = {name: is_gguf(tmp_path / name) for name in ("blob", "other", "folder.gguf", "missing.gguf", "missing")}
    assert found == {"blob": True, "other": False, "folder.gguf": False, "missing.gguf": True, "missing": False}


def test_a_folder_with_only_a_gguf_file_says_to_name_it(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"no config.json; to run a GGUF file name it: .*x.gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3moe", "gemma3", "gpt-oss"])
def test_random_damage_gives_an_error_in_one_line_or_a_model(
    family: str, model_file: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = model_file(family).read_bytes()
    end = min(info.offset for info in read_gguf(model_file(family)).tensors.values())
    chance, errors = random.Random(7), list[str]()
    for _ in range(120):
        content = bytearray(whole)
        if chance.random() < 0.2:
            content = content[: chance.randrange(len(content))]
        for _ in range(chance.choice((1, 1, 3))):
            # Half of the damage hits the first keys, which say what the model is.
            place = chance.randrange(min(len(content), chance.choice((1100, end))) or 1)
            content[place : place + 1] = bytes([chance.choice((0, 255, chance.randrange(256)))])
        (tmp_path / "x.gguf").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_model(tmp_path / "x.gguf")
            except (ValueError, FileNotFoundError) as error:
                errors.append(str(error))
    assert len(errors) > 40
    assert not [error for error in errors if "\n" in error]


def test_every_verb_takes_a_file(
    model_file: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(model_file("llama"))
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl named Lily. " * 4)
    assert main([path, "Once", "-n", "3", "--raw", "--json"]) == 0
    assert main(["inspect", path]) == 0
    assert main(["perplexity", path, "--text", str(tmp_path / "text.txt"), "--window", "16"]) == 0
    assert main(["convert", path, "-o", str(tmp_path / "folder"), "--dtype", "float16"]) == 0
    assert main(["convert", str(tmp_path / "folder"), "-o", str(tmp_path / "again"), "--to", "gguf"]) == 0
    assert "LlamaForCausalLM: 21 weights" in capsys.readouterr().out
    kinds = {info.kind for info in read_gguf(tmp_path / "again").tensors.values() if len(info.shape) > 1}
    assert kinds == {"F16"}


def test_nothing_stays_of_a_file_that_could_not_be_written(
    model_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causallm.gguf.writer.write_tensor", fail)
    with pytest.raises(OSError, match=r"cannot write .*x.gguf: No space left"):
        convert(model_file("llama").with_suffix(""), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_experts_are_one_tensor_and_progress_counts_all(model_file: Callable[[str], Path], tmp_path: Path) -> None:
    held: list[int] = []
    convert(model_file("qwen3moe").with_suffix(""), tmp_path / "x.gguf", progress=lambda step: held.append(step.nbytes))
    experts = [info for info in read_gguf(tmp_path / "x.gguf").tensors.values() if "exps" in info.name]
    assert len(experts) == 6
    assert all(len(info.shape) == 3 for info in experts)
    assert sum(held) == sum(info.nbytes for info in read_gguf(tmp_path / "x.gguf").tensors.values())


def test_what_is_loaded_does_not_change_the_file(model_file: Callable[[str], Path]) -> None:
    before = model_file("llama").read_bytes()
    model = load_model(model_file("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model_file("llama").read_bytes() == before
