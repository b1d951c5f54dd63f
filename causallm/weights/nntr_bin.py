"""NNTrainer's `.bin`: reading it mapped, writing it one tensor at a time; the order is `nntr_layout`'s."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from causallm.causal_lm import CausalLM
from causallm.packing import packed_shape
from causallm.transformer import Transformer
from causallm.weights.atomic_file import atomic_file
from causallm.weights.expected import expected_parameters
from causallm.weights.mapped_reader import MappedReader, StoredTensor
from causallm.weights.nntr_layout import (
    ALL,
    STORAGES,
    Entry,
    Storage,
    Stored,
    configured_storage,
    count_dense,
    file_size,
    has_spare_head,
    is_sandwich,
    layout,
)
from causallm.weights.nntr_quantized import INTERLEAVED, is_packed, packing_problem
from causallm.weights.q4_0x8 import ROWS, deinterleave, interleave
from causallm.weights.reader import Fetch, FileRange, Index, WeightReader, rows_in_parts
from causallm.weights.tensor_bytes import Advance, write_tensor
from layers.kernels.block_formats import BLOCK_FORMATS

SAID = "by nntr_config.json"


class NntrReader(MappedReader):
    """The tensors of a `.bin` for `model`, which gives order and shapes (it may be on the meta device).

    Linear weights are views of the mapping, (out, in) with the strides of (in, out); gpt-oss's fused experts and
    norms stored as 1 + w (given as w in fp32) are computed. Packed weights are plain ggml rows, a view where the file
    has them so. The dtypes are those of nntr_config.json if the file's size fits them, else those of `STORAGES` that
    do; ValueError with all sizes where none or several do.
    """

    def __init__(self, path: Path, model: Transformer):
        super().__init__([path])
        self._path, self._file = path, self._mapped[path]
        self._shapes = {name: parameter.shape for name, parameter in expected_parameters(model).items()}
        entries, self._dtypes = _identify(path, self._file.size, model)
        self._places: dict[str, list[tuple[Entry, int]]] = {name: [] for name in self._shapes}
        position = 0
        for entry in entries:
            if not entry.ignored:
                self._places[entry.name].append((entry, position))
            position += file_size([entry], self._dtypes)

    def names(self) -> Sequence[str]:
        return list(self._places)

    def formats(self) -> Mapping[str, str]:
        stored = {name: self._stored(name) for name in self._places}
        return {name: kind for name, kind in stored.items() if isinstance(kind, str)}

    def meta(self, name: str) -> Tensor:
        stored, shape = self._stored(name), self._shapes[name]
        if isinstance(stored, str):
            return torch.empty(packed_shape(shape, stored), dtype=torch.uint8, device="meta")
        dtype = torch.float32 if self._places[name][0][0].offset else stored
        return torch.empty(shape, dtype=dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        places = self._places[name]
        if len(places) == 1:
            return self._read(*places[0], self._map)
        whole = torch.empty_like(self.meta(name), device="cpu")
        for expert in range(len(whole)):
            whole[expert] = self._expert(name, expert, self._map)
        return whole

    def part(self, name: str, index: Index) -> Tensor:
        fused = len(self._places[name]) > 1
        for part, entry, position, rows in self._cut(name, index[:1] if fused else ()):
            if index == part:
                return self._read(entry, position, self._fetch, rows)
        if not fused:
            return self._read(*self._places[name][0], self._fetch)[index]
        if index and isinstance(index[0], int):
            return self._expert(name, index[0], self._fetch)[index[1:]]
        return super().part(name, index)

    def parts(self, name: str, index: Index = ()) -> Sequence[Index]:
        if len(index) > 1 or self.place(name):
            return super().parts(name, index)
        return [part for part, *_ in self._cut(name, index)]

    def _cut(self, name: str, index: Index) -> Iterator[tuple[Index, Entry, int, slice]]:
        """Parts of our tensor, of all or of one expert, each with the entry, its position and the rows that are it."""
        shape = self.meta(name).shape
        for entry, position in self._places[name]:
            where = self._index(entry)
            if where[:1] == index or not index:
                cut = where[1] if len(where) > 1 else ALL
                assert isinstance(cut, slice)
                ours = range(shape[len(where[:1])])[cut]
                row_bytes = entry.nbytes(self._dtypes[entry.kind]) // len(ours)
                for rows in rows_in_parts(len(ours), row_bytes, ROWS):
                    some = ours[rows]
                    yield (*where[:1], slice(some.start, some.stop, some.step), *where[2:]), entry, position, rows

    def _expert(self, name: str, expert: int, fetch: Fetch) -> Tensor:
        """One of fused experts, put together from its entries."""
        whole = torch.empty_like(self.meta(name)[0], device="cpu")
        for entry, position in self._places[name]:
            if entry.index[0] == expert:
                whole[self._index(entry)[1:]] = self._read(entry, position, fetch)
        return whole

    def _index(self, entry: Entry) -> Index:
        return entry.rows if isinstance(self._dtypes[entry.kind], str) else entry.index

    def place(self, name: str) -> FileRange | None:
        entry, position = self._places[name][0]
        stored = self._dtypes[entry.kind]
        if len(self._places[name]) > 1 or entry.offset or (isinstance(stored, str) and entry.kind in INTERLEAVED):
            return None
        transposed = entry.transposed and not isinstance(stored, str)
        return FileRange(self._path, position, entry.nbytes(stored), transposed)

    def release(self, name: str) -> None:
        for entry, position in self._places[name]:
            self._file.release(position, entry.nbytes(self._dtypes[entry.kind]))

    def _stored(self, name: str) -> Stored:
        return self._dtypes[self._places[name][0][0].kind]

    def _read(self, entry: Entry, position: int, fetch: Fetch, rows: slice = ALL) -> Tensor:
        """rows: which of the file's, of interleaved ones whole groups."""
        stored = self._dtypes[entry.kind]
        if isinstance(stored, str):
            packed = StoredTensor(fetch, self._path, position, packed_shape(entry.matrix, stored), torch.uint8)[(rows,)]
            if entry.kind not in INTERLEAVED:
                return packed
            plain = deinterleave(packed)
            self._file.release(position, entry.nbytes(stored))
            return plain
        shape = entry.shape[::-1] if entry.transposed else entry.shape
        values = StoredTensor(fetch, self._path, position, shape, stored)[(rows,)]
        if entry.offset:
            return values.float() - 1.0
        return values.t() if entry.transposed else values


def _identify(path: Path, size: int, model: Transformer) -> tuple[Sequence[Entry], Storage]:
    """Order and dtypes of a file of `size` bytes."""
    said, problem = configured_storage(model.runtime_config), None
    if said and is_packed(said):
        entries = layout(model, spare_head=False)
        problem = packing_problem(entries, said)
        if not problem and file_size(entries, said) == size:
            return entries, said
        if not problem:
            problem = f"as nntr_config.json says it is {file_size(entries, said)} bytes"
        said = None
    candidates = {SAID: said, **STORAGES} if said else STORAGES
    usual = layout(model, has_spare_head(model))
    if dtypes := _fitting(path, size, usual, candidates):
        return usual, dtypes
    other = layout(model, not has_spare_head(model)) if _head_is_optional(model) else ()
    if other and (dtypes := _fitting(path, size, other, candidates)):
        if has_spare_head(model) and not is_sandwich(model):
            raise ValueError(
                f"{path}: {size} bytes are this model without its tied head, as a later NNTrainer writes it, in "
                "another order: convert it again from the Hugging Face model"
            )
        return other, dtypes
    sizes = {file_size(usual, dtypes): name for name, dtypes in reversed(candidates.items())}
    needed = " or ".join(f"{needed} ({name})" for needed, name in sorted(sizes.items()))
    needed += f", or packed: {problem}" if problem else ""
    raise ValueError(f"{path}: {size} bytes, but this model needs {needed}: it is cut off, or of another model")


def _head_is_optional(model: Transformer) -> bool:
    """A tied head may be missing, and a converter for language models gives one to an embedding model too."""
    return has_spare_head(model) or not (isinstance(model, CausalLM) or count_dense(model))


def _fitting(path: Path, size: int, entries: Sequence[Entry], candidates: Mapping[str, Storage]) -> Storage | None:
    """The dtypes that give `size`: nntr_config.json's if they do, else the only ones; ValueError for several."""
    fitting = {name: dtypes for name, dtypes in candidates.items() if file_size(entries, dtypes) == size}
    if SAID in fitting:
        return fitting[SAID]
    kinds = {entry.kind for entry in entries}
    if len({tuple(dtypes[kind] for kind in sorted(kinds)) for dtypes in fitting.values()}) > 1:
        raise ValueError(
            f"{path}: {size} bytes may be this model as {' or as '.join(fitting)}: say which by model_tensor_type in "
            "nntr_config.json"
        )
    return next(iter(fitting.values()), None)


def write_nntr(
    path: Path,
    model: Transformer,
    reader: WeightReader,
    dtypes: Storage,
    advance: Advance | None = None,
) -> None:
    """Write the weights that `reader` has for `model` as a `.bin`, little-endian, one tensor in memory at a time.

    A value too large for float16 is a ValueError naming the tensor. Nothing has the name `path` until it is whole.
    """
    with atomic_file(path) as file:
        for entry in layout(model, has_spare_head(model)):
            nbytes = write_entry(entry, reader, dtypes[entry.kind], file)
            if advance:
                advance(entry.name, nbytes)


def write_entry(entry: Entry, reader: WeightReader, stored: Stored, file: BinaryIO) -> int:
    """Write one entry with the float values that `reader` has for it; returns the bytes written."""
    # No name holds a tensor here: it would outlive the reading of the next one.
    if isinstance(stored, str):
        return write_tensor(file, entry.name, _packed(entry, reader.part(entry.name, entry.index), stored), torch.uint8)
    return write_tensor(file, entry.name, _in_order(entry, reader.part(entry.name, entry.index)), stored)


def _in_order(entry: Entry, tensor: Tensor) -> Tensor:
    if entry.offset:
        return tensor.float() + 1.0
    return tensor.t() if entry.transposed else tensor


def _packed(entry: Entry, tensor: Tensor, kind: str) -> Tensor:
    rows = BLOCK_FORMATS[kind].pack(tensor.t() if entry.index else tensor)
    return interleave(rows) if entry.kind in INTERLEAVED else rows
