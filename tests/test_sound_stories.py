"""tools/sound_stories.py: a story that breaks a rule is not sound, and one that breaks none is."""

from collections.abc import Iterator
from typing import Any

import pytest
from sample_story import STORY
from tool_modules import tool_module


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    yield from tool_module("sound_stories")


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
