"""From any weights that can be read to any that can be written, one tensor in memory at a time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causallm.gguf.source import is_gguf
from causallm.gguf.write_config import written_family
from causallm.gguf.writer import plan, write_gguf
from causallm.loading import build_model, find_source, resolve_generation
from causallm.model_source import ModelSource
from causallm.packing import pack_layers
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.atomic_file import temporary_beside
from causallm.weights.converted import converted_metadata
from causallm.weights.expanded import ExpandedReader
from causallm.weights.expected import expected_parameters
from causallm.weights.huggingface import write_config, write_weights
from causallm.weights.loader import check_weights
from causallm.weights.nntr_bin import write_nntr
from causallm.weights.nntr_layout import FP16, FP32, file_size, has_spare_head, layout
from causallm.weights.reader import WeightReader
from causallm.weights.safetensors_writer import write_safetensors
from causallm.weights.tensor_bytes import Advance

TARGETS = ("safetensors", "nntrainer", "huggingface", "gguf")
SUFFIXES = {".safetensors": "safetensors", ".bin": "nntrainer", ".gguf": "gguf"}
EXPANDED = torch.bfloat16
"""What packed weights become where they must become floats and nothing says which."""
NNTR_STORAGES = {None: FP32, torch.float32: FP32, torch.float16: FP16}
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Written:
    """One step of a conversion: the tensor just written, its bytes, and the bytes of the whole."""

    name: str
    nbytes: int
    total: int


def convert(
    source: Path,
    output: Path,
    target: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Written], None] | None = None,
) -> None:
    """Write the weights of `source` to `output`, which appears only when it is whole.

    source: a model folder, one weight file in it, or a GGUF file. target: one of `TARGETS`; None goes by the suffix of
    `output`: `.safetensors` the project's converted file, `.bin` NNTrainer's, `.gguf` llama.cpp's, else a new Hugging
    Face folder. dtype: of all weights; None keeps what they are, and means float32 for a `.bin`, which knows float32
    and float16 only (norms, biases and routers stay float32 there). Packed weights stay packed in a `.gguf`; elsewhere
    they are expanded, to bfloat16 unless `dtype` says otherwise. All names, shapes and sizes are checked before
    anything is written; FileNotFoundError, ValueError and OSError say in one line what is wrong.
    """
    target = target or SUFFIXES.get(output.suffix, "huggingface")
    if target not in TARGETS:
        raise ValueError(f"unknown target '{target}', expected one of {', '.join(TARGETS)}")
    found, named = find_weights(source)
    model = build_model(found, None, **named)
    reader = found.weights(model)
    if target == "gguf":
        pack_layers(model, reader.formats())
    elif reader.formats():
        reader = ExpandedReader(reader, dtype or (torch.float32 if target == "nntrainer" else EXPANDED))
    check_weights(model, reader)
    if target == "nntrainer":
        _to_nntrainer(model, reader, output, dtype, progress)
    elif target == "gguf":
        _to_gguf(model, reader, found, output, dtype, progress)
    elif target == "safetensors":
        _to_converted(model, reader, found, output, dtype or found.written_dtype(), progress)
    else:
        _to_huggingface(model, reader, found, output, dtype or found.written_dtype(), max_shard_bytes, progress)


def find_weights(source: Path) -> tuple[ModelSource, dict[str, Any]]:
    """The model that `source` stands for, and the key of nntr_config.json that names it where it is one weight file."""
    if source.is_file() and not is_gguf(source):
        return find_source(source.parent), {"model_file_name": source.name}
    return find_source(source), {}


def _to_gguf(
    model: Transformer,
    reader: WeightReader,
    source: ModelSource,
    output: Path,
    dtype: torch.dtype | None,
    progress: Callable[[Written], None] | None,
) -> None:
    tokenizer = _tokenizer(source, model)
    ends = resolve_generation(model, tokenizer).eos_token_id
    total = sum(entry.nbytes for entry in plan(model, written_family(model), reader, dtype))
    name = source.path.resolve().stem if source.path.is_file() else source.path.resolve().name
    write_gguf(output, name, model, reader, tokenizer, ends, dtype, _advance(progress, total))


def _to_nntrainer(
    model: Transformer,
    reader: WeightReader,
    output: Path,
    dtype: torch.dtype | None,
    progress: Callable[[Written], None] | None,
) -> None:
    if dtype not in NNTR_STORAGES:
        raise ValueError(f"NNTrainer's .bin has float32 and float16, not {str(dtype).removeprefix('torch.')}")
    dtypes = NNTR_STORAGES[dtype]
    total = file_size(layout(model, has_spare_head(model)), dtypes)
    write_nntr(output, model, reader, dtypes, _advance(progress, total))


def _to_converted(
    model: Transformer,
    reader: WeightReader,
    source: ModelSource,
    output: Path,
    dtype: torch.dtype | None,
    progress: Callable[[Written], None] | None,
) -> None:
    tensors = _metas(model, reader, dtype)
    metadata = converted_metadata(
        model.config.architecture, source.path.resolve().name, tensors, _tokenizer(source, model)
    )
    advance = _advance(progress, sum(tensor.nbytes for tensor in tensors.values()))
    write_safetensors(output, tensors, reader.tensor, metadata, advance)


def _to_huggingface(
    model: Transformer,
    reader: WeightReader,
    source: ModelSource,
    output: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Callable[[Written], None] | None,
) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder: name a new one")
    tensors = _metas(model, reader, dtype)
    advance = _advance(progress, sum(tensor.nbytes for tensor in tensors.values()))
    temporary = temporary_beside(output)
    try:
        temporary.mkdir()
        write_weights(temporary, model.config, tensors, reader.tensor, max_shard_bytes, advance)
        source.write_companions(temporary)
        write_config(temporary, source.config_json(), tensors)
        temporary.replace(output)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _metas(model: Transformer, reader: WeightReader, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes to write, in the model's order."""
    return {name: reader.meta(name).to(dtype or reader.meta(name).dtype) for name in expected_parameters(model)}


def _advance(progress: Callable[[Written], None] | None, total: int) -> Advance | None:
    return progress and (lambda name, nbytes: progress(Written(name, nbytes, total)))


def _tokenizer(source: ModelSource, model: Transformer) -> Tokenizer | None:
    try:
        return source.tokenizer(model.runtime_config.tokenizer_file)
    except FileNotFoundError:
        return None
