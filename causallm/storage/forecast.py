"""How many tokens a second a plan promises, from what this machine's memory and disk were measured to give."""

from dataclasses import dataclass
from typing import NamedTuple

from causallm.storage.plan import Plan

EFFICIENCY = 0.7
"""Of the memory's bandwidth that products with a few rows reach (benchmarks/README.md)."""
CALL_SECONDS = 1e-4
"""A block that is computed by itself costs besides its products: calls, checks, binding its weights (measured)."""


class Rates(NamedTuple):
    """Bytes a second: of reading memory, of reading blocks from files, and of reads of the size of an expert."""

    memory: float
    blocks: float
    experts: float


@dataclass(frozen=True)
class Forecast:
    """Of one token after the prompt: seconds of computing, of reading while that goes on, and of waiting for experts,
    all chosen equally often."""

    computing: float
    reading: float
    experts: float

    @property
    def tokens_per_second(self) -> float:
        """Reading blocks goes on while others are computed; experts are known only when they are needed."""
        return 1 / (max(self.computing, self.reading) + self.experts)


def forecast(plan: Plan, touched: float, blocks: int, rates: Rates) -> Forecast:
    """touched: bytes of weights that a token multiplies with."""
    missed = plan.experts_per_token * plan.expert_bytes * (1 - plan.hit_rate)
    calls = 0.0 if plan.whole else blocks * CALL_SECONDS
    computing = touched / (EFFICIENCY * rates.memory) + calls
    return Forecast(computing, plan.pass_bytes / rates.blocks, missed / rates.experts)
