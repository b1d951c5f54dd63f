"""The bench verb: what is run, what is counted and what is printed; never how fast it was."""

import csv
import io
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from embedding_folders import save_embedding_model
from sample_tokenizers import byte_level, save
from test_cli import mistake
from text_models import save_text_model

import causallm.bench
from causallm import load_model
from causallm.bench import (
    Case,
    Measurement,
    bytes_per_step,
    count_parameters,
    make_cases,
    measure,
    name_dtypes,
    size_in_bytes,
)
from causallm.causal_lm import CausalLM
from causallm.cli import main
from causallm.commands.bench import cpu_name, parse_numbers
from causallm.memory_bandwidth import processors, read_bandwidth, read_bandwidth_apart
from causallm.prompt_cache.make import make_prompt_cache
from causallm.storage.storage import Storage
from layers.packed import PackedLinear

Captured = pytest.CaptureFixture[str]
SMALL = ["--prompt", "5", "--generate", "3", "--repeat", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benches") / "tiny"
    save_text_model(folder)
    return folder


@pytest.fixture
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The memory delivers 1 GB/s; returns the thread counts that it was measured with."""
    asked: list[int] = []

    def measured(threads: int) -> float:
        asked.append(threads)
        return 1e9

    monkeypatch.setattr("causallm.commands.bench.read_bandwidth_apart", measured)
    return asked


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each forward call was given, and the cache it met."""
    seen: list[dict[str, Any]] = []
    forward = CausalLM.forward

    def spy(self: CausalLM, ids: Any, cache: Any = None, **options: Any) -> Any:
        seen.append(
            {
                "shape": tuple(ids.shape),
                "ids": ids.clone(),
                "offset": cache[0].offset,
                "keys": cache[-1].state()["keys"],
                "last": options["last"],
                "threads": torch.get_num_threads(),
                "inference": torch.is_inference_mode_enabled(),
            }
        )
        return forward(self, ids, cache, **options)

    monkeypatch.setattr(CausalLM, "forward", spy)
    return seen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock of bench.py is 0.5 s after the one before."""
    ticks = (number * 0.5 for number in range(10**6))
    monkeypatch.setattr(causallm.bench.time, "perf_counter", lambda: next(ticks))


def cases_of(**changes: Any) -> list[Case]:
    given = {"prompts": [5], "generates": [3], "depths": [0], "threads": [1], "batches": [1], "max_length": 64}
    return make_cases(**{**given, **changes})


def test_all_combinations_are_run() -> None:
    cases = cases_of(prompts=[5, 6], generates=[3, 0], depths=[0, 7], threads=[1, 2], batches=[1, 4])
    assert len(set(cases)) == len(cases) == 3 * 2 * 2 * 2
    assert {case.name for case in cases} == {"pp5", "pp6", "tg3", "pp5 @ d7", "pp6 @ d7", "tg3 @ d7"}
    assert {(case.threads, case.batch) for case in cases} == {(1, 1), (1, 4), (2, 1), (2, 4)}


def test_a_prompt_is_taken_in_as_generation_does(checkpoints: Checkpoints, calls: list[dict[str, Any]]) -> None:
    model = checkpoints.ours("llama", init_seq_len=4)
    (measurement,) = measure(model, cases_of(generates=[], prompts=[10], batches=[2]), 2)
    assert len(measurement.rates) == 2
    assert [call["shape"] for call in calls] == [(2, 4), (2, 4), (2, 2)] * 3
    assert [call["last"] for call in calls] == [0, 0, 1] * 3
    assert [call["offset"] for call in calls] == [0, 4, 8] * 3
    assert all(call["inference"] for call in calls)
    assert calls[0]["ids"].unique().numel() > 4


def test_generation_is_greedy_and_goes_one_by_one(checkpoints: Checkpoints, calls: list[dict[str, Any]]) -> None:
    (_,) = measure(checkpoints.ours("llama"), cases_of(prompts=[], generates=[4]), 1)
    assert [(call["shape"], call["last"], call["offset"]) for call in calls] == [((1, 1), 1, n) for n in range(4)] * 2
    tokens = torch.cat([call["ids"] for call in calls[:4]], 1)
    with torch.no_grad():
        expected = checkpoints.reference("llama")(tokens).logits.argmax(-1)
    assert tokens[0, 1:].tolist() == expected[0, :-1].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_depth_is_in_the_cache_at_the_start_of_each_run(
    checkpoints: Checkpoints, calls: list[dict[str, Any]], name: str
) -> None:
    """gemma3's last layer slides, and has forgotten all but its window of the 20."""
    model = checkpoints.ours(name)
    assert len(list(measure(model, cases_of(depths=[20], batches=[2]), 2))) == 2
    fill, *runs = calls
    assert (fill["shape"], fill["offset"]) == ((2, 20), 0)
    assert [call["offset"] for call in runs] == [20] * 3 + [20, 21, 22] * 3
    cache = model.make_cache(2)
    with torch.inference_mode():
        model(fill["ids"], cache, last=1)
    held = cache[-1].state()["keys"]
    assert held.shape[2] == (20 if name == "llama" else 8)
    for call in (call for call in runs if call["offset"] == 20):
        torch.testing.assert_close(call["keys"], held)


def test_threads_are_set_for_their_case_and_put_back(checkpoints: Checkpoints, calls: list[dict[str, Any]]) -> None:
    before = torch.get_num_threads()
    generator = measure(checkpoints.ours("llama"), cases_of(generates=[], threads=[1, 2]), 1)
    assert [next(generator).case.threads for _ in range(2)] == [1, 2]
    generator.close()
    assert [call["threads"] for call in calls] == [1, 1, 2, 2]
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("clock")
def test_rates_count_the_tokens_of_all_rows(checkpoints: Checkpoints) -> None:
    prompts, generated = measure(checkpoints.ours("llama"), cases_of(batches=[3]), 3)
    assert prompts.rates == (30.0, 30.0, 30.0)
    assert generated.rates == (18.0, 18.0, 18.0)
    assert prompts.bytes_per_second is None
    assert generated.step_bytes is not None
    # One step of three tokens every 1/6 s.
    assert generated.bytes_per_second == pytest.approx(6 * generated.step_bytes)


def test_mean_and_deviation() -> None:
    rates = (1.0, 2.0, 6.0)
    measurement = Measurement(Case("tg", 4, 0, 1, 2), rates, 100.0)
    assert measurement.mean == 3.0
    assert measurement.deviation == statistics.stdev(rates)
    assert measurement.bytes_per_second == 150.0
    assert Measurement(Case("pp", 4, 0, 1, 1), (5.0,), None).deviation == 0.0


SIZE = 4
"""Bytes of a number in fp32."""


def layer_bytes(reference: Any) -> Iterator[tuple[str, int]]:
    return ((name, parameter.numel() * SIZE) for name, parameter in reference.named_parameters())


def test_the_bytes_of_a_step_leave_out_an_embedding_table_of_its_own(checkpoints: Checkpoints) -> None:
    untied = sum(size for name, size in layer_bytes(checkpoints.reference("llama")) if "embed_tokens" not in name)
    tied = sum(size for _, size in layer_bytes(checkpoints.reference("llama biased, tied, MHA")))
    # 4 layers, keys and values of 2 or 4 heads of 8; 10 tokens held, then 11, 12: 11.5 are read on average.
    first = bytes_per_step(checkpoints.ours("llama"), Case("tg", 2, 10, 1, 1))
    assert first == untied + 11.5 * 4 * 2 * 2 * 8 * SIZE
    second = bytes_per_step(checkpoints.ours("llama biased, tied, MHA"), Case("tg", 1, 0, 1, 3))
    assert second == tied + 3 * 1 * 4 * 2 * 4 * 8 * SIZE


@pytest.mark.parametrize(("name", "share"), [("qwen3-moe", 2 / 6), ("gpt-oss", 2 / 4)])
def test_the_bytes_of_a_step_count_the_experts_it_chooses(checkpoints: Checkpoints, name: str, share: float) -> None:
    weights = {name: size for name, size in layer_bytes(checkpoints.reference(name)) if "embed_tokens" not in name}
    experts = sum(size for name, size in weights.items() if ".experts." in name)
    rest = sum(weights.values()) - experts
    assert experts
    cache = 4 * 2 * 2 * 16 * SIZE
    model = checkpoints.ours(name)
    assert bytes_per_step(model, Case("tg", 1, 0, 1, 1)) == pytest.approx(rest + share * experts + cache)
    two_rows = share + (1 - share) * share
    assert bytes_per_step(model, Case("tg", 1, 0, 1, 2)) == pytest.approx(rest + two_rows * experts + 2 * cache)


def test_the_bytes_of_a_step_end_at_the_window_of_a_sliding_layer(checkpoints: Checkpoints) -> None:
    """gemma3 has three layers of window 8, and one that sees all."""
    model = checkpoints.ours("gemma3")
    difference = bytes_per_step(model, Case("tg", 1, 40, 1, 1)) - bytes_per_step(model, Case("tg", 1, 20, 1, 1))
    assert difference == 20 * 2 * model.config.num_key_value_heads * 16 * SIZE
    start = bytes_per_step(model, Case("tg", 1, 3, 1, 1)) - bytes_per_step(model, Case("tg", 1, 0, 1, 1))
    assert start == 3 * 4 * 2 * model.config.num_key_value_heads * 16 * SIZE


def test_packed_weights_count_as_the_numbers_they_stand_for(checkpoints: Checkpoints) -> None:
    model = checkpoints._load("llama", None)
    plain, size = sum(parameter.numel() for parameter in model.parameters()), size_in_bytes(model)
    assert (count_parameters(model), name_dtypes(model), size) == (plain, "float32", 4 * plain)
    mlp = model.layers[0].mlp
    mlp.gate_proj = PackedLinear.from_float(mlp.gate_proj.weight.detach(), kind="Q8_0")
    assert (count_parameters(model), name_dtypes(model)) == (plain, "Q8_0+float32")
    # Rows of 32 numbers, which take 32 bytes and a scale of 2.
    assert size_in_bytes(model) == size - 48 * (32 * 4 - 34)


def test_the_table(folder: Path, capsys: Captured, bandwidth: list[int], clock: None) -> None:
    assert main(["bench", str(folder), *SMALL, "--depth", "0,7"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    table, footer = output.out.split("\n\n")
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert lines[0] == ["model", "size", "params", "threads", "test", "tokens/s", "GB/s", "of bandwidth"]
    assert set("".join(lines[1])) == {"-", ":"}
    parameters = sum(parameter.numel() for parameter in load_model(folder).parameters())
    sizes = ["tiny", f"{parameters * 4 / 2**20:.2f} MiB", f"{parameters / 1e6:.2f} M", "1"]
    assert all(line[:4] == sizes for line in lines[2:])
    assert [line[4] for line in lines[2:]] == ["pp5", "tg3", "pp5 @ d7", "tg3 @ d7"]
    assert [line[5] for line in lines[2:]] == ["10.00 ± 0.00", "6.00 ± 0.00"] * 2
    assert table.splitlines()[2].endswith("|         |              |")
    read = bytes_per_step(load_model(folder), Case("tg", 3, 7, 1, 1)) * 6 / 1e9
    assert lines[5][6:] == [f"{read:.2f}", f"{100 * read:.0f} %"]
    assert bandwidth == [processors()]
    memory, load, machine = footer.splitlines()
    assert memory == "memory bandwidth: 1.0 GB/s read"
    assert load.startswith("load: ")
    assert ", peak memory: " in load
    assert machine == f"torch {torch.__version__}, {cpu_name()}, cpu, float32"


def test_batches_get_a_column(folder: Path, capsys: Captured, bandwidth: list[int]) -> None:
    assert main(["bench", str(folder), *SMALL, "--batch", "1,2"]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    column = [cell.strip() for cell in lines[0]].index("batch")
    assert [line[column].strip() for line in lines[2:]] == ["1", "1", "2", "2"]


def test_csv_and_json_say_the_same(folder: Path, capsys: Captured, bandwidth: list[int], clock: None) -> None:
    arguments = ["bench", str(folder), *SMALL, "--depth", "7", "--dtype", "bfloat16"]
    assert main([*arguments, "--output", "csv"]) == 0
    output = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(output.out)))
    assert [line.split(":")[0].split(" ")[0] for line in output.err.splitlines()] == ["memory", "load", "torch"]
    assert main([*arguments, "--output", "json"]) == 0
    output = capsys.readouterr()
    assert (output.err, output.out.count("\n")) == ("", 1)
    content = json.loads(output.out)
    for row, test in zip(rows, content["tests"], strict=True):
        assert len(test.pop("repeats")) == 2
        assert row == {name: "" if value is None else str(value) for name, value in test.items()}
    first, second = content["tests"]
    assert (first["test"], first["prompt"], first["generate"], first["depth"]) == ("pp5 @ d7", 5, 0, 7)
    assert (second["test"], second["prompt"], second["generate"], second["depth"]) == ("tg3 @ d7", 0, 3, 7)
    assert (first["tokens_per_second"], first["deviation"], first["gb_per_second"]) == (10.0, 0.0, None)
    assert first["size_bytes"] == 2 * first["parameters"]
    # Of the 1 GB/s that the memory delivers here.
    assert second["bandwidth_percent"] == pytest.approx(100 * second["gb_per_second"])
    assert (content["dtype"], content["torch"], content["device"]) == ("bfloat16", torch.__version__, "cpu")
    assert content["memory_bandwidth_gb_per_second"] == 1.0
    assert min(content["load_ms"], content["peak_memory_bytes"]) > 0


def test_the_memory_is_left_alone_where_nothing_is_generated(
    folder: Path, capsys: Captured, bandwidth: list[int]
) -> None:
    assert main(["bench", str(folder), *SMALL, "--generate", "0"]) == 0
    text = capsys.readouterr().out
    assert "tg" not in text
    assert "memory bandwidth" not in text
    assert bandwidth == []


def test_an_interruption_keeps_the_tests_that_are_done(
    folder: Path, capsys: Captured, bandwidth: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_one(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(causallm.bench, "decode_one", decode_one)
    assert main(["bench", str(folder), *SMALL, "--output", "json"]) == 130
    assert [test["test"] for test in json.loads(capsys.readouterr().out)["tests"]] == ["pp5"]


def test_numbers_are_taken_once_and_in_order() -> None:
    assert parse_numbers("--prompt", "8, 4,8,0", 0) == [8, 4, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prompt x", "--prompt: got 'x', expected whole numbers of at least 0, such as 1 or 1,2"),
        ("--prompt 1,,2", "--prompt: got '1,,2', expected whole numbers"),
        ("--prompt=-3", "--prompt: got '-3', expected whole numbers"),
        ("--prompt=", "--prompt: got '', expected whole numbers"),
        ("--generate 1.5", "--generate: got '1.5', expected whole numbers"),
        ("--depth 1,a", "--depth: got '1,a', expected whole numbers"),
        ("--batch 0", "--batch: got '0', expected whole numbers of at least 1"),
        ("--threads 0,1", "--threads: got '0,1', expected whole numbers of at least 1"),
        ("--threads 1,100000", f"--threads: got 100000, expected 1 to {os.cpu_count()}, the number of processors"),
        ("--repeat 0", "--repeat: got '0', expected a whole number of at least 1"),
        ("--repeat two", "--repeat: got 'two', expected a whole number of at least 1"),
        ("--output xml", "argument --output: invalid choice: 'xml'"),
        ("--prompt 0 --generate 0", "there is nothing to measure"),
        ("--prompt 500 --depth 0,13", "prompt 500 at depth 13 needs 513 tokens, but the context is 512 tokens"),
        ("--prompt 0 --generate 500 --depth 13", "generate 500 at depth 13 needs 513 tokens, but the context is 512"),
        ("--prompt 30 --max-length 20", "prompt 30 at depth 0 needs 30 tokens, but the context is 20 tokens"),
        ("--device nowhere", "--device: 'nowhere' cannot be used here"),
        ("--dtype int3", "unknown dtype 'int3'"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys: Captured, options: str, message: str) -> None:
    assert message in mistake(capsys, "bench", str(folder), *SMALL, *options.split())


def test_an_embedding_model_is_refused(tmp_path: Path, capsys: Captured) -> None:
    save_embedding_model(tmp_path, "Qwen3Config", vocab_size=422)
    save(byte_level(), tmp_path)
    assert "is an embedding model, expected one that generates text" in mistake(capsys, "bench", str(tmp_path))


def test_the_memory_is_read_with_the_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, before = [], torch.get_num_threads()
    ones = torch.ones

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.sum:
                threads.append(torch.get_num_threads())
            return super().__torch_function__(function, types, args, kwargs or {})

    monkeypatch.setattr(torch, "ones", lambda *sizes, **options: ones(*sizes, **options).as_subclass(Watched))
    assert read_bandwidth(before + 1, size=4000) > 0
    assert threads == [before + 1] * len(threads)
    assert len(threads) > 1
    assert torch.get_num_threads() == before


def test_the_memory_is_read_in_another_process() -> None:
    assert read_bandwidth_apart(1, size=4000) > 0
    with pytest.raises(OSError, match="the memory bandwidth could not be measured: "):
        read_bandwidth_apart(1, size=-8)


def test_rows_that_a_budget_has_no_room_for_are_refused(
    checkpoints: Checkpoints, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints.ours("llama", init_seq_len=4)
    monkeypatch.setattr(model, "storage", Storage())
    model.storage.positions = model.max_length
    list(measure(model, cases_of(batches=[2], prompts=[8]), 1))
    assert max(rows * time for rows, time in (call["shape"] for call in calls)) == 4
    list(measure(model, cases_of(depths=[20], prompts=[24], generates=[24]), 1))
    message = f"pp17: 4 rows of 17 positions have no room in the memory that was planned for {model.max_length}"
    with pytest.raises(ValueError, match=message):
        measure(model, cases_of(batches=[4], prompts=[17]), 1)
    with pytest.raises(ValueError, match=r"tg25 @ d20: 1 row of 65 positions \(the depth twice"):
        measure(model, cases_of(depths=[20], generates=[25]), 1)


def test_under_a_budget_the_prompt_cache_is_used_up(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoints.ours("llama", init_seq_len=4)
    monkeypatch.setattr(model, "storage", Storage())
    model.storage.positions = model.max_length
    held = make_prompt_cache(model, [[1, 2, 3]])
    assert len(list(measure(model, cases_of(depths=[3]), 1, held))) == 2
    assert not held.cache
