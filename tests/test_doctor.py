"""The doctor verb: what a model needs against its files and bench's count, the report's shape, and wrong models."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints, save_random_model
from converting import copy_of
from embedding_folders import save_embedding_model
from gguf_oracle import write
from test_cli import Terminal, mistake
from test_weights_mxfp4 import packed as mxfp4  # noqa: F401  a fixture

import causallm.doctor.machine
from causallm.available_memory import Memory
from causallm.bench import Case, bytes_per_step
from causallm.cli import main
from causallm.doctor.needs import read_needs
from causallm.loading import build_model, find_source
from layers.kernels import native

Captured = pytest.CaptureFixture[str]
NUMBER = (int, float)
RATE = (int, float, type(None))
SIZE = (int, type(None))
WEIGHTS = {"bytes": int, "bytes_per_token": NUMBER, "expert_bytes": int}
MACHINE: dict[str, Any] = {
    "versions": dict.fromkeys(
        "causallm python os torch numpy tokenizers safetensors huggingface_hub psutil".split(), str
    ),
    "packages": dict.fromkeys(("prompt_toolkit", "matplotlib", "tensorboard", "mlflow"), (str, type(None))),
    "processor": {
        "name": str,
        "architecture": str,
        "features": list,
        "cores": SIZE,
        "usable": int,
        "limit": RATE,
        "threads": int,
    },
    "kernels": {"native": bool, "level": str},
    "memory": {"total_bytes": int, "available_bytes": int, "limit_bytes": SIZE, "bytes_per_second": RATE},
    "disk": {
        "path": str,
        "total_bytes": int,
        "free_bytes": int,
        "bytes_per_second": RATE,
        "expert_bytes_per_second": RATE,
    },
    "accelerators": list,
    "findings": list,
}
MODEL: dict[str, Any] = {
    "architecture": str,
    "parameters": int,
    "dtypes": str,
    "experts": int,
    "experts_chosen": int,
    "memory": WEIGHTS,
    "files": WEIGHTS,
    "context": int,
    "cache_bytes": int,
    "fits": bool,
    "tokens_per_second": dict.fromkeys(("resident", "resident_full_cache", "streamed", "streamed_all"), RATE),
}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Memory of 8 GB that gives 10 GB/s, a disk that gives 1 GB/s; returns what was measured."""
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []

    def measured(what: str, figure: float) -> Any:
        return lambda *_: calls.append(what) or figure

    machine = causallm.doctor.machine
    monkeypatch.setattr(machine, "available_memory", lambda: Memory(10 * 10**9, 8 * 10**9, None))
    monkeypatch.setattr(machine, "read_bandwidth_apart", measured("memory", 1e10))
    monkeypatch.setattr(machine, "disk_bandwidth", measured("disk", 1e9))
    monkeypatch.setattr(causallm.disk_bandwidth, "SMALLEST", 2**12)
    return calls


def check(content: Any, schema: Any, where: str = "report") -> None:
    """Keys and kinds of values; nothing may be missing or too many."""
    if not isinstance(schema, dict):
        assert isinstance(content, schema), where
        return
    assert isinstance(content, dict), where
    assert list(content) == list(schema), where
    for key, inner in schema.items():
        check(content[key], inner, f"{where}.{key}")


def test_the_machine_alone(capsys: Captured, tmp_path: Path) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    names = [line.split(" ")[0] for line in lines[: lines.index("")]]
    assert names == "versions optional processor threads kernels memory disk accelerators".split()
    assert f"torch {torch.__version__}" in lines[0]
    assert "8.0 GB available; reads 10.0 GB/s" in output.out
    assert str(tmp_path) in output.out
    assert output.err == ""
    assert not os.listdir(tmp_path)


def test_a_terminal_sees_what_is_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["doctor"]) == 0
    for step in ("memory bandwidth", "disk bandwidth", "accelerators"):
        assert f"measuring: {step}" in terminal.getvalue()


def test_the_json_of_a_machine_has_these_keys(capsys: Captured, asked: list[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("model") is None
    check(shown, MACHINE)
    assert asked == ["memory", "disk", "disk"]


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3", "gpt-oss"])
def test_the_json_of_a_model_has_these_too(name: str, checkpoints: Checkpoints, capsys: Captured) -> None:
    assert main(["doctor", str(checkpoints.folder(name)), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    check(shown.pop("model"), MODEL, "model")
    check(shown, MACHINE)
    assert not [finding for finding in shown["findings"] if "--memory-budget" in finding["remedy"]]


@pytest.mark.parametrize("name", ["llama", "qwen2 sliding, tied", "qwen3-moe", "gemma3", "gpt-oss"])
def test_needs_are_those_of_the_files_and_of_bench(name: str, checkpoints: Checkpoints) -> None:
    """What a step reads was counted before, from the model; here it comes from names and sizes."""
    from safetensors import safe_open

    folder = checkpoints.folder(name)
    needs, model = read_needs(find_source(folder)), build_model(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert needs.files == needs.memory
    assert needs.memory.total == stored == 4 * needs.parameters
    read = bytes_per_step(model, Case("tg", 1, 20, 1, 1))  # type: ignore[arg-type]
    assert needs.memory.per_token + needs.cache_bytes(21) == pytest.approx(read)
    assert (needs.memory.experts > 0) == (needs.experts > 0) == ("moe" in name or "oss" in name)
    assert (needs.memory.table > 0) == (not model.config.tie_word_embeddings)


@pytest.mark.parametrize(
    ("name", "architecture"), [("qwen3-moe", "Qwen3CachedSlimMoeForCausalLM"), ("gpt-oss", "GptOssCachedSlimCausalLM")]
)
def test_experts_that_are_fetched_count_as_well(
    name: str, architecture: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Of their architectures, or under a memory budget, no expert is a parameter of the model."""
    folder = copy_of(checkpoints.folder(name), tmp_path / "x")
    plain = read_needs(find_source(folder))
    assert read_needs(find_source(folder), memory_budget=10**9) == plain
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    assert read_needs(find_source(folder)) == replace(plain, architecture=architecture)


def test_packed_while_loading_files_stay_as_they_are(tmp_path: Path) -> None:
    save_random_model(tmp_path, 1, "LlamaConfig", intermediate_size=64)
    plain, packed = (
        read_needs(find_source(tmp_path), **changes) for changes in ({}, {"model_tensor_type": "Q8_0-FP32"})
    )
    assert packed.files == plain.files == plain.memory
    assert packed.parameters == plain.parameters
    assert packed.memory.table == plain.memory.table * 34 // (4 * 32)
    assert packed.dtypes == "Q8_0+float32"


def test_a_gguf_file_needs_what_its_folder_does(checkpoints: Checkpoints, tmp_path: Path, capsys: Captured) -> None:
    """The query and key of a Llama lie there in another order, and are computed."""
    folder, path = checkpoints.folder("llama"), tmp_path / "x.gguf"
    write(folder, path, "LLAMA")
    ours, theirs = read_needs(find_source(path)), read_needs(find_source(folder))
    assert ours.memory == theirs.memory
    assert ours.files is not None
    assert ours.files.total == pytest.approx(path.stat().st_size, abs=100)
    assert main(["doctor", str(path)]) == 0
    assert f"{path}: LlamaForCausalLM" in capsys.readouterr().out


def test_nntrainers_file_is_counted_as_it_is(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = copy_of(checkpoints.folder("qwen3"), tmp_path / "x", model_file_name="x.bin")
    assert main(["convert", str(checkpoints.folder("qwen3")), "-o", str(folder / "x.bin")]) == 0
    needs = read_needs(find_source(folder))
    assert needs.files is not None
    assert needs.files.total == pytest.approx((folder / "x.bin").stat().st_size, abs=100)
    assert needs.files.always == pytest.approx(needs.memory.always, abs=100)


def test_mxfp4_experts_are_smaller_in_their_file(mxfp4: Path) -> None:  # noqa: F811
    needs = read_needs(find_source(mxfp4))
    assert needs.files is not None
    assert needs.files.experts < 0.6 * needs.memory.experts
    assert needs.files.total == pytest.approx((mxfp4 / "model.safetensors").stat().st_size, rel=0.01)


def test_what_is_wrong_with_a_model_is_one_line_before_anything_is_measured(
    checkpoints: Checkpoints, tmp_path: Path, capsys: Captured, asked: list[str]
) -> None:
    assert "there is no model folder" in mistake(capsys, "doctor", str(tmp_path / "gone"))
    folder = copy_of(checkpoints.folder("llama"), tmp_path / "x")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert "truncated" in mistake(capsys, "doctor", str(folder))
    weights.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert "tensors are missing" in mistake(capsys, "doctor", str(folder), "--json")
    assert "unknown key 'x'" in mistake(capsys, "doctor", str(folder), "--set", "x=1")
    assert not asked


def test_a_model_without_weights_is_a_problem_and_its_needs_are_told(
    checkpoints: Checkpoints, tmp_path: Path, capsys: Captured
) -> None:
    config = (checkpoints.folder("llama") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"]["files"] is None
    assert shown["model"]["tokens_per_second"]["streamed"] is None
    assert shown["model"]["tokens_per_second"]["resident"] > 0
    assert [found["text"] for found in shown["findings"] if "has no weights" in found["text"]]
    assert main(["doctor", str(tmp_path)]) == 0
    assert f"\nproblem: {tmp_path} has no weights" in capsys.readouterr().out


def test_options_change_what_is_needed(checkpoints: Checkpoints, capsys: Captured) -> None:
    def shown(*options: str) -> dict[str, Any]:
        assert main(["doctor", str(checkpoints.folder("llama")), "--json", *options]) == 0
        content: dict[str, Any] = json.loads(capsys.readouterr().out)["model"]
        return content

    plain = shown()
    assert shown("--max-length", "32")["cache_bytes"] == plain["cache_bytes"] // 2
    assert shown("--cache-dtype", "bfloat16")["cache_bytes"] == plain["cache_bytes"] // 2
    assert shown("--dtype", "bfloat16")["memory"]["bytes"] == plain["memory"]["bytes"] // 2
    assert plain["tokens_per_second"]["resident"] == pytest.approx(1e10 / plain["memory"]["bytes_per_token"])


def test_an_embedding_model_generates_nothing(tmp_path: Path, capsys: Captured) -> None:
    save_embedding_model(tmp_path / "x")
    assert main(["doctor", str(tmp_path / "x"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["model"]
    assert shown["cache_bytes"] == 0
    assert set(shown["tokens_per_second"].values()) == {None}
    assert main(["doctor", str(tmp_path / "x")]) == 0
    assert "tokens/s" not in capsys.readouterr().out


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "layers" / "kernels" / "native.py"))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "kernels       torch's operators" in text
    problem = next(line for line in text.splitlines() if line.startswith("problem: the native kernels are not built"))
    assert "install a C compiler" in problem


def test_where_the_disk_cannot_be_measured_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Checkpoints, capsys: Captured
) -> None:
    def fail(*_: Any) -> float:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(causallm.doctor.machine, "disk_bandwidth", fail)
    monkeypatch.setattr(causallm.doctor.machine, "read_bandwidth_apart", fail)
    assert main(["doctor", str(checkpoints.folder("llama"))]) == 0
    text = capsys.readouterr().out
    assert "problem: the disk's bandwidth was not measured: Permission denied" in text
    assert "problem: the memory's bandwidth was not measured: Permission denied" in text
    assert "tokens/s" not in text
