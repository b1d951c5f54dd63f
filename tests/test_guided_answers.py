"""tools/guided_answers.py: what guidance does to logits, and plain answers without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_modules import tool_module

from causallm import load_model
from causallm.config import GenerationConfig

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = ["Tell me a story about a cat.", "Write a short story about a boy named Sam and a boat.", "A story, please."]
ENDS = (0, 2)


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("guided_answers")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(ROOT / "res" / "tiny-stories", dtype="float32")


def test_logits_are_moved_by_what_the_request_adds(tool) -> None:
    logits = torch.randn(6, 50) * 3
    asked, anything = logits.log_softmax(-1).double().split(3)
    for guidance in (0.5, 1.0, 2.5):
        found = tool.guided(logits, 0, guidance)
        torch.testing.assert_close(found.double(), guidance * asked + (1 - guidance) * anything, rtol=1e-5, atol=1e-5)
    kept = tool.guided(logits, 7, 2.5).isfinite()
    assert (kept.sum(-1) == 7).all()
    assert torch.equal(kept, asked >= asked.topk(7).values[:, -1:])


@pytest.mark.parametrize("temperature", [1e-9, 0.8])
def test_without_guidance_answers_are_plain_ones(tool, model, temperature: float) -> None:
    options = {"temperature": temperature, "top_k": 40, "max_new_tokens": 280}
    found = tool.guided_answers(model, REQUESTS, GenerationConfig(**options, eos_token_id=ENDS), 1.0, 5)
    plain = model.generate_text(REQUESTS, **options, do_sample=True, repetition_penalty=1.0, seed=5)
    assert any(found)
    for answer, text in zip(found, plain, strict=True):
        assert answer in (text.strip(), None)


def test_an_answer_without_an_end_is_none(tool, model) -> None:
    config = GenerationConfig(temperature=0.8, top_k=40, max_new_tokens=5, eos_token_id=ENDS)
    assert tool.guided_answers(model, REQUESTS, config, 1.5, 0) == [None] * 3


def test_guided_answers_are_those_of_the_formula(tool, model) -> None:
    """Greedy, until the first full stop, every token from a pass over all of both texts."""
    stop = model.tokenizer.token_id(".")
    ends = (*ENDS, stop)
    config = GenerationConfig(temperature=1e-9, max_new_tokens=60, eos_token_id=ends)
    expected = []
    for request in REQUESTS:
        asked, anything = (tool._prompt(model, text) for text in (request, tool.ANYTHING))
        answer = list[int]()
        while not answer or answer[-1] not in ends:
            with torch.inference_mode():
                said, beside = (model(torch.tensor([ids]))[0, -1].log_softmax(-1) for ids in (asked, anything))
            answer.append(int((beside + 2.5 * (said - beside)).argmax()))
            asked, anything = [*asked, answer[-1]], [*anything, answer[-1]]
        expected.append(model.tokenizer.decode(answer[:-1]).strip())
    assert tool.guided_answers(model, REQUESTS, config, 2.5, 0) == expected
    assert len(set(expected)) > 1
