"""Files that are changed, replaced or unreadable while a model runs from them: a clear error, never a wrong token."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_models import save_mxfp4, save_shape, shapes, smallest, streamed, tight  # noqa: F401  fixtures among them

from causallm import load_model
from causallm.storage import open_file
from causallm.storage.rows import RowsOfFile
from causallm.weights.convert import convert
from causallm.weights.quantize import quantize

pytestmark = [pytest.mark.usefixtures("tight"), pytest.mark.filterwarnings("ignore:the budget has room for")]

Shapes = Callable[[str], Path]
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
CHANGED = "the file was changed while the model ran from it; load it again"


def _truncate(file: Path) -> None:
    os.truncate(file, 100)


def _rewrite(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-(len(content) // 2) :] = bytes(len(content) // 2)
    time.sleep(0.02)  # Modification times are coarse.
    with file.open("r+b") as opened:
        opened.write(content)


def _append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def model_of(kind: str, folder: Path) -> tuple[Any, Path]:
    """A model of that family and file format that keeps nothing in memory, and its file."""
    name, _, form = kind.partition(" ")
    if form == "mxfp4":
        save_mxfp4(folder / "m")
        return streamed(folder / "m", memory_budget=smallest(folder / "m")), folder / "m/model-2.safetensors"
    save_shape(folder / "m", name)
    path = file = folder / "m"
    if form == "gguf":
        path = file = folder / "m.gguf"
        convert(folder / "m", path)
    elif form == "packed bin":
        path = folder / "packed"
        quantize(folder / "m", path, "Q4_0", output_format="bin")
        file = path / "packed_x86.bin"
    else:
        file = path / "model.safetensors"
    return streamed(path, memory_budget=smallest(path)), file


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("change", [_truncate, _rewrite, _append])
@pytest.mark.parametrize(
    "kind", ["qwen3", "qwen3-moe", "llama gguf", "gpt-oss gguf", "gpt-oss packed bin", "gpt-oss mxfp4"]
)
def test_a_file_that_is_changed_in_place(kind: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    model, file = model_of(kind, tmp_path)
    expected = model(IDS)
    assert torch.equal(model(IDS), expected)
    change(file)
    for _ in range(3):
        with pytest.raises(OSError, match=CHANGED) as caught:
            model(IDS)
        assert caught.value.filename == str(file)
    with pytest.raises(OSError, match=CHANGED):
        list(model.stream([[1, 2, 3]], max_new_tokens=2))
    model.storage.close()


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("kind", ["llama gguf", "gpt-oss gguf", "gpt-oss packed bin", "gpt-oss mxfp4"])
def test_a_file_that_is_cut_while_a_weight_is_computed_from_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a mapping it would be SIGBUS, the end of the process."""
    model, file = model_of(kind, tmp_path)
    assert torch.equal(model(IDS), model(IDS))
    reader = model.storage._reader
    part, parts = reader.part, []

    def cut(name: str, index: Any) -> torch.Tensor:
        parts.append(name)
        _truncate(file)
        found: torch.Tensor = part(name, index)
        return found

    monkeypatch.setattr(reader, "part", cut)
    for _ in range(2):
        with pytest.raises(OSError, match=CHANGED):
            [model(IDS) for _ in range(2)]
    assert parts
    model.storage.close()


@pytest.mark.parametrize("change", [_truncate, _rewrite])
def test_in_the_middle_of_an_answer(change: Callable[[Path], None], tmp_path: Path) -> None:
    model, file = model_of("llama", tmp_path)
    expected = [event.token_id for event in model.stream([[1, 2, 3]], max_new_tokens=8)]
    answer = model.stream([[1, 2, 3]], max_new_tokens=8)
    found = [next(answer).token_id for _ in range(3)]
    change(file)
    with pytest.raises(OSError, match=CHANGED):
        found.extend(event.token_id for event in answer)
    assert found == expected[: len(found)]
    assert len(found) < 8
    model.storage.close()


def _remove(file: Path) -> None:
    file.unlink()


def _replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(bytes(file.stat().st_size))
    other.replace(file)


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("change", [_remove, _replace])
@pytest.mark.parametrize("kind", ["qwen3-moe", "llama gguf", "gpt-oss packed bin", "gpt-oss mxfp4"])
def test_a_removed_or_replaced_file_is_run_on(kind: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    """Also where nothing was read from it before."""
    model, file = model_of(kind, tmp_path)
    resident = load_model(file if file.suffix == ".gguf" else file.parent)
    expected = resident(IDS), resident(IDS.flip(1))
    change(file)
    for _ in range(2):
        assert torch.equal(model(IDS), expected[0])
        assert torch.equal(model(IDS.flip(1)), expected[1])
    model.storage.close()


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_every_read_may_fail_once(name: str, shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Wherever it happens, in front or ahead: an error or the right answer, and then the right answer."""
    folder, preadv = shapes(name), os.preadv
    model, expected = streamed(folder, memory_budget=smallest(folder)), load_model(folder)(IDS)
    failures = []
    for number in range(0, 24, 3):
        countdown = iter(range(number, -1, -1))

        def failing(*args: Any, countdown: Any = countdown) -> int:
            if next(countdown, 1) == 0:
                raise OSError(errno.EIO, "x")
            return preadv(*args)

        monkeypatch.setattr(os, "preadv", failing)
        for _ in range(3):
            try:
                assert torch.equal(model(IDS), expected), number
            except OSError as error:
                failures.append((error.errno, error.filename))
        monkeypatch.setattr(os, "preadv", preadv)
        assert torch.equal(model(IDS), expected), number
    assert len(failures) >= 8
    assert set(failures) == {(errno.EIO, str(folder / "model.safetensors"))}
    model.storage.close()


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe"])
def test_a_disk_that_is_gone(name: str, shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    folder, preadv = shapes(name), os.preadv
    model, expected = streamed(folder, memory_budget=smallest(folder)), load_model(folder)(IDS)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "preadv", fail)
    for _ in range(3):
        with pytest.raises(OSError, match=r"Input/output error.*model\.safetensors"):
            model(IDS)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    for _ in range(3):
        with pytest.raises(OSError, match=rf"Input/output error|{CHANGED}"):
            model(IDS)
    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(2):
        try:
            assert torch.equal(model(IDS), expected)
        except OSError:
            continue  # What was read ahead while the disk was gone.
    assert torch.equal(model(IDS), expected)
    model.storage.close()


def test_an_error_while_loading(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(open_file, "_reads_direct", lambda _: False)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_model(shapes("qwen3"), fsu=True)


def test_files_that_are_missing(shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    convert(shapes("llama"), tmp_path / "m", max_shard_bytes=40_000)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(tmp_path / "m", fsu=True)


@pytest.mark.parametrize("kind", ["qwen3", "llama gguf"])
@pytest.mark.filterwarnings("ignore:llama.cpp")
def test_ids_outside_of_the_table_are_refused(kind: str, tmp_path: Path) -> None:
    """As torch refuses them; they must not become the bytes beside the table."""
    model, _ = model_of(kind, tmp_path)
    assert isinstance(model.embed_tokens, RowsOfFile)
    for wrong in (-1, 96, 10**6):
        with pytest.raises(IndexError, match=f"token ids .*{wrong}.*, expected 0 to 95"):
            model(torch.tensor([[1, wrong, 5]]))
    assert torch.isfinite(model(torch.tensor([[95, 0]]))).all()
    model.storage.close()


@pytest.mark.parametrize("stored", ["float32", "float16", "Q8_0", "gguf"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.filterwarnings("ignore:llama.cpp")
def test_rows_are_those_of_the_table(stored: str, dtype: str | None, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / ("m.gguf" if stored == "gguf" else "m")
    if stored == "Q8_0":
        quantize(shapes("gemma3"), path, "Q8_0")
    elif stored in ("float32", "gguf"):
        convert(shapes("gemma3"), path)
    else:
        convert(shapes("gemma3"), path, None, torch.float16)
    model, resident = streamed(path, dtype, memory_budget=smallest(path, dtype)), load_model(path, dtype=dtype)
    ids = torch.tensor([[95, 0, 0, 7, 95], [1, 2, 3, 2, 1]])
    assert isinstance(model.embed_tokens, RowsOfFile)
    assert torch.equal(model.embed_tokens(ids), resident.embed_tokens(ids))
    assert not list(model.embed_tokens.parameters())
    model.storage.close()


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_shards_that_are_read(name: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    """Only the file that is changed is blamed."""
    convert(shapes(name), tmp_path / "m", max_shard_bytes=60_000)
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    for shard in sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))[1:3]:
        shutil.rmtree(tmp_path / "m")
        shutil.copytree(tmp_path / "copy", tmp_path / "m")
        model = streamed(tmp_path / "m", memory_budget=smallest(tmp_path / "m"))
        model(IDS)
        _append(tmp_path / "m" / shard)
        with pytest.raises(OSError, match=CHANGED) as caught:
            [model(IDS) for _ in range(3)]
        assert Path(str(caught.value.filename)).name == shard
        model.storage.close()
