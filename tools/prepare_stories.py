"""Make training data for res/tiny-stories: stories as they are, and each as the answer to a request.

    python tools/prepare_stories.py --stories DIR --tales FILE -o data/tiny-stories

DIR holds .txt files of short stories (TinyStories), FILE longer tales divided by <|endoftext|>. Writes train.jsonl and
validation.jsonl; a story held out is in no form in train.jsonl. Each story comes several times, after the first with
other names, and as an answer also with other animals and things.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from story_requests import conversation
from vary_stories import rename, swap_things

from causallm.cli import reporting_errors

MARK = "<|endoftext|>"
PLAIN = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
WRONGLY_DECODED = {"\u00e2\u20ac\u0153": '"', "\u00e2\u20ac\u2122": "'", "\u00e2\u20ac": '"'}
"""Quotes in UTF-8 that were read as Windows-1252; what is left of a closing one is shorter, so it comes last."""


def main() -> int:
    """Parse the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--tales", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--hold-out", type=int, default=50, help="every so many-th story is validation")
    parser.add_argument("--variants", type=int, default=7, help="how often each story comes in each form")
    parser.add_argument("--tale-copies", type=int, default=4, help="how often each tale comes")
    parser.add_argument("--seed", type=int, default=1)
    return reporting_errors(lambda: prepare(parser.parse_args()))


def prepare(args: argparse.Namespace) -> int:
    """Write both files."""
    stories = list(dict.fromkeys(story for path in sorted(args.stories.glob("*.txt")) for story in split_stories(path)))
    if not stories:
        raise ValueError(f"{args.stories} holds no .txt file with stories")
    draw = random.Random(args.seed)
    draw.shuffle(stories)
    validation = [{"text": story} for story in stories[:: args.hold_out]]
    known = [story for number, story in enumerate(stories) if number % args.hold_out]
    train = [entry for story in known for entry in all_forms(story, args.variants, draw)]
    train += tales(args.tales) * args.tale_copies if args.tales else []
    draw.shuffle(train)
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "train.jsonl", train)
    write(args.output / "validation.jsonl", validation)
    return 0


def write(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text(lines, encoding="utf-8")
    print(f"{path}: {len(entries)} documents, {len(lines.encode()):,} bytes")


def tales(path: Path) -> list[dict[str, Any]]:
    """The texts between marks."""
    return [{"text": clean(tale)} for tale in path.read_text(encoding="utf-8").split(MARK) if tale.strip()]


def split_stories(path: Path) -> list[str]:
    """Stories between marks; a file without marks has them between single line breaks, paragraphs between two."""
    text = path.read_text(encoding="utf-8")
    parts = text.split(MARK) if MARK in text else re.split(r"(?<!\n)\n(?!\n)", text)
    return [story for part in parts if len(story := clean(part)) > 200]


def clean(text: str) -> str:
    """Plain quotes and dashes, no stray spaces, paragraphs on lines of their own."""
    for wrong, right in WRONGLY_DECODED.items():
        text = text.replace(wrong, right)
    return re.sub(r" *\n\s*", "\n", text.translate(PLAIN)).strip()


def all_forms(story: str, variants: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """A story as text and as an answer, first as it is and then in new ways, another for either."""
    for variant in range(variants):
        if variant == 0:
            text, answer = {"text": story}, story
        else:
            answer = swap_things(rename(story, draw), draw)
            text = {"text": rename(story, draw)}
        yield text
        yield {"messages": conversation(answer, draw)}


if __name__ == "__main__":
    sys.exit(main())
