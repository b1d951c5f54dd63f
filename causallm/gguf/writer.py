"""Writing a GGUF file that llama.cpp runs, one tensor in memory at a time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causallm.gguf.families import Family
from causallm.gguf.names import ROPE_FACTORS, Place, place
from causallm.gguf.rope_keys import write_rope
from causallm.gguf.serialise import header, padding
from causallm.gguf.tensor_types import FLOAT_NAMES, FLOATS, row_bytes
from causallm.gguf.write_config import config_keys, generation_keys, written_family
from causallm.gguf.write_tokenizer import tokenizer_keys
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.atomic_file import atomic_file
from causallm.weights.expected import expected_parameters
from causallm.weights.reader import WeightReader
from causallm.weights.tensor_bytes import Advance, write_tensor
from layers.kernels.block_formats import BLOCK_FORMATS

# llama.h's llama_ftype: what most of a file's matrices are.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
QUANTIZATION_VERSION = 2
ROUTER = "ffn_gate_inp.weight"


@dataclass
class Planned:
    """A tensor to write: its slices, each one of ours with the number of its part in what the change gives."""

    name: str
    shape: tuple[int, ...]
    kind: str
    slices: list[tuple[str, Place, int]] = field(default_factory=list)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """With a dimension for the experts, where they are slices."""
        return self.shape if self.slices[0][1].expert is None else (len(self.slices), *self.shape)

    @property
    def nbytes(self) -> int:
        rows = torch.Size(self.whole_shape[:-1]).numel()
        return rows * row_bytes(self.kind, self.shape[-1])


def plan(model: Transformer, family: Family, reader: WeightReader, dtype: torch.dtype | None) -> list[Planned]:
    """The tensors of the file in the model's order. Packed rows stay as they are; of floats matrices get `dtype` (None:
    keep their own), the rest float32, as llama.cpp wants it. ValueError where experts of a layer differ in type."""
    formats, planned = reader.formats(), dict[str, Planned]()
    for name in expected_parameters(model):
        where, meta = place(name, family, model.config), reader.meta(name)
        for number, (theirs, part) in enumerate(zip(where.names, where.change.write(meta), strict=True)):
            shape = tuple(part.shape)
            if name in formats:
                kind = formats[name]
                shape = (*shape[:-1], BLOCK_FORMATS[kind].row_values(shape[-1]))
            else:
                kind = _float_type(theirs, part, dtype)
            entry = planned.setdefault(theirs, Planned(theirs, shape, kind))
            if (entry.shape, entry.kind) != (shape, kind):
                raise ValueError(f"tensor {name} is {kind}, but it shares a GGUF tensor with others in {entry.kind}")
            entry.slices.append((name, where, number))
    return list(planned.values())


def _float_type(name: str, tensor: Tensor, dtype: torch.dtype | None) -> str:
    if tensor.dim() == 1 or not name.endswith(".weight") or name.endswith(ROUTER):
        return "F32"
    return FLOAT_NAMES.get(dtype or tensor.dtype, "F32")


def write_gguf(
    path: Path,
    name: str,
    model: Transformer,
    reader: WeightReader,
    tokenizer: Tokenizer | None,
    ends: Sequence[int],
    dtype: torch.dtype | None = None,
    advance: Advance | None = None,
) -> None:
    """Write `model`, whose weights `reader` has, to `path`, which appears when it is whole.

    name: the model's, for people. ends: ids that end an answer. ValueError for what GGUF or llama.cpp has no place for,
    before anything is written; a warning for what llama.cpp does otherwise.
    """
    family = written_family(model)
    planned = plan(model, family, reader, dtype)
    rope, divisors = write_rope(model.config, family.arch)
    metadata = {
        **_general(family.arch, name, planned),
        **config_keys(model, family),
        **rope,
        **generation_keys(model.generation_config),
        **tokenizer_keys(tokenizer, model.config.vocab_size, ends),
    }
    listed = [(entry.name, entry.whole_shape, entry.kind, entry.nbytes) for entry in planned]
    if divisors is not None:
        listed.insert(0, (ROPE_FACTORS, tuple(divisors.shape), "F32", divisors.nbytes))
    with atomic_file(path) as file:
        file.write(header(metadata, listed))
        if divisors is not None:
            write_tensor(file, ROPE_FACTORS, divisors, torch.float32)
            file.write(bytes(padding(divisors.nbytes)))
        for entry in planned:
            for ours, tensor in _parts(entry, reader):
                write_tensor(file, ours, tensor, FLOATS.get(entry.kind, torch.uint8))
                reader.release(ours)
            file.write(bytes(padding(entry.nbytes)))
            if advance:
                advance(entry.name, entry.nbytes)


def _parts(entry: Planned, reader: WeightReader) -> Iterator[tuple[str, Tensor]]:
    for ours, where, number in entry.slices:
        yield ours, where.change.write(reader.tensor(ours))[number]


def _general(arch: str, name: str, planned: Sequence[Planned]) -> dict[str, Any]:
    kinds = Counter(entry.kind for entry in planned if len(entry.shape) > 1)
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kinds.most_common(1)[0][0]],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
