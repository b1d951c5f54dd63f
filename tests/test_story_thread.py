"""tools/story_thread.py: a story whose second half follows from its first scores higher than one of two stories."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_modules import tool_module

from causallm import load_model

ROOT = Path(__file__).resolve().parents[1]
STORIES = [
    "Once upon a time, there was a dog named Max. Max had a red ball and he loved it. "
    "One day, the ball rolled away. Max ran after the ball and found it under a tree. Max was happy to have his ball.",
    "Lily wanted to bake a cake with her mom. They put eggs in a bowl.\nThe cake was very good. Lily ate the cake.",
    'Tom and Sue went to the sea. "Look, a big fish!" said Tom. The fish swam to Sue. '
    "It was a kind fish, and they all swam in the sea until the sun went down. Tom and Sue went home.",
]


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("story_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(ROOT / "res" / "tiny-stories", dtype="float32")


def test_halves_meet_at_the_sentence_end_nearest_to_the_middle(tool) -> None:
    for story in STORIES:
        first, second = tool.halves(story)
        assert first + second == story
        assert first[-1] in '.!?"'
        assert second[0] in " \n"
        assert abs(len(first) - len(second)) < 60
    assert tool.halves("One. Two. Three. Four.") == ("One. Two.", " Three. Four.")
    assert tool.halves("No end") == ("No end", "")


def test_a_thread_is_what_the_first_half_tells_of_the_second(tool, model, monkeypatch) -> None:
    """Each by itself, from the definition; and the same in batches of stories of unlike length."""
    encode, mark = model.tokenizer.encode, model.tokenizer.token_id("<|endoftext|>")

    def nats(before: list[int], after: list[int]) -> float:
        ids = torch.tensor([*before, *after])
        with torch.inference_mode():
            likely = model(ids[None, :-1])[0].log_softmax(-1)
        return sum(likely[place - 1, ids[place]].item() for place in range(len(before), len(ids)))

    exact = []
    for story in STORIES:
        first, second = map(encode, tool.halves(story))
        exact.append((nats([mark, *first], second) - nats([mark], second)) / len(second))
    assert tool.threads(model, STORIES) == pytest.approx(exact, abs=1e-4)
    monkeypatch.setattr(tool, "ROWS", 2)
    assert tool.threads(model, STORIES) == pytest.approx(exact, abs=1e-4)
    assert tool.threads(model, []) == []


def test_halves_of_different_stories_have_less_of_one(tool, model) -> None:
    firsts, seconds = zip(*map(tool.halves, STORIES), strict=True)
    mixed = [first + second for first, second in zip(firsts, (*seconds[1:], seconds[0]), strict=True)]
    assert all(
        whole > other for whole, other in zip(tool.threads(model, STORIES), tool.threads(model, mixed), strict=True)
    )


def test_a_tokenizer_without_the_mark_is_refused(tool, model, monkeypatch) -> None:
    monkeypatch.setattr(tool, "MARK", "<|none|>")
    with pytest.raises(ValueError, match="expected a model trained on texts divided by it"):
        tool.threads(model, STORIES)
