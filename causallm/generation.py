"""Generating text: prefill, then one position at a time over the cache, or a draft at a time where one is looked up."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causallm.config import GenerationConfig
from causallm.cuda_graphs import graphed
from causallm.penalties import TokenHistory, adjust_logits
from causallm.prompt_cache.reuse import PromptCache
from causallm.prompt_ids import check_ids, fit_prompt, left_pad
from causallm.prompt_lookup import PromptLookup, rotates_alike
from causallm.report import Lookup, Report
from causallm.sampling import make_generators, sample
from causallm.steps import Progress, decode_draft, decode_one, prefill, take_back
from causallm.stop_strings import StopStrings
from causallm.storage.counts import StorageCounts
from causallm.storage.step_memory import rows_that_fit, step_tokens
from causallm.stream_decoder import StreamDecoder
from causallm.transformer import Transformer
from layers.kv_cache import KVCache


@dataclass(frozen=True)
class Event:
    """One generated token of one row and the text that it completes.

    finish: None while the row goes on, else "eos" (an end-of-sequence token), "stop" (a stop string) or "length".
    The text of an end-of-sequence token or stop string is not shown.
    """

    row: int
    token_id: int
    text: str
    finish: str | None = None


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    static_cache: bool = False,
    truncate: bool = False,
    report: Report | None = None,
    on_prefill: Progress | None = None,
    cache: Sequence[KVCache] | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Event]:
    """Continue each prompt (token ids); returns an iterator over an event per row and step until all are finished.

    Rows are padded on the left and give what they give alone; at most nntr_config.json's batch_size run together. A
    prompt that is empty, unknown to the vocabulary or without room in the model's context is a ValueError at once; with
    `truncate` one that is too long loses its beginning. `report` is filled in as it goes; `on_prefill` is called after
    each chunk with the prompt columns done and those of the longest prompt.

    With prompt_lookup_num_tokens rows run one after the other, for each accepts another number of drafted tokens. Every
    token is still chosen from its own logits by every rule and with its own random number, so events are those of plain
    decoding but for rounding: a step of several tokens may differ from steps of one in the last bits of its logits.

    `cache` takes the place of one made here, static_cache and all, for one prompt, of which it already holds the first
    tokens, but not all; in the end it holds the prompt and what was generated, save the last token.

    On a CUDA device steps of one token a row are replayed as one CUDA graph (`causallm.cuda_graphs.graphed`), over
    caches that grow, or with static_cache never move; a warning says where a model does not allow that.

    Of `prompt_cache`, made by `model`, as much is reused as the prompts begin with (`PromptCache.reuse`); the rest is
    computed, always the last token. One of several rows is for as many prompts, run together; with one of one row
    several prompts run one after the other, each with a copy of it.
    """
    for prompt in prompts:
        check_ids(prompt, model.config.vocab_size)
    fitted = [fit_prompt(prompt, config, model.max_length, truncate) for prompt in prompts]
    generators = make_generators(config.seed, len(fitted), model.device)
    rows = [
        _Row(number, prompt, generator, model, config)
        for number, (prompt, generator) in enumerate(zip(fitted, generators, strict=True))
    ]
    size = 1 if config.prompt_lookup_num_tokens else _rows_at_once(model, rows)
    if prompt_cache is not None:
        size = _batch_size(prompt_cache, len(rows), size)
    # A cache that grows is for a moment in memory twice.
    fixed = static_cache or model.storage.positions is not None
    batches = (rows[start : start + size] for start in range(0, len(rows), size or 1))
    report = Report() if report is None else report
    if prompt_cache is not None:
        report.reused_tokens = report.reused_tokens or 0
    if cache is not None and (len(rows) != 1 or cache[0].offset >= len(fitted[0])):
        raise ValueError(
            f"a cache of {cache[0].offset} positions continues one prompt that is longer, got prompts of "
            f"{', '.join(str(len(prompt)) for prompt in fitted)} tokens"
        )

    def begin(batch: Sequence[_Row]) -> Sequence[KVCache]:
        """The cache of a batch, which may hold what its prompts begin with."""
        if cache is not None:
            return cache
        columns = _columns(batch)
        capacity, drafted = columns if fixed else None, config.prompt_lookup_num_tokens
        if prompt_cache is None:
            return model.make_cache(len(batch), capacity, drafted)
        tokens = [row.history.tokens for row in batch]
        return prompt_cache.reuse(model, tokens, capacity, drafted, keep=len(batch) < len(rows))[0]

    return (event for batch in batches for event in _run(model, batch, config, begin, report, on_prefill))


def _columns(rows: Sequence["_Row"]) -> int:
    """Positions of the cache of a batch; the last token of a row is never put into it."""
    return max(len(row.history.tokens) for row in rows) + max(row.room for row in rows) - 1


def _rows_at_once(model: Transformer, rows: Sequence["_Row"]) -> int:
    """nntr_config.json's batch_size, else all rows, or as many as a memory budget has room for."""
    size = model.runtime_config.batch_size or len(rows)
    return rows_that_fit(model, size, _columns(rows)) if rows else size


def _batch_size(held: PromptCache, prompts: int, size: int) -> int:
    """How many prompts run together; ValueError where those of a prompt cache of several rows cannot."""
    if len(held.ids) == 1:
        return 1
    if len(held.ids) != prompts or size < prompts:
        raise ValueError(
            f"the prompt cache has {len(held.ids)} rows, expected as many prompts that run together, got {prompts}, "
            f"{min(size, prompts)} at a time"
        )
    return size


def _run(
    model: Transformer,
    rows: Sequence["_Row"],
    config: GenerationConfig,
    begin: Callable[[Sequence["_Row"]], Sequence[KVCache]],
    report: Report,
    on_prefill: Progress | None,
) -> Iterator[Event]:
    """One batch, from its prompts to the end of its last row."""
    ids, padding = left_pad([row.history.tokens for row in rows], model.device)
    report.prompt_tokens += sum(len(row.history.tokens) for row in rows)
    chunk = step_tokens(model, len(rows))
    counts = model.storage.counts()
    with report.timed("prefill"):
        cache = begin(rows)
        held = cache[0].offset
        if held:
            reused = sum(max(held - ids.shape[1] + len(row.history.tokens), 0) for row in rows)
            report.reused_tokens = (report.reused_tokens or 0) + reused
        tokens = choose(prefill(model, ids[:, held:], cache, padding, chunk, on_prefill), rows, config)
    report.first_tokens += len(rows)
    counts = _note_storage(model, report, "prefill", counts)
    steps = (
        _by_lookup(model, rows[0], int(tokens), cache, config, report)
        if config.prompt_lookup_num_tokens
        else _one_by_one(model, rows, tokens, cache, padding, config, report)
    )
    try:
        yield from steps
    finally:
        report.note_cache(model.cache_dtype, sum(layer.nbytes for layer in cache))
        _note_storage(model, report, "generation", counts)


def _note_storage(model: Transformer, report: Report, phase: str, before: StorageCounts | None) -> StorageCounts | None:
    """Put what came from the disk since `before` to a phase's account; returns what there is until now."""
    now, report.planned_bytes = model.storage.counts(), model.storage.planned_bytes
    if now is not None and before is not None:
        report.note_storage(phase, now - before)
    return now


def _one_by_one(
    model: Transformer,
    rows: Sequence["_Row"],
    tokens: Int[Tensor, "batch"],
    cache: Sequence[KVCache],
    padding: Int[Tensor, "batch"] | None,
    config: GenerationConfig,
    report: Report,
) -> Iterator[Event]:
    """From the first token of each row on, a step for each further one."""

    def eager(tokens: Int[Tensor, "batch"]) -> Float[Tensor, "batch vocab"]:
        return decode_one(model, tokens, cache, padding)

    decode = graphed(model, cache, padding, eager)
    while True:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row.finish is None:
                report.generated_tokens += 1
                yield row.take(token)
        if all(row.finish for row in rows):
            return
        with report.timed("generation"):
            tokens = choose(decode(tokens), rows, config)


def _by_lookup(
    model: Transformer, row: "_Row", token: int, cache: Sequence[KVCache], config: GenerationConfig, report: Report
) -> Iterator[Event]:
    """From the first token of a row on, a step for a token and its draft, of which is kept as much as came true."""
    lookup = PromptLookup(row.history.tokens, config.max_matching_ngram_size, config.prompt_lookup_num_tokens)
    ropes = {model.config.rope(layer_id) for layer_id in range(len(model.layers))}
    counts = report.lookup = report.lookup or Lookup()
    report.generated_tokens += 1
    yield row.take(token)
    while row.finish is None:
        with report.timed("generation"):
            begin = cache[0].offset
            # A step gives one token more than it drafts, and the last token of a row is never put into the cache.
            room = min(lookup.length, row.room - 1)
            draft = lookup.draft(room if rotates_alike(ropes, begin + 1, begin + 1 + room) else 0)
            logits = decode_draft(model, [token, *draft], cache)
        counts.steps, counts.drafted = counts.steps + 1, counts.drafted + len(draft)
        for accepted, each in enumerate(logits.split(1)):
            with report.timed("generation"):
                token = int(choose(each, [row], config))
            right = draft[accepted : accepted + 1] == [token]
            counts.accepted += right
            report.generated_tokens += 1
            yield row.take(token)
            if row.finish or not right:
                break
        with report.timed("generation"):
            take_back(cache, begin + 1 + accepted)
            lookup.learn(len(draft), accepted)


@torch.inference_mode()
def choose(
    logits: Float[Tensor, "batch vocab"], rows: Sequence["_Row"], config: GenerationConfig
) -> Int[Tensor, "batch"]:
    """The next token of each row, every option obeyed."""
    adjusted = adjust_logits(logits, [row.history for row in rows], config)
    return sample(adjusted, config, [row.generator for row in rows])


class _Row:
    """The state of one row: what it has seen, what text it holds back and why it ended."""

    def __init__(
        self, row: int, prompt: list[int], generator: torch.Generator, model: Transformer, config: GenerationConfig
    ):
        self.row, self.generator = row, generator
        self.history = TokenHistory(prompt)
        self.room = min(config.max_new_tokens, model.max_length - len(prompt))
        self.finish: str | None = None
        self._ends = config.eos_token_id
        self._decoder = None if model.tokenizer is None else StreamDecoder(model.tokenizer, prompt)
        self._stops = StopStrings(config.stop)

    def take(self, token: int) -> Event:
        """Account for the next token."""
        self.history.append(token)
        self.room -= 1
        finish = "eos" if token in self._ends else "length" if self.room == 0 else None
        text, stopped = self._stops.push(self._decode(token, finish))
        if finish and not stopped:
            text += self._stops.flush()
        self.finish = "stop" if stopped else finish
        return Event(self.row, token, text, self.finish)

    def _decode(self, token: int, finish: str | None) -> str:
        """The text that a token completes; at the end all that was held back."""
        if self._decoder is None:
            return ""
        text = "" if finish == "eos" else self._decoder.push(token)
        return text + self._decoder.flush() if finish else text
