"""Random requests, as somebody may make them who has not read the stories, and whether an answer keeps to one."""

import random
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from story_requests import ADJECTIVES, NAME_CHANCE, REQUESTS, THING, THINGS
from vary_stories import FLATTEN, WORDS, plural

EVENNESS = 0.3
"""Things are asked for by how often the data name them to this power: rare ones nearly as often as frequent ones."""
ADJECTIVE_CHANCE = 0.3
DEEDS = {"finds": "f[io]u?nds?", "loses": "los[et]s?", "loves": "loves?d?", "wants": "want(?:ed|s)?", "has": "ha[ds]"}
"""What somebody may do with a thing, and the forms that tell of it."""
DEED_CHANCE = 0.4
WHO, WHAT = frozenset(WORDS["who"].split()), frozenset(WORDS["what"].split())
OPENINGS = 0.04
"""How often the first words of a story are asked for."""


@dataclass(frozen=True)
class Request:
    """What is asked for, and the things, people, phrases and deed that an answer has to name; or its first words."""

    text: str
    things: tuple[str, ...] = ()
    people: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    deed: str = ""
    opening: bool = False

    def kept(self, answer: str) -> bool:
        """Things and people are named in both halves, a thing once with its adjective, and the deed is told."""
        if self.opening:
            return answer.startswith(self.text)
        words = (*(rf"{thing}|{plural(thing)}" for thing in self.things), *self.people)
        found = [[match.start() / len(answer) for match in re.finditer(rf"\b({w})\b", answer, re.I)] for w in words]
        throughout = all(places and places[0] < 0.5 < places[-1] for places in found)
        told = not self.deed or re.search(rf"\b{DEEDS[self.deed]}\b", answer)
        return throughout and bool(told) and all(phrase in answer.lower() for phrase in self.phrases)


class Requests:
    """Draws requests as somebody may ask them who has not read the stories."""

    def __init__(self, stories: Sequence[str], draw: random.Random) -> None:
        named = Counter(THINGS[form] for story in stories for _, form in THING.findall(story.lower()))
        self.draw = draw
        self.openings = stories
        self.weights = {thing: count**EVENNESS for thing, count in named.items() if count > 1}

    def next(self) -> Request:
        """The first words of a story, or a request for one to two things, or for somebody with something."""
        if self.draw.random() < OPENINGS:
            words = self.draw.choice(self.openings).split()
            return Request(" ".join(words[: self.draw.randint(3, 8)]).rstrip(","), opening=True)
        deed = self.draw.choice([*DEEDS]) if self.draw.random() < DEED_CHANCE else ""
        things = (self.thing(WHO), self.thing(WHAT)) if deed else (self.thing(), self.thing())
        things = things if deed else tuple(dict.fromkeys(things))[: self.draw.choice((1, 2, 2, 2, 2))]
        phrases = tuple(self.phrase(thing) for thing in things)
        listed, people = [f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}" for phrase in phrases], ()
        if self.draw.random() < NAME_CHANCE:
            group = self.draw.choice(("girl", "boy"))
            known = WORDS[f"{group}s"]
            people = tuple(self.draw.choices([*known], [count**FLATTEN for count in known.values()]))
            things, phrases, listed = things[-1:], phrases[-1:], listed[-1:]
            listed.insert(0, self.draw.choice((people[0], f"a {group} named {people[0]}")))
        joined = (f" who {deed} " if deed else " and ").join(listed)
        return Request(self.draw.choice(REQUESTS).format(joined), things, people, phrases, deed)

    def thing(self, among: Container[str] = THINGS) -> str:
        """One of those that the data name."""
        weights = {thing: weight for thing, weight in self.weights.items() if thing in among}
        if not weights:
            raise ValueError("the stories name nobody and nothing to ask for more than once, expected more of them")
        return self.draw.choices([*weights], [*weights.values()])[0]

    def phrase(self, thing: str) -> str:
        """`ball` or `red ball`."""
        return f"{self.draw.choice(ADJECTIVES.split('|'))} {thing}" if self.draw.random() < ADJECTIVE_CHANCE else thing
