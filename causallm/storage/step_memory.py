"""What a run takes besides weights: the program, the cache of keys and values, what one step computes with; and how
many rows have room in what a memory budget was planned for."""

from bisect import bisect_right

import psutil

from causallm.packing import packed_tensors
from causallm.transformer import Transformer
from causallm.weights.names import weight_kind
from layers.step import MASK_BLOCK

GROWTH = 40 * 10**6
"""By how much libraries grow when they first compute (measured): threads' stacks, oneDNN's kernels, scratch."""
QUERY_ROWS = 128
"""Queries whose scores are held at once."""
MASK_BYTES = 16
"""For each number of the block of a mask that is being made: distances and what is compared with them."""
INT8_BITS = 10
"""For each activation rounded to int8: itself, and a scale and a sum in fp32 for 32 of them."""
LOGITS = 3 * 4
"""Bytes for each number of the vocabulary and row: logits and two copies in fp32."""


def program_bytes() -> int:
    """What this process has in memory now, before it has weights, and what its libraries will yet take."""
    return int(psutil.Process().memory_info().rss) + GROWTH


def cache_bytes(model: Transformer, rows: int, columns: int, chunk: int) -> int:
    """The cache of `rows` rows of `columns` positions, given in steps of `chunk` tokens a row."""
    if not model.in_steps:
        return 0
    return sum(_seen(model, columns, chunk)) * rows * model.cache_position_bytes


def step_bytes(model: Transformer, rows: int, columns: int, chunk: int) -> int:
    """An upper estimate of what a step of `chunk` tokens of each row computes with, at the end of `columns` positions.

    Vectors between the layers, the scores of some queries, masks, the cache in the activations' dtype, one packed
    matrix expanded to bf16 or what it is multiplied with as int8, and logits.
    """
    config, itemsize, chunk = model.config, model.dtype.itemsize, min(chunk, columns)
    dim, heads = config.hidden_size, config.num_attention_heads
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = 4 * dim + 3 * queries + 2 * keys
    hidden = 3 * config.intermediate_size
    if config.num_experts:
        hidden = config.num_experts_per_tok * dim + 3 * (config.moe_intermediate_size or config.intermediate_size)
    vectors = chunk * rows * (attention + hidden + 2 * dim) * itemsize
    scores = 3 * rows * heads * min(QUERY_ROWS, chunk) * columns * 4
    kinds = {config.window(layer): seen for layer, seen in enumerate(_seen(model, columns, chunk))}
    masks = rows * chunk * sum(kinds.values()) * itemsize + MASK_BYTES * MASK_BLOCK
    context = 2 * rows * keys * columns * itemsize if model.cache_dtype != model.dtype and model.in_steps else 0
    products = max(
        (
            packed.shape[-1] * max(2 * packed.shape[-2], rows * chunk * INT8_BITS // 8)
            for name, packed in packed_tensors(model).items()
            if weight_kind(name) == "linear"
        ),
        default=0,
    )
    logits = LOGITS * rows * config.vocab_size if model.in_steps else 0
    return vectors + scores + masks + context + products + logits


def planned_bytes(model: Transformer, rows: int) -> tuple[int, int]:
    """What is planned for the cache of `rows` rows of the whole context, and for a step at its end."""
    shape = rows, model.max_length, model.chunk
    return cache_bytes(model, *shape), step_bytes(model, *shape)


def planned_capacity(model: Transformer, rows: int = 1) -> int | None:
    """Positions that caches of so many rows have room for, a row, where a memory budget was planned; else None."""
    positions = model.storage.positions
    return None if positions is None else min(positions // rows, model.max_length)


def step_tokens(model: Transformer, rows: int) -> int:
    """How many tokens of each row one step takes: of more rows than a memory budget was planned for fewer."""
    if model.storage.positions is None:
        return model.chunk
    together = min(model.chunk, model.max_length) * _planned_rows(model)
    return max(min(model.chunk, together // rows), 1)


def rows_that_fit(model: Transformer, rows: int, columns: int) -> int:
    """How many of `rows` rows of `columns` positions run together: at least one; all where no memory was planned."""
    positions = model.storage.positions
    if positions is None:
        return rows
    room = sum(planned_bytes(model, _planned_rows(model)))

    def taken(rows: int) -> int:
        shape = rows, columns, step_tokens(model, rows)
        return cache_bytes(model, *shape) + step_bytes(model, *shape)

    most = min(rows, positions // max(columns, 1))
    return max(bisect_right(range(1, most + 1), room, key=taken), 1)


def _planned_rows(model: Transformer) -> int:
    return max((model.storage.positions or 0) // model.max_length, 1)


def _seen(model: Transformer, columns: int, chunk: int) -> list[int]:
    """For each layer, how many positions a step may see."""
    windows = map(model.config.window, range(model.config.num_hidden_layers))
    return [columns if window is None else min(window + chunk, columns) for window in windows]
