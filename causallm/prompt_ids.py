"""Prompts as token ids: checked, fitted into the context and padded to one length."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from causallm.config import GenerationConfig


def check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """ValueError for a prompt without tokens or with one that the model does not know."""
    if not prompt:
        raise ValueError("the prompt is empty: it has no tokens, expected at least one")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"the prompt has token id {token}, expected 0 <= id < {vocab_size}; does the tokenizer belong to "
                "the model?"
            )


def fit_prompt(prompt: Sequence[int], config: GenerationConfig, max_length: int, truncate: bool) -> list[int]:
    """The prompt, or its end if it may be truncated, so that at least one token fits after it.

    A truncated prompt leaves room for max_new_tokens, but keeps at least half of the context, and its beginning-of-
    sequence token if it has one: some models give nonsense without.
    """
    if len(prompt) < max_length:
        return list(prompt)
    if not truncate:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the context is {max_length} tokens, of which at least one is "
            "to be generated; shorten it, raise max_seq_len (--max-length) where the model allows it, or ask to "
            "truncate (--truncate)"
        )
    room = max(max_length - config.max_new_tokens, max_length // 2, 1)
    kept = list(prompt[-room:])
    if prompt[0] == config.bos_token_id and room > 1:
        kept[0] = prompt[0]
    warnings.warn(f"{len(prompt) - room} of the prompt's {len(prompt)} tokens are left out", stacklevel=2)
    return kept


def left_pad(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch"] | None]:
    """One tensor of all prompts, and how many columns of each row are padding (None where none is)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    padding = [longest - len(prompt) for prompt in prompts]
    return ids, torch.tensor(padding, device=device) if any(padding) else None
