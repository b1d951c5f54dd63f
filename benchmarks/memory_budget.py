"""Tokens a second, peak memory and what is read, under memory budgets, each held by a control group of the same size.

    python benchmarks/memory_budget.py FOLDER --budgets 1.3GB,2GB,4GB,none [--gguf FILE --llama-python PYTHON]

Every run is a process of its own, its weights dropped from the system's cache of files before. Where control groups can
be made (Linux, root) it and its share of that cache are held to the budget; the forecast is that of the plan verb in
the same group. llama.cpp maps its file and gets the same limit and the same tokens.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from causallm.byte_size import parse_bytes, show_bytes
from causallm.cli import reporting_errors
from causallm.weights.source_state import WEIGHTS

HERE = Path(__file__).parent
GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)
COLUMNS = (
    "budget",
    "planned",
    "peak",
    "mapped",
    "prefill",
    "tokens/s",
    "forecast",
    "read/token",
    "disk",
    "waited",
    "hits",
)


def main() -> int:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budgets", default="2GB,none", help="with commas between; none: all in memory")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--skew", type=float, help="change a random model's routers: 0 for even choices (budget_worker.py)"
    )
    args = parser.parse_args()
    return reporting_errors(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """All budgets, one after the other."""
    print("| " + " | ".join(COLUMNS) + (" | llama.cpp | ratio |" if args.gguf else " |"))
    print("| --- " * (len(COLUMNS) + 2 * bool(args.gguf)) + "|")
    for text in args.budgets.split(","):
        budget = None if text.strip() == "none" else parse_bytes(text)
        ours = measure_ours(args, budget)
        cells = [text, *cells_of(ours)]
        if args.gguf:
            theirs = measure_llama(args, budget)
            cells += [f"{theirs:.2f}", f"{ours['decode_tps'] / theirs:.2f}"] if theirs else ["-", "-"]
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


def measure_ours(args: argparse.Namespace, budget: int | None) -> dict[str, Any]:
    """One run of budget_worker.py, and the forecast."""
    context = ["--max-length", str(args.prompt + args.generate)]
    plan = [sys.executable, str(HERE.parent / "main.py"), "plan", str(args.folder), "--json", *context]
    plan += ["--threads", str(args.threads)] + ([] if budget is None else ["--memory-budget", str(budget)])
    worker = [sys.executable, str(HERE / "budget_worker.py"), str(args.folder)]
    worker += [] if args.skew is None else ["--skew", str(args.skew)]
    worker += ["--prompt", str(args.prompt), "--generate", str(args.generate), "--threads", str(args.threads)]
    worker += ["--context", context[1]] + ([] if budget is None else ["--budget", str(budget)])
    with memory_group(budget) as enter:
        forget(args.folder)
        forecast = called(plan, enter)["forecast_tokens_per_second"]
        forget(args.folder)
        return {**called(worker, enter), "forecast": forecast}


def measure_llama(args: argparse.Namespace, budget: int | None) -> float | None:
    """Tokens a second of llama.cpp under the same limit; None where it does not run there."""
    command = [args.llama_python, str(HERE / "llama_cpp_worker.py"), str(args.gguf), "--prompt", str(args.prompt)]
    command += [] if budget is None else ["--no-repack"]  # what it copies it cannot give back
    command += ["--generate", str(args.generate), "--depths", "0", "--threads", str(args.threads)]
    command += ["--vocab", str(json.loads((args.folder / "config.json").read_text())["vocab_size"])]
    with memory_group(budget) as enter:
        forget(args.gguf)
        try:
            return called(command, enter)["decode_tps"][0]
        except ValueError as error:
            print(error, file=sys.stderr)
            return None


def called(command: Sequence[str], enter: Callable[[], None]) -> dict[str, Any]:
    """What a process prints as JSON; ValueError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
    if done.returncode:
        raise ValueError(
            f"{Path(command[1]).name} failed ({done.returncode}): {(done.stderr.splitlines() or ['killed'])[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def memory_group(limit: int | None) -> Iterator[Callable[[], None]]:
    """A control group held to `limit` bytes; yields what a new process does to enter it, nothing without a limit."""
    found = next(
        ((top, file) for top, file in GROUPS if (top / "cgroup.procs").exists() and os.access(top, os.W_OK)), None
    )
    if limit is None or found is None:
        if limit is not None:
            print("no control groups here: the budget is the program's own word", file=sys.stderr)
        yield lambda: None
        return
    group = found[0] / f"causallm-{os.getpid()}"
    group.mkdir()
    try:
        (group / found[1]).write_text(str(limit))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def forget(path: Path) -> None:
    """Drop weights from the system's cache of files, where it can be told to."""
    files = [file for file in path.iterdir() if file.suffix in WEIGHTS] if path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        with contextlib.suppress(AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cells_of(result: dict[str, Any]) -> list[str]:
    """The columns of one run."""
    hits = "-" if result["hit_rate"] is None else f"{100 * result['hit_rate']:.0f} %"
    return [
        show_bytes(result["planned_bytes"]) if result["planned_bytes"] else "-",
        show_bytes(result["peak_bytes"]),
        show_bytes(result["mapped_bytes"]),
        f"{result['prefill_tps']:.2f}",
        f"{result['decode_tps']:.2f}",
        f"{result['forecast']:.2f}",
        show_bytes(result["read_bytes_per_token"]),
        f"{show_bytes(result['read_rate'])}/s",
        f"{100 * result['waited']:.0f} %",
        hits,
    ]


if __name__ == "__main__":
    sys.exit(main())
