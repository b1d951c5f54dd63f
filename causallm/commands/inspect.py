"""Show a model as a table of its weights, built without loading them, and what its key-value cache costs."""

import argparse
import json
from typing import Any

from causallm.blocks import SandwichBlock
from causallm.commands.model_arguments import add_model_arguments, prepare
from causallm.loading import build_model, find_source
from causallm.packing import choose_formats, pack_layers, packed_tensors
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.names import nntrainer_name

COLUMNS = ("nntrainer", "name", "shape", "dtype", "parameters", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `inspect`."""
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(args: argparse.Namespace) -> int:
    """Print the table."""
    model = _packed_model(args)
    rows, cache = weight_rows(model), cache_sizes(model)
    summary = {
        "architecture": model.config.architecture,
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "max_length": model.max_length,
        **cache,
    }
    if args.json:
        print(json.dumps({**summary, "weights": rows}))
        return 0
    _print_table(rows)
    tied = " (embedding and head share one)" if model.config.tie_word_embeddings else ""
    print(f"\n{summary['architecture']}: {len(rows)} weights{tied}, {summary['parameters']:,} parameters, ", end="")
    print(f"{summary['bytes']:,} bytes")
    print(f"key-value cache: {cache['cache_bytes_per_token']:,} bytes a token, ", end="")
    print(f"{cache['cache_bytes_at_max_length']:,} bytes at {model.max_length} tokens")
    if cache["sliding_layers"]:
        window = model.config.sliding_window
        print(f"of its layers {cache['sliding_layers']} slide and hold {window} tokens at most, ", end="")
        print(f"then {cache['cache_bytes_per_token_beyond_window']:,} bytes a token")
    return 0


def _packed_model(args: argparse.Namespace) -> Transformer:
    """The model on meta, with packed layers where its weights are or would be packed; it may have no weights."""
    path, overrides = prepare(args)
    source = find_source(path)
    model = build_model(source, args.dtype, **overrides)
    try:
        stored = source.weights(model).formats()
    except FileNotFoundError:
        stored = {}
    pack_layers(model, choose_formats(model, stored))
    return model


def weight_rows(model: Transformer) -> list[dict[str, Any]]:
    """One row per weight, in the order of the model; a packed one's shape is that of the numbers it stands for."""
    sandwich = any(isinstance(block, SandwichBlock) for block in model.layers)
    packed = packed_tensors(model)
    rows = []
    for name, parameter in expected_parameters(model).items():
        shape = packed[name].shape if name in packed else parameter.shape
        dtype = packed[name].kind if name in packed else str(parameter.dtype).removeprefix("torch.")
        row = {"nntrainer": nntrainer_name(name, sandwich), "name": name, "shape": list(shape), "dtype": dtype}
        rows.append({**row, "parameters": shape.numel(), "bytes": parameter.nbytes})
    return rows


def cache_sizes(model: Transformer) -> dict[str, int]:
    """Bytes of the key-value cache of one row: a token while all layers grow, later, and at the longest."""
    cfg = model.config
    layer = model.cache_position_bytes
    windows = [cfg.window(number) for number in range(cfg.num_hidden_layers)]
    return {
        "cache_bytes_per_token": layer * len(windows),
        "cache_bytes_per_token_beyond_window": layer * windows.count(None),
        "cache_bytes_at_max_length": sum(
            layer * min(window or model.max_length, model.max_length) for window in windows
        ),
        "sliding_layers": len(windows) - windows.count(None),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    cells = [COLUMNS] + [tuple(_cell(row[column]) for column in COLUMNS) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:4], widths[:4], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[4:], widths[4:], strict=True)]
        print("  ".join(left + right))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else value
