"""A budget on the command line: running under one, the plan verb, and what is refused in which words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from storage_models import bare, between, planned, smallest  # noqa: F401  fixtures
from text_models import PROMPT, save_text_model

from causallm.byte_size import parse_bytes
from causallm.cli import main
from causallm.commands import plan as plan_command
from causallm.report import Report, memory_kinds
from causallm.storage.counts import StorageCounts

pytestmark = [pytest.mark.usefixtures("bare"), pytest.mark.filterwarnings("ignore:the budget has room for")]
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_text_model(folder, num_hidden_layers=3, intermediate_size=64)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    save_text_model(folder, "Qwen3MoeConfig", num_hidden_layers=3, **MOE)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: 10 GB/s of memory, 1 GB/s of disk."""
    monkeypatch.setattr(plan_command, "read_bandwidth_apart", lambda *_: 1e10)
    for name in ("disk_bandwidth", "cached_bandwidth"):
        monkeypatch.setattr(plan_command, name, lambda *_, **__: 1e9)


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_an_answer_is_that_of_a_model_in_memory(mixture: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("--max-new-tokens", 5, "--seed", 1)
    _, expected, _ = run(capsys, mixture, PROMPT, *options)
    code, answer, report = run(capsys, mixture, PROMPT, *options, "--memory-budget", f"{smallest(mixture)}B")
    assert (code, answer) == (0, expected)
    assert re.search(
        r"^disk in prefill: [\d.]+ MB, [\d.]+ [MG]B/s, waited [\d.]+ s of [\d.]+ s, \d+ % of exp", report, re.M
    )
    assert re.search(r"^disk in generation: .* MB a token, \d+ % of experts were in memory$", report, re.MULTILINE)
    assert re.search(r"^memory: planned [\d.]+ MB, peak .*; now .* of its own, .* of files$", report, re.MULTILINE)


def test_the_report_as_json(dense: Path, capsys: pytest.CaptureFixture) -> None:
    memory = smallest(dense)
    code, out, _ = run(capsys, dense, PROMPT, "--max-new-tokens", 4, "--memory-budget", memory, "--json")
    assert code == 0
    content = json.loads(out)
    assert 0 < content["planned_memory_bytes"] <= memory
    assert content["anonymous_memory_bytes"] + content["file_memory_bytes"] > 10**7
    for phase, passes in (("prefill", 1), ("generation", 3)):
        storage = content[f"{phase}_storage"]
        assert storage["read_bytes"] >= passes * planned(dense, memory)[0].pass_bytes * 0.5
        assert storage["waited_ms"] >= 0
        assert storage["waited_ms"] + storage["computed_ms"] == pytest.approx(content[f"{phase}_ms"], abs=0.01)
        assert storage["expert_hits"] == storage["expert_misses"] == 0
    resident = json.loads(run(capsys, dense, PROMPT, "--max-new-tokens", 4, "--json")[1])
    assert not {key for key in resident if "storage" in key or "planned" in key}


def test_the_budget_is_refused_with_the_table(dense: Path, capsys: pytest.CaptureFixture) -> None:
    for verb in (("run",), ("plan",)):
        code, out, err = run(capsys, *verb, dense, *([PROMPT] if verb == ("run",) else []), "--memory-budget", "100KB")
        lines = err.splitlines()
        assert (code, out) == (2, "")
        assert lines[0].split() == ["of", "the", "model", "in", "memory"]
        assert any(line.startswith("blocks") and "0 of 3 stay in memory" in line for line in lines)
        assert lines[-2].startswith("together")
        assert lines[-2].endswith("budget 0.1 MB")
        assert [line for line in lines if "error" in line] == lines[-1:]
        named = re.fullmatch(
            r"error: a budget of 0.1 MB is too small for this model, expected at least ([\d.]+ MB) for 512 positions "
            r"\(a shorter --max-length needs less\)",
            lines[-1],
        )
        assert named
        assert parse_bytes(named[1]) >= smallest(dense)
        code, _, _ = run(capsys, dense, PROMPT, "--max-new-tokens", 2, "--memory-budget", named[1])
        assert code == 0
    code, _, _ = run(capsys, dense, PROMPT, "--max-new-tokens", 2, "--max-length", 64, "--memory-budget", "200KB")
    assert code == 0


@pytest.mark.parametrize("given", ["much", "0GB", "-2GB"])
def test_what_is_no_budget(given: str, dense: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, dense, PROMPT, f"--memory-budget={given}")
    assert (code, out) == (2, "")
    assert err == (
        f"error: --memory-budget: '{given}' is no amount of memory, expected a number of bytes such as 2GB, 1.5GB or "
        "700MiB\n"
    )


def test_packing_each_time_is_refused(dense: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, dense, PROMPT, "--memory-budget", "2GB", "--set", "fc_layer_dtype=Q8_0")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: layers.0.")
    assert "pack the model once with `main.py quantize`" in err


def test_the_plan_as_text(mixture: Path, capsys: pytest.CaptureFixture) -> None:
    memory = between(mixture, 0.4)
    code, out, err = run(capsys, "plan", mixture, "--memory-budget", memory)
    assert (code, err.splitlines()[-1]) == (0, "measuring memory and disk ...")
    plan, _ = planned(mixture, memory)
    lines = out.splitlines()
    assert lines[: len(plan.lines) + 2] == plan.table()
    assert re.fullmatch(r"smallest budget: [\d.]+ MB for 512 positions", lines[len(plan.lines) + 3])
    assert parse_bytes(lines[len(plan.lines) + 3].split(":")[1].split("for")[0].strip()) >= plan.smallest
    assert re.fullmatch(
        r"forecast: [\d.]+ tokens/s \(computing \d+ ms, reading \d+ ms meanwhile, waiting for experts \d+ ms "
        r"with \d+ % of them in memory\)",
        lines[-1],
    )


def test_the_plan_without_a_budget_is_that_of_a_model_in_memory(dense: Path, capsys: pytest.CaptureFixture) -> None:
    content = plan_json(capsys, dense)
    assert content["budget_bytes"] is None
    assert content["whole"]
    assert content["read_bytes_per_token"] == content["streamed_units"] == 0
    weights = sum(line["model_bytes"] for line in content["lines"])
    assert content["forecast_tokens_per_second"] < 1e10 / weights * 1.3
    _, out, _ = run(capsys, "plan", dense)
    assert "1000" not in out
    assert "budget 1" not in out


def plan_json(capsys: pytest.CaptureFixture, *arguments: object) -> dict[str, Any]:
    code, out, _ = run(capsys, "plan", *arguments, "--json")
    assert code == 0
    content: dict[str, Any] = json.loads(out)
    return content


def test_the_plan_as_json(mixture: Path, capsys: pytest.CaptureFixture) -> None:
    memory = between(mixture, 0.4)
    content, (plan, _) = plan_json(capsys, mixture, "--memory-budget", memory), planned(mixture, memory)
    assert content["budget_bytes"] == memory >= content["planned_bytes"] == plan.memory
    assert content["planned_bytes"] == sum(line["memory_bytes"] for line in content["lines"])
    assert content["smallest_budget_bytes"] == plan.enough
    assert plan.smallest < plan.enough
    assert not content["whole"]
    assert 4 <= content["expert_slots"] < 12
    assert content["read_bytes_per_token"] == round(plan.read_per_token)
    assert content["forecast_tokens_per_second"] > 0


def test_the_plan_goes_by_nntr_config(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_text_model(tmp_path, num_hidden_layers=3, nntr={})
    memory = smallest(tmp_path)
    for nntr, budget, streams in (
        ({}, None, 0),
        ({"memory_budget": memory}, memory, 3),
        ({"fsu": True, "fsu_lookahead": 1}, None, 3),
    ):
        (tmp_path / "nntr_config.json").write_text(json.dumps(nntr))
        content = plan_json(capsys, tmp_path)
        assert content["budget_bytes"] == budget, nntr
        assert content["streamed_units"] >= streams, nntr
        assert content["whole"] == (streams == 0)
    content = plan_json(capsys, tmp_path, "--memory-budget", "1GB", "--set", "fsu=false")
    assert content["whole"]


def test_fsu_of_nntr_config_is_acted_on(dense: Path, capsys: pytest.CaptureFixture) -> None:
    _, expected, _ = run(capsys, dense, PROMPT, "--max-new-tokens", 3, "--seed", 2)
    options = ("--set", "fsu=true", "--set", "fsu_lookahead=2")
    code, answer, err = run(capsys, dense, PROMPT, "--max-new-tokens", 3, "--seed", 2, *options)
    assert (code, answer) == (0, expected)
    assert "disk in generation: " in err


def test_the_numbers_of_the_report() -> None:
    report = Report(generated_tokens=11, first_tokens=1, prefill_seconds=2.0, generation_seconds=4.0)
    report.planned_bytes = 10**9
    report.note_storage("prefill", StorageCounts(3 * 10**9, 1.5, 0.5, 1, 0, 0))
    report.note_storage("generation", StorageCounts(10**9, 0.5, 1.0, 5, 30, 10))
    report.note_storage("generation", StorageCounts(10**9, 0.5, 1.0, 5, 30, 10))
    lines = report.lines()
    assert "disk in prefill: 3.00 GB, 2.00 GB/s, waited 0.50 s of 2.00 s" in lines
    assert (
        "disk in generation: 2.00 GB, 2.00 GB/s, waited 2.00 s of 4.00 s, 200.0 MB a token, "
        "75 % of experts were in memory"
    ) in lines
    assert any(line.startswith("memory: planned 1.00 GB, peak ") for line in lines)
    content = report.as_json()
    assert content["generation_storage"] == {
        "read_bytes": 2 * 10**9,
        "read_bytes_per_second": 2 * 10**9,
        "waited_ms": 2000.0,
        "computed_ms": 2000.0,
        "expert_hits": 60,
        "expert_misses": 20,
    }
    assert content["planned_memory_bytes"] == 10**9


def test_counts() -> None:
    early, late = StorageCounts(1, 2.0, 3.0, 4, 5, 6), StorageCounts(10, 20.0, 30.0, 40, 50, 60)
    assert late - early == StorageCounts(9, 18.0, 27.0, 36, 45, 54)
    assert (late - early) + early == late
    assert StorageCounts().read_rate == 0
    assert StorageCounts().hit_rate is None
    assert StorageCounts(hits=1, misses=3).hit_rate == 0.25


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell")
def test_memory_of_files_is_told_apart() -> None:
    anonymous, mapped = memory_kinds()
    assert anonymous > 10**7
    assert mapped > 10**6
