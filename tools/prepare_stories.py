"""Make training data for res/tiny-stories: stories as they are, and each as the answer to a request.

    python tools/prepare_stories.py --stories DIR --tales FILE -o data/tiny-stories

DIR holds .txt files of short stories (TinyStories), FILE longer tales divided by <|endoftext|>. Writes train.jsonl and
validation.jsonl; a story held out is in neither form in train.jsonl. The request names things that the story tells of,
or is its first words.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

from causallm.cli import reporting_errors

MARK = "<|endoftext|>"
SYSTEM = "You are a friendly storyteller for small children."
REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Write a story about {}.",
    "Can you tell me a story about {}?",
    "I want to hear a story about {}.",
    "Please write a short story with {}.",
)
COLOURS = "red|blue|green|yellow|big|little|small|old|new|pretty|shiny|brown|white|black|happy|sad|kind|magic"
PLAIN = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
THING = re.compile(rf"\b(a|an|the|his|her|their) ((?:{COLOURS}) )?([a-z]{{3,}})\b")
NO_THINGS = frozenset(
    "big little small old new red blue green yellow day time way lot bit end one other two first next best very good "
    "bad great long nice same many most only great whole few more moral rest sad happy kind special pretty shiny loud "
    "scared brave careful and was that with then had but hurry name lesson idea thing things something side top back "
    "front middle bottom ground sky sun people person".split()
)


def main() -> int:
    """Parse the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--tales", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--hold-out", type=int, default=50, help="every so many-th story is validation")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    return reporting_errors(lambda: prepare(args.stories, args.tales, args.output, args.hold_out, args.seed))


def prepare(folder: Path, tales: Path | None, output: Path, hold_out: int, seed: int) -> int:
    """Write both files."""
    stories = list(dict.fromkeys(story for path in sorted(folder.glob("*.txt")) for story in split_stories(path)))
    if not stories:
        raise ValueError(f"{folder} holds no .txt file with stories")
    draw = random.Random(seed)
    draw.shuffle(stories)
    train, validation = [], []
    for number, story in enumerate(stories):
        if number % hold_out == 0:
            validation.append({"text": story})
        else:
            train.append({"text": story})
            train.append({"messages": conversation(story, draw)})
    if tales:
        train += [{"text": clean(tale)} for tale in tales.read_text(encoding="utf-8").split(MARK) if tale.strip()]
    draw.shuffle(train)
    output.mkdir(parents=True, exist_ok=True)
    for name, entries in (("train", train), ("validation", validation)):
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{output / name}.jsonl: {len(entries)} documents, {len(lines.encode()):,} bytes")
    return 0


def split_stories(path: Path) -> list[str]:
    """Stories between marks; a file without marks has them between single line breaks, paragraphs between two."""
    text = path.read_text(encoding="utf-8")
    parts = text.split(MARK) if MARK in text else re.split(r"(?<!\n)\n(?!\n)", text)
    return [story for part in parts if len(story := clean(part)) > 200]


def clean(text: str) -> str:
    """Plain quotes and dashes, no stray spaces, paragraphs on lines of their own."""
    return re.sub(r" *\n\s*", "\n", text.translate(PLAIN)).strip()


def conversation(story: str, draw: random.Random) -> list[dict[str, str]]:
    """A request that fits the story, sometimes after a system message, and the story."""
    messages = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.25 else []
    request = opening(story, draw) if draw.random() < 0.25 else request_for(story, draw)
    return [*messages, {"role": "user", "content": request}, {"role": "assistant", "content": story}]


def opening(story: str, draw: random.Random) -> str:
    """The first words of a story, which asks for the whole of it."""
    return " ".join(story.split()[: draw.randint(4, 12)]).rstrip(",")


def request_for(story: str, draw: random.Random) -> str:
    """A request that names what the story tells of."""
    found = Counter()
    for _, adjective, noun in THING.findall(story.lower()):
        if noun not in NO_THINGS:
            found[(adjective, noun)] += 1
    nouns: dict[str, str] = {}
    for (adjective, noun), _ in found.most_common():
        if noun not in nouns:
            nouns[noun] = f"{adjective}{noun}"
    chosen = list(nouns.values())[: draw.choice((1, 2, 2))]
    things = [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in chosen]
    return draw.choice(REQUESTS).format(" and ".join(things)) if things else "Tell me a story."


if __name__ == "__main__":
    sys.exit(main())
