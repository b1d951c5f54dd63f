"""Computing prompt caches: of prompts that are to be saved, and of nntr_config.json's head_prompt."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from causallm.prompt_cache.file import is_prompt_cache, load_prompt_cache, save_prompt_cache
from causallm.prompt_cache.nntr_file import read_nntr_cache
from causallm.prompt_cache.reuse import ROLLBACK, PromptCache, common_prefix
from causallm.prompt_ids import check_ids, left_pad
from causallm.report import Report
from causallm.steps import Progress, prefill
from causallm.storage.step_memory import planned_capacity, rows_that_fit, step_tokens
from causallm.transformer import Transformer

PROBES = ("x", "1")
"""Prompts of which one does not begin as a given one does."""


def make_prompt_cache(
    model: Transformer, rows: Sequence[Sequence[int]], on_prefill: Progress | None = None
) -> PromptCache:
    """The cache of prompts, each a list of ids, computed in steps of init_seq_len as when they are answered.

    Sliding layers can go back `ROLLBACK` positions. ValueError for prompts that the model has no room for.
    """
    for row in rows:
        check_ids(row, model.config.vocab_size)
        if len(row) > model.max_length:
            raise ValueError(f"the prompt has {len(row)} tokens, but the context is {model.max_length} tokens")
    ids, padding = left_pad(rows, model.device)
    if rows_that_fit(model, len(rows), ids.shape[1]) < len(rows):
        raise ValueError(
            f"{len(rows)} prompts of {ids.shape[1]} tokens have no room together in the memory that was planned for "
            f"{model.storage.positions} positions; raise batch_size of nntr_config.json"
        )
    chunk = step_tokens(model, len(rows))
    # A step of one token at the end would push what lies before a window out for good.
    chunk = next((size for size in range(chunk, 1, -1) if ids.shape[1] % size != 1), chunk)
    cache = model.make_cache(len(rows), planned_capacity(model, len(rows)), ROLLBACK)
    prefill(model, ids, cache, padding, chunk, on_prefill)
    return PromptCache([list(row) for row in rows], cache, ids.shape[1])


def head_prompt_cache(
    model: Transformer, encode: Callable[[str], list[int]], prompt: str, report: Report
) -> PromptCache | None:
    """The cache of nntr_config.json's head_prompt, from its file, or computed and saved there for the next run.

    encode: a prompt's ids, head and tail around it. `prompt` is one of those to be answered. Which of the ids are the
    head's is what other prompts begin with too. None where there is nothing to keep. A file of NNTrainer's stands for
    head_prompt's own ids. Whatever the file holds, only what a prompt begins with is reused. Tokens computed here are
    taken off `report.reused_tokens`, for it is this run that paid for them. ValueError where the file does not fit.
    """
    runtime = model.runtime_config
    assert runtime.head_cache_path is not None
    path, size = Path(runtime.head_cache_path), runtime.head_cache_size
    ids, probe = encode(prompt), next(probe for probe in PROBES if not prompt.startswith(probe))
    head = ids[: common_prefix(ids, encode(probe))] if runtime.head_prompt else []
    if path.exists():
        held = _read(path, model, size)
        if (reused := common_prefix(held.ids[0], head)) < min(len(head), size or len(head)):
            warnings.warn(
                f"{path} was made of another text than head_prompt: {reused} of its {len(head)} tokens are reused; "
                "remove the file to have it made again",
                stacklevel=3,
            )
        return held
    if not head:
        return None
    with report.timed("prefill"):
        held = make_prompt_cache(model, [head[:size]])
    save_prompt_cache(path, model, held.cache, held.ids, rope_length=held.rope_length)
    report.reused_tokens = (report.reused_tokens or 0) - held.columns
    return held


def _read(path: Path, model: Transformer, size: int | None) -> PromptCache:
    if not is_prompt_cache(path):
        assert model.tokenizer is not None
        head = model.runtime_config.head_prompt
        return read_nntr_cache(path, model, model.tokenizer.encode_prompt(head) if head else [], size)
    held = load_prompt_cache(path, model)
    if size is not None and size < held.columns:
        held.truncate(size)
    return held
