"""Let a story model answer random requests, and keep the answers that keep to what was asked for, to train on.

    python tools/own_stories.py MODEL --data data/tiny-variants-2/train.jsonl -o data/own.jsonl --answers 20000

Answers are guided by the request (guided_answers.py), so that more keep to it. Of those kept the ones that keep their
thread best (story_thread.py), have no sentence out of place and are unlike each other are written, if wanted more than
once under other names, so that names do not grow alike; what names two things that were asked for, which is rarer, is
written twice as often. Training on the best of a
model's own answers: Touvron et al., Llama 2 (2023), section 3.2.3, "rejection sampling".
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_answers import guided_answers
from story_requests import ADJECTIVES, NAME_CHANCE, REQUESTS, SYSTEM_CHANCE, THING, THINGS, messages
from story_thread import threads, weakest_sentences
from tqdm import tqdm
from vary_stories import FLATTEN, WORDS, plural, rename

from causallm import load_model
from causallm.causal_lm import CausalLM
from causallm.cli import reporting_errors
from causallm.config import GenerationConfig
from causallm.weights.atomic_file import atomic_file

LONGEST = 280
"""Tokens."""
SHORTEST = 320
"""Characters."""
TEMPERATURE, TOP_K = 0.8, 40
"""Somewhat warmer than the model's own, so that answers differ."""
EVENNESS = 0.3
"""Things are asked for by how often the data name them to this power: rare ones nearly as often as frequent ones."""
ADJECTIVE_CHANCE = 0.3
DEEDS = {"finds": "f[io]u?nds?", "loses": "los[et]s?", "loves": "loves?d?", "wants": "want(?:ed|s)?", "has": "ha[ds]"}
"""What somebody may do with a thing, and the forms that tell of it."""
DEED_CHANCE = 0.4
WHO, WHAT = frozenset(WORDS["who"].split()), frozenset(WORDS["what"].split())
OPENINGS = 0.04
"""How often the first words of a story are asked for: answers to these are kept four times as often as others."""
WEAK = 0.2
ALIKE, OFTEN = 0.4, 12
ROWS = 64
BETWEEN = "\n\0\n"
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


def main() -> int:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of prepare_stories.py")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=30000, help="how many to choose from")
    parser.add_argument("--guidance", type=float, default=1.5, help="1 for plain answers (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="of those kept, the ones with the best thread")
    parser.add_argument("--copies", type=int, default=2, help="how often each is written, under other names")
    parser.add_argument("--others", type=int, default=2500, help="how many entries of the data to mix in")
    parser.add_argument("--seed", type=int, default=1)
    return reporting_errors(lambda: write_kept(parser.parse_args()))


def write_kept(args: argparse.Namespace) -> int:
    """Write the best of the answers that were kept, a conversation a line."""
    if not 0 < args.share <= 1:
        raise ValueError(f"--share: got {args.share}, expected a part of the answers, more than 0 and up to 1")
    lines = args.data.read_text(encoding="utf-8").splitlines()
    stories = [entry["text"] for entry in map(json.loads, lines) if "text" in entry]
    if not stories:
        raise ValueError(f'{args.data} holds no entry with "text", expected train.jsonl of prepare_stories.py')
    draw, model = random.Random(args.seed), load_model(args.model)
    kept = list(chosen(model, Requests(stories, draw), args.answers, args.guidance, draw))
    best = unlike(best_threads(model, without_weak(model, kept), args.share))
    mixed = [conversation(*pair, draw) for pair in best for _ in range(args.copies * (len(pair[0].things) or 1))]
    mixed += draw.sample(lines, min(args.others, len(lines)))
    draw.shuffle(mixed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as file:
        file.write("".join(f"{line}\n" for line in mixed).encode())
    print(
        f"{args.output}: {len(kept)} of {args.answers} answers were kept, {len(best)} of these chosen, "
        f"{len(mixed)} documents in all"
    )
    return 0


def best_threads(model: CausalLM, kept: Sequence[tuple[Request, str]], share: float) -> list[tuple[Request, str]]:
    """Those of which the model foretells the second half best when it knows the first."""
    ranked = sorted(zip(threads(model, [answer for _, answer in kept]), range(len(kept)), strict=True), reverse=True)
    return [kept[number] for _, number in ranked[: round(share * len(kept))]]


def without_weak(model: CausalLM, kept: Sequence[tuple[Request, str]]) -> list[tuple[Request, str]]:
    """All but those whose weakest sentence surprises the model most."""
    weakest = weakest_sentences(model, [answer for _, answer in kept])
    order = sorted(range(len(kept)), key=lambda number: -weakest[number])
    return [kept[number] for number in sorted(order[: round((1 - WEAK) * len(kept))])]


def unlike(ranked: Sequence[tuple[Request, str]]) -> list[tuple[Request, str]]:
    """Those of which less than `ALIKE` of the runs of four words were in `OFTEN` better ones already."""
    seen: Counter[tuple[str, ...]] = Counter()
    chosen = []
    for request, answer in ranked:
        words = re.findall(r"\w+", answer)
        fours = set(zip(words, words[1:], words[2:], words[3:], strict=False))
        if sum(seen[four] >= OFTEN for four in fours) < ALIKE * len(fours):
            chosen.append((request, answer))
            seen.update(fours)
    return chosen


def conversation(request: Request, answer: str, draw: random.Random) -> str:
    """A line of the data: the answer, and where it was asked for with names the request too, under other names."""
    asked = request.text if request.people or request.opening else ""
    renamed, told = rename(f"{asked}{BETWEEN}{answer}", draw).split(BETWEEN)
    turns = messages(renamed or request.text, told, draw.random() < SYSTEM_CHANCE)
    return json.dumps({"messages": turns}, ensure_ascii=False)


def chosen(
    model: CausalLM, requests: Requests, answers: int, guidance: float, draw: random.Random
) -> Iterator[tuple[Request, str]]:
    """The sound answers that keep to their requests."""
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=LONGEST, eos_token_id=ends)
    with tqdm(total=answers, unit=" answers", disable=None) as bar:
        for start in range(0, answers, ROWS):
            asked = [requests.next() for _ in range(min(ROWS, answers - start))]
            texts = guided_answers(model, [each.text for each in asked], config, guidance, draw.getrandbits(31))
            for request, answer in zip(asked, texts, strict=True):
                if answer is not None and sound(answer) and request.kept(answer):
                    yield request, answer
            bar.update(len(asked))


if __name__ == "__main__":
    sys.exit(main())
