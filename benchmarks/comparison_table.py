"""From measurements of all systems to rows: mean and best of each, and ours beside the best peer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

OURS = "causallm"
Results = Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]
"""What the workers gave, a round each, by type, system and setting ("" where a system has only one)."""


@dataclass(frozen=True)
class Measure:
    """What a row is about. key: in a worker's result; index: which of its depths, None for a single number."""

    title: str
    key: str
    index: int | None = None
    unit: float = 1.0
    digits: int = 1
    less_is_better: bool = False

    def of(self, result: Mapping[str, Any]) -> float | None:
        """A worker's number in the row's unit; None where it could not be told."""
        value = result[self.key] if self.index is None else result[self.key][self.index]
        return None if value is None else value / self.unit


def measures(prompt: int, generate: int, depths: Sequence[int]) -> list[Measure]:
    """The rows of each type."""
    rates = []
    for index, depth in enumerate(depths):
        before = f" @ d{depth}" if depth else ""
        rates.append(Measure(f"prefill {prompt}{before}, tokens/s", "prefill_tps", index))
        rates.append(Measure(f"decode {generate} @ d{depth + prompt}, tokens/s", "decode_tps", index))
    return [
        *rates,
        Measure("peak memory, MB", "peak_bytes", unit=1e6, digits=0, less_is_better=True),
        Measure("load, s", "load_seconds", digits=2, less_is_better=True),
    ]


def make_rows(results: Results, wanted: Sequence[Measure]) -> list[dict[str, Any]]:
    """A row for each type and measure. "systems": mean, best and setting of each, by name; of a system with several
    settings the one of the better mean. "best_peer", and the "ratio" of our mean and best to its (None without one).
    """
    rows = []
    for kind in dict.fromkeys(key[0] for key in results):
        for measure in wanted:
            systems: dict[str, dict[str, Any]] = {}
            for (own, system, setting), rounds in results.items():
                values = [value for result in rounds if (value := measure.of(result)) is not None]
                if own != kind or not values:
                    continue
                best = min(values) if measure.less_is_better else max(values)
                figures = {"mean": fmean(values), "best": best, "setting": setting}
                if system not in systems or _better(measure, figures, systems[system]):
                    systems[system] = figures
            rows.append({"type": kind, "measure": measure.title, "systems": systems, **_ratio(measure, systems)})
    return rows


def _better(measure: Measure, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["mean"] < other["mean"] if measure.less_is_better else one["mean"] > other["mean"]


def _ratio(measure: Measure, systems: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    peer: str | None = None
    for name in systems:
        if name != OURS and (peer is None or _better(measure, systems[name], systems[peer])):
            peer = name
    if peer is None or OURS not in systems:
        return {"best_peer": None, "ratio": None}
    ratio = {figure: systems[OURS][figure] / systems[peer][figure] for figure in ("mean", "best")}
    return {"best_peer": peer, "ratio": ratio}


def markdown(rows: Sequence[Mapping[str, Any]], wanted: Sequence[Measure]) -> list[str]:
    """The lines of a Markdown table; a cell is "mean (best)", with the setting where a system has several."""
    digits = {measure.title: measure.digits for measure in wanted}
    systems = list(dict.fromkeys(name for row in rows for name in row["systems"]))
    lines = [
        f"| weights | measure | {' | '.join(systems)} | {OURS} / best peer |",
        "| --- | --- |" + " ---: |" * (len(systems) + 1),
    ]
    for row in rows:
        cells = [_cell(row["systems"].get(name), digits[row["measure"]]) for name in systems]
        ratio = f"{row['ratio']['mean']:.2f} ({row['ratio']['best']:.2f})" if row["ratio"] else ""
        lines.append(f"| {row['type']} | {row['measure']} | {' | '.join(cells)} | {ratio} |")
    return lines


def _cell(figures: Mapping[str, Any] | None, digits: int) -> str:
    if figures is None:
        return ""
    setting = f", {figures['setting']}" if figures["setting"] else ""
    return f"{figures['mean']:.{digits}f} ({figures['best']:.{digits}f}){setting}"
