"""tools/judge_stories.py: what it counts, and that it prints each measure of a model."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_modules import tool_module

from causallm import load_model

ROOT = Path(__file__).resolve().parents[1]
STORIES = [
    "Once upon a time, there was a dog named Max. Max had a red ball and he loved it. The ball rolled away.",
    "Lily wanted to bake a cake with her mom. They put eggs in a bowl. The cake was very good.",
]


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("judge_stories")


def test_words_are_counted_whole_and_in_the_plural(tool) -> None:
    assert tool.times("A dog, two Dogs and a dogma. The balls!", ["dog", "ball"]) == 1
    assert tool.times("Two foxes and a box.", ["fox", "box"]) == 1
    assert tool.times("Two foxes and a fox and a box.", ["fox"]) == 2
    assert tool.times("A hotdog.", ["dog"]) == 0


def test_what_answers_share(tool) -> None:
    answers = ["one two three four five"] * 6 + ["six seven eight nine"]
    assert tool.shared(answers) == pytest.approx(12 / 13)
    assert tool.shared(answers[1:]) == 0
    assert tool.shared(["too short"]) == 0


def test_every_request_can_be_kept(tool) -> None:
    assert len({request for request, *_ in tool.ASKED}) == 40
    for request, *words in tool.ASKED:
        assert tool.times(request, words) >= 1


def test_a_likelihood_is_the_mean_of_all_tokens(tool) -> None:
    model = load_model(ROOT / "res" / "tiny-stories", dtype="float32")
    nats, tokens = 0.0, 0
    for story in STORIES:
        ids = [model.tokenizer.token_id("<|endoftext|>"), *model.tokenizer.encode(story)]
        with torch.inference_mode():
            scores = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        nats, tokens = nats + sum(scores[at, id].item() for at, id in enumerate(ids[1:])), tokens + len(ids) - 1
    assert tool.log_likelihood(model, STORIES) == pytest.approx(nats / tokens, abs=1e-5)


def test_each_measure_is_printed(tool, tmp_path, monkeypatch, capsys) -> None:
    for name in ("train", "validation"):
        lines = [json.dumps({"text": story}) for story in (*STORIES, *STORIES)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    folder = ROOT / "res" / "tiny-stories"
    monkeypatch.setattr(tool, "ASKED", tool.ASKED[:2])
    arguments = ["judge", str(folder), "--data", str(tmp_path), "--judge", str(folder), "--answers", "3"]
    monkeypatch.setattr("sys.argv", [*arguments, "--temperature", "0.5"])
    assert tool.main() == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert len(printed) == 7
    assert re.fullmatch(r" *\d of 6 answers", printed["all that was asked for named"])
    assert re.fullmatch(r" *\d of 3 answers", printed["random requests kept"])
    nats, perplexity = re.fullmatch(r" *([\d.]+) \(perplexity ([\d.]+)\)", printed["held out, nats a token"]).groups()
    assert float(perplexity) == pytest.approx(math.exp(float(nats)), rel=1e-3)


def test_data_without_stories_is_one_line(tool, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["judge", "none", "--data", str(tmp_path), "--judge", "none"])
    assert tool.main() == 2
    assert re.fullmatch(r'error: .*train.jsonl holds no entry with "text".*\n', capsys.readouterr().err)
