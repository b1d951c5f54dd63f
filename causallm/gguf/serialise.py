"""From keys and a list of tensors to the bytes of a GGUF header."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from causallm.gguf.format import ALIGNMENT, ARRAY, BOOL, MAGIC, SCALARS, STRING
from causallm.gguf.tensor_types import TYPE_NUMBERS

VERSION = 3
UINT32, INT32, FLOAT32 = 4, 5, 6
SIGNED = frozenset({"general.sampling.top_k"})
"""Whole numbers that readers expect to have a sign; all others have none."""


def header(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, Sequence[int], str, int]]) -> bytes:
    """The header, filled up to where the tensors start.

    A value is a bool, a whole number (32 bits), a float (32 bits), a text, or a list of one of these, an empty one of
    texts. tensors: name, shape in torch's order, ggml's type, and bytes of each, in the order in which they follow.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(_text(key))
        parts.append(_value(value, key in SIGNED))
    offset = 0
    for name, shape, kind, nbytes in tensors:
        parts.append(_text(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPE_NUMBERS[kind], offset))
        offset += nbytes + padding(nbytes)
    content = b"".join(parts)
    return content + bytes(padding(len(content)))


def padding(nbytes: int) -> int:
    """Bytes to fill up with so that what follows is aligned."""
    return -nbytes % ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any, signed: bool) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0], signed=True) if value else STRING
        body = b"".join(map(_text, value)) if kind == STRING else struct.pack(f"<{len(value)}{SCALARS[kind]}", *value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + body
    kind = _kind(value, signed)
    return struct.pack("<I", kind) + (_text(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value))


def _kind(value: Any, signed: bool) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT32 if signed else UINT32
    return FLOAT32 if isinstance(value, float) else STRING
