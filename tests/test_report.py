"""The report against times and counts that are known."""

import json
import time
from contextlib import suppress

import torch

from causallm.report import Lookup, Report, peak_memory


def example() -> Report:
    return Report(
        prompt_tokens=30,
        generated_tokens=12,
        first_tokens=2,
        load_seconds=1.5,
        prefill_seconds=0.25,
        generation_seconds=0.5,
    )


def test_rates_count_each_token_once() -> None:
    """The first token of each row comes with its prompt."""
    assert example().prefill_rate == 120.0
    assert example().generation_rate == 20.0


def test_nothing_done_divides_by_nothing() -> None:
    assert (Report().prefill_rate, Report().generation_rate) == (0.0, 0.0)
    assert Report(generated_tokens=1, first_tokens=1, prefill_seconds=1.0).generation_rate == 0.0


def test_the_lines_are_those_of_nntrainer() -> None:
    prefill, generation, rest = example().lines()
    assert prefill == "prefill: 30 tokens, 250 ms, 120.0 TPS"
    assert generation == "generation: 12 tokens, 500 ms, 20.0 TPS"
    assert rest.startswith("load: 1500 ms, first token after: 250 ms, peak memory: ")
    assert rest.endswith(" MB")


def test_json_has_the_same_numbers() -> None:
    content = json.loads(json.dumps(example().as_json()))
    peak = content.pop("peak_memory_bytes")
    assert peak > 10_000_000
    assert content == {
        "prompt_tokens": 30,
        "generated_tokens": 12,
        "load_ms": 1500.0,
        "prefill_ms": 250.0,
        "prefill_tps": 120.0,
        "generation_ms": 500.0,
        "generation_tps": 20.0,
        "time_to_first_token_ms": 250.0,
    }


def test_the_cache_is_told_once_there_is_one() -> None:
    report = example()
    for nbytes in (100, 12_600_000, 300):
        report.note_cache(torch.float16, nbytes)
    assert report.lines()[3:] == ["cache: float16, 12.6 MB"]
    content = report.as_json()
    assert (content["cache_dtype"], content["cache_bytes"]) == ("float16", 12_600_000)


def test_drafts_are_told_where_there_are_some() -> None:
    report = example()
    report.lookup = Lookup(steps=4, drafted=8, accepted=6)
    assert report.lines()[3:] == ["lookup: 6 of 8 drafted tokens accepted (75 %), 2.50 tokens per step"]
    content = json.loads(json.dumps(report.as_json()))
    told = ("draft_tokens", "draft_tokens_accepted", "draft_acceptance", "tokens_per_step")
    assert [content[key] for key in told] == [8, 6, 0.75, 2.5]
    report.lookup = Lookup()
    assert report.lines()[3:] == ["lookup: 0 of 0 drafted tokens accepted (0 %), 0.00 tokens per step"]


def test_reused_tokens_are_not_computed() -> None:
    report = example()
    report.reused_tokens = 20
    assert report.prefill_rate == 40.0
    assert report.lines()[0] == "prefill: 10 tokens, 250 ms, 40.0 TPS"
    assert report.lines()[3:] == ["reused: 20 of 30 prompt tokens, from the prompt cache"]
    assert [report.as_json()[key] for key in ("prompt_tokens", "reused_tokens", "prefill_tps")] == [30, 20, 40.0]
    report.reused_tokens = 0
    assert report.lines()[3] == "reused: 0 of 30 prompt tokens, from the prompt cache"
    assert report.as_json()["reused_tokens"] == 0


def test_times_add_up_and_survive_an_interruption() -> None:
    report = Report()
    for _ in range(2):
        with report.timed("generation"):
            time.sleep(0.01)
    with suppress(KeyboardInterrupt), report.timed("generation"):
        time.sleep(0.01)
        raise KeyboardInterrupt
    assert 0.03 <= report.generation_seconds < 3
    assert report.prefill_seconds == report.load_seconds == 0


def test_peak_memory_does_not_fall() -> None:
    before = peak_memory()
    block = bytearray(1)
    block *= 300_000_000
    after = peak_memory()
    del block
    # Linux counts pages in batches, each processor its own: the figure is right to within a megabyte.
    assert before - 2**20 <= after <= peak_memory() + 2**20
    assert after > 300_000_000
