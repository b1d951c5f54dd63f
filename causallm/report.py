"""What a run cost: tokens, times and memory, in NNTrainer's words and as JSON."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from causallm.byte_size import show_bytes
from causallm.storage.counts import StorageCounts


@dataclass
class Lookup:
    """What drafts were worth: decoding steps, tokens drafted in them, and drafted tokens that came true."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that came true."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class Report:
    """Filled in while a model loads and generates. Times in seconds; tokens summed over the rows of a batch.

    reused_tokens: those of prompt_tokens that a cache already held, so that prefill did not compute them; None where
    there is none.
    cache_dtype, cache_bytes: of the keys and values at the end, or of the largest batch; None, 0 before the first.
    lookup: None where nothing is drafted.
    storage: what came from the disk in a phase, "prefill" or "generation"; planned_bytes: of memory, if planned.
    """

    prompt_tokens: int = 0
    reused_tokens: int | None = None
    generated_tokens: int = 0
    first_tokens: int = 0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generation_seconds: float = 0.0
    cache_dtype: torch.dtype | None = None
    cache_bytes: int = 0
    lookup: Lookup | None = None
    storage: dict[str, StorageCounts] = field(default_factory=dict)
    planned_bytes: int | None = None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to `<phase>_seconds`."""
        name, start = f"{phase}_seconds", time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def note_cache(self, dtype: torch.dtype, nbytes: int) -> None:
        """Take in how large the cache of one batch has become."""
        self.cache_dtype, self.cache_bytes = dtype, max(self.cache_bytes, nbytes)

    def note_storage(self, phase: str, counts: StorageCounts) -> None:
        """Take in what came from the disk in a phase."""
        self.storage[phase] = self.storage.get(phase, StorageCounts()) + counts

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed a second."""
        return self.computed_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that no cache held."""
        return self.prompt_tokens - (self.reused_tokens or 0)

    @property
    def generation_rate(self) -> float:
        """Tokens a second after the first of each row, which prefill already paid for."""
        steps = self.generated_tokens - self.first_tokens
        return steps / self.generation_seconds if steps and self.generation_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decoding step gave, 1 in plain decoding of one row; of steps with drafts only."""
        steps = self.lookup.steps if self.lookup else 0
        return (self.generated_tokens - self.first_tokens) / steps if steps else 0.0

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [
            f"prefill: {self.computed_tokens} tokens, {self.prefill_seconds * 1e3:.0f} ms, {self.prefill_rate:.1f} TPS",
            f"generation: {self.generated_tokens} tokens, {self.generation_seconds * 1e3:.0f} ms, "
            f"{self.generation_rate:.1f} TPS",
            f"load: {self.load_seconds * 1e3:.0f} ms, first token after: {self.prefill_seconds * 1e3:.0f} ms, "
            f"peak memory: {peak_memory() / 1e6:.0f} MB",
        ]
        if self.reused_tokens is not None:
            lines.append(f"reused: {self.reused_tokens} of {self.prompt_tokens} prompt tokens, from the prompt cache")
        if self.cache_dtype:
            lines.append(f"cache: {_name(self.cache_dtype)}, {self.cache_bytes / 1e6:.1f} MB")
        lines += [self._storage_line(phase) for phase in self.storage]
        if self.planned_bytes:
            anonymous, mapped = memory_kinds()
            lines.append(
                f"memory: planned {show_bytes(self.planned_bytes)}, peak {show_bytes(peak_memory())}; now "
                f"{show_bytes(anonymous)} of its own, {show_bytes(mapped)} of files"
            )
        if self.lookup:
            lines.append(
                f"lookup: {self.lookup.accepted} of {self.lookup.drafted} drafted tokens accepted "
                f"({100 * self.lookup.acceptance:.0f} %), {self.tokens_per_step:.2f} tokens per step"
            )
        return lines

    def _storage_line(self, phase: str) -> str:
        counts = self.storage[phase]
        seconds = getattr(self, f"{phase}_seconds")
        line = (
            f"disk in {phase}: {show_bytes(counts.read_bytes)}, {show_bytes(counts.read_rate)}/s, "
            f"waited {counts.waited_seconds:.2f} s of {seconds:.2f} s"
        )
        steps = self.generated_tokens - self.first_tokens
        if phase == "generation" and steps:
            line += f", {show_bytes(counts.read_bytes / steps)} a token"
        if counts.hit_rate is not None:
            line += f", {100 * counts.hit_rate:.0f} % of experts were in memory"
        return line

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; times in milliseconds, memory in bytes; without keys of what there is not."""
        content: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "load_ms": round(self.load_seconds * 1e3, 3),
            "prefill_ms": round(self.prefill_seconds * 1e3, 3),
            "prefill_tps": round(self.prefill_rate, 3),
            "generation_ms": round(self.generation_seconds * 1e3, 3),
            "generation_tps": round(self.generation_rate, 3),
            "time_to_first_token_ms": round(self.prefill_seconds * 1e3, 3),
            "peak_memory_bytes": peak_memory(),
        }
        if self.reused_tokens is not None:
            content["reused_tokens"] = self.reused_tokens
        if self.cache_dtype:
            content |= {"cache_dtype": _name(self.cache_dtype), "cache_bytes": self.cache_bytes}
        for phase, counts in self.storage.items():
            content[f"{phase}_storage"] = {
                "read_bytes": counts.read_bytes,
                "read_bytes_per_second": round(counts.read_rate),
                "waited_ms": round(counts.waited_seconds * 1e3, 3),
                "computed_ms": round((getattr(self, f"{phase}_seconds") - counts.waited_seconds) * 1e3, 3),
                "expert_hits": counts.hits,
                "expert_misses": counts.misses,
            }
        if self.planned_bytes:
            anonymous, mapped = memory_kinds()
            content |= {
                "planned_memory_bytes": self.planned_bytes,
                "anonymous_memory_bytes": anonymous,
                "file_memory_bytes": mapped,
            }
        if self.lookup:
            content |= {
                "draft_tokens": self.lookup.drafted,
                "draft_tokens_accepted": self.lookup.accepted,
                "draft_acceptance": round(self.lookup.acceptance, 4),
                "tokens_per_step": round(self.tokens_per_step, 3),
            }
        return content


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peak_memory() -> int:
    """The most memory this process has had resident, mapped files included, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # getrusage would count what a process before this one had, where it was replaced by exec.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_kinds() -> tuple[int, int]:
    """Bytes this process has resident: its own, and mapped files'; all count as its own where the system is silent."""
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        own, files, shared = (int(fields[f"Rss{kind}"].split()[0]) * 1024 for kind in ("Anon", "File", "Shmem"))
        return own + shared, files
    import psutil

    return int(psutil.Process().memory_info().rss), 0
