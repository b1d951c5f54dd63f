"""benchmarks/compare.py: what is run, left out and refused, and how rows are made of figures; never how fast it was."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from text_models import save_text_model

TOOL = Path(__file__).resolve().parents[1] / "benchmarks" / "compare.py"
SHORT = ("--prompt", "5", "--generate", "2", "--threads", "1", "--rounds", "1")
SYSTEMS = ("causallm", "llama-cpp", "transformers")


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comparison_table", TOOL.with_name("comparison_table.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "tiny"
    save_text_model(folder, hidden_size=32, intermediate_size=64)
    return folder


def result(prefill: float, decode: float, peak: int | None = 10**6, load: float = 1.0) -> dict[str, Any]:
    return {"prefill_tps": [prefill], "decode_tps": [decode], "peak_bytes": peak, "load_seconds": load}


def test_the_better_setting_of_a_peer_counts_in_each_row(table) -> None:
    results = {
        ("Q4_0", "causallm", ""): [result(100, 30, load=1), result(200, 50, load=3)],
        ("Q4_0", "llama-cpp", "fa off"): [result(100, 50, None, load=4)],
        ("Q4_0", "llama-cpp", "fa on"): [result(300, 20, 4 * 10**6, load=8)],
    }
    wanted = table.measures(512, 64, [0])
    prefill, decode, memory, load = table.make_rows(results, wanted)
    assert prefill["systems"]["causallm"] == {"mean": 150, "best": 200, "setting": ""}
    assert prefill["systems"]["llama-cpp"] == {"mean": 300, "best": 300, "setting": "fa on"}
    assert prefill["ratio"] == {"mean": 0.5, "best": pytest.approx(2 / 3)}
    assert decode["systems"]["llama-cpp"]["setting"] == "fa off"
    assert memory["systems"]["llama-cpp"] == {"mean": 4, "best": 4, "setting": "fa on"}
    assert load["systems"]["causallm"]["best"] == 1
    assert load["ratio"] == {"mean": 0.5, "best": 0.25}
    lines = table.markdown([prefill], wanted)
    assert lines[-1] == "| Q4_0 | prefill 512, tokens/s | 150.0 (200.0) | 300.0 (300.0), fa on | 0.50 (0.67) |"


def test_the_best_peer_is_found_and_types_stay_apart(table) -> None:
    results = {
        (kind, system, ""): [result(rate * factor, 1)]
        for kind, factor in (("bf16", 1), ("fp32", 2))
        for system, rate in zip(SYSTEMS, (10, 20, 40), strict=True)
    }
    rows = table.make_rows(results, table.measures(8, 2, [0])[:1])
    assert [(row["type"], row["best_peer"], row["ratio"]["mean"]) for row in rows] == [
        ("bf16", "transformers", 0.25),
        ("fp32", "transformers", 0.25),
    ]
    alone = table.make_rows({("bf16", "causallm", ""): [result(1, 1)]}, table.measures(8, 2, [0]))
    assert {row["ratio"] for row in alone} == {None}


def test_systems_are_measured_on_the_same_weights(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    arguments = (folder, *SHORT, "--types", "Q8_0,fp32", "--depth", "0,3", "--peers", "transformers", "--work", work)
    done = compare(*arguments, "--output", "json")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    found = json.loads(done.stdout)
    assert [(own["type"], own["system"]) for own in found["results"]] == [
        ("Q8_0", "causallm"),
        ("fp32", "causallm"),
        ("fp32", "transformers"),
    ]
    assert len(found["rows"]) == 2 * (2 * 2 + 2)
    ours, theirs = (own["rounds"][0] for own in found["results"][1:])
    assert ours["logits"] == pytest.approx(theirs["logits"], abs=1e-3)
    assert all(rate > 0 for rate in ours["prefill_tps"] + ours["decode_tps"] + theirs["decode_tps"])

    made = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    assert made
    again = compare(*arguments)
    assert again.returncode == 0
    assert "| fp32 | decode 2 @ d8, tokens/s |" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == made


def test_what_is_not_there_is_left_out_with_a_line_and_mistakes_are_one_line(folder: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        done = compare(folder, *SHORT, "--types", "fp32", "--peers", "llama-cpp")
        assert done.returncode == 0
        assert "pip install llama-cpp-python" in done.stderr
        assert "llama-cpp" not in done.stdout
    for options, words in (
        (("--types", "Q5_1"), "Q5_1"),
        (("--peers", "vllm"), "vllm"),
        (("--rounds", "0"), "--rounds"),
        (("--depth", "510"), "the context"),
        (("--llama-python", "no-such-python"), "no-such-python"),
    ):
        done = compare(folder, *SHORT, *options)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
