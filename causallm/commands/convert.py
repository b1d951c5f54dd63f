"""Convert weights between Hugging Face, GGUF, this project's converted file and NNTrainer's .bin."""

import argparse
import re
from pathlib import Path

from tqdm import tqdm

from causallm.commands.model_arguments import add_plugin_argument, load_plugins
from causallm.config.fields import DTYPES
from causallm.hub import resolve_model
from causallm.weights.convert import MAX_SHARD_BYTES, TARGETS, Written, convert

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convert`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a model folder, a weight file in one, a .gguf file, or a hub id"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True,
        help="x.gguf: llama.cpp's file, with tokenizer and chat template; x.safetensors: this project's converted "
        "file; x.bin: NNTrainer's; else a new Hugging Face folder",
    )  # fmt: skip
    parser.add_argument("--to", choices=TARGETS, help="the format, where OUT's suffix does not say it")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"),
        help="of the weights written (default: as they are, and bfloat16 for packed ones that are expanded; float32 "
        "for a .bin, where float16 leaves norms, biases and routers in float32)",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default=f"{MAX_SHARD_BYTES // 10**9}GB", metavar="SIZE",
        help="of one file of a Hugging Face folder, such as 500MB (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_plugin_argument(parser)


def execute(args: argparse.Namespace) -> int:
    """Convert, with a progress bar on a terminal."""
    load_plugins(args)
    limit = parse_size("--max-shard-size", args.max_shard_size)
    source, output = resolve_model(args.model, args.revision), Path(args.output)
    run_conversion(source, output, args.to, args.dtype, limit)
    print(f"{output}: {_size(output) / 1e6:.1f} MB")
    return 0


def _size(output: Path) -> int:
    return sum(file.stat().st_size for file in output.rglob("*")) if output.is_dir() else output.stat().st_size


def run_conversion(
    source: Path,
    output: Path,
    target: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`convert` with a progress bar on stderr when that is a terminal."""
    with tqdm(desc=f"writing {output}", unit="B", unit_scale=True, disable=None) as bar:

        def advance(step: Written) -> None:
            bar.total = step.total
            bar.update(step.nbytes)

        convert(source, output, target, DTYPES[dtype] if dtype else None, max_shard_bytes, advance)


def parse_size(option: str, text: str) -> int:
    """Bytes from a number with an optional unit (KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"{option}: got '{text}', expected a size such as 500MB or 5GB")
    return size
