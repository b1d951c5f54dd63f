"""tools/random_requests.py: what is asked for, and which answers keep to it."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sample_story import STORY
from tool_modules import tool_module


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("random_requests")


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
