"""From a float model folder to a packed one, one tensor in memory at a time."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from causallm.config import read_json
from causallm.config.runtime import QUANTIZED
from causallm.loading import build_model
from causallm.packing import choose_formats
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.convert import Written
from causallm.weights.converted import converted_metadata
from causallm.weights.huggingface import copy_companions
from causallm.weights.loader import check_weights
from causallm.weights.open import open_weights
from causallm.weights.reader import WeightReader
from causallm.weights.safetensors_reader import FORMATS_KEY
from causallm.weights.safetensors_writer import write_safetensors
from layers.kernels.block_formats import BLOCK_FORMATS

FILE = "packed.safetensors"
TYPES = (*QUANTIZED, "FP32", "FP16", "BF16")


def quantize(
    source: Path,
    output: Path,
    fc: str,
    embedding: str | None = None,
    head: str | None = None,
    progress: Callable[[Written], None] | None = None,
) -> dict[str, str]:
    """Write `source` packed to the new model folder `output`; returns the format of each packed weight.

    fc: the format of linear layers, embedding of the table, head of the head (None: the embedding's); a float type
    leaves them as they are. A tied table is one tensor in the embedding's format. `output` appears when it is whole.
    ValueError, FileNotFoundError and OSError say what is wrong; weights that are packed already are refused.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder: name a new one")
    types = {"fc_layer_dtype": fc, "embedding_dtype": embedding or fc, "lmhead_dtype": head or embedding or fc}
    for key, name in types.items():
        if name not in TYPES:
            raise ValueError(f"{key}: unknown format '{name}', expected one of {', '.join(TYPES)}")
    folder, named = (source.parent, {"model_file_name": source.name}) if source.is_file() else (source, {})
    model = build_model(folder, None, **named, **types)
    reader = open_weights(folder, model)
    if reader.formats():
        raise ValueError(f"{source} is packed already; quantize the float weights that it was made from")
    check_weights(model, reader)
    formats = choose_formats(model, {})
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        copy_companions(folder, temporary)
        _write_packed(temporary / FILE, model, reader, folder, formats, progress)
        nntr = folder / "nntr_config.json"
        content = {**(read_json(nntr) if nntr.is_file() else {}), **_runtime(types)}
        (temporary / "nntr_config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(output)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return formats


def _runtime(types: dict[str, str]) -> dict[str, str]:
    """What nntr_config.json says of a packed model: its activations are fp32."""
    return {"model_file_name": FILE, "model_tensor_type": f"{types['fc_layer_dtype']}-FP32", **types}


def _write_packed(
    path: Path,
    model: Transformer,
    reader: WeightReader,
    folder: Path,
    formats: dict[str, str],
    progress: Callable[[Written], None] | None,
) -> None:
    metas = {name: _meta(reader.meta(name), formats.get(name)) for name, _ in model.named_parameters()}
    total = sum(meta.nbytes for meta in metas.values())
    try:
        tokenizer = Tokenizer.from_folder(folder, model.runtime_config.tokenizer_file)
    except FileNotFoundError:
        tokenizer = None
    metadata = converted_metadata(model.config.architecture, folder.resolve().name, metas, tokenizer)
    metadata[FORMATS_KEY] = json.dumps(formats, separators=(",", ":"))

    def packed(name: str) -> Tensor:
        tensor = reader.tensor(name)
        return BLOCK_FORMATS[formats[name]].pack(tensor) if name in formats else tensor

    def advance(name: str, nbytes: int) -> None:
        reader.release(name)
        if progress:
            progress(Written(name, nbytes, total))

    write_safetensors(path, metas, packed, metadata, advance)


def _meta(tensor: Tensor, kind: str | None) -> Tensor:
    if kind is None:
        return tensor
    rows, columns = tensor.shape
    return torch.empty(rows, BLOCK_FORMATS[kind].row_bytes(columns), dtype=torch.uint8, device="meta")
