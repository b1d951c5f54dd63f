"""The same story about other people and things, so that a model learns to go by what was said before, not by heart."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

WORDS = json.loads(Path(__file__).with_name("story_words.json").read_text(encoding="utf-8"))
SWAP_CHANCE = 0.5
FLATTEN = 0.7
"""Names are drawn by their number of stories to this power: a rare one has to be learned, too."""


def rename(story: str, draw: random.Random) -> str:
    """The story with each person's name changed everywhere to another that fits a girl, or a boy, and is not in it."""
    words = set(re.findall(r"\w+", story))
    new: dict[str, str] = {}
    for group in ("girls", "boys"):
        weights: dict[str, int] = WORDS[group]
        left = [name for name in weights if name not in words]
        for name in weights:
            if name in words and left:
                chosen = draw.choices(left, [weights[other] ** FLATTEN for other in left])[0]
                left.remove(chosen)
                new[name] = chosen
    return replace(story, new)


def swap_things(story: str, draw: random.Random) -> str:
    """The story with animals, toys, food and colours changed everywhere to others of their kind.

    A kind is left alone where a word such as `barked` would not fit the others.
    """
    lower = story.lower()
    for kind in WORDS["swaps"]:
        if draw.random() < SWAP_CHANCE and not re.search(kind["unless"], lower):
            story = replace(story, other_words(lower, kind["words"], draw))
    return story


def other_words(lower: str, words: Sequence[str], draw: random.Random) -> dict[str, str]:
    """For each of the words in the text another that is not in it, also in the plural."""
    found = [word for word in words if re.search(rf"\b({word}|{plural(word)})\b", lower)]
    left = [word for word in words if word not in found]
    chosen = draw.sample(left, min(len(left), len(found)))
    pairs = list(zip(found, chosen, strict=False))
    return {**dict(pairs), **{plural(old): plural(new) for old, new in pairs}}


def plural(noun: str) -> str:
    """More than one of it, for the words of the table."""
    if noun.endswith("y") and noun[-2] not in "aeo":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("x", "ch", "sh", "ato")) else "s")


def replace(text: str, new: dict[str, str]) -> str:
    """Change whole words, all at once; capitals stay, and `a` becomes `an` where it must."""
    if not new:
        return text

    def change(match: re.Match[str]) -> str:
        article, word = match.groups()
        changed = new[word] if word in new else new[word.lower()].capitalize()
        if not article:
            return changed
        vowel = changed[0].lower() in "aeiou"
        return f"{article[0]}{'n' if vowel else ''} {changed}"

    old = "|".join(re.escape(word) for word in new)
    cased = "|".join(re.escape(word.capitalize()) for word in new if word.islower())
    return re.sub(rf"\b([Aa]n? )?({old}{'|' + cased if cased else ''})\b", change, text)
