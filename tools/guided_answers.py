"""Answers that keep closer to what was asked for: classifier-free guidance.

A token's logit is that after the request plus `guidance - 1` times what the request adds to it, beside one that asks
for nothing in particular (Sanchez et al., Stay on topic with Classifier-Free Guidance, 2023). It takes two rows of a
batch for each answer.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from causallm.causal_lm import CausalLM
from causallm.config import GenerationConfig
from causallm.prompt_ids import left_pad
from causallm.sampling import make_generators, sample
from causallm.steps import decode_one, prefill

ANYTHING = "Tell me a story."


def guided_answers(
    model: CausalLM, requests: Sequence[str], config: GenerationConfig, guidance: float, seed: int
) -> list[str | None]:
    """The answers to requests that run together; None where one found no end in `max_new_tokens`.

    Of `config` temperature, top_k (of the logits without guidance) and lengths are obeyed. With a guidance of 1 these
    are plain answers.
    """
    prompts = [_prompt(model, request) for request in (*requests, *[ANYTHING] * len(requests))]
    ids, padding = left_pad(prompts, model.device)
    cache = model.make_cache(len(prompts), ids.shape[1] + config.max_new_tokens)
    generators = make_generators(seed, len(requests), model.device)
    plain = GenerationConfig(do_sample=True, temperature=config.temperature, top_k=config.top_k)
    answers: list[list[int]] = [[] for _ in requests]
    ended = [False] * len(requests)
    logits = prefill(model, ids, cache, padding, ids.shape[1])
    for _ in range(config.max_new_tokens):
        tokens = sample(guided(logits, config.top_k, guidance), plain, generators)
        for row, token in enumerate(tokens.tolist()):
            ended[row] = ended[row] or token in config.eos_token_id
            if not ended[row]:
                answers[row].append(token)
        if all(ended):
            break
        logits = decode_one(model, torch.cat((tokens, tokens)), cache, padding)
    found = zip(answers, ended, strict=True)
    return [model.tokenizer.decode(tokens).strip() if complete else None for tokens, complete in found]


def guided(logits: Float[Tensor, "rows vocab"], top_k: int, guidance: float) -> Float[Tensor, "requests vocab"]:
    """What the first half of the rows says, moved away from what the second half does; -inf below its top_k."""
    asked, anything = logits.float().log_softmax(-1).chunk(2)
    moved = anything + guidance * (asked - anything)
    smallest = asked.topk(min(top_k or asked.shape[-1], asked.shape[-1])).values[:, -1:]
    return moved.masked_fill(asked < smallest, -math.inf)


def _prompt(model: CausalLM, request: str) -> list[int]:
    rendered = model.tokenizer.render([{"role": "user", "content": request}])
    return model.tokenizer.encode(rendered, add_special_tokens=False)
