"""Reading ranges of files: whole pages, exact places, ends of files, and every way in which a read can go wrong."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from causallm.storage import open_file
from causallm.storage.background import AHEAD, URGENT
from causallm.storage.disk import PIECE_BYTES, Disk
from causallm.storage.layout import Span
from causallm.storage.open_file import OpenFile
from layers.pages import PAGE, Pages, whole_pages

SIZE = 5 * PAGE + 1234


@pytest.fixture
def content() -> bytes:
    return bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).tolist())


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(content)
    return path


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def disk(request: pytest.FixtureRequest, path: Path) -> Iterator[Disk]:
    disk = Disk([path], request.param, threads=2)
    if request.param and not disk.direct:
        pytest.skip("this file system has no direct reads")
    yield disk
    disk.close()


def bytes_of(memory: Pages, start: int, nbytes: int) -> bytes:
    return bytes(memory.view(start, nbytes))


def test_whole_pages_to_their_places(disk: Disk, path: Path, content: bytes) -> None:
    memory = Pages(10 * PAGE)
    spans = [Span(path, 2 * PAGE, PAGE, 3 * PAGE), Span(path, 0, 2 * PAGE, 0)]
    disk.read(spans, memory, 2 * PAGE).wait()
    assert bytes_of(memory, 5 * PAGE, PAGE) == content[2 * PAGE : 3 * PAGE]
    assert bytes_of(memory, 2 * PAGE, 2 * PAGE) == content[: 2 * PAGE]
    assert bytes_of(memory, 0, 2 * PAGE) == bytes(2 * PAGE)
    assert bytes_of(memory, 4 * PAGE, PAGE) == bytes(PAGE)


def test_the_end_of_a_file_is_no_whole_page(disk: Disk, path: Path, content: bytes) -> None:
    memory = Pages(2 * PAGE)
    disk.read([Span(path, 4 * PAGE, 2 * PAGE, 0)], memory).wait()
    assert bytes_of(memory, 0, PAGE + 1234) == content[4 * PAGE :]


@pytest.mark.parametrize(("place", "nbytes"), [(0, 1), (PAGE - 3, 10), (100, 2 * PAGE), (SIZE - 5, 5), (64, PAGE)])
@pytest.mark.parametrize("start", [0, 64, PAGE + 8, 3 * PAGE - 1])
def test_bytes_at_any_place_to_any_place(
    place: int, nbytes: int, start: int, disk: Disk, path: Path, content: bytes
) -> None:
    memory = Pages(8 * PAGE)
    disk.read_exactly([(path, place, nbytes)], memory, [start], URGENT).wait()
    assert bytes_of(memory, start, nbytes) == content[place : place + nbytes]


def test_large_reads_are_done_in_pieces(tmp_path: Path) -> None:
    values = torch.arange(PIECE_BYTES // 2, dtype=torch.int64)
    (tmp_path / "large").write_bytes(values.numpy().tobytes())
    disk, memory = Disk([tmp_path / "large"], False), Pages(values.nbytes)
    reads: list[int] = []
    begin = disk.counts.begin

    def counted() -> None:
        reads.append(1)
        begin()

    disk.counts.begin = counted  # type: ignore[method-assign]
    disk.read([Span(tmp_path / "large", 0, values.nbytes, 0)], memory).wait()
    assert torch.equal(memory.tensor(0, (len(values),), torch.int64), values)
    assert len(reads) == values.nbytes // PIECE_BYTES == 4
    assert disk.counts.nbytes == values.nbytes
    assert disk.counts.seconds > 0
    disk.close()


def test_what_somebody_waits_for_comes_first(path: Path) -> None:
    disk, done = Disk([path], False, threads=1), list[str]()
    gate, memory = threading.Event(), Pages(PAGE)

    def stand() -> None:
        gate.wait()

    disk.read([], memory, computing=[stand])
    ahead = disk.read([], memory, 0, AHEAD, [lambda: done.append("ahead")])
    urgent = disk.read_exactly([], memory, [], URGENT, [lambda: done.append("urgent")])
    gate.set()
    assert urgent.wait() >= 0
    ahead.wait()
    assert done == ["urgent", "ahead"]
    disk.close()


def test_a_failing_system_call_is_told_with_the_files_name(
    disk: Disk, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, preadv = Pages(2 * PAGE), os.preadv

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "preadv", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error") as caught:
            disk.read([Span(path, 0, PAGE, 0)], memory).wait()
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
        with pytest.raises(OSError, match="weights"):
            disk.read_exactly([(path, 5, 9)], memory, [0], URGENT).wait()
    monkeypatch.setattr(os, "preadv", preadv)
    disk.read([Span(path, 0, PAGE, 0)], memory).wait()
    assert bytes_of(memory, 0, PAGE) == content[:PAGE]


def test_a_read_that_comes_short_is_gone_on_with(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, memory, preadv = Disk([path], False), Pages(6 * PAGE), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:1000]], at))
    disk.read([Span(path, 0, 6 * PAGE, 0)], memory).wait()
    assert bytes_of(memory, 0, SIZE) == content
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match="was changed while the model ran"):
        disk.read([Span(path, 0, PAGE, 0)], memory).wait()
    disk.close()


def test_without_preadv(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    disk, memory = Disk([path], False), Pages(6 * PAGE)
    disk.read([Span(path, 0, 2 * PAGE, 0), Span(path, 2 * PAGE, 4 * PAGE, 2 * PAGE)], memory).wait()
    assert bytes_of(memory, 0, SIZE) == content
    disk.close()


def _truncate(path: Path) -> None:
    os.truncate(path, PAGE)


def _rewrite(path: Path) -> None:
    time.sleep(0.02)  # Modification times are coarse.
    with path.open("r+b") as file:
        file.write(b"other")


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [_truncate, _rewrite, _append])
def test_a_file_that_is_changed_in_place(change: Any, disk: Disk, path: Path) -> None:
    memory = Pages(6 * PAGE)
    disk.read([Span(path, 0, PAGE, 0)], memory).wait()
    disk.check()
    change(path)
    for _ in range(2):
        with pytest.raises(OSError, match="the file was changed while the model ran from it; load it again") as caught:
            disk.read([Span(path, 0, PAGE, 0)], memory).wait()
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="changed"):
        disk.read_exactly([(path, 2 * PAGE, 8)], memory, [0], URGENT).wait()
    with pytest.raises(OSError, match="changed"):
        disk.check()


def test_a_file_that_is_removed_or_replaced_is_read_on(disk: Disk, path: Path, content: bytes) -> None:
    memory = Pages(PAGE)
    (path.parent / "other").write_bytes(bytes(SIZE))
    (path.parent / "other").replace(path)
    disk.read([Span(path, PAGE, PAGE, 0)], memory).wait()
    assert bytes_of(memory, 0, PAGE) == content[PAGE : 2 * PAGE]
    path.unlink()
    disk.read([Span(path, 0, PAGE, 0)], memory).wait()
    assert bytes_of(memory, 0, PAGE) == content[:PAGE]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin is missing"):
        Disk([tmp_path / "nothing.bin"], False)


def test_a_file_system_without_direct_reads(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_file, "_reads_direct", lambda _: False)
    disk, memory = Disk([path], True), Pages(PAGE)
    assert not disk.direct
    disk.read([Span(path, 0, PAGE, 0)], memory).wait()
    assert bytes_of(memory, 0, PAGE) == content[:PAGE]
    disk.close()


def test_an_error_in_the_background_is_raised_where_it_is_waited_for(path: Path) -> None:
    disk, memory = Disk([path], False, threads=1), Pages(PAGE)

    def fail() -> None:
        raise MemoryError("no room")

    ticket = disk.read([Span(path, 0, PAGE, 0)], memory, computing=[fail])
    ticket.settle()
    assert ticket.done
    assert ticket.failed
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            ticket.wait()
    assert disk.read([Span(path, 0, PAGE, 0)], memory).wait() >= 0
    disk.close()


def test_a_closed_disk_refuses(path: Path) -> None:
    disk = Disk([path], False)
    disk.close()
    disk.close()
    with pytest.raises(RuntimeError, match="closed"):
        disk.read([Span(path, 0, PAGE, 0)], Pages(PAGE))
    with pytest.raises(RuntimeError, match="closed"):
        disk.read_now(path, 0, Pages(PAGE).view(0, PAGE))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell which files are open")
def test_files_are_closed(path: Path) -> None:
    def open_files() -> int:
        return sum(os.readlink(link) == str(path) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    before = open_files()
    file, disk = OpenFile(path, False), Disk([path], False)
    assert open_files() == before + 2
    disk.close()
    del file
    assert open_files() == before


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 2**21 + 5])
def test_pages(nbytes: int) -> None:
    memory = Pages(nbytes)
    assert len(memory.view(0, nbytes)) == nbytes
    if nbytes:
        tensor = memory.tensor(0, (nbytes,), torch.uint8)
        assert tensor.data_ptr() % PAGE == 0
        assert nbytes < 2**21 or tensor.data_ptr() % 2**21 == 0
        memory.view(nbytes - 1, 1)[0] = 7
        del memory
        assert tensor[-1] == 7
    assert whole_pages(nbytes) % PAGE == 0
    assert 0 <= whole_pages(nbytes) - nbytes < PAGE
