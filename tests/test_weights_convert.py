"""Converting: what a failure or a kill leaves behind, what is held in memory, and the two command lines."""

import os
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from converting import copy_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from causallm.cli import main
from causallm.weights import tensor_bytes
from causallm.weights.atomic_file import temporary_beside
from causallm.weights.convert import Written, convert
from causallm.weights.nntr_bin import NntrReader
from causallm.weights.safetensors_reader import SafetensorsReader

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ("model.bin", "model.safetensors", "folder")


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_exception_half_way_leaves_nothing(checkpoints: Checkpoints, tmp_path: Path, output: str) -> None:
    def fail(step: Written) -> None:
        if "layers.2" in step.name:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(checkpoints.folder("llama"), tmp_path / output, progress=fail)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from causallm.weights.convert import convert

def kill(step):
    if "layers.2" in step.name:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_kill_half_way_leaves_the_old_file_or_none(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"old")
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, checkpoints.folder("llama"), tmp_path / output], cwd=ROOT)
        for output in OUTPUTS
    ]
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 3
    assert (tmp_path / "model.bin").read_bytes() == b"old"
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "folder").exists()
    assert len(list(tmp_path.iterdir())) == 4, "what was being written is left"
    for output in OUTPUTS:
        convert(checkpoints.folder("llama"), tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(OUTPUTS), "the same command clears it away"


def test_only_what_nobody_writes_any_more_is_cleared_away(tmp_path: Path) -> None:
    """Kept: what a process that runs, or another computer, writes; what stands for another file; the file itself."""
    target = tmp_path / "x[1].bin"
    own = temporary_beside(target).name
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        gone = own.replace(f".{os.getpid()}.", f".{dead.pid}.")
        kept = [
            target.name,
            own.replace(f".{os.getpid()}.", f".{running.pid}."),
            gone.replace(f".{dead.pid}.", f"-elsewhere.{dead.pid}."),
            gone.replace("x[1].bin", "y.bin"),
            gone.replace("x[1].bin", "x1.bin"),
        ]
        for name in (own, gone, *kept):
            (tmp_path / name).write_bytes(b"half")
        assert temporary_beside(target) == tmp_path / own
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
        running.communicate(b"\n")


def test_an_old_file_is_replaced_at_the_end(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"old")

    def look(step: Written) -> None:
        assert (tmp_path / "model.bin").read_bytes() == b"old"

    convert(checkpoints.folder("llama"), tmp_path / "model.bin", progress=look)
    assert (tmp_path / "model.bin").stat().st_size > 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("source", ["folder", "bin"])
def test_one_tensor_at_a_time_is_in_memory(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str
) -> None:
    folder = copy_of(checkpoints.folder("gpt-oss"), tmp_path / "m")
    if source == "bin":
        convert(folder, folder / "model.bin")
        folder = folder / "model.bin"
    alive: dict[int, int] = {}
    peaks: list[int] = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            tensor = function(*arguments).clone()
            number = len(peaks)
            alive[number] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, number)
            peaks.append(len(alive))
            return tensor

        return call

    for reader in (SafetensorsReader, NntrReader):
        for method in ("tensor", "part"):
            monkeypatch.setattr(reader, method, counted(getattr(reader, method)))
    monkeypatch.setattr(tensor_bytes, "cast", counted(tensor_bytes.cast))
    monkeypatch.setattr(tensor_bytes, "PIECE_BYTES", 1000)
    convert(folder, tmp_path / output, dtype=torch.float16)
    monkeypatch.undo()
    assert len(peaks) > 100
    assert max(peaks) == 2, "a tensor, and the part of it that is being written"


def test_progress_adds_up(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for output in OUTPUTS:
        steps: list[Written] = []
        convert(checkpoints.folder("qwen3-moe"), tmp_path / output, progress=steps.append, max_shard_bytes=9000)
        assert {step.total for step in steps} == {sum(step.nbytes for step in steps)}


def test_nothing_is_written_where_the_source_is_wrong(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = copy_of(checkpoints.folder("llama"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    for output in OUTPUTS:
        with pytest.raises(ValueError, match=r"1 of 39 tensors are missing, the first is norm.weight"):
            convert(folder, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_the_verb_goes_by_the_suffix_or_by_to(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.folder("llama")
    assert run(capsys, monkeypatch, "convert", source, "-o", tmp_path / "a.bin", "--dtype", "float16") == (0, "")
    assert run(capsys, monkeypatch, "convert", source, "-o", tmp_path / "b", "--to", "nntrainer") == (0, "")
    options = ("--max-shard-size", "0.04MB", "--dtype", "float16")
    assert run(capsys, monkeypatch, "convert", source, "-o", tmp_path / "qwen3-0.6b", *options) == (0, "")
    assert (tmp_path / "a.bin").stat().st_size < (tmp_path / "b").stat().st_size
    assert (tmp_path / "qwen3-0.6b" / "model-00001-of-00002.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-o", "x.bin"], "there is no model folder nowhere"),
        (["MODEL", "-o", "nowhere/x.bin"], "cannot write nowhere/x.bin: No such file or directory"),
        (["MODEL", "-o", "nowhere/x.safetensors"], "cannot write nowhere/x.safetensors: No such file or directory"),
        (["MODEL", "-o", "nowhere/x"], "cannot write nowhere/x: No such file or directory"),
        (["MODEL", "-o", "taken", "--to", "nntrainer"], "cannot write taken: it is a folder, name a file in it"),
        (["MODEL", "-o", "x.bin", "--dtype", "bfloat16"], "NNTrainer's .bin has float32 and float16, not bfloat16"),
        (["MODEL", "-o", "x", "--max-shard-size", "5 GiBs"], "got '5 GiBs', expected a size such as 500MB or 5GB"),
        (["MODEL", "-o", "x", "--max-shard-size", "0"], "got '0', expected a size"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    checkpoints: Checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    model = str(checkpoints.folder("llama"))
    code, error = run(capsys, monkeypatch, "convert", *[model if word == "MODEL" else word for word in arguments])
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


TOOL = (sys.executable, "tools/weight_converter.py")


def test_the_tool_takes_nntrainers_flags(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints.folder("llama")
    convert(source, tmp_path / "expected.bin", dtype=torch.float16)
    flags = ("--model_path", source, "--output_name", tmp_path / "x.bin", "--data_type", "float16")
    done = subprocess.run([*TOOL, *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs setrlimit")
def test_a_full_disk_is_one_line_and_leaves_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    flags = ("--model_path", checkpoints.folder("llama"), "--output_name", tmp_path / "x.bin")
    done = subprocess.run([sys.executable, "-c", LIMITED, TOOL[1], *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write {tmp_path / 'x.bin'}: File too large\n"
    assert list(tmp_path.iterdir()) == []
