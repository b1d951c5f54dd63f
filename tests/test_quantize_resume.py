"""A killed `quantize` is continued: the same bytes as without the kill, and anew wherever that would not be sure."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import save_random_model
from text_models import save_text_model
from torch import Tensor

from causallm.cli import main
from causallm.weights import resumable
from causallm.weights.convert import Written, convert
from causallm.weights.quantize import FILES, quantize
from causallm.weights.resumable import JOURNAL
from causallm.weights.tensor_bytes import write_tensor
from layers.kernels.block_formats import BLOCK_FORMATS

OUTPUT_FORMATS = tuple(FILES)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LAST = 12


class Killed(BaseException):
    """What a test throws to end a run; like KeyboardInterrupt no Exception."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_text_model(tmp_path / "source", "Qwen3Config", tie_word_embeddings=True, **WIDE)
    return tmp_path / "source"


def killing(after: int) -> Callable[[Written], None]:
    """A progress callback that ends the run with the piece of that number."""
    seen: list[str] = []

    def progress(step: Written) -> None:
        seen.append(step.name)
        if len(seen) == after:
            raise Killed

    return progress


def run(source: Path, out: Path, output_format: str, after: int = 0, fc: str = "Q4_0") -> tuple[list[str], int]:
    """Notices of one run and how often it packed something; `after` so many pieces it is killed."""
    notices: list[str] = []
    packed: list[int] = []
    q4_0 = BLOCK_FORMATS["Q4_0"]

    def counting(blocks: Tensor) -> Tensor:
        packed.append(len(blocks))
        return q4_0.pack_blocks(blocks)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setitem(BLOCK_FORMATS, "Q4_0", replace(q4_0, pack_blocks=counting))
        quantize(source, out, fc, progress=killing(after), output_format=output_format, notice=notices.append)
    return notices, len(packed)


def killed(source: Path, out: Path, output_format: str, after: int = LAST) -> Path:
    """The hidden folder that a run leaves that was killed after so many pieces."""
    run(source, out, output_format, after)
    assert not out.exists()
    return out.with_name(f".{out.name}.partial")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
@pytest.mark.parametrize("after", [1, LAST, -1])
def test_a_run_goes_on_after_the_last_whole_tensor(output_format: str, after: int, source, tmp_path) -> None:
    _, whole = run(source, tmp_path / "whole", output_format)
    steps: list[Written] = []
    quantize(source, tmp_path / "counted", "Q4_0", progress=steps.append, output_format=output_format)
    after = after if after > 0 else len(steps)
    _, before = run(source, tmp_path / "packed", output_format, after)
    partial = tmp_path / ".packed.partial"
    assert sorted(path.name for path in partial.iterdir()) == sorted([JOURNAL, FILES[output_format]])
    assert not (tmp_path / "packed").exists()
    notices, packed = run(source, tmp_path / "packed", output_format)
    assert notices == [
        f"going on with {tmp_path / 'packed'}: {after} of {len(steps)} tensors were written by an earlier run"
    ]
    assert before + packed == whole
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
    assert not partial.exists()


def test_a_run_may_be_killed_again_and_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", "safetensors")
    for after in (3, 4, 4, 9, 20):
        killed(source, tmp_path / "packed", "safetensors", after)
    run(source, tmp_path / "packed", "safetensors")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_progress_counts_what_was_there_already(source: Path, tmp_path: Path) -> None:
    killed(source, tmp_path / "packed", "bin")
    steps: list[Written] = []
    quantize(source, tmp_path / "packed", "Q4_0", progress=steps.append, output_format="bin")
    assert sum(step.nbytes for step in steps) == steps[0].total == (tmp_path / "packed" / FILES["bin"]).stat().st_size


def test_a_run_killed_before_anything_was_safe_leaves_no_trace(source: Path, tmp_path: Path) -> None:
    partial = killed(source, tmp_path / "packed", "safetensors")
    lines = (partial / JOURNAL).read_text().splitlines(True)
    (partial / JOURNAL).write_text("".join(lines[:2]))
    assert json.loads(lines[1])["pieces"] == 0
    assert run(source, tmp_path / "packed", "safetensors")[0] == []
    run(source, tmp_path / "whole", "safetensors")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def remove_journal(partial: Path) -> None:
    (partial / JOURNAL).unlink()


def garble_a_line(partial: Path) -> None:
    lines = (partial / JOURNAL).read_text().splitlines(True)
    (partial / JOURNAL).write_text("".join([lines[0], "x" + lines[1], *lines[2:]]))


def lie_about_the_end(partial: Path) -> None:
    with (partial / JOURNAL).open("a") as file:
        file.write('{"pieces": 14, "end": 1}\n')


def claim_too_many(partial: Path) -> None:
    with (partial / JOURNAL).open("a") as file:
        file.write('{"pieces": 1400, "end": 1}\n')


def cut_the_file(partial: Path) -> None:
    os.truncate(partial / FILES["safetensors"], 100)


def empty_the_journal(partial: Path) -> None:
    (partial / JOURNAL).write_text("")


def no_text_at_all(partial: Path) -> None:
    (partial / JOURNAL).write_bytes(bytes(range(256)))


DAMAGES = (
    remove_journal, garble_a_line, lie_about_the_end, claim_too_many, cut_the_file, empty_the_journal, no_text_at_all
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_started_anew(damage: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    _, whole = run(source, tmp_path / "whole", "safetensors")
    damage(killed(source, tmp_path / "packed", "safetensors"))
    (notice,), packed = run(source, tmp_path / "packed", "safetensors")
    assert notice.startswith(f"starting {tmp_path / 'packed'} anew")
    assert packed == whole
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_line_cut_off_by_the_kill_is_passed_over(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", "safetensors")
    partial = killed(source, tmp_path / "packed", "safetensors")
    with (partial / JOURNAL).open("a") as file:
        file.write('{"pieces": 13, "en')
    with (partial / FILES["safetensors"]).open("ab") as file:
        file.write(b"half a tensor")
    killed(source, tmp_path / "packed", "safetensors", LAST + 1)
    (notice,), _ = run(source, tmp_path / "packed", "safetensors")
    assert f": {LAST + 1} of " in notice
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def other_values(source: Path) -> None:
    # The same names and sizes, written at another time.
    save_random_model(source, 9, "Qwen3Config", vocab_size=json.loads((source / "config.json").read_text())[
        "vocab_size"], max_position_embeddings=512, num_hidden_layers=2, tie_word_embeddings=True, **WIDE)  # fmt: skip


def other_config(source: Path) -> None:
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 0.5}))


@pytest.mark.parametrize("change", [other_values, other_config])
def test_a_changed_source_is_started_anew(change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    killed(source, tmp_path / "packed", "bin")
    change(source)
    (notice,), _ = run(source, tmp_path / "packed", "bin")
    assert "anew" in notice
    run(source, tmp_path / "whole", "bin")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:llama.cpp has no rules")
def test_a_gguf_source_is_gone_on_with_until_it_changes(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    convert(source, file)
    run(file, tmp_path / "whole", "safetensors")
    killed(file, tmp_path / "packed", "safetensors")
    killed(file, tmp_path / "changed", "safetensors")
    (notice,), _ = run(file, tmp_path / "packed", "safetensors")
    assert notice.startswith("going on with")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
    os.utime(file, ns=(1, 1))
    (notice,), _ = run(file, tmp_path / "changed", "safetensors")
    assert "anew" in notice


@pytest.mark.parametrize(("fc", "output_format"), [("Q8_0", "safetensors"), ("Q4_0", "bin")])
def test_other_settings_are_started_anew(fc: str, output_format: str, source: Path, tmp_path: Path) -> None:
    killed(source, tmp_path / "packed", "safetensors")
    (notice,), _ = run(source, tmp_path / "packed", output_format, fc=fc)
    assert "anew" in notice
    run(source, tmp_path / "whole", output_format, fc=fc)
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_pieces_count_only_when_they_are_on_the_disk(source: Path, tmp_path: Path, monkeypatch) -> None:
    events: list[str] = []
    fsync, record = os.fsync, resumable.ResumableFile._record

    def recording(self: resumable.ResumableFile, whole: int) -> bytes:
        events.append(f"record {whole}")
        return record(self, whole)

    monkeypatch.setattr(resumable.ResumableFile, "_record", recording)
    monkeypatch.setattr(resumable.os, "fsync", lambda number: (events.append("sync"), fsync(number)))
    monkeypatch.setattr(resumable, "SYNC_BYTES", 1)
    quantize(source, tmp_path / "packed", "Q8_0")
    counts = [event for event in events if event.startswith("record")]
    assert counts[:4] == ["record 0", "record 1", "record 2", "record 3"]
    assert all(events[place - 1] == "sync" for place, event in enumerate(events) if event[-2:] not in (" 0", "nc"))


def test_a_disk_that_fills_up_keeps_the_beginning(source: Path, tmp_path: Path, monkeypatch) -> None:
    room = [LAST]

    def filling(*arguments: object) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return write_tensor(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("causallm.weights.quantize.write_tensor", filling)
        with pytest.raises(OSError, match=r"No space left on device; \.packed\.partial is kept"):
            quantize(source, tmp_path / "packed", "Q4_0")
    (notice,), _ = run(source, tmp_path / "packed", "safetensors")
    assert f": {LAST} of " in notice


def test_two_processes_do_not_write_the_same(source: Path, tmp_path: Path) -> None:
    partial = killed(source, tmp_path / "packed", "safetensors")
    lines = (partial / JOURNAL).read_text().splitlines(True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        first = {**json.loads(lines[0]), "process": other.pid, "since": psutil.Process(other.pid).create_time()}
        (partial / JOURNAL).write_text("".join([json.dumps(first) + "\n", *lines[1:]]))
        with pytest.raises(ValueError, match=f"process {other.pid} is writing .*packed right now"):
            quantize(source, tmp_path / "packed", "Q4_0")
        other.communicate(b"\n")
    (notice,), _ = run(source, tmp_path / "packed", "safetensors")
    assert notice.startswith("going on")


DIE = """
import os, signal, sys
from pathlib import Path
from causallm.weights import quantize, resumable

resumable.SYNC_BYTES = 1
count = 0

def progress(step):
    global count
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

quantize.quantize(Path(sys.argv[1]), Path(sys.argv[2]), "Q4_0", progress=progress, output_format=sys.argv[3])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_a_process_that_was_really_killed_is_continued(
    output_format: str, source: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "packed"
    root = str(Path(__file__).resolve().parents[1])
    arguments = [sys.executable, "-c", DIE, str(source), str(out), output_format, str(LAST)]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    command = ["quantize", str(source), "-o", str(out), "--output_format", output_format]
    assert main(command) == 0
    assert f"going on with {out}: {LAST} of " in capsys.readouterr().err
    run(source, tmp_path / "whole", output_format)
    assert contents(out) == contents(tmp_path / "whole")
