"""The disk's figure against disks of a known rate, which file it is taken from, and what is left behind: nothing."""

import os
import sys
import time
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import causallm.disk_bandwidth
from causallm.disk_bandwidth import EXPERT, PIECE, THREADS, disk_bandwidth, large_file

PAGE = 4096


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 64 pages are large enough."""
    monkeypatch.setattr(causallm.disk_bandwidth, "SMALLEST", 64 * PAGE)
    monkeypatch.setattr(causallm.disk_bandwidth, "PIECE", PAGE)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(64 * PAGE))
    return path


class SlowFile(FileIO):
    """One of which each read takes 10 ms, and which notes where they were."""

    places: list[int]

    def readinto(self, buffer: Any, /) -> int:
        self.places.append(self.tell())
        time.sleep(0.01)
        return super().readinto(buffer)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    SlowFile.places = []
    monkeypatch.setattr(causallm.disk_bandwidth, "_open", SlowFile)
    return SlowFile.places


def test_pieces_are_of_whole_pages() -> None:
    assert not PIECE % PAGE
    assert not EXPERT % PAGE
    assert 2.5e6 <= EXPERT <= 2.7e6


def test_the_rate_is_that_of_the_disk(weights, slow) -> None:
    """Four threads with a page every 10 ms each; slower where this machine is busy, never faster."""
    rate = disk_bandwidth(weights, 10.0, PAGE)
    assert 0.1 * THREADS * PAGE / 0.01 < rate <= THREADS * PAGE / 0.01
    assert sorted(slow) == list(range(0, 64 * PAGE, PAGE))
    assert slow != sorted(slow)


def test_it_ends_in_time_and_leaves_out_the_odd_end(tmp_path, slow) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000 * PAGE + 1))
    begin = time.perf_counter()
    disk_bandwidth(path, 0.05, PAGE)
    assert time.perf_counter() - begin < 2.0
    assert len(slow) < 1000
    assert all(place % PAGE == 0 and place + PAGE <= 1000 * PAGE for place in slow)


def test_real_reads_give_a_rate(weights) -> None:
    assert disk_bandwidth(weights, 0.2, PAGE) > 0
    assert disk_bandwidth(weights.parent, 0.2, 2 * PAGE) > 0


def test_a_folder_stands_for_its_largest_weights(tmp_path, weights) -> None:
    (tmp_path / "b.gguf").write_bytes(bytes(65 * PAGE))
    (tmp_path / "corpus.txt").write_bytes(bytes(66 * PAGE))
    with large_file(tmp_path) as file:
        assert file == tmp_path / "b.gguf"
    with large_file(weights) as file:
        assert file == weights


@pytest.mark.parametrize("name", ["model.safetensors", "", "notes"])
def test_where_no_file_is_large_enough_one_is_made_and_removed(name, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(PAGE))
    (tmp_path / "notes").write_bytes(b"")
    with large_file(tmp_path / name) as file:
        assert file.parent == tmp_path
        assert file.stat().st_size == 64 * PAGE
        assert len({*file.read_bytes()}) > 200
    monkeypatch.setattr(causallm.disk_bandwidth, "_open", refuse)
    with pytest.raises(OSError, match="refused"):
        disk_bandwidth(tmp_path / name, 0.1, PAGE)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "notes"]


def refuse(*_: object) -> Any:
    raise OSError("refused")


def test_what_does_not_exist_is_not_measured(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*gone"):
        disk_bandwidth(tmp_path / "gone")
    assert not os.listdir(tmp_path)


class IndirectFile(FileIO):
    """Opens directly but does not read so, as some file systems have it."""

    def readinto(self, buffer: Any, /) -> int:
        import fcntl

        if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return super().readinto(buffer)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="direct reads are Linux's")
@pytest.mark.parametrize("refused", ["open", "read"])
def test_buffered_reads_of_a_dropped_file_where_direct_ones_are_refused(refused, weights, monkeypatch) -> None:
    real, dropped, asked = os.open, [], []

    def open_indirectly(name: Any, flags: int, *mode: int) -> int:
        asked.append(flags & os.O_DIRECT)
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", open_indirectly)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[1:]))
    if refused == "read":
        monkeypatch.setattr(causallm.disk_bandwidth, "FileIO", IndirectFile)
    assert disk_bandwidth(weights, 0.2, PAGE) > 0
    assert asked == [os.O_DIRECT] * THREADS
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * THREADS


def test_macos_reads_past_its_cache(weights, monkeypatch) -> None:
    calls = []
    control = SimpleNamespace(fcntl=lambda descriptor, command, value: calls.append((command, value)))
    monkeypatch.setitem(sys.modules, "fcntl", control)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert disk_bandwidth(weights, 0.2, PAGE) > 0
    assert calls == [(48, 1)] * THREADS


def test_windows_has_neither(weights, monkeypatch) -> None:
    for name in ("O_DIRECT", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    assert disk_bandwidth(weights, 0.2, PAGE) > 0
