"""Look at this machine: processor, kernels, memory, disk, versions; what is wrong; and what it means for a model."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from causallm.commands.model_arguments import add_model_arguments, prepare
from causallm.doctor.as_json import machine_json, model_json
from causallm.doctor.findings import machine_findings, model_findings
from causallm.doctor.machine import examine
from causallm.doctor.needs import read_needs
from causallm.doctor.text import machine_lines, model_lines
from causallm.loading import find_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    add_model_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def execute(args: argparse.Namespace) -> int:
    """Print the report; problems do not change the exit code, a wrong MODEL does."""
    needs, path = None, Path.cwd()
    if args.model is not None:
        path, overrides = prepare(args)
        needs = read_needs(find_source(path), args.dtype, **overrides)
    with tqdm(bar_format="measuring: {desc}", disable=None, leave=False) as bar:
        machine = examine(path, bar.set_description_str)
    found = machine_findings(machine)
    if needs:
        found += model_findings(needs, machine, args.model, folder=path.is_dir())
    if args.json:
        model = model_json(needs, machine) if needs else None
        print(json.dumps({**machine_json(machine), "model": model, "findings": [asdict(one) for one in found]}))
        return 0
    print(*machine_lines(machine), sep="\n")
    if needs:
        print("", *model_lines(needs, machine, args.model), sep="\n")
    print("", *(map(str, found) if found else ["no problems found"]), sep="\n")
    return 0
