"""A GGUF file's weights by our names: packed rows and floats mapped from the file where they lie there as ours do."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from causallm.causal_lm import CausalLM
from causallm.gguf.changes import Change, GateAndUp, Transposed
from causallm.gguf.families import Family
from causallm.gguf.format import GgufFile, TensorInfo
from causallm.gguf.mxfp4 import mxfp4_as_q8_0
from causallm.gguf.names import ROPE_FACTORS, Place, place
from causallm.gguf.tensor_types import FLOATS, MXFP4, PACKED, row_bytes
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.mapped_reader import MappedReader, StoredTensor
from causallm.weights.reader import Fetch, FileRange, Index, rows_in_parts

FUSED = (GateAndUp, Transposed)
"""Of tensors that have the experts of a layer."""


class GgufReader(MappedReader):
    """The tensors of a GGUF file for `model`, which was built from it.

    Copied are only the query and key of Llama (rows in another order), Gemma's norms, the gates of gpt-oss's experts,
    and what is MXFP4. ValueError for a tensor that is missing, is too many, or is not shaped for its change.
    """

    def __init__(self, file: GgufFile, family: Family, model: Transformer):
        super().__init__([file.path])
        self.file = file
        places = {name: place(name, family, model.config) for name in expected_parameters(model)}
        wanted = [part for where in places.values() for part in where.names]
        # An embedding model's file may carry the head, which it has no use for.
        known = {*wanted, ROPE_FACTORS, *(() if isinstance(model, CausalLM) else ("output.weight",))}
        for problem, names in (
            ("missing", [name for name in wanted if name not in file.tensors]),
            (f"not one of {family.arch} with these settings", [name for name in file.tensors if name not in known]),
        ):
            if names:
                raise ValueError(f"{file.path}: tensor {names[0]} is {problem}")
        self._places = places
        for where in places.values():
            self._check(where)

    def _check(self, where: Place) -> None:
        infos = [self.file.tensors[name] for name in where.names]
        if where.expert is not None and any(len(i.shape) != 3 or where.expert >= i.shape[0] for i in infos):
            raise self._wrong(infos[0], f"holds no expert {where.expert}")
        if any((info.shape, info.kind) != (infos[0].shape, infos[0].kind) for info in infos):
            raise self._wrong(infos[0], f"differs in shape or type from {infos[1].name}")
        if len(infos[0].shape) not in where.change.dimensions:
            raise self._wrong(infos[0], f"expected {' or '.join(map(str, where.change.dimensions))} dimensions")
        if infos[0].shape[0] % where.change.multiple():
            raise self._wrong(infos[0], f"expected a multiple of {where.change.multiple()} rows")
        if len(infos[0].shape) == 1 and infos[0].kind in PACKED:
            raise self._wrong(infos[0], "expected floats")

    def _wrong(self, info: TensorInfo, what: str) -> ValueError:
        return ValueError(f"{self.file.path}: tensor {info.name} {info.kind} {list(info.shape)}: {what}")

    def names(self) -> Sequence[str]:
        return list(self._places)

    def formats(self) -> Mapping[str, str]:
        kinds = {name: self.file.tensors[where.names[0]].kind for name, where in self._places.items()}
        return {name: PACKED[kind] for name, kind in kinds.items() if kind in PACKED}

    def meta(self, name: str) -> Tensor:
        where = self._places[name]
        return where.change.read([self._empty(self.file.tensors[part], where.expert) for part in where.names])

    def _empty(self, info: TensorInfo, expert: int | None) -> Tensor:
        kind = PACKED.get(info.kind)
        shape = info.shape if kind is None else (*info.shape[:-1], row_bytes(kind, info.shape[-1]))
        dtype = torch.uint8 if kind else FLOATS[info.kind]
        return torch.empty(shape if expert is None else shape[1:], dtype=dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        where = self._places[name]
        return self._unpacked(where, where.change.read([stored[()] for stored in self._stored(where, self._map)]))

    def part(self, name: str, index: Index) -> Tensor:
        where = self._places[name]
        # Rows first: those of MXFP4 have other bytes in the file.
        packed = self.file.tensors[where.names[0]].kind in PACKED
        rows = self.meta(name).dim() - 1 if packed else len(index)
        part = where.change.part(self._stored(where, self._fetch), index[:rows])
        return self._unpacked(where, part)[(..., *index[rows:])]

    def parts(self, name: str, index: Index = ()) -> Sequence[Index]:
        meta, change = self.meta(name), self._places[name].change
        fused = isinstance(change, FUSED)
        if meta.dim() < 2 + fused or len(index) > fused:
            return super().parts(name, index)
        # Of fused floats, (experts, in, out), the file's rows are columns.
        columns = fused and meta.is_floating_point()
        rows, row_bytes = meta.shape[2 if columns else fused], meta.shape[1 if columns else -1] * meta.itemsize
        steps = rows_in_parts(rows, row_bytes, change.group(rows))
        if not fused:
            return [(step,) for step in steps]
        experts = index or range(len(meta))
        return [(expert, slice(None), step) if columns else (expert, step) for expert in experts for step in steps]

    def _unpacked(self, where: Place, tensor: Tensor) -> Tensor:
        return mxfp4_as_q8_0(tensor) if self.file.tensors[where.names[0]].kind == MXFP4 else tensor

    def _stored(self, where: Place, fetch: Fetch) -> list[StoredTensor]:
        """The tensors, or the slices of one expert, as the file has them."""
        found = []
        for info in map(self.file.tensors.__getitem__, where.names):
            shape, dtype = info.shape, FLOATS.get(info.kind, torch.uint8)
            if info.kind not in FLOATS:
                shape = (*shape[:-1], row_bytes(info.kind, shape[-1]))
            first, _ = _bytes_of(info, where.expert)
            found.append(StoredTensor(fetch, self.file.path, first, shape[where.expert is not None :], dtype))
        return found

    def place(self, name: str) -> FileRange | None:
        where = self._places[name]
        info = self.file.tensors[where.names[0]]
        if type(where.change) is not Change or info.kind == MXFP4:
            return None
        return FileRange(self.file.path, *_bytes_of(info, where.expert))

    def release(self, name: str) -> None:
        where = self._places[name]
        for part in where.names:
            self._mapped[self.file.path].release(*_bytes_of(self.file.tensors[part], where.expert))


def _bytes_of(info: TensorInfo, expert: int | None) -> tuple[int, int]:
    """Offset and number of the bytes of a tensor, or of one expert in it."""
    if expert is None:
        return info.offset, info.nbytes
    nbytes = info.nbytes // info.shape[0]
    return info.offset + expert * nbytes, nbytes
