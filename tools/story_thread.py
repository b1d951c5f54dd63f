"""How well stories keep their thread: how much better a model foretells the second half of one that knows the first.

A story whose second half could follow any other scores low, however smooth it is. Pointwise mutual information, as in
Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (2016), here of a story's halves.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from causallm.causal_lm import CausalLM

MARK = "<|endoftext|>"
"""What stands before a text in the data."""
ROWS = 32
SENTENCE_END = re.compile(r"[.!?]\"?(?=\s)")


def halves(story: str) -> tuple[str, str]:
    """A story divided after the sentence that ends nearest to its middle; the second half begins with white space."""
    ends = [match.end() for match in SENTENCE_END.finditer(story)] or [len(story)]
    middle = min(ends, key=lambda end: abs(end - len(story) / 2))
    return story[:middle], story[middle:]


def threads(model: CausalLM, stories: Sequence[str]) -> list[float]:
    """For each story, by how many nats a token its second half is likelier after the first than after nothing."""
    mark = _mark(model)
    pairs = [tuple(map(model.tokenizer.encode, halves(story))) for story in stories]
    known = _log_likelihoods(model, [([mark, *first], second) for first, second in pairs])
    alone = _log_likelihoods(model, [([mark], second) for _, second in pairs])
    return [(a - b) / max(1, len(second)) for a, b, (_, second) in zip(known, alone, pairs, strict=True)]


def log_likelihood(model: CausalLM, stories: Sequence[str]) -> float:
    """Of a token of the stories, each by itself, in the mean."""
    mark = _mark(model)
    scores = _token_log_likelihoods(model, [[mark, *model.tokenizer.encode(story)] for story in stories])
    return torch.cat(scores).mean().item()


def _mark(model: CausalLM) -> int:
    mark = model.tokenizer.token_id(MARK)
    if mark is None:
        raise ValueError(f"the model's tokenizer has no {MARK}, expected a model trained on texts divided by it")
    return mark


def _log_likelihoods(model: CausalLM, asked: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Of each second list of tokens after the first."""
    scores = _token_log_likelihoods(model, [[*before, *after] for before, after in asked])
    return [each[len(before) - 1 :].sum().item() for each, (before, _) in zip(scores, asked, strict=True)]


def _token_log_likelihoods(model: CausalLM, rows: Sequence[list[int]]) -> list[Float[Tensor, "tokens"]]:
    """Of each token of a row but the first; rows of like length are computed together."""
    found = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for begin in range(0, len(order), ROWS):
        numbers = order[begin : begin + ROWS]
        ids = _padded([rows[number] for number in numbers])
        with torch.inference_mode():
            scores = model(ids[:, :-1]).float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        for score, number in zip(scores, numbers, strict=True):
            found[number] = score[: len(rows[number]) - 1]
    return found


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids
