"""A prompt cache as one safetensors file, whose header says what it belongs to and whose last bytes are its checksum.

Tensors: "ids" (batch, columns), padded with 0 on the left, "padding" (batch), and "layers.<n>.<part>" for the parts of
each layer's `state`. Header: format, version, positions, what `fingerprint` says. "checksum" is the sha256 of header
text and of all tensors before it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from causallm.prompt_cache.fingerprint import fingerprint
from causallm.prompt_cache.reuse import PromptCache, check_room
from causallm.prompt_ids import left_pad
from causallm.storage.step_memory import planned_capacity
from causallm.transformer import Transformer
from causallm.weights.mapped_file import MappedFile
from causallm.weights.safetensors_reader import DTYPES, Header, read_header
from causallm.weights.safetensors_writer import in_file_order, write_safetensors
from layers.kv_cache import KVCache

FORMAT = "causallm prompt cache"
FORMAT_VERSION = "1"
CHECKSUM = "checksum"
DIGEST_BYTES = 32
States = Mapping[str, Tensor]


def save_prompt_cache(
    path: Path,
    model: Transformer,
    cache: Sequence[KVCache],
    ids: Sequence[int] | Sequence[Sequence[int]],
    to: int | None = None,
    rope_length: int | None = None,
) -> None:
    """Write what `cache`, one object a layer, holds of `ids`: those of one row, or a list for each row of a batch.

    to: only the first so many positions. rope_length: see `PromptCache`. One layer at a time is copied. Nothing has the
    name `path` before the file is whole. ValueError where ids and cache do not belong together, or a sliding layer
    cannot go back to `to`.
    """
    rows = _rows(ids)
    held = PromptCache(rows, list(cache), rope_length)
    positions = held.columns if to is None else to
    if {layer.offset for layer in cache} != {held.columns}:
        raise ValueError(f"the cache holds {cache[0].offset} positions, the ids given are {held.columns}")
    if not 0 < positions <= held.columns:
        raise ValueError(f"cannot save {positions} positions of a cache that holds {held.columns}")
    states = _States(model, held, positions)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "positions": str(positions),
        "rope_length": str(rope_length or held.columns),
        "rollback": str(max(layer.rollback or 0 for layer in cache)),
        **fingerprint(model),
    }
    tensors = {**states.tensors, CHECKSUM: torch.empty(DIGEST_BYTES, dtype=torch.uint8, device="meta")}
    digest = _begin(metadata)

    def read(name: str) -> Tensor:
        if name == CHECKSUM:
            return torch.tensor(list(digest.digest()), dtype=torch.uint8)
        tensor = states.read(name)
        _add(digest, name, tensor)
        return tensor

    assert [*in_file_order(tensors)][-1] == CHECKSUM
    write_safetensors(path, tensors, read, metadata)


def load_prompt_cache(path: Path, model: Transformer, to: int | None = None) -> PromptCache:
    """Read what `save_prompt_cache` wrote, mapped, into caches as `model` makes them; `to`: only so many positions.

    ValueError names the file and what differs: the field of `fingerprint`, the version, a cut or changed file, more
    positions than a memory budget was planned for.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: no prompt cache, its header's format is {metadata.get('format')!r}")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {metadata.get('format_version')}, expected {FORMAT_VERSION}: make the cache again"
        )
    for field, expected in fingerprint(model).items():
        if metadata.get(field) != expected:
            raise ValueError(
                f"{path} does not fit this model: {field} differs: found {metadata.get(field)}, expected {expected}; "
                "make the cache again"
            )
    mapped = MappedFile(path)
    _check(path, header, mapped)
    check_room(model, path, len(_tensor(header, mapped, "ids")), int(metadata["positions"]))
    try:
        held = _restored(model, header, mapped)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if to is not None and to != held.columns:
        if not 0 < to <= held.columns:
            raise ValueError(f"{path} holds {held.columns} positions, {to} were asked for")
        held.truncate(to)
    return held


def is_prompt_cache(path: Path) -> bool:
    """Whether a file begins as a safetensors file does: the size of a JSON header, then the header."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt cache {path}")
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**32


class _States:
    """The tensors of the file, computed when they are asked for, one layer in memory at a time."""

    def __init__(self, model: Transformer, held: PromptCache, positions: int):
        self._model, self._held, self._positions = model, held, positions
        self._layer, self._state = -1, dict[str, Tensor]()
        ids, padding = left_pad(held.ids, torch.device("cpu"))
        self._row_tensors = {
            "ids": ids[:, :positions],
            "padding": torch.zeros(len(held.ids), dtype=torch.int64) if padding is None else padding,
        }
        self.tensors = {name: tensor.to("meta") for name, tensor in self._row_tensors.items()}
        for number in range(len(held.cache)):
            for part, tensor in self._state_of(number).items():
                self.tensors[f"layers.{number}.{part}"] = tensor.to("meta")

    def read(self, name: str) -> Tensor:
        if name in self._row_tensors:
            return self._row_tensors[name]
        _, number, part = name.split(".")
        return self._state_of(int(number))[part].cpu()

    def _state_of(self, number: int) -> dict[str, Tensor]:
        if number != self._layer:
            self._state = {}  # before the next takes memory
            self._layer, self._state = number, self._compute(number)
        return self._state

    @torch.inference_mode()
    def _compute(self, number: int) -> dict[str, Tensor]:
        layer = self._held.cache[number]
        if self._positions == layer.offset:
            return layer.state(back=True)
        given = {"rollback": layer.rollback} if layer.rollback else {}
        copy = self._model.createCache(number, len(self._held.ids), None, **given)
        copy.restore(layer.state(back=True), layer.offset)
        copy.truncate(self._positions)
        return copy.state(back=True)


def _rows(ids: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    rows = [[row] if isinstance(row, int) else list(row) for row in ids]
    if ids and isinstance(ids[0], int):
        rows = [[token for row in rows for token in row]]
    if not any(rows):
        raise ValueError("there are no ids, expected those of the tokens that the cache holds")
    return rows


def _restored(model: Transformer, header: Header, mapped: MappedFile) -> PromptCache:
    """The caches of a file that has been checked; each layer's part of the mapping is given back when it is copied."""
    ids, padding = (_tensor(header, mapped, name).tolist() for name in ("ids", "padding"))
    positions = int(header.metadata["positions"])
    caches = model.make_cache(len(ids), planned_capacity(model, len(ids)), int(header.metadata["rollback"]))
    for number, layer in enumerate(caches):
        prefix = f"layers.{number}."
        names = [name for name in header.tensors if name.startswith(prefix)]
        layer.restore({name.removeprefix(prefix): _tensor(header, mapped, name) for name in names}, positions)
        for name in names:
            _release(header, mapped, name)
    rows = [row[columns:] for row, columns in zip(ids, padding, strict=True)]
    return PromptCache(rows, caches, int(header.metadata["rope_length"]))


def _tensor(header: Header, mapped: MappedFile, name: str) -> Tensor:
    entry = header.tensors[name]
    return mapped.tensor(header.start + entry["data_offsets"][0], entry["shape"], DTYPES[entry["dtype"]])


def _release(header: Header, mapped: MappedFile, name: str) -> None:
    begin, end = header.tensors[name]["data_offsets"]
    mapped.release(header.start + begin, end - begin)


def _check(path: Path, header: Header, mapped: MappedFile) -> None:
    """ValueError where the checksum is not that of the content."""
    digest = _begin(header.metadata)
    for name in _content(header):
        _add(digest, name, _tensor(header, mapped, name))
        _release(header, mapped, name)
    stored = bytes(_tensor(header, mapped, CHECKSUM).tolist()) if CHECKSUM in header.tensors else b""
    if stored != digest.digest():
        raise ValueError(f"{path}: damaged: its checksum is not that of its content; make the cache again")


def _content(header: Header) -> Iterator[str]:
    return (name for name in header.tensors if name != CHECKSUM)


def _begin(metadata: Mapping[str, str]) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
