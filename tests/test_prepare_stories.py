"""tools/prepare_stories.py: stories are found, held out in both forms, and asked for by what they tell of."""

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "prepare_stories.py"
STORY = (
    "One day, a dog found a red ball. The dog liked the red ball. He ran with the ball to his mom and said, "
    "\u201cLook!\u201d\n\nThe dog was happy. His mom was happy too, and she threw the ball far away. Number {}. "
    "They played all day, and then the dog slept."
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_stories", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_with_and_without_marks_give_the_same_stories(tool, tmp_path) -> None:
    stories = [STORY.format(number) for number in range(3)]
    (tmp_path / "marked.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    (tmp_path / "plain.txt").write_text("\n".join(stories), encoding="utf-8")
    marked, plain = (tool.split_stories(tmp_path / name) for name in ("marked.txt", "plain.txt"))
    assert marked == plain
    assert len(marked) == 3
    assert marked[0].count('"Look!"') == 1


def test_a_request_names_things_of_its_story(tool) -> None:
    for seed in range(20):
        request = tool.request_for(STORY, random.Random(seed))
        assert "dog" in request or "red ball" in request


def test_a_conversation_asks_in_both_ways_and_is_answered_by_the_whole_story(tool) -> None:
    requests = []
    for seed in range(40):
        messages = tool.conversation(STORY, random.Random(seed))
        assert messages[-1] == {"role": "assistant", "content": STORY}
        assert [message["role"] for message in messages[:-1]] in (["user"], ["system", "user"])
        requests.append(messages[-2]["content"])
    openings = [request for request in requests if STORY.startswith(request)]
    assert 0 < len(openings) < 20
    assert all(4 <= len(request.split()) <= 12 for request in openings)


def test_what_is_held_out_is_in_no_form_in_the_training_data(tool, tmp_path) -> None:
    stories = [STORY.format(number) for number in range(40)]
    source = tmp_path / "stories"
    source.mkdir()
    (source / "a.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    assert tool.prepare(source, None, tmp_path / "out", hold_out=10, seed=1) == 0
    validation, lines = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text(encoding="utf-8").splitlines()]
        for name in ("validation.jsonl", "train.jsonl")
    )
    held_out = [line["text"] for line in validation]
    plain = {line["text"] for line in lines if "text" in line}
    answers = {line["messages"][-1]["content"] for line in lines if "messages" in line}
    assert len(held_out) == 4
    assert plain == answers
    assert len(plain) == 36
    assert not plain & set(held_out)


def test_a_folder_without_stories_is_refused(tool, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        tool.prepare(tmp_path, None, tmp_path / "out", hold_out=10, seed=1)
