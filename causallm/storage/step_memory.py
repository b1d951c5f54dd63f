"""What a run takes besides weights: the program, the cache of keys and values, and what one step computes with."""

import psutil

from causallm.generation import DEFAULT_CHUNK
from causallm.packing import packed_tensors
from causallm.transformer import Transformer
from causallm.weights.names import weight_kind

GROWTH = 40 * 10**6
"""By how much libraries grow when they first compute (measured): threads' stacks, oneDNN's kernels, scratch."""
QUERY_ROWS = 128
"""Queries whose scores are held at once."""


def program_bytes() -> int:
    """What this process has in memory now, before it has weights, and what its libraries will yet take."""
    return int(psutil.Process().memory_info().rss) + GROWTH


def cache_bytes(model: Transformer) -> tuple[str, int, int, str]:
    """Purpose, 0, bytes and remark of the cache for all positions that the model may be given."""
    config, batch = model.config, model.runtime_config.batch_size or 1
    chunk = model.runtime_config.init_seq_len or DEFAULT_CHUNK
    positions = 0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer)
        positions += model.max_length if window is None else min(window + chunk, model.max_length)
    note = f"{model.max_length} positions" + (f", {batch} rows" if batch > 1 else "")
    return "cache of keys and values", 0, positions * batch * model.cache_position_bytes, note


def step_bytes(model: Transformer) -> int:
    """An upper estimate of what a step over a chunk of the prompt computes with, at the end of the longest prompt.

    Vectors between the layers, the scores of some queries, the cache in the activations' dtype, one packed matrix
    expanded to bf16, and logits.
    """
    config, batch, itemsize = model.config, model.runtime_config.batch_size or 1, model.dtype.itemsize
    chunk = min(model.runtime_config.init_seq_len or DEFAULT_CHUNK, model.max_length)
    dim, heads, past = config.hidden_size, config.num_attention_heads, model.max_length
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = 4 * dim + 3 * queries + 2 * keys
    hidden = 3 * config.intermediate_size
    if config.num_experts:
        hidden = config.num_experts_per_tok * dim + 3 * (config.moe_intermediate_size or config.intermediate_size)
    vectors = chunk * batch * (attention + hidden + 2 * dim) * itemsize
    scores = 3 * batch * heads * min(QUERY_ROWS, chunk) * past * 4
    context = 2 * batch * keys * past * itemsize if model.cache_dtype != model.dtype else 0
    expanded = max(
        (
            2 * packed.shape[-1] * packed.shape[-2]
            for name, packed in packed_tensors(model).items()
            if weight_kind(name) == "linear"
        ),
        default=0,
    )
    return vectors + scores + context + expanded + 3 * batch * config.vocab_size * 4
