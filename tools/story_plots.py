"""Plots of children's stories, and the words for what changes in them; story_plots.txt says how they are written."""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

SLOT, CHOICE = re.compile(r"\{(\w+)\}"), re.compile(r"\[([^\[\]]*)\]")
MARK = "\0"
SAID = "said|asked|cried|shouted|thought|called|laughed|whispered"
AFTER_SPEECH = re.compile(rf"(?:the )?[\w']+(?: \w+)? (?:{SAID})\b")


@dataclass(frozen=True)
class Plot:
    """kinds: of words, by slot. clauses: what a request may say of {x}; extras: what else it may ask for."""

    name: str
    kinds: Mapping[str, str]
    clauses: tuple[str, ...]
    extras: tuple[str, ...]
    lines: tuple[str, ...]

    def uses(self, slot: str) -> bool:
        """Whether any line has it."""
        return any(f"{{{slot}}}" in line for line in self.lines)


def read_plots(path: Path) -> tuple[dict[str, list[str]], list[Plot]]:
    """The words of each kind, and the plots; ValueError for a line that is neither."""
    head, *parts = re.split(r"^== ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    words = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in head.splitlines())):
        kind, colon, listed = line.partition(":")
        if not colon or not listed.split():
            raise ValueError(f'{path}: got the line "{line}", expected "kind: words" or "== plot"')
        words[kind] = listed.split()
    return words, [_plot(path, part) for part in parts]


def _plot(path: Path, part: str) -> Plot:
    head, *lines = filter(None, part.splitlines())
    name, *slots = head.split()
    kinds = dict(slot.split(":", 1) for slot in slots if ":" in slot)
    if "x" not in kinds or len(kinds) < len(slots) or not kinds.keys() <= set("xytu"):
        raise ValueError(
            f'{path}: got the plot "{head}", expected a name, x:kind, and y:kind, t:kind, u:kind where needed'
        )
    listed = {mark: tuple(_listed(lines, mark)) for mark in ">+"}
    return Plot(name, kinds, listed[">"], listed["+"], tuple(line for line in lines if line[0] not in ">+"))


def _listed(lines: list[str], mark: str) -> list[str]:
    return [each.strip() for line in lines if line.startswith(mark) for each in line[1:].split("|")]


def chosen(line: str, draw: random.Random) -> str:
    """The line with every choice made, the inner ones first."""
    while match := CHOICE.search(line):
        line = line[: match.start()] + draw.choice(match[1].split("|")) + line[match.end() :]
    return line


def filled(text: str, values: Mapping[str, str], wrap: Callable[[str], str] = str) -> str:
    """The text with its slots filled; KeyError for one that has no value."""
    return SLOT.sub(lambda match: wrap(values[match[1]]), text)


def told(lines: list[str], values: Mapping[str, str]) -> str:
    """The lines with their slots filled, and a capital wherever what fills one begins a sentence."""
    text = filled("".join(lines), values, lambda value: MARK + value if value[:1].isalpha() else value)
    pieces = text.split(MARK)
    story = pieces[0]
    for number, piece in enumerate(pieces[1:], 1):
        after = "".join(pieces[number:])
        story += piece[0].upper() + piece[1:] if _begins(story, after) else piece
    return re.sub(r" +([.,!?])", r"\1", re.sub(r" {2,}", " ", story)).replace(" \n", "\n").strip()


def _begins(before: str, after: str) -> bool:
    """Whether a sentence begins between the two; after speech that ended, not with `he said`."""
    if re.search(r'(?:^|[\n.!?]) ?$|(?:^|\s)"$', before):
        return True
    return bool(re.search(r'[.!?]" $', before)) and not AFTER_SPEECH.match(after)
