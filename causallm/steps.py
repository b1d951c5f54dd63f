"""A model's steps over a cache: the chunks of a prompt, one token a row, a draft; and back again."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causallm.transformer import Transformer
from layers.kv_cache import KVCache

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do."""


@torch.inference_mode()
def prefill(
    model: Transformer,
    ids: Int[Tensor, "batch time"],
    cache: Sequence[KVCache],
    padding: Int[Tensor, "batch"] | None,
    chunk: int,
    on_chunk: Progress | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Put a prompt, or the rest of one, into the cache, `chunk` columns at a time; the logits after its last token.

    The cache gets its memory before the first chunk: between what a chunk computes with, it would be torn to pieces.
    """
    held, time = cache[0].offset, ids.shape[1]
    for layer in cache:
        layer.reserve(held + time)
    for start in range(0, time, chunk):
        end = min(start + chunk, time)
        last = 1 if end == time else 0
        logits = model(ids[:, start:end], cache, padding=padding, rope_length=held + time, last=last)
        if on_chunk:
            on_chunk(held + end, held + time)
    return logits[:, -1]


@torch.inference_mode()
def decode_one(
    model: Transformer,
    tokens: Int[Tensor, "batch"],
    cache: Sequence[KVCache],
    padding: Int[Tensor, "batch"] | None,
) -> Float[Tensor, "batch vocab"]:
    """Put one token a row into the cache; returns the logits after it."""
    return model(tokens[:, None], cache, padding=padding, last=1)[:, -1]


@torch.inference_mode()
def decode_draft(model: Transformer, tokens: Sequence[int], cache: Sequence[KVCache]) -> Float[Tensor, "time vocab"]:
    """Put a token of the only row and the draft of what follows into the cache; returns the logits after each."""
    return model(torch.tensor([tokens], device=model.device), cache, last=len(tokens))[0]


@torch.inference_mode()
def take_back(cache: Sequence[KVCache], columns: int) -> None:
    """Forget all but the first `columns` positions; in inference mode, whose tensors nothing else may write to."""
    for layer in cache:
        layer.truncate(columns)
