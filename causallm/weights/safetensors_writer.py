"""Writing a safetensors file one tensor at a time; the library's own writer needs all of them in memory."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from causallm.weights.atomic_file import atomic_file
from causallm.weights.safetensors_reader import DTYPES
from causallm.weights.tensor_bytes import Advance, write_tensor

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    advance: Advance | None = None,
) -> None:
    """Write `tensors`, meta tensors that give names, shapes and dtypes, with the values that `read` returns.

    Wider dtypes come first, so that every tensor is aligned to its own; otherwise the order is kept. Values are
    cast to the dtype announced; see `cast` for the error. Nothing has the name `path` until it is whole.
    """
    ordered = in_file_order(tensors)
    with atomic_file(path) as file:
        file.write(header(ordered, metadata))
        for name, tensor in ordered.items():
            nbytes = write_tensor(file, name, read(name), tensor.dtype)
            if advance:
                advance(name, nbytes)


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wider dtypes first, else the order given."""
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: -tensors[name].itemsize)}


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Size and JSON of the header, padded with spaces so that the tensors start on a 64-byte boundary."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        content[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
