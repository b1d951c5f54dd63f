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

from random_requests import Requests
from sound_stories import sound
from story_thread import log_likelihood, threads
from tqdm import tqdm

from causallm import load_model
from causallm.causal_lm import CausalLM
from causallm.cli import reporting_errors

ASKED = (
    ("Tell me a story about a cat who is afraid of the rain.", "cat", "rain"),
    ("Tell me a story about a little girl named Mia and her kite.", "Mia", "kite"),
    ("Can you tell me a story about a frog?", "frog"),
    ("a story about a dragon please", "dragon"),
    ("Tell me a story about a boy who lost his shoe.", "boy", "shoe"),
    ("I want a bedtime story about the moon and a sleepy owl.", "moon", "owl"),
    ("Write a short story about two friends who find a box in the park.", "box", "park"),
    ("Tell me a story about a bunny and a carrot.", "bunny", "carrot"),
    ("Tell me a story about a princess who wants to climb a tree.", "princess", "tree"),
    ("story about a train", "train"),
    ("Please tell my son Ben a story about a big truck.", "Ben", "truck"),
    ("Tell me a story about Grandma baking a cake.", "grandma", "cake"),
    ("Tell me about a bear who could not sleep.", "bear"),
    ("Make up a story where a mouse helps a lion.", "mouse", "lion"),
    ("Tell me a story about a snowman that a girl builds in the yard.", "snowman", "girl"),
    ("Could you write a story about a duck who learns to swim?", "duck"),
    ("Tell me a funny story about a monkey and a hat.", "monkey", "hat"),
    ("I'd like to hear a story about a fairy with a broken wing.", "fairy", "wing"),
    ("Tell me a story about Tom and his toy robot.", "Tom", "robot"),
    ("Tell a story about a fish in the sea", "fish", "sea"),
    ("Tell me a story about a baby bird who falls out of the nest.", "bird", "nest"),
    ("My daughter loves horses. Tell her a story about a horse.", "horse"),
    ("Tell me a story about a king who had no friends.", "king"),
    ("Tell me a story about a mom and her daughter at the beach.", "mom", "beach"),
    ("Write me a story about a pig that likes mud.", "pig", "mud"),
    ("Tell me a story about a teddy bear left on the bus.", "teddy", "bus"),
    ("Tell me a scary story, but not too scary, about a ghost.", "ghost"),
    ("What happened when Lily found a shiny key? Tell me!", "Lily", "key"),
    ("Tell me a story about an elephant and an ant.", "elephant", "ant"),
    ("Give me a story with a wizard and a spoon in it.", "wizard", "spoon"),
    ("Tell me a story about a boat and the strong wind.", "boat", "wind"),
    ("Tell me a story about a brother who would not share his cookie.", "brother", "cookie"),
    ("I want a story about a butterfly and a flower!", "butterfly", "flower"),
    ("Tell me a story about Sam, who does not like soup.", "Sam", "soup"),
    ("Tell me a nice story about a doll.", "doll"),
    ("Tell me a story about a squirrel who hides a nut.", "squirrel", "nut"),
    ("Let's have a story about a farmer and his cow.", "farmer", "cow"),
    ("Tell me a story about a puppy named Max who chases a bee.", "Max", "bee"),
    ("Tell me a story about a dad who fixes a bike.", "dad", "bike"),
    ("Tell me a story about a witch who is really kind.", "witch"),
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
