"""Measure a story model: how often answers keep to what was asked for, how sound they are, and how much alike.

    python tools/judge_stories.py MODEL --data data/tiny-variants-2 --judge OTHER

--data is a folder of prepare_stories.py. The judge, best a model that has not chosen what this one was trained on,
tells how well answers keep their thread (story_thread.py). Answers are drawn as MODEL's generation_config.json says.
"""

import argparse
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from own_stories import Requests, sound
from story_thread import log_likelihood, threads
from tqdm import tqdm

from causallm import load_model
from causallm.causal_lm import CausalLM
from causallm.cli import reporting_errors

ASKED = (
    ("Tell me a story about a dog and a red ball.", "dog", "ball"),
    ("Tell me a story about a cat who finds a key.", "cat", "key"),
    ("Write a story about a boy named Ben and his big kite.", "Ben", "kite"),
    ("Can you tell me a story about a girl who loves cake?", "girl", "cake"),
    ("I want a story about a frog in a pond.", "frog", "pond"),
    ("Tell me a bedtime story about a bear and the moon.", "bear", "moon"),
    ("A story about Lily and her teddy, please.", "Lily", "teddy"),
    ("Tell me about a bird that lost its nest.", "bird", "nest"),
    ("Write something about a little train.", "train"),
    ("Tell me a story with a princess and a dragon.", "princess", "dragon"),
    ("Do you know a story about a rabbit and a carrot?", "rabbit", "carrot"),
    ("Tell me a story about Tom, who has a new bike.", "Tom", "bike"),
    ("a story about a fish and a boat", "fish", "boat"),
    ("Tell me a story about a mouse and a piece of cheese.", "mouse", "cheese"),
    ("Please tell me a story about a tree in the garden.", "tree", "garden"),
    ("Tell me a story about two friends and a puddle.", "friend", "puddle"),
    ("Write a very short story about a duck.", "duck"),
    ("Tell me a story about a farmer and his horse.", "farmer", "horse"),
    ("Tell me a story about Mia and a yellow balloon.", "Mia", "balloon"),
    ("I would like to hear about a lion who wants a hat.", "lion", "hat"),
)
"""What somebody may ask for, in other words than the training data, and what an answer has to name."""
EACH = 3
OFTEN = 5


def main() -> int:
    """Print the measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--judge", type=Path, required=True, help="another story model")
    parser.add_argument("--answers", type=int, default=256, help="to random requests (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="instead of the model's own")
    parser.add_argument("--seed", type=int, default=1)
    return reporting_errors(lambda: print_measures(parser.parse_args()))


def print_measures(args: argparse.Namespace) -> int:
    """One measure a line."""
    stories, held_out = texts(args.data / "train.jsonl"), texts(args.data / "validation.jsonl")
    model = load_model(args.model, dtype="float32")
    options: dict[str, Any] = {} if args.temperature is None else {"temperature": args.temperature}
    asked = [each for each in ASKED for _ in range(EACH)]
    answers = [each.strip() for each in answered(model, [request for request, *_ in asked], args.seed, options)]
    found = [times(answer, words) for answer, (_, *words) in zip(answers, asked, strict=True)]
    print(f"all that was asked for named: {sum(each > 0 for each in found)} of {len(found)} answers")
    print(f"named twice:                  {sum(each > 1 for each in found)}")
    requests = Requests(stories, random.Random(args.seed))
    drawn = [requests.next() for _ in range(args.answers)]
    answers = [each.strip() for each in answered(model, [request.text for request in drawn], args.seed, options)]
    kept = [request.kept(answer) for request, answer in zip(drawn, answers, strict=True)]
    judged = threads(load_model(args.judge, dtype="float32"), answers)
    print(f"random requests kept:         {sum(kept)} of {len(kept)} answers")
    print(f"sound by rule:                {sum(map(sound, answers))}")
    print(f"thread, nats a token:         {sum(judged) / len(judged):.3f}")
    print(f"shared runs of four words:    {shared(answers):.2f}")
    nats = log_likelihood(model, held_out)
    print(f"held out, nats a token:       {-nats:.3f} (perplexity {math.exp(-nats):.2f})")
    return 0


def texts(path: Path) -> list[str]:
    """The texts among the documents of a file; ValueError where there is none."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = [entry["text"] for entry in entries if "text" in entry]
    if not found:
        raise ValueError(f'{path} holds no entry with "text", expected a file of prepare_stories.py')
    return found


def answered(model: CausalLM, requests: Sequence[str], seed: int, options: dict[str, Any]) -> list[str]:
    """The model's answers, all requests as one batch."""
    parts = [""] * len(requests)
    with tqdm(total=len(requests), unit=" answers", disable=None) as bar:
        for event in model.stream(requests, seed=seed, **options):
            parts[event.row] += event.text
            bar.update(event.finish is not None)
    return parts


def times(answer: str, words: Sequence[str]) -> int:
    """How often the rarest of the words is named, in singular or plural."""
    return min(len(re.findall(rf"\b{word}(?:e?s)?\b", answer, re.I)) for word in words)


def shared(answers: Sequence[str]) -> float:
    """Of the runs of four words in all answers, those that are in more than `OFTEN` of them."""
    runs = [re.findall(r"(?=(\b\w+\W+\w+\W+\w+\W+\w+\b))", answer) for answer in answers]
    held = Counter(run for each in runs for run in set(each))
    return sum(held[run] > OFTEN for each in runs for run in each) / max(1, sum(map(len, runs)))


if __name__ == "__main__":
    sys.exit(main())
