"""The options that say which model to load and how; shared by the verbs that load one."""

import argparse
import json
import os
from typing import Any

import torch
from tqdm import tqdm

from causallm.byte_size import parse_bytes
from causallm.hub import resolve_model
from causallm.loading import load_model
from causallm.plugin import load_plugin
from causallm.report import Report
from causallm.steps import Progress


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """MODEL and what changes how it is built; enough to build it without weights."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        help="a model folder, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 for weights, activations and cache")
    group.add_argument(
        "--cache-dtype", help="int8, float16, bfloat16 or float32 for the key-value cache (kv_cache_dtype)"
    )
    group.add_argument(
        "--memory-budget", metavar="BYTES",
        help="run in so much memory in all, 2GB say; weights are read from the disk when needed (memory_budget)",
    )  # fmt: skip
    group.add_argument(
        "--no-mmap", action="store_true",
        help="read weights into memory instead of mapping their files: loads slower, runs up to a tenth faster (mmap)",
    )  # fmt: skip
    group.add_argument("--max-length", type=int, metavar="N", help="context in tokens (max_seq_len)")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="replace a key of nntr_config.json; VALUE is JSON or plain text; repeatable",
    )  # fmt: skip
    add_plugin_argument(group)


def add_plugin_argument(parser: argparse._ActionsContainer) -> None:
    """A user's own Python files."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="run this file first; it may register models",
    )


def load_plugins(args: argparse.Namespace) -> None:
    """Run the files that `--plugin` names."""
    for path in args.plugin:
        load_plugin(path)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--chunk", type=int, metavar="N", help="prompt tokens taken in one step (init_seq_len)")


def open_model(args: argparse.Namespace, report: Report) -> Any:
    """Load the model that the arguments name, with a progress bar on a terminal."""
    device = _device(args.device)
    if args.threads is not None:
        processors = os.cpu_count() or 1
        if not 1 <= args.threads <= processors:
            raise ValueError(f"--threads: got {args.threads}, expected 1 to {processors}, the number of processors")
        torch.set_num_threads(args.threads)
    folder, overrides = prepare(args)
    with tqdm(desc="loading", unit=" tensors", disable=None, leave=False) as bar, report.timed("load"):
        return load_model(folder, device, args.dtype, moving(bar), **overrides)


def moving(bar: tqdm) -> Progress:
    """What moves a progress bar to so many of so many."""

    def move(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return move


def prepare(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Load plug-ins; returns the model's folder or file and the overrides of nntr_config.json."""
    load_plugins(args)
    overrides = key_values("--set", args.overrides)
    if args.max_length is not None:
        overrides["max_seq_len"] = args.max_length
    if args.memory_budget is not None:
        overrides["memory_budget"] = _budget(args.memory_budget)
    if args.no_mmap:
        overrides["mmap"] = False
    if args.cache_dtype is not None:
        overrides["kv_cache_dtype"] = args.cache_dtype
    if getattr(args, "chunk", None) is not None:
        overrides["init_seq_len"] = args.chunk
    return resolve_model(args.model, args.revision), overrides


def _budget(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--memory-budget: {error}") from None


def _key_value(option: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{option}: got '{text}', expected NAME=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def key_values(option: str, texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE options as a dictionary; a value that is JSON is read as such."""
    return dict(_key_value(option, text) for text in texts)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: '{name}' cannot be used here: {reason}") from None
    if device.type == "meta":
        raise ValueError("--device: 'meta' holds no numbers; use the inspect verb to see a model's structure")
    return device
