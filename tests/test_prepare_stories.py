"""tools/prepare_stories.py: stories are found, held out in every form, told in new ways, and asked for by content."""

import argparse
import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tool_modules import tool_module

STORY = (
    "One day, a dog found a red ball. The dog liked the red ball. He ran with the ball to his mom and said, "
    "\u201cLook!\u201d\n\nThe dog was happy. His mom was happy too, and she threw the ball far away. Number {}. "
    "They played all day, and then the dog slept."
)
FRIENDS = (
    "Once upon a time, there was a girl named Lily. Lily had a cat. Lily's cat and Tim's two cats ate a cookie. "
    "\u201cCats!\u201d said Tim. Lily was glad. Tim and Lily had blue hats. Max was not asked."
)


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("prepare_stories")


@pytest.fixture(scope="module")
def requests(tool: ModuleType) -> ModuleType:
    return importlib.import_module("story_requests")


@pytest.fixture(scope="module")
def vary(tool: ModuleType) -> ModuleType:
    return importlib.import_module("vary_stories")


def arguments(folder: Path, **changed: Any) -> argparse.Namespace:
    options = {"tales": None, "hold_out": 10, "variants": 3, "tale_copies": 2, "seed": 1}
    return argparse.Namespace(stories=folder / "stories", output=folder / "out", **{**options, **changed})


def written(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / name).read_text(encoding="utf-8").splitlines()]


def test_files_with_and_without_marks_give_the_same_stories(tool, tmp_path) -> None:
    stories = [STORY.format(number) for number in range(3)]
    (tmp_path / "marked.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    (tmp_path / "plain.txt").write_text("\n".join(stories), encoding="utf-8")
    marked, plain = (tool.split_stories(tmp_path / name) for name in ("marked.txt", "plain.txt"))
    assert marked == plain
    assert len(marked) == 3
    assert marked[0].count('"Look!"') == 1


def test_quotes_that_were_decoded_wrongly_are_plain(tool) -> None:
    text = "\u201cIt\u2019s me,\u201d she said."
    # Windows-1252 has no character for the last byte of a closing quote, and it was dropped.
    wrong = text.encode().decode("cp1252", errors="ignore")
    assert "\u20ac" in wrong
    assert tool.clean(wrong) == tool.clean(text) == '"It\'s me," she said.'


def test_a_request_names_things_of_its_story(requests) -> None:
    asked = {requests.request_for(STORY, random.Random(seed)) for seed in range(60)}
    assert all("dog" in request or "ball" in request for request in asked)
    assert any("a red ball" in request for request in asked)
    assert any(" a dog and " in request or " and a dog" in request for request in asked)
    assert not any("mom" in request for request in asked)


def test_a_request_may_name_who_the_story_is_about(requests) -> None:
    asked = {requests.request_for(FRIENDS, random.Random(seed)) for seed in range(100)}
    assert any("a girl named Lily" in request for request in asked)
    assert any("Tim" in request for request in asked)
    assert not any("Max" in request for request in asked)
    assert requests.request_for("Nothing was there.", random.Random(0)) == "Tell me a story."


def test_a_conversation_asks_in_both_ways_and_is_answered_by_the_whole_story(requests) -> None:
    asked = []
    for seed in range(60):
        messages = requests.conversation(STORY, random.Random(seed))
        assert messages[-1] == {"role": "assistant", "content": STORY}
        assert [message["role"] for message in messages[:-1]] in (["user"], ["system", "user"])
        asked.append(messages[-2]["content"])
    openings = [request for request in asked if STORY.startswith(request)]
    assert 0 < len(openings) < 20
    assert all(4 <= len(request.split()) <= 12 for request in openings)


def test_names_change_everywhere_to_others_of_the_kind(vary) -> None:
    for seed in range(20):
        told = vary.rename(FRIENDS, random.Random(seed))
        girl = told.split("a girl named ")[1].split(".")[0]
        assert girl in vary.WORDS["girls"]
        assert girl != "Lily"
        assert told.count(girl) == FRIENDS.count("Lily")
        assert f"{girl}'s cat" in told
        boy = told.split("said ")[1].split(".")[0]
        assert boy in vary.WORDS["boys"]
        assert boy not in ("Tim", "Max")
        assert vary.rename(FRIENDS.replace("Lily", girl).replace("Tim", boy), random.Random(0)) != told
        assert len(told.split()) == len(FRIENDS.split())


def test_things_change_with_their_plural_their_capital_and_their_article(vary) -> None:
    new = {"cat": "elephant", "cats": "elephants", "apple": "pear"}
    assert vary.replace("A cat. Cats ate an apple, the cat a catfish.", new) == (
        "An elephant. Elephants ate a pear, the elephant a catfish."
    )
    told = {vary.swap_things(FRIENDS, random.Random(seed)) for seed in range(40)}
    assert FRIENDS in told
    assert any("cat" not in story.lower() for story in told)
    assert any("blue" not in story for story in told)


def test_animals_stay_what_they_are_where_a_word_fits_no_other(vary) -> None:
    barking = "The dog barked at a cat."
    assert all(vary.swap_things(barking, random.Random(seed)) == barking for seed in range(20))


@pytest.mark.parametrize(("noun", "many"), [
    ("cat", "cats"), ("fox", "foxes"), ("peach", "peaches"), ("brush", "brushes"), ("potato", "potatoes"),
    ("piano", "pianos"), ("fly", "flies"), ("bunny", "bunnies"), ("toy", "toys"), ("key", "keys"),
])  # fmt: skip
def test_plurals(vary, noun: str, many: str) -> None:
    assert vary.plural(noun) == many


def test_what_is_held_out_is_in_no_form_in_the_training_data(tool, tmp_path) -> None:
    stories = [FRIENDS.replace("Max", f"Number {number}") + STORY.format(number) for number in range(40)]
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    (tmp_path / "tales").write_text("A tale.<|endoftext|>Another.\n", encoding="utf-8")
    assert tool.prepare(arguments(tmp_path, tales=tmp_path / "tales")) == 0
    held_out = [entry["text"] for entry in written(tmp_path, "validation.jsonl")]
    train = written(tmp_path, "train.jsonl")
    plain = [entry["text"] for entry in train if "text" in entry]
    answers = [entry["messages"][-1]["content"] for entry in train if "messages" in entry]
    assert len(held_out) == 4
    assert sorted(text for text in plain if "tale" in text or "Another" in text) == ["A tale."] * 2 + ["Another."] * 2
    assert (len(plain), len(answers)) == (36 * 3 + 4, 36 * 3)
    for number in range(40):
        mark = f"Number {number} was"
        copies = sum(mark in text for text in (*plain, *answers))
        assert copies == (0 if any(mark in text for text in held_out) else 6)
    known = {story for story in map(tool.clean, stories) if story not in held_out}
    assert known <= set(plain)
    assert known <= set(answers)
    assert sum(text in known for text in plain) == 36


def test_a_folder_without_stories_is_refused(tool, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        tool.prepare(arguments(tmp_path))
