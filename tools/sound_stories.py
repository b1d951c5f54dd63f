"""Whether a story is sound by rule: it ends, repeats nothing and keeps to whom it tells of. Nothing about its sense."""

import re
from collections import Counter
from collections.abc import Iterable

from story_requests import THING, THINGS
from vary_stories import WORDS

SHORTEST = 320
"""Characters."""
SENTENCES = re.compile(r"(?<=[.!?])\"?\s")
GIRLS, BOYS = "|".join(WORDS["girls"]), "|".join(WORDS["boys"])
NAME = re.compile(rf"\b(?:{GIRLS}|{BOYS})\b")
MUDDLED = re.compile(
    rf"\b(a|an|the|his|her|their) (\w+) and \1 \2\b"  # her dolls and her dolls
    rf"|\b(?:{BOYS})\b(?:(?!{GIRLS}|girl|sister|[.!?]).)*\bher (?:mom|mum|dad|parents|toys|room|bed)"  # Tim and her mom
    rf"|\b(?:{GIRLS})\b(?:(?!{BOYS}|boy|brother|[.!?]).)*\bhis (?:mom|mum|dad|parents|toys|room|bed)"
    rf"|\b({GIRLS}|{BOYS}) and \3\b"
)
COLOURED = re.compile(rf"\b(red|blue|green|yellow|pink|purple|brown|white|black|orange) ({'|'.join(THINGS)})\b")
CALLED = re.compile(r"\b(?:named|called) ([A-Z]\w+)")
MALE = "boy|brother|man|king|prince|wizard|knight|grandpa|fireman|policeman|he"
FEMALE = "girl|sister|woman|lady|queen|princess|witch|fairy|grandma"
OWN = "mom|mum|mommy|dad|daddy|parents|toys|room|bed|friends?"


def sound(answer: str) -> bool:
    """Whether a story ends, names each of at most three people again, repeats nothing, and keeps to he or she.

    A thing keeps its colour, and is not named all the time.
    """
    sentences = [sentence.strip() for sentence in SENTENCES.split(answer)]
    words = re.findall(r"\w+", answer)
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    people = Counter(NAME.findall(answer))
    return (
        len(answer) >= SHORTEST
        and answer.endswith((".", "!", '."', '!"', '?"'))
        and answer.count('"') % 2 == 0
        and len(set(sentences)) == len(sentences)
        and max(fours.values()) <= 2
        and not MUDDLED.search(answer)
        and len(people) <= 3
        and all(count > 1 for count in people.values())
        and keeps_to_one(answer, people)
        and things_agree(answer, len(words))
    )


def keeps_to_one(answer: str, people: Iterable[str]) -> bool:
    """Whether a story of girls or boys alone says `her mom` or `his mom`, and names again whoever has a name."""
    girls, boys = (any(name in WORDS[group] for name in people) for group in ("girls", "boys"))
    lower, called = answer.lower(), set(CALLED.findall(answer))
    hers, his = (re.search(rf"\b{whose} (?:{OWN})\b", lower) for whose in ("her", "his"))
    others = re.search(rf"\b(?:{MALE if girls else FEMALE})\b", lower)
    mixed = girls != boys and not others and (hers if boys else his)
    return not mixed and all(len(re.findall(rf"\b{name}\b", answer)) > 1 for name in called)


def things_agree(answer: str, words: int) -> bool:
    """Whether no thing has two colours, and none is more than one word in fourteen."""
    colours: dict[str, set[str]] = {}
    for colour, form in COLOURED.findall(answer.lower()):
        colours.setdefault(THINGS[form], set()).add(colour)
    named = Counter(THINGS[form] for _, form in THING.findall(answer.lower()))
    return all(len(each) == 1 for each in colours.values()) and max(named.values(), default=0) * 14 <= words
