"""tools/compose_stories.py: stories are whole and well written whatever is drawn, and hold what their requests name."""

import importlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tool_modules import tool_module

SAID = "said|asked|cried|shouted|thought|called|laughed|whispered"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("compose_stories")


@pytest.fixture(scope="module")
def plots(tool: ModuleType) -> ModuleType:
    return importlib.import_module("story_plots")


@pytest.fixture(scope="module")
def composer(tool: ModuleType, plots: ModuleType) -> Any:
    return tool.Composer(*plots.read_plots(tool.PLOTS), random.Random(5))


def test_every_plot_makes_well_written_stories(composer: Any) -> None:
    assert len(composer.plots) >= 50
    for plot in composer.plots:
        for _ in range(40):
            story, request = composer.compose(plot)
            assert not re.search(r"[][{}|\0<>]|  | [.,!?]|\bthe the\b|\ba a\b|\ba [aeiou]|\ban [^aeiou]", story), story
            assert story.count('"') % 2 == 0
            assert story.endswith((".", "!", '."', '!"', '?"'))
            starts = re.findall(r'(?:^|[.!?] |\n)"?(\w)', story)
            assert starts
            assert all(letter.isupper() for letter in starts), story
            # After speech that ended: `the dog said`, but `The dog ran`.
            assert not re.search(rf'[.!?]" (?!(?:[\w\']+ ){{0,2}}(?:{SAID})\b)[a-z]', story), story
            assert not re.search(r'[.!?]" (?:The \w+|He|She|His \w+|Her \w+) (?:said|asked)\b', story), story
            assert not re.search(r"[][{}|\0<>]", request)


def test_what_a_request_names_is_in_the_story(tool: ModuleType, composer: Any) -> None:
    known = {word for kind in ("animal", "toy", "food", "someone") for word in composer.words[kind]}
    named = 0
    for _ in range(300):
        plot = composer.draw.choice(composer.plots)
        story, request = composer.compose(plot)
        asked = [word for word in re.findall(r"\w+", request) if word in known]
        named += len(asked)
        assert all(re.search(rf"\b{word}s?\b", story) for word in asked), (plot.name, request, story)
    assert named > 200


def test_whatever_a_plot_offers_to_ask_for_is_in_its_stories(composer: Any) -> None:
    for plot in composer.plots:
        for _ in range(12 if plot.extras else 0):
            story, _ = composer.compose(plot)
            missing = [each for each in plot.extras if each.split()[-1].rstrip("s").lower() not in story.lower()]
            assert not missing, (plot.name, story)


def test_a_parent_is_asked_for_only_where_one_acts(composer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composer.draw, "random", lambda: 0.19)
    plot = next(plot for plot in composer.plots if not plot.clauses and "y" not in plot.kinds and plot.uses("p"))
    people = composer.people(plot)
    values = {**composer.values(plot, people), "p": "mom", "his": "her"}
    monkeypatch.setattr(composer.draw, "choice", lambda options: options[-1])
    monkeypatch.setattr(composer.draw, "sample", lambda options, _: list(options))
    assert "her mom" in composer.request(plot, people, values, "Her mom came.")
    assert "her mom" not in composer.request(plot, people, values, "She sat for a moment.")


def test_the_two_who_act_are_told_apart(composer: Any) -> None:
    for _ in range(200):
        plot = composer.draw.choice([plot for plot in composer.plots if "y" in plot.kinds])
        people = composer.people(plot)
        assert people["x"].who != people["y"].who
        assert people["x"].noun != people["y"].noun or people["x"].noun in ("girl", "boy")
        assert people["y"].name or not plot.uses("ayn")


def test_capitals_begin_sentences_alone(plots: ModuleType) -> None:
    lines = ['{x} saw {y}. {he} was glad. "{y} is here!" {x} said. "It is you." {he} ran to {y}. {his} {p} slept.']
    values = {"x": "the dog", "y": "the cat", "he": "she", "his": "her", "p": "mom"}
    assert plots.told(lines, values) == (
        'The dog saw the cat. She was glad. "The cat is here!" the dog said. "It is you." She ran to the cat. '
        "Her mom slept."
    )


def test_choices_are_made_from_the_inside(plots: ModuleType) -> None:
    found = {plots.chosen("[a[1|2]|b].", random.Random(seed)) for seed in range(40)}
    assert found == {"a1.", "a2.", "b."}


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["compose_stories.py", *map(str, arguments)])
    return int(tool.main())


def test_documents_are_mixed_and_the_same_for_a_seed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = tmp_path / "mix.jsonl"
    mix.write_text("".join(json.dumps({"text": f"other {number}"}) + "\n" for number in range(30)), encoding="utf-8")
    one, two = tmp_path / "new" / "one.jsonl", tmp_path / "two.jsonl"
    for path in (one, two):
        assert run(tool, monkeypatch, "-o", path, "--stories", 60, "--mix", mix, "--others", 20) == 0
    assert "60 stories of" in capsys.readouterr().out
    assert one.read_bytes() == two.read_bytes()
    entries = [json.loads(line) for line in one.read_text(encoding="utf-8").splitlines()]
    assert sum(entry.get("text", "").startswith("other") for entry in entries) == 20
    answers = [entry["messages"] for entry in entries if "messages" in entry]
    assert 40 <= len(answers) <= 60
    assert all([turn["role"] for turn in turns][-2:] == ["user", "assistant"] for turns in answers)


def test_only_texts_are_mixed_in(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix, out = tmp_path / "mix.jsonl", tmp_path / "out.jsonl"
    others = [{"text": f"other {number}"} if number % 3 else {"messages": [number]} for number in range(30)]
    mix.write_text("".join(json.dumps(other) + "\n" for other in others), encoding="utf-8")
    assert run(tool, monkeypatch, "-o", out, "--stories", 5, "--mix", mix, "--others", 30, "--texts-only") == 0
    entries = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(entries) == 5 + 20
    assert [entry for entry in others if "text" in entry] == sorted(
        (entry for entry in entries if entry in others), key=others.index
    )


@pytest.mark.parametrize(("text", "message"), [
    ("toy: ball\n", "holds no plot"),
    ("toy\n", 'got the line "toy", expected "kind: words" or "== plot"'),
    ("toy: ball\n== lost t:toy\n{x} ran.\n", 'got the plot "lost t:toy", expected a name, x:kind'),
])  # fmt: skip
def test_what_is_no_plot_is_told(
    text: str, message: str, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "plots.txt"
    path.write_text(text, encoding="utf-8")
    assert run(tool, monkeypatch, "-o", tmp_path / "out.jsonl", "--plots", path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
