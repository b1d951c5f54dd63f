"""causallm beside llama.cpp and transformers on the same weights: prefill, decode, memory and load, with ratios.

    python tools/make_random_model.py qwen3-0.6b -o qwen3-random
    python benchmarks/compare.py qwen3-random --work comparison --rounds 3

Every measurement is a process of its own, and the systems take turns, never two at once. llama.cpp runs with flash
attention off and on, and the better counts in each row. A folder that is packed already is compared as it is. Before
each measurement its files are read once: what the system before left of them in the cache of files is no difference.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from comparison_files import DEFAULT_TYPES, FLOATS, Model, folder_of, gguf_of, read_model
from comparison_table import OURS, make_rows, markdown, measures
from tqdm import tqdm

from causallm.cli import Parser, reporting_errors
from causallm.commands.bench import cpu_name, parse_numbers

HERE = Path(__file__).parent
LLAMA, TRANSFORMERS = "llama-cpp", "transformers"
PEERS = {LLAMA: ("llama_cpp", "llama-cpp-python==0.3.36"), TRANSFORMERS: ("transformers", "transformers")}
"""The module of each peer, and what pip installs it by; llama-cpp-python is built from source."""
READ_BYTES = 2**24
LEAST_CORRELATION = 0.9
"""Of first logits after the prompt, ours and a peer's: below this they do not run the same model."""


@dataclass(frozen=True)
class Job:
    """A system, in one of its settings, to be measured on weights of a type."""

    kind: str
    system: str
    setting: str
    command: tuple[str, ...]
    weights: Path

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.system, self.setting


def main() -> int:
    """Compare as the command line says; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder, see tools/make_random_model.py")
    parser.add_argument("--types", metavar="TYPE,...", help=f"what weights to run (default: {DEFAULT_TYPES})")
    parser.add_argument("--prompt", default="512", metavar="N", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--generate", default="64", metavar="N", help="tokens after it (default: %(default)s)")
    parser.add_argument("--depth", default="0", metavar="N,...", help="tokens before it (default: %(default)s)")
    parser.add_argument("--threads", default="2", metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", default="3", metavar="N", help="times that each is measured (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="Python with llama-cpp-python")
    parser.add_argument("--work", type=Path, help="where files made for this are kept (default: nowhere)")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="default: %(default)s")
    return reporting_errors(lambda: compare(parser.parse_args()))


def compare(args: argparse.Namespace) -> int:
    """Make what is missing, measure, print; 130 when interrupted, with what there is until then."""
    numbers = {
        name: one_number(f"--{name}", getattr(args, name)) for name in ("prompt", "generate", "threads", "rounds")
    }
    depths = parse_numbers("--depth", args.depth, 0)
    model = read_model(args.model, args.types)
    if (length := max(depths) + numbers["prompt"] + numbers["generate"]) > model.max_length:
        raise ValueError(
            f"depth, prompt and generate come to {length} tokens, but the context of {args.model} is {model.max_length}"
        )
    pythons = {LLAMA: args.llama_python, TRANSFORMERS: sys.executable}
    versions = {OURS: f"torch {torch.__version__}"}
    for peer in dict.fromkeys(args.peers.replace(" ", "").split(",") if args.peers else ()):
        if peer not in PEERS:
            raise ValueError(f"--peers: got '{peer}', expected some of {', '.join(PEERS)}, with commas between them")
        if version := installed(peer, pythons[peer]):
            versions[peer] = version
    settings = {name: str(numbers[name]) for name in ("prompt", "generate", "threads")}
    options = [
        *(text for name, value in settings.items() for text in (f"--{name}", value)),
        "--vocab",
        str(model.vocab),
    ]
    options += ["--depths", *map(str, depths)]
    results: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        jobs = make_jobs(model, work, versions, args.llama_python)
        code = measure(jobs, options, numbers["rounds"], numbers["threads"], results)
    wanted = measures(numbers["prompt"], numbers["generate"], depths)
    rows = make_rows(results, wanted)
    about = {"model": model.folder.resolve().name, **numbers, "depths": depths, "cpu": cpu_name()}
    about |= {"python": platform.python_version(), "versions": versions, "date": date.today().isoformat()}
    if args.output == "json":
        raw = [dict(zip(("type", "system", "setting"), key, strict=True), rounds=own) for key, own in results.items()]
        print(json.dumps({**about, "rows": rows, "results": raw}, indent=1))
    else:
        named = ", ".join(f"{name} ({version})" for name, version in versions.items())
        print(f"{about['model']}, {about['threads']} threads of {about['cpu']}, {named}; {about['date']}")
        print(f"mean (best) of {numbers['rounds']} rounds; of memory and load less is better\n")
        print("\n".join(markdown(rows, wanted)))
    return code


def one_number(option: str, text: str) -> int:
    """A whole number of at least 1."""
    numbers = parse_numbers(option, text, 1)
    if len(numbers) != 1:
        raise ValueError(f"{option}: got '{text}', expected one whole number")
    return numbers[0]


def installed(peer: str, python: str) -> str | None:
    """The version that an interpreter has of a peer; None where it has none, which is said on stderr."""
    module, package = PEERS[peer]
    command = [python, "-c", f"import {module}; print({module}.__version__)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--llama-python: cannot run {python}: {error.strerror}") from None
    if found.returncode == 0:
        return found.stdout.split()[-1]
    print(f"{peer} is left out, {python} has none: {python} -m pip install {package}", file=sys.stderr)
    return None


def make_jobs(model: Model, work: Path, systems: Sequence[str] | dict[str, str], llama_python: str) -> list[Job]:
    """What is measured in every round, with the files that it needs."""
    jobs = []
    for kind in model.types:
        dtype = ("--dtype", FLOATS[kind]) if kind in FLOATS else ()
        torch_worker = (sys.executable, str(HERE / "torch_worker.py"))
        folder = folder_of(model, kind, work)
        jobs.append(Job(kind, OURS, "", (*torch_worker, OURS, str(folder), *dtype), folder))
        if LLAMA in systems:
            gguf = gguf_of(model, kind, work)
            command = (llama_python, str(HERE / "llama_cpp_worker.py"), str(gguf))
            for flash in ("off", "on"):
                jobs.append(Job(kind, LLAMA, f"fa {flash}", (*command, "--flash-attention", flash), gguf))
        if TRANSFORMERS in systems and kind in FLOATS:
            command = (*torch_worker, TRANSFORMERS, str(model.folder), *dtype)
            jobs.append(Job(kind, TRANSFORMERS, "", command, model.folder))
    return jobs


def measure(
    jobs: Sequence[Job],
    options: Sequence[str],
    rounds: int,
    threads: int,
    results: dict[tuple[str, str, str], list[dict[str, Any]]],
) -> int:
    """Fill `results` round by round, every other in the opposite order; returns the exit code.

    A peer that fails is left out from then on with a line on stderr; a failure of ours is a ValueError.
    """
    failed: set[tuple[str, str, str]] = set()
    with tqdm(total=rounds * len(jobs), unit=" runs", disable=None, leave=False) as bar:
        try:
            for number in range(rounds):
                for job in jobs[:: -1 if number % 2 else 1]:
                    bar.set_description(" ".join(job.key).strip())
                    if job.key not in failed:
                        try:
                            results.setdefault(job.key, []).append(run(job, options, threads))
                        except ValueError as error:
                            if job.system == OURS:
                                raise
                            failed.add(job.key)
                            tqdm.write(f"warning: {error}; left out", file=sys.stderr)
                    bar.update()
        except KeyboardInterrupt:
            return 130
    for problem in disagreements(results):
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if failed else 0


def run(job: Job, options: Sequence[str], threads: int) -> dict[str, Any]:
    """One worker process; ValueError with its last line where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    read_once(job.weights)
    done = subprocess.run([*job.command, *options], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise ValueError(f"{' '.join(job.key).strip()} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def read_once(weights: Path) -> None:
    """Have the system's cache hold the files, as far as it has room."""
    for path in sorted(weights.iterdir()) if weights.is_dir() else [weights]:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


def disagreements(results: dict[tuple[str, str, str], list[dict[str, Any]]]) -> list[str]:
    """A line for each peer whose logits after the prompt do not go with ours."""
    problems = []
    for (kind, system, setting), rounds in results.items():
        ours = results.get((kind, OURS, ""))
        if ours and rounds and (found := correlation(ours[0]["logits"], rounds[0]["logits"])) < LEAST_CORRELATION:
            problems.append(
                f"{kind} {system} {setting}: its logits correlate {found:.2f} with ours: not the same model"
            )
    return problems


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's; 0 where it has no value."""
    value = torch.corrcoef(torch.tensor([one, other], dtype=torch.float64))[0, 1].item()
    return 0.0 if math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
