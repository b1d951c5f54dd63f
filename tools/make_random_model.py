"""Make a model folder with random weights, of any family and size: python tools/make_random_model.py qwen3-0.6b -o OUT.

For benchmarks and tests of memory and speed, which do not depend on what the weights are; nothing is downloaded.
With --format Q4_0 the weights are random blocks of that format, written as such: a model of 30 thousand million weights
is made at the speed of the disk and never takes the room of its floats.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from random_blocks import RandomBlocks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from causallm.cli import reporting_errors
from causallm.config import read_json
from causallm.config.fields import DTYPES
from causallm.loading import build_model
from causallm.packing import choose_formats, packed_shape
from causallm.tokenizer import Tokenizer as ModelTokenizer
from causallm.weights.convert import MAX_SHARD_BYTES
from causallm.weights.converted import converted_metadata
from causallm.weights.huggingface import copy_companions, write_huggingface
from causallm.weights.names import weight_kind
from causallm.weights.quantize import FILES
from causallm.weights.safetensors_reader import FORMATS_KEY
from causallm.weights.safetensors_writer import write_safetensors
from layers.kernels.block_formats import writable

SHAPES = Path(__file__).with_name("random_model_shapes.json")
DEVIATION = 0.02
MakeFloats = Callable[[str, torch.Size], Tensor]
TABLE_FORMAT = "Q6_K"
"""Of the embedding and the head, where linear layers are packed; as llama.cpp's own Q4_0 and Q4_K files have it."""


def main() -> int:
    """Parse the arguments and make the folder."""
    shapes = read_json(SHAPES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"a config.json, or one of: {', '.join(shapes)}")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the folder to make")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of all weights, or with --format of those that stay floats (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=writable(),
        help=f"make a packed folder, linear layers in this format, embedding and head in {TABLE_FORMAT}",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, help="this many layers instead of the shape's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = shapes[args.shape] if args.shape in shapes else read_json(Path(args.shape))
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
        config.pop("layer_types", None)
    return reporting_errors(lambda: make_random_model(config, args.output, DTYPES[args.dtype], args.seed, args.format))


def make_random_model(config: dict, output: Path, dtype: torch.dtype, seed: int, packed: str | None = None) -> int:
    """Write the folder: weights of standard deviation 0.02, norms as at the start of training, a byte tokenizer.

    packed: the block format of the linear layers; None writes floats only. ValueError where `output` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty")
    output.mkdir(parents=True, exist_ok=True)
    constants = 0.0 if config["architectures"][0].startswith("Gemma") else 1.0
    generator = torch.Generator().manual_seed(seed)

    def floats(name: str, shape: torch.Size) -> Tensor:
        if weight_kind(name) == "norm":
            return torch.full(shape, constants, dtype=dtype)
        return torch.empty(shape, dtype=dtype).normal_(0, DEVIATION, generator=generator)

    with tempfile.TemporaryDirectory() as name, tqdm(unit="B", unit_scale=True, disable=None) as bar:
        source = Path(name)
        (source / "config.json").write_text(json.dumps(config, indent=2))
        byte_tokenizer().save(str(source / "tokenizer.json"))
        if packed:
            _write_packed(output, source, packed, dtype, floats, RandomBlocks(seed, DEVIATION), bar)
        else:
            _write_floats(output, source, dtype, floats, bar)
    return 0


def _write_floats(output: Path, source: Path, dtype: torch.dtype, floats: MakeFloats, bar: tqdm) -> None:
    model = build_model(source, dtype)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    bar.reset(sum(parameter.nbytes for parameter in parameters.values()))
    write_huggingface(
        output,
        source,
        model.config,
        parameters,
        lambda name: floats(name, parameters[name].shape),
        MAX_SHARD_BYTES,
        lambda _, nbytes: bar.update(nbytes),
    )


def _write_packed(
    output: Path,
    source: Path,
    kind: str,
    dtype: torch.dtype,
    floats: MakeFloats,
    blocks: RandomBlocks,
    bar: tqdm,
) -> None:
    """Fill the folder as `quantize` does, with random blocks; `floats` makes what is not packed."""
    types = {"fc_layer_dtype": kind, "embedding_dtype": TABLE_FORMAT, "lmhead_dtype": TABLE_FORMAT}
    model = build_model(source, None, **types)
    formats = choose_formats(model, {})
    metas = {
        name: torch.empty(packed_shape(parameter.shape, formats[name]), dtype=torch.uint8, device="meta")
        if name in formats
        else torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in model.named_parameters()
    }

    def read(name: str) -> Tensor:
        shape = metas[name].shape
        return blocks.make(formats[name], tuple(shape)) if name in formats else floats(name, shape)

    tokenizer = ModelTokenizer.from_folder(source, None)
    metadata = converted_metadata(model.config.architecture, output.resolve().name, metas, tokenizer)
    metadata[FORMATS_KEY] = json.dumps(formats, separators=(",", ":"))
    bar.reset(sum(meta.nbytes for meta in metas.values()))
    write_safetensors(output / FILES["safetensors"], metas, read, metadata, lambda _, nbytes: bar.update(nbytes))
    copy_companions(source, output)
    runtime = {"model_file_name": FILES["safetensors"], "model_tensor_type": f"{kind}-FP32", **types}
    (output / "nntr_config.json").write_text(json.dumps(runtime, indent=2) + "\n", encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """256 tokens, one a byte, so that any text can be a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
