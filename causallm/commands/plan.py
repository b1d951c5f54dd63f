"""Show where a model's bytes would go under a memory budget, and how fast it would be, without loading it."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from causallm.bench import bytes_per_token
from causallm.byte_size import show_bytes
from causallm.commands.model_arguments import add_model_arguments, prepare
from causallm.disk_bandwidth import EXPERT, cached_bandwidth, disk_bandwidth
from causallm.loading import build_packed, find_source
from causallm.memory_bandwidth import read_bandwidth_apart
from causallm.storage.budget import make_plan
from causallm.storage.forecast import Forecast, Rates, forecast
from causallm.storage.inventory import take_inventory
from causallm.storage.plan import Plan
from causallm.weights.loader import check_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    add_model_arguments(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(args: argparse.Namespace) -> int:
    """Print the plan; 2 with the same table where the budget is too small."""
    path, overrides = prepare(args)
    source = find_source(path)
    model, reader = build_packed(source, args.dtype, **overrides)
    free = model.runtime_config.memory_budget is None and not model.runtime_config.fsu and not model.fetches_experts
    if free:
        model, reader = build_packed(source, args.dtype, **{**overrides, "memory_budget": "1000TB"})
    check_weights(model, reader)
    plan = make_plan(model, take_inventory(model, reader))
    if free:
        plan = replace(plan, budget=None)
    print("measuring memory and disk ...", file=sys.stderr)
    rates = _rates(plan, path, args.threads)
    expected = forecast(plan, bytes_per_token(model), len(model.layers), rates)
    if args.json:
        print(json.dumps(_as_json(plan, expected, rates)))
        return 0
    print(*plan.table(), sep="\n")
    print(f"\nsmallest budget: {show_bytes(plan.enough)} for {plan.positions} positions")
    if plan.tight:
        print(plan.tight)
    print(*_forecast_lines(plan, expected), sep="\n")
    return 0


def _rates(plan: Plan, path: Path, threads: int) -> Rates:
    """What this machine's memory and disk give."""
    memory = read_bandwidth_apart(threads)
    if not plan.direct:
        cached = cached_bandwidth(path)
        return Rates(memory, cached, cached)
    return Rates(memory, disk_bandwidth(path), disk_bandwidth(path, piece=EXPERT))


def _forecast_lines(plan: Plan, expected: Forecast) -> list[str]:
    where = "the disk" if plan.direct else "the system's cache of files, once they are in it"
    lines = [f"a token reads {show_bytes(plan.read_per_token)} from {where}"] if plan.read_per_token else []
    milliseconds = [1e3 * seconds for seconds in (expected.computing, expected.reading, expected.experts)]
    lines.append(
        f"forecast: {expected.tokens_per_second:.2f} tokens/s (computing {milliseconds[0]:.0f} ms"
        f", reading {milliseconds[1]:.0f} ms meanwhile, waiting for experts {milliseconds[2]:.0f} ms"
        + (f" with {100 * plan.hit_rate:.0f} % of them in memory)" if plan.expert_count else ")")
    )
    return lines


def _as_json(plan: Plan, expected: Forecast, rates: Rates) -> dict[str, Any]:
    return {
        "budget_bytes": plan.budget,
        "planned_bytes": plan.memory,
        "smallest_budget_bytes": plan.enough,
        "whole": plan.whole,
        "lines": [
            {"purpose": line.purpose, "model_bytes": line.model, "memory_bytes": line.memory, "note": line.note}
            for line in plan.lines
        ],
        "streamed_units": len(plan.streamed),
        "expert_slots": plan.slots,
        "read_bytes_per_token": round(plan.read_per_token),
        "direct": plan.direct,
        "disk_bytes_per_second": round(rates.blocks),
        "expert_bytes_per_second": round(rates.experts),
        "forecast_tokens_per_second": round(expected.tokens_per_second, 3),
    }
