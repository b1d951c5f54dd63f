"""Measure tokens a second of prompts (pp) and generation (tg) on random tokens, in the manner of llama-bench."""

import argparse
import csv
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from causallm.bench import Case, Measurement, count_parameters, make_cases, measure, name_dtypes, size_in_bytes
from causallm.causal_lm import CausalLM
from causallm.commands.model_arguments import add_model_arguments, open_model
from causallm.commands.prompt_cache_arguments import add_prompt_cache_argument, open_prompt_cache
from causallm.embedding_model import EmbeddingModel
from causallm.memory_bandwidth import processors, read_bandwidth, read_bandwidth_apart
from causallm.report import Report, peak_memory

LISTED = (
    ("--prompt", "512", 0, "prompt lengths, each a pp test; 0 for none"),
    ("--generate", "128", 0, "how many tokens to generate, each a tg test; 0 for none"),
    ("--depth", "0", 0, "tokens in the cache before the test begins"),
    ("--threads", None, 1, "CPU threads"),
    ("--batch", "1", 1, "rows that run together"),
)
"""Options that take several values: name, default (None: torch's choice), least value, help."""
LEFT = ("model", "test")
"""Columns of text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    add_model_arguments(parser)
    group = parser.add_argument_group("tests", "each takes several values (128,512), and all combinations are run")
    for option, default, _, text in LISTED:
        default = default or str(torch.get_num_threads())
        group.add_argument(option, default=default, metavar="N,...", help=f"{text} (default: %(default)s)")
    add_prompt_cache_argument(parser, "each test begins with it; takes the place of --depth and --batch")
    parser.add_argument("--repeat", default="5", metavar="N", help="times each test is run (default: %(default)s)")
    parser.add_argument(
        "--output", choices=("table", "csv", "json"), default="table", help="form of the results (default: table)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--chunk", type=int, metavar="N", help="prompt tokens taken in one step (init_seq_len)")


def execute(args: argparse.Namespace) -> int:
    """Load the model, run all tests, print each as it ends; 130 when interrupted, with what there is until then."""
    prompts, generates, depths, threads, batches = (
        parse_numbers(option, getattr(args, option[2:]), least) for option, _, least, _ in LISTED
    )
    repeat = _one_number("--repeat", args.repeat)
    _check_threads(threads)
    report = Report()
    model = open_model(argparse.Namespace(**{**vars(args), "threads": None}), report)
    if isinstance(model, EmbeddingModel):
        raise ValueError(f"{args.model} is an embedding model, expected one that generates text")
    held = open_prompt_cache(args, model, report)
    if held is not None:
        if any(held.padding):
            raise ValueError("the prompt cache has rows of different lengths, expected rows of one length to measure")
        depths, batches = [held.columns], [len(held.ids)]
    cases = make_cases(prompts, generates, depths, threads, batches, model.max_length)
    measurements = measure(model, cases, repeat, held)
    bandwidth = _bandwidth(model.device) if any(case.kind == "tg" for case in cases) else None
    about = _describe(Path(args.model).resolve().name, model)
    printer = PRINTERS[args.output](cases, about)
    rows, code = [], 0
    with tqdm(total=len(cases), desc="bench", unit=" tests", disable=None, leave=False) as bar:
        try:
            for measurement in measurements:
                rows.append({**about, **_result(measurement, bandwidth)})
                bar.clear()
                printer.row(rows[-1])
                bar.update()
        except KeyboardInterrupt:
            code = 130
    machine = {
        "memory_bandwidth_gb_per_second": None if bandwidth is None else bandwidth / 1e9,
        "load_ms": round(report.load_seconds * 1e3, 3),
        "peak_memory_bytes": peak_memory(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "device": str(model.device),
        "dtype": about["dtype"],
    }
    printer.end(rows, machine)
    return code


def parse_numbers(option: str, text: str, least: int) -> list[int]:
    """Whole numbers of at least `least`, separated by commas, each once."""
    if not re.fullmatch(r" *[0-9]+ *(, *[0-9]+ *)*", text) or min(map(int, text.split(","))) < least:
        raise ValueError(f"{option}: got '{text}', expected whole numbers of at least {least}, such as 1 or 1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def cpu_name() -> str:
    """The processor as it calls itself, or its architecture."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(errors="replace"), re.M)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _one_number(option: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{option}: got '{text}', expected a whole number of at least 1")
    return int(text)


def _check_threads(threads: Sequence[int]) -> None:
    most = os.cpu_count() or 1
    for count in threads:
        if count > most:
            raise ValueError(f"--threads: got {count}, expected 1 to {most}, the number of processors")


def _bandwidth(device: torch.device) -> float:
    if device.type == "cpu":
        return read_bandwidth_apart(processors())
    return read_bandwidth(processors(), str(device))


def _describe(name: str, model: CausalLM) -> dict[str, Any]:
    return {
        "model": name,
        "size_bytes": size_in_bytes(model),
        "parameters": count_parameters(model),
        "dtype": name_dtypes(model),
    }


def _result(measurement: Measurement, bandwidth: float | None) -> dict[str, Any]:
    case, read = measurement.case, measurement.bytes_per_second
    return {
        "threads": case.threads,
        "batch": case.batch,
        "test": case.name,
        "prompt": case.tokens if case.kind == "pp" else 0,
        "generate": case.tokens if case.kind == "tg" else 0,
        "depth": case.depth,
        "tokens_per_second": measurement.mean,
        "deviation": measurement.deviation,
        "gb_per_second": None if read is None else read / 1e9,
        "bandwidth_percent": None if read is None or bandwidth is None else 100 * read / bandwidth,
        "repeats": measurement.rates,
    }


class _Table:
    """A Markdown table, a row at a time; so the widths are settled before there are any figures."""

    def __init__(self, cases: Sequence[Case], about: dict[str, Any]):
        batch = {"batch": 5} if any(case.batch != 1 for case in cases) else {}
        tests = max(len(case.name) for case in cases)
        widths = {"model": len(about["model"]), "size": 12, "params": 9, "threads": 7, **batch, "test": tests}
        widths |= {"tokens/s": 18, "GB/s": 7, "of bandwidth": 12}
        self._widths = {name: max(width, len(name)) for name, width in widths.items()}
        self._line({name: name for name in widths})
        rules = {name: "-" * width for name, width in self._widths.items()}
        self._line({name: rule if name in LEFT else rule[:-1] + ":" for name, rule in rules.items()})

    def row(self, row: dict[str, Any]) -> None:
        """Show one test."""
        read, share, count = row["gb_per_second"], row["bandwidth_percent"], row["parameters"]
        self._line(
            {
                "model": row["model"],
                "size": f"{row['size_bytes'] / 2**20:.2f} MiB",
                "params": f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M",
                "threads": str(row["threads"]),
                "batch": str(row["batch"]),
                "test": row["test"],
                "tokens/s": f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}",
                "GB/s": "" if read is None else f"{read:.2f}",
                "of bandwidth": "" if share is None else f"{share:.0f} %",
            }
        )

    def end(self, rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> None:
        """What holds for all tests."""
        print("", *_footer(machine), sep="\n")

    def _line(self, cells: dict[str, str]) -> None:
        aligned = (
            cells[name].ljust(width) if name in LEFT else cells[name].rjust(width)
            for name, width in self._widths.items()
        )
        print("|", " | ".join(aligned), "|", flush=True)


class _Csv:
    """A line for each test; what holds for all goes to stderr."""

    def __init__(self, cases: Sequence[Case], about: dict[str, Any]):
        self._writer: Any = None

    def row(self, row: dict[str, Any]) -> None:
        """Show one test."""
        cells = {name: value for name, value in row.items() if name != "repeats"}
        if self._writer is None:
            self._writer = csv.DictWriter(sys.stdout, list(cells), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(cells)
        sys.stdout.flush()

    def end(self, rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> None:
        """What holds for all tests."""
        print(*_footer(machine), sep="\n", file=sys.stderr)


class _Json:
    """One object at the end."""

    def __init__(self, cases: Sequence[Case], about: dict[str, Any]):
        pass

    def row(self, row: dict[str, Any]) -> None:
        """Nothing to show yet."""

    def end(self, rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> None:
        """The object."""
        print(json.dumps({**machine, "tests": rows}, ensure_ascii=False))


PRINTERS: dict[str, Any] = {"table": _Table, "csv": _Csv, "json": _Json}


def _footer(machine: dict[str, Any]) -> list[str]:
    bandwidth = machine["memory_bandwidth_gb_per_second"]
    first = [] if bandwidth is None else [f"memory bandwidth: {bandwidth:.1f} GB/s read"]
    return [
        *first,
        f"load: {machine['load_ms']:.0f} ms, peak memory: {machine['peak_memory_bytes'] / 1e6:.0f} MB",
        f"torch {machine['torch']}, {machine['cpu']}, {machine['device']}, {machine['dtype']}",
    ]
