"""Loading in another dtype gives back what it mapped: peak memory is the model and one tensor more."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causallm.weights.mapped_file import MappedFile

MEASURE = """
import sys, torch
from pathlib import Path
from causallm.report import peak_memory
from causallm.weights.safetensors_reader import SafetensorsReader
reader = SafetensorsReader({Path(sys.argv[1]): ""})
before = peak_memory()
kept = []
for name, tensor in reader:
    kept.append(tensor.to(torch.float32))
    if sys.argv[2] == "release":
        reader.release(name)
print(peak_memory() - before)
"""


def grown(path: Path, mode: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(path), mode]
    root = Path(__file__).resolve().parents[1]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count or release mapped pages differently")
def test_pages_of_cast_tensors_do_not_add_up(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.ones(2**22, dtype=torch.bfloat16) for number in range(8)}, path)
    model, one = 8 * 2**24, 2**23
    assert grown(path, "release") < model + 2 * one
    assert grown(path, "keep") > model + 6 * one


def test_a_released_range_reads_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    values = torch.randn(5000)
    path.write_bytes(values.numpy().tobytes())
    file = MappedFile(path)
    before = file.tensor(0, [5000], torch.float32).clone()
    file.release(100, 15000)
    file.release(8, 8)
    assert torch.equal(file.tensor(0, [5000], torch.float32), before)
    assert torch.equal(before, values)


def test_a_system_without_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    for unknown in (10**4, None):
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", unknown, raising=False)
        if unknown is None:
            monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
        assert MappedFile(path).tensor(3, [2], torch.uint8).tolist() == [3, 4]
