"""How many of the experts that a text needs are in memory, when room is for some of them.

    python benchmarks/expert_hits.py res/tiny-moe

One cache for all layers keeps the experts used last. The share depends on the routing alone, so that a small trained
model tells more of it than a large one of random numbers.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from causallm.cli import reporting_errors
from causallm.loading import build_packed, find_source, resolve_generation
from causallm.storage.attach import attach_storage
from causallm.storage.budget import make_plan
from causallm.storage.inventory import take_inventory

ALL = 2**50


def main() -> int:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--shares", default="0.25,0.5,0.75", help="of all experts, with commas between them")
    args = parser.parse_args()
    return reporting_errors(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """A line for each share."""
    print("| experts in memory | of all | found there |\n| --- | --- | --- |")
    for share in map(float, args.shares.split(",")):
        model, slots, count = load(args.folder, share)
        # Without ends the text goes on from one story to the next.
        model.generate_text(args.prompt, max_new_tokens=args.tokens, eos_token_id=(), seed=0)
        hits = model.storage.counts().hit_rate
        print(f"| {slots} of {count} | {100 * slots / count:.0f} % | {100 * hits:.1f} % |", flush=True)
    return 0


def load(folder: Path, share: float) -> tuple[Any, int, int]:
    """The model with room for a share of its experts, how many those are, and of how many; ValueError without any."""
    model: Any
    model, reader = build_packed(find_source(folder), memory_budget=ALL)
    inventory = take_inventory(model, reader)
    count, least = inventory.expert_count, 2 * model.config.num_experts_per_tok
    if not count:
        raise ValueError(f"{folder} has no experts")
    slots = max(int(share * count), least)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = make_plan(model, inventory)
    attach_storage(model, reader, replace(plan, whole=False, slots=slots, most_experts=slots // 2), inventory)
    model.generation_config = resolve_generation(model, model.tokenizer)
    return model.eval(), slots, count


if __name__ == "__main__":
    sys.exit(main())
