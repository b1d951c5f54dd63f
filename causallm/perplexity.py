"""How well a model predicts a text: sliding windows over its tokens, each token scored once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from causallm.causal_lm import CausalLM
from causallm.logit_blocks import choose_blocks, logit_blocks
from causallm.prompt_ids import check_ids
from causallm.steps import Progress
from causallm.training.loss import cross_entropy_sum
from causallm.training.progress import perplexity as exponential


@dataclass(frozen=True)
class Perplexity:
    """nats: -log p, summed over the `tokens` scored, in `windows` forward passes."""

    nats: float
    tokens: int
    windows: int

    @property
    def nats_per_token(self) -> float:
        """The mean over the tokens scored."""
        return self.nats / self.tokens

    @property
    def value(self) -> float:
        """The perplexity: exp of the mean nats a token."""
        return exponential(self.nats_per_token)

    def bits_per_byte(self, tokens: int, size: int) -> float:
        """Bits that `tokens` cost a byte, for a text of `tokens` tokens and `size` bytes.

        Comparable between tokenizers. The few tokens that nothing stands before, which are not scored, count as the
        mean of the others.
        """
        return self.nats_per_token * tokens / size / math.log(2)


def perplexity(
    model: CausalLM, ids: Sequence[int], window: int, stride: int, progress: Progress | None = None
) -> Perplexity:
    """Score `ids` in windows of `window` tokens that begin `stride` apart.

    A window scores the tokens that no window before it has scored, given all that it holds before them: the strided
    sliding window of huggingface.co/docs/transformers/perplexity. A window's first token is only ever context. Every
    scored token weighs the same; the page's code weighs a window by one token fewer than its mean is over.
    `progress` is called after each window with the tokens done and those there are. Keys and values pass through a
    cache only where nntr_config.json has a kv_cache_dtype, whose effect that shows, or a memory budget has no room for
    a window in one step. ValueError for fewer than 2 tokens, a window beyond the model's context, a stride beyond the
    window, a model that sees what it is to predict, and scores that are not finite.
    """
    if not model.is_causal:
        raise ValueError("a model that attends in both directions sees the tokens that it would have to predict")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least 2: one is predicted from those before it")
    if not 2 <= window <= model.max_length:
        raise ValueError(f"window: got {window}, expected 2 to {model.max_length}, the model's context")
    if not 1 <= stride <= window:
        raise ValueError(f"stride: got {stride}, expected 1 to {window}, the window")
    check_ids(ids, model.config.vocab_size)
    nats, tokens, count = 0.0, 0, 0
    for begin, first, end in windows(len(ids), window, stride):
        scored = _score(model, ids[begin:end], end - first)
        if not math.isfinite(scored):
            raise ValueError(
                f"the scores of tokens {first} to {end - 1} are not finite numbers in {model.dtype}; another dtype may "
                "help, or the weights are damaged"
            )
        nats, tokens, count = nats + scored, tokens + end - first, count + 1
        if progress:
            progress(end, len(ids))
    return Perplexity(nats, tokens, count)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, first, end): a window holds the tokens begin to end and scores first to end."""
    end = 0
    for begin in range(0, length, stride):
        first, end = max(end, begin + 1), min(begin + window, length)
        if first < end:
            yield begin, first, end
        if end == length:
            return


@torch.inference_mode()
def _score(model: CausalLM, ids: Sequence[int], scored: int) -> float:
    """-log p of the last `scored` of `ids`, summed, in nats."""
    window = torch.tensor(ids, device=model.device)
    cached = model.runtime_config.kv_cache_dtype is not None
    nats, targets = 0.0, window[-scored:]
    # The last token predicts none of them, but counts for the rotary kinds that depend on the length.
    for logits in logit_blocks(model, window[:-1], scored, choose_blocks(model), cached, len(ids)):
        nats += cross_entropy_sum(logits, targets[: len(logits)]).item()
        targets = targets[len(logits) :]
    return nats
