"""tools/own_stories.py: answers are kept that are sound and keep to what was asked for, and nothing else."""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tool_modules import tool_module

STORY = (
    "Once upon a time, there was a dog named Rex who lived with Lily. One day, Lily gave him a red ball. "
    '"Look, it is for you!" she said. The dog ran far with it and came back with mud on his nose. '
    "Lily laughed and cleaned his face with a towel. They sat under the old tree until the sun was low, "
    "and the dog kept the ball close all night. When it was morning, Rex was up first and ran to wake up Lily."
)


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("own_stories")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        (" wake up Lily.", " wake up Lily"),
        (" wake up Lily.", ' wake up Lily, "he thought.'),
        ("who lived with Lily", "who lived with Lily and Tom"),
        ("Lily laughed", "She laughed. Tom and Tim and Max came. Tom and Tim and Max sat. Lily laughed"),
        ("They sat under", "Lily laughed and cleaned his face with a towel. They sat under"),
        ("with a towel", "with a towel, with a towel, with a towel, with a towel"),
        ("with a towel", "with the towel and the towel"),
        ("Lily laughed", "Lily and Lily laughed"),
        ("Lily gave him", "Lily asked his mom and gave him"),
        (STORY[60:], "Lily was glad to see Lily."),
        ("kept the ball", "kept the blue ball"),
        ("mud on his nose", "balls, one ball, this ball, the ball and another ball"),
        ("Rex was up", "he was up"),
    ],
)
def test_a_sound_story_has_an_end_repeats_nothing_and_knows_its_people(tool, old: str, new: str) -> None:
    assert tool.sound(STORY)
    assert tool.sound(STORY.replace(old, new)) == (old == new)


def test_she_and_her_mom_may_be_in_a_sentence_with_him(tool) -> None:
    assert tool.sound(STORY.replace("Lily laughed", "Tim and her mom came in. Tim and Lily laughed")) is False
    assert tool.sound(STORY.replace("Lily laughed", "Tim saw Lily and her mom. Then Tim and Lily laughed"))


def test_an_answer_names_what_was_asked_for_in_both_halves(tool) -> None:
    kept = tool.Request("", ("dog", "ball"), ("Lily",), ("dog", "red ball"))
    assert kept.kept(STORY)
    assert not kept.kept(STORY.replace("the dog kept", "he kept").replace("The dog ran", "He ran"))
    assert not kept.kept(STORY.replace("red ball", "ball"))
    assert not kept.kept(STORY.replace("Lily", "Anna"))
    assert not tool.Request("", ("cat",), (), ("cat",)).kept(STORY)
    assert tool.Request("Once upon a time", opening=True).kept(STORY)
    assert not tool.Request("One day", opening=True).kept(STORY)


def test_a_deed_that_was_asked_for_is_told(tool) -> None:
    kept = tool.Request("", ("dog", "ball"), (), ("dog", "ball"), "finds")
    assert not kept.kept(STORY)
    assert kept.kept(STORY.replace("One day, Lily gave him", "One day, he found"))
    forms = {"finds": "find found", "loses": "lose loses lost", "loves": "loved", "wants": "wanted want", "has": "had"}
    assert forms.keys() == tool.DEEDS.keys()
    assert all(re.fullmatch(tool.DEEDS[deed], form) for deed in forms for form in forms[deed].split())


@pytest.mark.parametrize(
    ("story", "people", "keeps"),
    [
        ("Tim ran. Her mom said yes.", {"Tim"}, False),
        ("Tim ran. His mom said yes.", {"Tim"}, True),
        ("Lily sat. She took his toys.", {"Lily"}, False),
        ("Lily saw a boy. She took his toys.", {"Lily"}, True),
        ("Lily saw a bear and his friends.", {"Lily"}, False),
        ("Lily saw a bear. He had his friends.", {"Lily"}, True),
        ("A monkey named Tim ran. Tim ran. Her mom said yes.", {"Tim"}, False),
        ("Lily and Tim sat. She took his toys.", {"Lily", "Tim"}, True),
        ("There was a deer named Square. Squire ran.", set(), False),
        ("There was a deer named Spot. Spot ran.", set(), True),
    ],
)
def test_stories_keep_to_one(tool, story: str, people: set[str], keeps: bool) -> None:
    assert tool.keeps_to_one(story, people) == keeps


def test_answers_are_chosen_that_are_unlike_better_ones(tool, monkeypatch) -> None:
    monkeypatch.setattr(tool, "OFTEN", 2)
    other = "A frog sat on a stone and sang until the moon came over the hill"
    ranked = [(None, STORY), (None, STORY), (None, STORY), (None, other), (None, other + " with a star")]
    assert tool.unlike(ranked) == [ranked[0], ranked[1], ranked[3], ranked[4]]


def test_answers_with_a_weak_sentence_are_left_out_in_their_order(tool, monkeypatch) -> None:
    monkeypatch.setattr(tool, "weakest_sentences", lambda _, stories: [-float(story) for story in stories])
    kept = [(None, number) for number in ("3", "1", "5", "2", "4")]
    assert tool.without_weak(None, kept) == [(None, number) for number in ("3", "1", "2", "4")]
    assert tool.without_weak(None, []) == []


def test_requests_ask_for_what_the_stories_tell_of(tool) -> None:
    requests = tool.Requests([STORY], random.Random(0))
    drawn = [requests.next() for _ in range(400)]
    openings = [request for request in drawn if request.opening]
    assert 0 < len(openings) < 60
    assert all(STORY.startswith(request.text) for request in openings)
    asked = [request for request in drawn if not request.opening]
    assert {thing for request in asked for thing in request.things} == {"dog", "ball"}
    for request in asked:
        assert 1 <= len(request.things) <= 2
        assert all(phrase in request.text for phrase in (*request.phrases, *request.people))
    assert any(request.people for request in asked)
    assert any("a red " in request.text for request in asked)


def test_stories_that_name_nothing_twice_are_refused(tool) -> None:
    with pytest.raises(ValueError, match="expected more of them"):
        tool.Requests(["A dog ran."], random.Random(0)).next()


def answered(model: Any, requests: list[str], config: Any, guidance: float, seed: int) -> list[str | None]:
    """All requests get one story, and every eighth has no end."""
    assert (config.max_new_tokens, config.eos_token_id, guidance) == (280, (0, 2), 1.5)
    assert seed >= 0
    return [None if number % 8 == 0 else STORY for number, _ in enumerate(requests)]


def run(tool: Any, folder: Path, answers: int, others: int) -> list[dict[str, Any]]:
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"{STORY} Number {number}."}) + "\n" for number in range(5)), encoding="utf-8"
    )
    arguments = argparse.Namespace(
        model=folder, data=folder / "train.jsonl", output=folder / "own" / "train.jsonl", answers=answers, seed=3,
        share=0.5, copies=2, others=others, guidance=1.5,
    )  # fmt: skip
    assert tool.write_kept(arguments) == 0
    return [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def story_teller(tool, monkeypatch) -> None:
    model = argparse.Namespace(generation_config=argparse.Namespace(eos_token_id=(0, 2)))
    monkeypatch.setattr(tool, "load_model", lambda _: model)
    monkeypatch.setattr(tool, "guided_answers", answered)
    monkeypatch.setattr(tool, "threads", lambda _, stories: [0.0] * len(stories))
    monkeypatch.setattr(tool, "weakest_sentences", lambda _, stories: [0.0] * len(stories))
    monkeypatch.setattr(tool, "OFTEN", 1000)


@pytest.mark.usefixtures("story_teller")
def test_the_file_has_the_best_of_what_was_kept_under_other_names_and_others(tool, tmp_path, capsys) -> None:
    entries = run(tool, tmp_path, answers=150, others=3)
    answers = [entry["messages"] for entry in entries if "messages" in entry]
    assert len(entries) - len(answers) == 3
    printed = re.search(r"(\d+) of 150 answers were kept, (\d+) of these chosen", capsys.readouterr().out)
    kept, best = (int(number) for number in printed.groups())
    assert 0 < best == round(round(kept * 0.8) / 2) < 60
    assert 2 * best <= len(answers) <= 4 * best
    asked = Counter(each[-2]["content"] for each in answers if not tool.NAME.search(each[-2]["content"]))
    assert asked
    assert all(count % (4 if "dog" in text and "ball" in text else 2) == 0 for text, count in asked.items())
    for *_, request, answer in answers:
        assert (request["role"], answer["role"]) == ("user", "assistant")
        name = re.search(r"who lived with (\w+)\.", answer["content"])[1]
        assert name != "Lily"
        assert answer["content"] == STORY.replace("Lily", name)
        assert "Lily" not in request["content"]
    assert {len(messages) for messages in answers} == {2, 3}
    assert run(tool, tmp_path, answers=150, others=3) == entries


def test_a_name_that_was_asked_for_is_changed_in_the_request_as_well(tool) -> None:
    asked = tool.Request("Tell me about Lily.", people=("Lily",))
    request, answer = json.loads(tool.conversation(asked, STORY, random.Random(2)))["messages"][-2:]
    name = re.fullmatch(r"Tell me about (\w+)\.", request["content"])[1]
    assert name != "Lily"
    assert answer["content"] == STORY.replace("Lily", name)
    asked = tool.Request("Tell me about a lily.")
    request, answer = json.loads(tool.conversation(asked, STORY, random.Random(2)))["messages"][-2:]
    assert request["content"] == asked.text
    assert "Lily" not in answer["content"]


def test_the_best_threads_are_chosen(tool, monkeypatch) -> None:
    monkeypatch.setattr(tool, "threads", lambda _, stories: [float(story) for story in stories])
    kept = [(None, number) for number in ("3", "1", "5", "2")]
    assert tool.best_threads(None, kept, 0.5) == [(None, "5"), (None, "3")]
    assert tool.best_threads(None, [], 0.5) == []


@pytest.mark.usefixtures("story_teller")
def test_answers_that_found_no_end_are_left_out(tool, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tool, "guided_answers", lambda *_: [None] * 64)
    assert run(tool, tmp_path, answers=64, others=0) == []


def test_data_without_stories_is_refused(tool, tmp_path) -> None:
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    arguments = argparse.Namespace(
        model=tmp_path, data=tmp_path / "train.jsonl", output=tmp_path / "out", seed=1, share=1
    )
    with pytest.raises(ValueError, match='no entry with "text"'):
        tool.write_kept(arguments)


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_none_is_refused(tool, share: float) -> None:
    with pytest.raises(ValueError, match=f"--share: got {share}"):
        tool.write_kept(argparse.Namespace(share=share))
