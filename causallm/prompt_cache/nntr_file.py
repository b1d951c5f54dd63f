"""NNTrainer's raw cache file: keys and values of one row, without header, names or tokens.

For each layer the keys, then the values: a uint16 that is 0, then (positions, kv_heads * head_dim) in fp16, then 8
bytes that mean nothing here and are written as 0; little-endian. Keys are rotated. Read off files of the original.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from causallm.prompt_cache.reuse import PromptCache, check_room
from causallm.storage.step_memory import planned_capacity
from causallm.transformer import Transformer
from causallm.weights.atomic_file import atomic_file
from causallm.weights.mapped_file import MappedFile
from causallm.weights.tensor_bytes import write_tensor
from layers.kv_cache import KVCache

BEFORE = struct.pack("<H", 0)
AFTER = bytes(8)


def write_nntr_cache(path: Path, model: Transformer, cache: Sequence[KVCache], to: int | None = None) -> None:
    """Write the first `to` positions, or all, rounded to fp16.

    ValueError for what the format cannot hold: several rows, 8-bit codes, sliding layers that have lost positions,
    values beyond fp16.
    """
    positions = cache[0].offset if to is None else to
    if not 0 < positions <= cache[0].offset:
        raise ValueError(f"cannot save {positions} positions of a cache that holds {cache[0].offset}")
    with atomic_file(path) as file:
        for number, layer in enumerate(cache):
            for part in ("keys", "values"):
                name = f"layers.{number}.{part}"
                file.write(BEFORE)
                write_tensor(file, name, _in_rows(name, layer, part)[:positions], torch.float16)
                file.write(AFTER)


def _in_rows(name: str, layer: KVCache, part: str) -> Tensor:
    """(positions, kv_heads * head_dim) from (1, kv_heads, positions, head_dim)."""
    state = layer.state(back=True)[part]
    if state.shape[0] != 1:
        raise ValueError(f"NNTrainer's cache file holds one row, this cache has {state.shape[0]}")
    if not state.is_floating_point():
        raise ValueError(f"NNTrainer's cache file holds floats of 16 bits, this cache is {layer.dtype}")
    if state.shape[2] < layer.offset:
        raise ValueError(
            f"NNTrainer's cache file holds every position, but {name} slides: {state.shape[2]} of {layer.offset} are "
            "left"
        )
    return state[0].transpose(0, 1).flatten(1).cpu()


def read_nntr_cache(path: Path, model: Transformer, ids: Sequence[int], to: int | None = None) -> PromptCache:
    """The first `to` positions, or all, as the cache of `ids`, which the file does not say; more ids are left out.

    ValueError where the file is none of this model's shape or holds fewer positions than asked for or more than ids.
    """
    mapped = MappedFile(path)
    held = count_positions(path, mapped.size, model)
    positions = held if to is None else to
    if not 0 < positions <= held:
        raise ValueError(f"{path} holds {held} positions, {positions} were asked for")
    if len(ids) < positions:
        raise ValueError(
            f"{path} stands for {positions} tokens, but there are ids of {len(ids)}: it was made from another text, or "
            "with another tokenizer"
        )
    cfg = model.config
    width = cfg.num_key_value_heads * cfg.head_dim
    size = len(BEFORE) + held * width * 2 + len(AFTER)

    def read(number: int) -> Tensor:
        start = number * size
        if mapped.tensor(start, [1], torch.uint16).item() != 0:
            raise ValueError(f"{path}: byte {start} should begin a tensor of NNTrainer's cache file, but is not 0")
        rows = mapped.tensor(start + len(BEFORE), [held, width], torch.float16)[:positions]
        return rows.view(1, positions, -1, cfg.head_dim).transpose(1, 2).to(model.device, model.dtype)

    check_room(model, path, 1, positions)
    cache = model.make_cache(1, planned_capacity(model))
    for number, layer in enumerate(cache):
        layer.update(read(2 * number), read(2 * number + 1))
    return PromptCache([list(ids[:positions])], cache)


def count_positions(path: Path, size: int, model: Transformer) -> int:
    """How many positions a file of `size` bytes holds; ValueError where the model's shape does not divide it."""
    cfg = model.config
    tensors = 2 * cfg.num_hidden_layers
    each, rest = divmod(size, tensors)
    row = cfg.num_key_value_heads * cfg.head_dim * 2
    around = len(BEFORE) + len(AFTER)
    if rest or each <= around or (each - around) % row:
        raise ValueError(
            f"{path}: {size} bytes are no NNTrainer cache of this model: {tensors} tensors of {around} + positions x "
            f"{row} bytes were expected"
        )
    return (each - around) // row
