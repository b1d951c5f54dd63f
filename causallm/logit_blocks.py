"""Logits of a given text, some positions at a time: those of a whole window are the most memory that scoring takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causallm.causal_lm import CausalLM
from causallm.storage.step_memory import LOGITS, planned_bytes, planned_capacity, step_tokens
from causallm.storage.storage import HEAD
from causallm.transformer import Transformer
from layers.lm_head import softcap

LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Blocks:
    """time: tokens in one step, None for all. rows: positions whose logits are computed at once."""

    time: int | None
    rows: int


def choose_blocks(model: CausalLM) -> Blocks:
    """What a model has memory for: all tokens in one step where no memory budget was planned."""
    rows = max(LOGITS_AT_ONCE // model.config.vocab_size, 1)
    if planned_capacity(model) is None:
        return Blocks(None, rows)
    _, step = planned_bytes(model, 1)
    return Blocks(step_tokens(model, 1), max(min(rows, step // (LOGITS * model.config.vocab_size)), 1))


@torch.inference_mode()
def logit_blocks(
    model: CausalLM,
    ids: Int[Tensor, "time"],
    last: int,
    blocks: Blocks,
    cached: bool = False,
    rope_length: int | None = None,
) -> Iterator[Float[Tensor, "rows vocab"]]:
    """Yields the logits at the `last` so many of `ids`, in order.

    cached: keys and values pass through a cache, as they do in any case where there are several steps. rope_length: see
    `layers.step.Step`.
    """
    time = len(ids)
    step = min(blocks.time or time, time)
    fixed = None if planned_capacity(model) is None else time
    cache = model.make_cache(1, fixed) if cached or step < time else None
    for start in range(0, time, step):
        end = min(start + step, time)
        wanted = max(min(end - (time - last), end - start), 0)
        model.storage.begin(head=wanted > 0)
        hidden = Transformer.forward(model, ids[None, start:end], cache, rope_length=rope_length or time)[0]
        for block in hidden[end - start - wanted :].split(blocks.rows) if wanted else ():
            yield _project(model, block.contiguous())


def _project(model: CausalLM, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows vocab"]:
    with model.storage.resident(HEAD):
        project = model.embed_tokens.project if model.config.tie_word_embeddings else model.lm_head
        return softcap(project(hidden), model.config.final_logit_softcapping)
