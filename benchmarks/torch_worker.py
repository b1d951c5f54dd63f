"""One measurement in a process of its own: load a folder with causallm or transformers, run prompts and generation,
print JSON. Used by compare.py; llama_cpp_worker.py does the same in the same order."""

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from causallm.report import peak_memory

CHECKED = 256
CHUNK = 512
WARM_STEPS = 2
Forward = Callable[[Tensor], Tensor]
"""Puts ids (1, time) in after those that are there; returns the logits (vocab,) after the last."""
Start = Callable[[int], Forward]
"""Starts a sequence of at most that many tokens."""


def load_causallm(folder: str, dtype: str | None) -> tuple[float, Start]:
    """The seconds of loading, imports apart, and what starts a sequence."""
    from causallm import load_model
    from causallm.allocator import keep_freed_memory
    from causallm.library_pages import give_back_library_code
    from causallm.steps import decode_one, prefill

    keep_freed_memory()  # as the command line does
    give_back_library_code()
    begin = time.perf_counter()
    model = load_model(folder, dtype=dtype)
    seconds = time.perf_counter() - begin

    def start(length: int) -> Forward:
        cache = model.make_cache(1, length)

        def forward(ids: Tensor) -> Tensor:
            if ids.shape[1] == 1:
                return decode_one(model, ids[0], cache, None)[0]
            return prefill(model, ids, cache, None, CHUNK)[0]

        return forward

    return seconds, start


def load_transformers(folder: str, dtype: str | None) -> tuple[float, Start]:
    """The same for transformers, with its default attention (SDPA) and growing cache."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # By its own name, so that importing the model's code is no part of loading.
    model_class = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    begin = time.perf_counter()
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    seconds = time.perf_counter() - begin

    def start(_: int) -> Forward:
        cache = transformers.DynamicCache(config=model.config)
        return lambda ids: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    return seconds, start


SYSTEMS = {"causallm": load_causallm, "transformers": load_transformers}


@torch.inference_mode()
def measure(start: Start, ids: Tensor, depth: int, prompt: int) -> tuple[float, float]:
    """Tokens a second of a prompt that follows `depth` tokens, and of the rest of `ids` (1, length) one by one.

    A step ends with the choice of a token, but what follows is given: all systems shall see the same.
    """
    forward = start(ids.shape[1])
    for part in ids[:, :depth].split(CHUNK, 1) if depth else ():
        forward(part)
    steps = ids[:, depth + prompt :].split(1, 1)
    begin = time.perf_counter()
    forward(ids[:, depth : depth + prompt]).argmax().item()
    middle = time.perf_counter()
    for token in steps:
        forward(token).argmax().item()
    end = time.perf_counter()
    return prompt / (middle - begin), len(steps) / (end - middle)


@torch.inference_mode()
def warm(start: Start, ids: Tensor) -> list[float]:
    """A first prompt and some steps; returns the first logits after the prompt."""
    forward = start(ids.shape[1] + WARM_STEPS)
    logits = forward(ids)[:CHECKED].tolist()
    for token in ids[:, :WARM_STEPS].split(1, 1):
        forward(token)
    return logits


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("folder")
    parser.add_argument("--dtype", help="default: as the folder says")
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--generate", type=int, required=True)
    parser.add_argument("--depths", type=int, nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = random.Random(0)
    length = max(args.depths) + args.prompt + args.generate
    ids = torch.tensor([[numbers.randrange(args.vocab) for _ in range(length)]])
    seconds, start = SYSTEMS[args.system](args.folder, args.dtype)
    result: dict[str, Any] = {"load_seconds": seconds, "logits": warm(start, ids[:, : args.prompt])}
    rates = [measure(start, ids[:, : d + args.prompt + args.generate], d, args.prompt) for d in args.depths]
    result["prefill_tps"], result["decode_tps"] = (list(column) for column in zip(*rates, strict=True))
    print(json.dumps({**result, "peak_bytes": peak_memory()}))


if __name__ == "__main__":
    main()
