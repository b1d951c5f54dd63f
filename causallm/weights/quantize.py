"""From float weights to a packed model folder, one tensor in memory at a time; a killed run is continued."""

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from causallm.config.fields import DTYPES
from causallm.config.runtime import QUANTIZED
from causallm.loading import build_model
from causallm.model_source import ModelSource
from causallm.packing import choose_formats, packed_shape
from causallm.transformer import Transformer
from causallm.weights.convert import Written, find_weights
from causallm.weights.converted import converted_metadata
from causallm.weights.expected import expected_parameters
from causallm.weights.loader import check_weights
from causallm.weights.nntr_bin import write_entry
from causallm.weights.nntr_layout import FLOATS, Entry, Stored, layout, storage
from causallm.weights.nntr_quantized import packing_problem
from causallm.weights.reader import WeightReader
from causallm.weights.resumable import JOURNAL, Piece, ResumableFile, other_writer
from causallm.weights.safetensors_reader import FORMATS_KEY
from causallm.weights.safetensors_writer import header, in_file_order
from causallm.weights.source_state import source_state
from causallm.weights.tensor_bytes import write_tensor
from layers.kernels.block_formats import BLOCK_FORMATS, writable

FILES = {"safetensors": "packed.safetensors", "bin": "packed_x86.bin"}
"""The weight file of each output format."""
TYPES = (*writable(), "FP32", "FP16", "BF16")
NNTRAINER_NEEDS: dict[str, Any] = {
    "model_type": "CausalLM",
    "bad_word_ids": [],
    "fsu": False,
    "fsu_lookahead": 2,
    "batch_size": 1,
    "tokenizer_file": "tokenizer.json",
    "sample_input": "",
}
"""Keys that NNTrainer reads without asking whether they are there, where the source's nntr_config.json has none;
three lengths besides."""
LONGEST = 2048
"""Tokens that NNTrainer is to allocate for, where nothing says so."""


def quantize(
    source: Path,
    output: Path,
    fc: str,
    embedding: str | None = None,
    head: str | None = None,
    progress: Callable[[Written], None] | None = None,
    output_format: str = "safetensors",
    notice: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Write `source` packed to the new model folder `output`; returns the format of each packed weight.

    source: a model folder, one weight file in it, or a GGUF file, with float weights.
    fc: the format of linear layers and experts, embedding of the table, head of the head (None: the embedding's); a
    float type leaves them as they are. A tied table is one tensor in the embedding's format. output_format: one of
    `FILES`; "bin" is NNTrainer's file for x86, see `causallm.weights.nntr_quantized` for what it can hold.

    `output` appears when it is whole. Until then its beginning is a hidden folder beside it, and the same call (same
    source, same types) goes on after what is there; `notice` is told so, in a line. ValueError, FileNotFoundError and
    OSError say what is wrong; weights that are packed already are refused. A `head` of its own format is warned about
    where the head is the embedding.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder: name a new one")
    if output_format not in FILES:
        raise ValueError(f"unknown output format '{output_format}', expected one of {', '.join(FILES)}")
    types = {"fc_layer_dtype": fc, "embedding_dtype": embedding or fc, "lmhead_dtype": head or embedding or fc}
    for key, name in types.items():
        if name not in TYPES:
            raise ValueError(f"{key}: unknown format '{name}', expected one of {', '.join(TYPES)}")
    found, named = find_weights(source)
    floats = build_model(found, None, **named)
    reader = found.weights(floats)
    if kinds := Counter(reader.formats().values()):
        what = ", ".join(f"{count} tensors in {kind}" for kind, count in kinds.items())
        raise ValueError(
            f"{source} is packed already ({what}); packing again would lose more: quantize the float weights that it "
            f"was made from, or the folder that python main.py convert {source} -o FOLDER makes of it"
        )
    check_weights(floats, reader)
    if floats.config.tie_word_embeddings:
        _warn_of_tied_head(head, types["embedding_dtype"])
        types["lmhead_dtype"] = types["embedding_dtype"]
    model = build_model(found, None, **named, **types)
    make = _as_bin if output_format == "bin" else _as_safetensors
    formats, head_bytes, pieces = make(model, reader, found, types)

    work = output.with_name(f".{output.name}.partial")
    if pid := other_writer(work):
        raise ValueError(f"process {pid} is writing {output} right now: wait for it, or name another folder")
    file = ResumableFile(work, FILES[output_format], source_state(found.path), head_bytes, pieces)
    try:
        _begin(work, file, output, len(pieces), notice)
        total = sum(piece.nbytes for piece in pieces)
        file.write(lambda piece: progress(Written(piece.name, piece.nbytes, total)) if progress else None)
        found.write_companions(work)
        _write_json(work / "config.json", found.config_json())
        _write_json(work / "nntr_config.json", _nntr_config(found, model, types, output_format))
        (work / JOURNAL).unlink()
        work.replace(output)
    except BaseException as error:
        lost = isinstance(error, ValueError) or not file.done
        if lost:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            again = "" if lost else f"; {work.name} is kept, the same command goes on after it"
            raise OSError(f"cannot write {output}: {error.strerror or error}{again}") from error
        raise
    return formats


def _begin(work: Path, file: ResumableFile, output: Path, pieces: int, notice: Callable[[str], None] | None) -> None:
    """Make room for a new beginning where there is none to go on from."""
    note = ""
    if file.done:
        note = f"going on with {output}: {file.done} of {pieces} tensors were written by an earlier run"
    elif work.exists() and not file.continues:
        note = f"starting {output} anew: what an earlier run left is damaged, or of another source or other formats"
    if not file.done:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    if note and notice:
        notice(note)


def _warn_of_tied_head(head: str | None, embedding: str) -> None:
    if head not in (None, embedding):
        warnings.warn(
            f"lmhead_dtype {head} is not acted on: the head is the embedding's tensor, which gets {embedding}",
            stacklevel=3,
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _nntr_config(
    source: ModelSource, model: Transformer, types: Mapping[str, str], output_format: str
) -> dict[str, Any]:
    """The source's nntr_config.json changed to what a packed model is, whose activations are fp32."""
    content = source.runtime_json()
    if output_format == "bin":
        longest = content.get("max_seq_len") or min(LONGEST, model.config.max_position_embeddings)
        lengths = {"max_seq_len": longest, "init_seq_len": longest // 2, "num_to_generate": longest // 4}
        content = {**NNTRAINER_NEEDS, **lengths, **content}
    kind = f"{types['fc_layer_dtype']}-FP32"
    return {**content, "model_file_name": FILES[output_format], "model_tensor_type": kind, **types}


def _as_bin(
    model: Transformer, reader: WeightReader, source: ModelSource, types: Mapping[str, str]
) -> tuple[dict[str, str], bytes, list[Piece]]:
    """Formats, head (none) and entries of NNTrainer's `.bin`."""
    stored = storage(
        _stored("fc_layer_dtype", types["fc_layer_dtype"]),
        torch.float32,
        embedding=_stored("embedding_dtype", types["embedding_dtype"]),
        lm_head=_stored("lmhead_dtype", types["lmhead_dtype"]),
    )
    entries = layout(model, spare_head=False)
    if problem := packing_problem(entries, stored):
        raise ValueError(problem)
    kinds = {entry.name: stored[entry.kind] for entry in entries}
    pieces = [
        Piece(entry.name, entry.nbytes(stored[entry.kind]), partial(_write_entry, entry, reader, stored[entry.kind]))
        for entry in entries
    ]
    return {name: kind for name, kind in kinds.items() if isinstance(kind, str)}, b"", pieces


def _write_entry(entry: Entry, reader: WeightReader, stored: Stored, file: BinaryIO) -> int:
    nbytes = write_entry(entry, reader, stored, file)
    reader.release(entry.name)
    return nbytes


def _stored(key: str, name: str) -> Stored:
    if name in QUANTIZED:
        return name
    if DTYPES[name] not in FLOATS:
        raise ValueError(f"{key}: NNTrainer's .bin has {', '.join(FLOATS.values())} as floats, not {name}")
    return DTYPES[name]


def _as_safetensors(
    model: Transformer, reader: WeightReader, source: ModelSource, types: Mapping[str, str]
) -> tuple[dict[str, str], bytes, list[Piece]]:
    """Formats, header and tensors of the project's own file."""
    formats = choose_formats(model, {})
    metas = {name: _meta(reader.meta(name), formats.get(name)) for name in expected_parameters(model)}
    try:
        tokenizer = source.tokenizer(model.runtime_config.tokenizer_file)
    except FileNotFoundError:
        tokenizer = None
    metadata = converted_metadata(model.config.architecture, source.path.resolve().name, metas, tokenizer)
    metadata[FORMATS_KEY] = json.dumps(formats, separators=(",", ":"))
    metas = in_file_order(metas)
    pieces = [
        Piece(name, meta.nbytes, partial(_write, reader, name, meta.dtype, formats.get(name)))
        for name, meta in metas.items()
    ]
    return formats, header(metas, metadata), pieces


def _meta(tensor: Tensor, kind: str | None) -> Tensor:
    if kind is None:
        return tensor
    return torch.empty(packed_shape(tensor.shape, kind), dtype=torch.uint8, device="meta")


def _write(reader: WeightReader, name: str, dtype: torch.dtype, kind: str | None, file: BinaryIO) -> int:
    """Write a tensor, packed where `kind` says so; of fused experts one at a time."""
    # No name holds a tensor here: it would outlive the reading of the next one.
    if kind is None:
        nbytes = write_tensor(file, name, reader.tensor(name), dtype)
    elif reader.meta(name).dim() == 2:
        nbytes = write_tensor(file, name, BLOCK_FORMATS[kind].pack(reader.tensor(name)), dtype)
    else:
        experts = range(len(reader.meta(name)))
        pack = BLOCK_FORMATS[kind].pack
        nbytes = sum(write_tensor(file, name, pack(reader.part(name, (expert,)).t()), dtype) for expert in experts)
    reader.release(name)
    return nbytes
