"""Compose children's stories from plots, each as the answer to a request for it, to train a small story model on.

    python tools/compose_stories.py -o data/composed.jsonl --mix data/tiny-variants-2/train.jsonl

A plot (story_plots.txt) is a story whose sentences have choices, and slots for who acts, for things and places. What a
model learns from them is to keep to what was asked for, and how a story goes on. --mix: other documents to shuffle in.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from story_plots import Plot, chosen, filled, read_plots, told
from story_requests import OPENING_CHANCE, REQUESTS, SYSTEM_CHANCE, messages, opening
from tqdm import trange
from vary_stories import FLATTEN, WORDS, plural

from causallm.cli import reporting_errors
from causallm.weights.atomic_file import atomic_file

PLOTS = Path(__file__).with_name("story_plots.txt")
MORE_REQUESTS = (
    "Please tell me a story about {}.", "Write me a story about {}.", "Could you tell me a story about {}?",
    "Tell a story about {}.", "a short story about {}", "Tell me a little story about {}.", "story about {}",
    "Do you have a story about {}?", "Tell me a bedtime story about {}.", "I would like a story about {}.",
    "Tell us a story about {}.", "a story with {}", "Tell me a nice story about {}, please.",
    "Give me a story about {}.",
)  # fmt: skip
ANY_REQUESTS = ("Tell me a story.", "Tell me a story, please.", "Write a story.", "tell me a story", "A story, please.")
COLOURS = ("red", "blue", "green", "yellow", "white", "pink", "purple", "brown")
SIZES = ("big", "little", "small")
LOOKS = ("new", "old", "pretty", "shiny")
PLACES = ("park", "garden", "forest", "yard", "field", "meadow")
PARENTS = ("mom", "mom", "mom", "dad", "dad", "mommy", "grandma", "grandpa")
MANNERS = ("little", "little", "", "", "young", "kind", "happy", "small", "big")
BEGINNINGS = ("Once upon a time, there was {a}.",) * 2 + ("Once there was {a}.", "There was once {a}.")
BEGINNINGS_WITH_NAME = ("{who} was {kind}.", "Once upon a time, there lived {a}.")
REMARKS = (
    "lived in a small house", "lived near the {place}", "was very kind", "liked to be outside", "was always curious",
    "loved to play",
)  # fmt: skip
PRONOUNS = {"girls": ("she", "her", "her", "herself"), "boys": ("he", "him", "his", "himself")}
TEXT_CHANCE = 0.1


@dataclass(frozen=True)
class Person:
    """Somebody who acts. group: "girls" or "boys", whose names and pronouns they have."""

    noun: str
    group: str
    manner: str
    name: str | None

    @property
    def who(self) -> str:
        """`Max`, or `the dog`."""
        return self.name or f"the {self.noun}"

    @property
    def met(self) -> str:
        """`a little dog named Max`."""
        return with_article(self.manner, self.noun) + (f" named {self.name}" if self.name else "")

    def asked_for(self, draw: random.Random) -> str:
        """As a request may have it."""
        if self.name and draw.random() < 0.45:
            noun = with_article(self.noun)
            return draw.choice((self.name, f"{noun} named {self.name}", f"{noun} called {self.name}"))
        return with_article(draw.choice(("", "", self.manner)), self.noun)


def with_article(*words: str) -> str:
    """`an old hat`."""
    phrase = " ".join(filter(None, words))
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class Composer:
    """Draws plots, and all that changes in them."""

    def __init__(self, words: dict[str, list[str]], plots: Sequence[Plot], draw: random.Random):
        self.words, self.plots, self.draw = words, plots, draw
        self.weights = [2 if plot.kinds["x"] == "any" and "t" in plot.kinds else 1 for plot in plots]
        """Stories of anybody with something are what is asked for most."""

    def document(self) -> dict[str, object]:
        """A story as text, or as the answer to a request."""
        draw = self.draw
        story, request = self.compose(draw.choices(self.plots, self.weights)[0])
        if draw.random() < TEXT_CHANCE:
            return {"text": story}
        asked = opening(story, draw) if draw.random() < OPENING_CHANCE else request
        return {"messages": messages(asked, story, draw.random() < SYSTEM_CHANCE)}

    def compose(self, plot: Plot) -> tuple[str, str]:
        """A story, and a request that it answers."""
        people = self.people(plot)
        values = self.values(plot, people)
        lines = [chosen(line, self.draw) for line in plot.lines]
        story = told([line + self.draw.choice("\n  ") for line in lines], values)
        return story, self.request(plot, people, values, story)

    def people(self, plot: Plot) -> dict[str, Person]:
        """{x}, and {y} where there is one, of other kinds and names."""
        people: dict[str, Person] = {}
        for slot in sorted(plot.kinds.keys() & {"x", "y"}):
            named = slot == "y" and (plot.uses("ayn") or plot.uses("yname"))
            people[slot] = self.person(plot.kinds[slot], people.values(), named)
        return people

    def person(self, kind: str, others: Iterable[Person], named: bool) -> Person:
        """Somebody of a kind of words; "child", or "any" and "other", who may be one, or some animal or grown-up."""
        draw, known = self.draw, [*others]
        child_chance = {"child": 1.0, "any": 0.35, "other": 0.25, "royal": 0.3}.get(kind, 0.0)
        if draw.random() < child_chance:
            group = draw.choice(("girls", "boys"))
            noun, manner, named = group[:-1], draw.choice(MANNERS[:-1]), True
        else:
            kinds = ("someone" if draw.random() < 0.12 else "animal") if kind in ("any", "other") else kind
            noun = draw.choice([word for word in self.words[kinds] if all(word != one.noun for one in known)])
            group = "girls" if noun in self.words["she"] else "boys" if noun in self.words["he"] else ""
            group, manner = group or draw.choice(("girls", "boys")), "" if kind == "tall" else draw.choice(MANNERS)
            named = named or draw.random() < 0.5
        return Person(noun, group, manner, self.name(group, [one.name for one in known]) if named else None)

    def name(self, group: str, used: Sequence[str | None]) -> str:
        """One that is not used; rare ones nearly as often as frequent ones."""
        weights = {name: count**FLATTEN for name, count in WORDS[group].items() if name not in used}
        return self.draw.choices([*weights], [*weights.values()])[0]

    def values(self, plot: Plot, people: dict[str, Person]) -> dict[str, str]:
        """What fills the slots."""
        draw, x, place = self.draw, people["x"], self.draw.choice(PLACES)
        values = {"p": draw.choice(PARENTS), "place": place, "open": self.beginning(x)}
        for slot, one in people.items():
            values |= {slot: one.who, f"a{slot}": one.met, f"c{slot}": f", {one.name}" if one.name else ""}
        values |= dict(zip(("he", "him", "his", "himself"), PRONOUNS[x.group], strict=True))
        if y := people.get("y"):
            values |= {
                "ayn": with_article(y.noun),
                "ynoun": f"the {y.noun}",
                "yname": y.name or "",
                "yhis": PRONOUNS[y.group][2],
            }
        things: list[str] = []
        for slot in sorted(plot.kinds.keys() & {"t", "u"}):
            noun = draw.choice([word for word in self.words[plot.kinds[slot]] if word not in things])
            things.append(noun)
            adjective = self.adjective(plot.kinds[slot], noun)
            phrase = f"{adjective} {noun}".strip()
            values |= {slot: noun, slot.upper(): phrase, f"a{slot}": with_article(phrase), f"{slot}s": plural(noun)}
        return values

    def adjective(self, kind: str, noun: str) -> str:
        """One that fits the thing, or none."""
        if noun == "treasure" or self.draw.random() < 0.35:
            return ""
        if noun in self.words["unlike_toys"]:
            return self.draw.choice((*SIZES, "red", "yellow"))
        return self.draw.choice(COLOURS + LOOKS if kind == "ride" else COLOURS + SIZES + LOOKS)

    def beginning(self, x: Person) -> str:
        """A sentence or two on who the story is about."""
        draw = self.draw
        sentence = draw.choice(BEGINNINGS + (BEGINNINGS_WITH_NAME if x.name else ()))
        sentence = sentence.format(a=x.met, who=x.who, kind=with_article(x.manner or "little", x.noun))
        if draw.random() > 0.3:
            return sentence
        remark = draw.choice(REMARKS).format(place=draw.choice(PLACES))
        return f"{sentence} {PRONOUNS[x.group][0].capitalize()} {remark}."

    def request(self, plot: Plot, people: dict[str, Person], values: dict[str, str], story: str) -> str:
        """A request that names some of what the story has."""
        draw, x = self.draw, people["x"].asked_for(self.draw)
        if draw.random() < 0.04:
            return draw.choice(ANY_REQUESTS)
        if plot.clauses and draw.random() < 0.27:
            clause = filled(draw.choice(plot.clauses), values)
            wanted = [f"{x} {clause.replace('who ', 'that ', 1) if draw.random() < 0.25 else clause}"]
        else:
            others = [people["y"].asked_for(draw)] if "y" in people else []
            others += (
                [draw.choice((values["at"], values["at"], with_article(values["t"]), f"{values['his']} {values['T']}"))]
                if "t" in values
                else []
            )
            others += [draw.choice(plot.extras)] if plot.extras else []
            if re.search(rf"\b{values['p']}\b", story) and draw.random() < 0.2:
                others.append(f"{values['his']} {values['p']}")
            wanted = [x, *draw.sample(others, min(len(others), draw.choice((0, 1, 1, 1, 1, 1, 2, 2))))]
            if draw.random() < 0.15:
                draw.shuffle(wanted)
        listed = " and ".join(filter(None, (", ".join(wanted[:-1]), wanted[-1])))
        return draw.choice(REQUESTS + MORE_REQUESTS).format(listed)


def main() -> int:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=28000, help="how many to compose (default: %(default)s)")
    parser.add_argument("--mix", type=Path, help="a file of documents, a line each")
    parser.add_argument("--others", type=int, default=7000, help="how many of those to mix in (default: %(default)s)")
    parser.add_argument("--texts-only", action="store_true", help="mix in none that are answers to requests")
    parser.add_argument("--plots", type=Path, default=PLOTS)
    parser.add_argument("--seed", type=int, default=1)
    return reporting_errors(lambda: write_composed(parser.parse_args()))


def write_composed(args: argparse.Namespace) -> int:
    """Write the documents in random order."""
    draw = random.Random(args.seed)
    words, plots = read_plots(args.plots)
    if not plots:
        raise ValueError(f'{args.plots} holds no plot, expected at least one that begins with "=="')
    composer = Composer(words, plots, draw)
    documents = (composer.document() for _ in trange(args.stories, unit=" stories", disable=None))
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    others = args.mix.read_text(encoding="utf-8").splitlines() if args.mix else []
    others = [line for line in others if "text" in json.loads(line)] if args.texts_only else others
    mixed = lines + draw.sample(others, min(args.others, len(others)))
    draw.shuffle(mixed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as file:
        file.write("".join(f"{line}\n" for line in mixed).encode())
    print(f"{args.output}: {len(lines)} stories of {len(plots)} plots, {len(mixed)} documents in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
