"""One measurement of causallm under a memory budget in a process of its own; memory_budget.py tells what it is."""

import argparse
import json
import random
import time
import warnings
from typing import Any

import torch

from causallm import load_model
from causallm.causal_lm import CausalLM
from causallm.report import memory_kinds, peak_memory
from causallm.steps import decode_one, prefill
from causallm.storage.counts import StorageCounts
from layers.qwen_moe import QwenMoe

CHUNK = 512


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--budget", type=int, help="bytes; default: all in memory")
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--generate", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--skew", type=float)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    budget = {} if args.budget is None else {"memory_budget": args.budget}
    model: CausalLM = load_model(args.folder, max_seq_len=args.context, **budget)
    loaded = time.perf_counter() - begin
    numbers = random.Random(0)
    ids = [numbers.randrange(model.config.vocab_size) for _ in range(args.prompt + args.generate)]
    if args.skew is not None:
        change_routing(model, args.skew)
    print(json.dumps({"load_seconds": loaded, **measure(model, ids, args.prompt)}))


@torch.inference_mode()
def measure(model: CausalLM, ids: list[int], prompt: int) -> dict[str, Any]:
    """Rates of a prompt and of single tokens after it, which are given: a model of random numbers repeats its own,
    whose experts would all be in memory."""
    prefill(model, torch.tensor([ids[:prompt]]), model.make_cache(1, len(ids)), None, CHUNK)  # pages come in
    cache = model.make_cache(1, len(ids))
    begin = time.perf_counter()
    prefill(model, torch.tensor([ids[:prompt]]), cache, None, CHUNK)
    middle, before = time.perf_counter(), model.storage.counts()
    for token in ids[prompt:]:
        decode_one(model, torch.tensor([token]), cache, None).argmax().item()
    end, after = time.perf_counter(), model.storage.counts()
    counts = StorageCounts() if before is None or after is None else after - before
    steps = len(ids) - prompt
    own, mapped = memory_kinds()
    return {
        "prefill_tps": prompt / (middle - begin),
        "decode_tps": steps / (end - middle),
        "read_bytes_per_token": counts.read_bytes / steps,
        "read_rate": counts.read_rate,
        "waited": counts.waited_seconds / (end - middle),
        "hit_rate": counts.hit_rate,
        "planned_bytes": model.storage.planned_bytes,
        "peak_bytes": peak_memory(),
        "own_bytes": own,
        "mapped_bytes": mapped,
    }


@torch.inference_mode()
def change_routing(model: CausalLM, skew: float) -> None:
    """Make a random model choose its experts as trained ones do not: all about equally often, or some more often.

    Without training what the layers add drowns what tokens differ in, and a router gives all of them the same few
    experts: larger embeddings prevent that. With `skew` a router's weights of expert e are scaled by (e + 1) ** -skew:
    large weights have the extreme scores.
    """
    model.embed_tokens.register_forward_hook(lambda _, inputs, vectors: 1000 * vectors)
    for module in model.modules():
        if isinstance(module, QwenMoe) and skew:
            weight: Any = module.gate.weight
            if weight.is_meta:
                raise SystemExit("error: --skew needs a budget under which all blocks stay in memory")
            weight *= (torch.arange(1, len(weight) + 1) ** -skew).to(weight.dtype)[:, None]


if __name__ == "__main__":
    main()
