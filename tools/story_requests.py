"""What somebody may have asked for who was told a story: who and what it tells of, or its first words."""

import random
import re
from collections import Counter

from vary_stories import WORDS, plural

SYSTEM = "You are a friendly storyteller for small children."
REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "tell me a story about {}",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "Do you know a story about {}?",
    "I want to hear a story about {}.",
    "Please write a short story with {}.",
    "Make up a story with {} in it.",
    "A story about {}, please.",
)
ADJECTIVES = "red|blue|green|yellow|pink|purple|brown|white|black|big|little|small|old|new|pretty|shiny|happy|sad|magic"
THINGS = {form: noun for noun in WORDS["things"].split() for form in (noun, plural(noun))}
THING = re.compile(rf"\b(?:({ADJECTIVES}) )?({'|'.join(THINGS)})\b")
SYSTEM_CHANCE, OPENING_CHANCE, NAME_CHANCE, ADJECTIVE_CHANCE = 0.25, 0.15, 0.25, 0.5


def conversation(story: str, draw: random.Random) -> list[dict[str, str]]:
    """A request that fits the story, sometimes after a system message, and the story."""
    system = draw.random() < SYSTEM_CHANCE
    request = opening(story, draw) if draw.random() < OPENING_CHANCE else request_for(story, draw)
    return messages(request, story, system)


def messages(request: str, story: str, system: bool) -> list[dict[str, str]]:
    """The turns of a conversation."""
    first = [{"role": "system", "content": SYSTEM}] if system else []
    return [*first, {"role": "user", "content": request}, {"role": "assistant", "content": story}]


def opening(story: str, draw: random.Random) -> str:
    """The first words of a story, which asks for the whole of it."""
    return " ".join(story.split()[: draw.randint(4, 12)]).rstrip(",")


def request_for(story: str, draw: random.Random) -> str:
    """A request that names who and what the story tells of."""
    wanted = things_of(story, draw)
    names = [name for group in ("girls", "boys") for name in WORDS[group] if story.count(name) > 2]
    if names and draw.random() < NAME_CHANCE:
        wanted = [who(story, draw.choice(names), draw), *wanted[:2]]
    if not wanted:
        return "Tell me a story."
    listed = " and ".join(filter(None, (", ".join(wanted[:-1]), wanted[-1])))
    return draw.choice(REQUESTS).format(listed)


def things_of(story: str, draw: random.Random) -> list[str]:
    """One to three of the four things that the story names most often, the most frequent ones likeliest."""
    adjectives: dict[str, Counter[str]] = {}
    for adjective, form in THING.findall(story.lower()):
        adjectives.setdefault(THINGS[form], Counter())[adjective] += 1
    often = sorted((noun for noun in adjectives if adjectives[noun].total() > 1), key=lambda n: -adjectives[n].total())
    count = draw.choice((1, 1, 2, 2, 2, 3))
    weighted = sorted(often[:4], key=lambda noun: -(draw.random() ** (1 / adjectives[noun].total())))
    return [with_article(noun, adjectives[noun], draw) for noun in weighted[:count]]


def with_article(noun: str, adjectives: Counter[str], draw: random.Random) -> str:
    """`a ball`, or with what the story says of it `a red ball`."""
    known = [adjective for adjective, _ in adjectives.most_common() if adjective]
    phrase = f"{known[0]} {noun}" if known and draw.random() < ADJECTIVE_CHANCE else noun
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def who(story: str, name: str, draw: random.Random) -> str:
    """`Lily`, or where the story says what she is `a girl named Lily`."""
    kind = re.search(rf"([a-z]+) (?:named|called) {name}\b", story)
    return f"a {kind[1]} named {name}" if kind and kind[1] in THINGS and draw.random() < 0.5 else name
