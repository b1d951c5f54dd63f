"""One measurement of llama.cpp in a process of its own: load a GGUF file, run prompts and generation, print JSON.

Used by compare.py, which tells what is measured; it needs llama-cpp-python and nothing else of this project, so that
its interpreter may be another. The low-level functions are timed, `llama_decode` and `llama_synchronize` alone: the
class around them copies the logits of every token.
"""

import argparse
import ctypes
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

FLASH_ATTENTION = {"off": 0, "on": 1}
"""llama.h's llama_flash_attn_type."""
BATCH = 512
CHECKED = 256
WARM_STEPS = 2


class Session:
    """A model and a context of `length` tokens."""

    def __init__(self, path: str, length: int, threads: int, flash_attention: str, repack: bool = True):
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = 0, repack
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = length, max(BATCH, context.n_batch), BATCH
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = FLASH_ATTENTION[flash_attention]
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {length} tokens for {path}")
        self._most = context.n_batch

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def advance(self, ids: list[int]) -> float:
        """Put tokens in after those that are there, logits for the last; returns the seconds that it took."""
        seconds = 0.0
        for start in range(0, len(ids), self._most):
            part = ids[start : start + self._most]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            batch = llama_cpp.llama_batch_get_one(tokens, len(part))
            begin = time.perf_counter()
            code = llama_cpp.llama_decode(self.context, batch)
            llama_cpp.llama_synchronize(self.context)
            seconds += time.perf_counter() - begin
            if code:
                raise ValueError(f"llama_decode failed with {code}")
        return seconds

    def logits(self) -> list[float]:
        """The first logits after the last token."""
        return list(llama_cpp.llama_get_logits_ith(self.context, -1)[:CHECKED])


def peak_memory() -> int | None:
    """The most memory this process has had resident, mapped files included, in bytes; None where it cannot be told."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Measure and print one JSON object; the arguments and the order of tokens are those of torch_worker.py."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--flash-attention", choices=FLASH_ATTENTION, default="off")
    parser.add_argument("--no-repack", action="store_true", help="run from the mapped file, which it else copies")
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--generate", type=int, required=True)
    parser.add_argument("--depths", type=int, nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    args = parser.parse_args()
    # One sequence of tokens for all systems: which experts run depends on them.
    length = max(args.depths) + args.prompt + args.generate
    numbers = random.Random(0)
    ids = [numbers.randrange(args.vocab) for _ in range(length)]
    begin = time.perf_counter()
    session = Session(args.path, length, args.threads, args.flash_attention, not args.no_repack)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin, "prefill_tps": [], "decode_tps": []}
    session.advance(ids[: args.prompt])
    result["logits"] = session.logits()
    for token in ids[:WARM_STEPS]:
        session.advance([token])
    for depth in args.depths:
        session.clear()
        session.advance(ids[:depth])
        middle = depth + args.prompt
        result["prefill_tps"].append(args.prompt / session.advance(ids[depth:middle]))
        steps = sum(session.advance([token]) for token in ids[middle : middle + args.generate])
        result["decode_tps"].append(args.generate / steps)
    print(json.dumps({**result, "peak_bytes": peak_memory()}))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
