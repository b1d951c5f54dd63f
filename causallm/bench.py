"""Measuring prefill and decode by themselves, on random tokens, along the path that generation takes."""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from causallm.causal_lm import CausalLM
from causallm.cuda_graphs import graphed
from causallm.memory_bandwidth import wait_for
from causallm.packing import packed_tensors
from causallm.prompt_cache.reuse import PromptCache
from causallm.steps import decode_one, prefill
from causallm.storage.step_memory import rows_that_fit, step_tokens
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from layers.expert_store import ExpertStore
from layers.kv_cache import KVCache

States = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One thing to measure. kind: "pp", a prompt of `tokens` taken in, or "tg", `tokens` generated one by one.

    depth: tokens in the cache before it begins. tokens and depth are of each of `batch` rows.
    """

    kind: str
    tokens: int
    depth: int
    threads: int
    batch: int

    @property
    def name(self) -> str:
        """As llama-bench has it: pp512, tg128 @ d4096."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Measurement:
    """rates: tokens a second, all rows together, of each repeat. step_bytes: see `bytes_per_step`; None for "pp"."""

    case: Case
    rates: tuple[float, ...]
    step_bytes: float | None

    @property
    def mean(self) -> float:
        """Tokens a second."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """The standard deviation of a sample; 0 for a single repeat."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """Weights and cache read a second; a step reads them once for all rows."""
        return None if self.step_bytes is None else self.step_bytes * self.mean / self.case.batch


def make_cases(
    prompts: Sequence[int],
    generates: Sequence[int],
    depths: Sequence[int],
    threads: Sequence[int],
    batches: Sequence[int],
    max_length: int,
) -> list[Case]:
    """All combinations; lengths of 0 are left out. ValueError where nothing is left or one exceeds `max_length`."""
    kinds = [("pp", tokens) for tokens in prompts if tokens] + [("tg", tokens) for tokens in generates if tokens]
    if not kinds:
        raise ValueError("there is nothing to measure: all prompt and generate lengths are 0")
    longest, depth = max(kinds, key=lambda kind: kind[1]), max(depths)
    if longest[1] + depth > max_length:
        option = {"pp": "prompt", "tg": "generate"}[longest[0]]
        raise ValueError(
            f"{option} {longest[1]} at depth {depth} needs {longest[1] + depth} tokens, but the context is "
            f"{max_length} tokens"
        )
    # Those of one batch and depth stand together, for the cache is filled to the depth once for them.
    return [
        Case(kind, tokens, depth, count, batch)
        for batch, depth, count, (kind, tokens) in itertools.product(batches, depths, threads, kinds)
    ]


def measure(
    model: CausalLM, cases: Sequence[Case], repeat: int, held: PromptCache | None = None
) -> Iterator[Measurement]:
    """Yields the measurement of each case: one run that warms up, then `repeat` that count. Tokens are random, the
    seed fixed; those in the cache before a case begins are `held`, of its depth and batch and without padding, or
    random as well. Sets torch's number of threads, and puts it back at the end. ValueError at once for rows that a
    memory budget has no room for; under one `held` is used up.
    """
    for case in cases:
        _check_room(model, case)
    return _measure(model, cases, repeat, held)


def _check_room(model: CausalLM, case: Case) -> None:
    columns = case.tokens + 2 * case.depth
    positions = model.storage.positions
    if positions is not None and (
        case.batch * columns > positions or rows_that_fit(model, case.batch, columns) < case.batch
    ):
        rows = "1 row" if case.batch == 1 else f"{case.batch} rows"
        twice = " (the depth twice, for its repeats begin with a copy)" if case.depth else ""
        raise ValueError(
            f"{case.name}: {rows} of {columns} positions{twice} have no room in the memory that was planned for "
            f"{positions}; raise max_seq_len (--max-length) or, for more rows, batch_size of nntr_config.json"
        )


def _measure(model: CausalLM, cases: Sequence[Case], repeat: int, held: PromptCache | None) -> Iterator[Measurement]:
    before = torch.get_num_threads()
    try:
        for (batch, depth), group in itertools.groupby(cases, lambda case: (case.batch, case.depth)):
            states: States | None = None if held is None else held.states(model)
            for case in group:
                torch.set_num_threads(case.threads)
                if depth and states is None:
                    states = _fill(model, batch, depth)
                _run(model, case, states)
                rates = tuple(batch * case.tokens / _run(model, case, states) for _ in range(repeat))
                yield Measurement(case, rates, bytes_per_step(model, case) if case.kind == "tg" else None)
    finally:
        torch.set_num_threads(before)


def bytes_per_step(model: CausalLM, case: Case) -> float:
    """Bytes that a decoding step reads, for GB/s: weights once, and each row's cache.

    All parameters count but an embedding table that is not also the head: of that a step reads one row a token. Of a
    layer's E experts k are chosen for a token; a step of B rows reads 1 - (1 - k/E)^B of them on average, were all
    chosen equally often (k/E for one row). The cache is that of the mean step: as it grows from depth + 1 to
    depth + tokens positions, a sliding layer's never beyond its window.
    """
    cfg = model.config
    read = bytes_per_token(model, case.batch)
    lengths = range(case.depth + 1, case.depth + case.tokens + 1)
    windows = (cfg.window(layer_id) or lengths.stop for layer_id in range(cfg.num_hidden_layers))
    positions = sum(statistics.fmean(min(length, window) for length in lengths) for window in windows)
    return read + case.batch * model.cache_position_bytes * positions


def bytes_per_token(model: Transformer, batch: int = 1) -> float:
    """Bytes of weights that a step of so many rows reads; see `bytes_per_step`."""
    sizes = {name: weight.nbytes for name, weight in expected_parameters(model).items()}
    read = float(sum(sizes.values()))
    if not model.config.tie_word_embeddings:
        read -= sizes["embed_tokens.weight"]
    for path, store in model.named_modules():
        if isinstance(store, ExpertStore):
            experts = sum(nbytes for name, nbytes in sizes.items() if name.startswith(f"{path}."))
            read -= experts * (1 - model.config.num_experts_per_tok / len(store)) ** batch
    return read


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of all weights, shared ones once, wherever they are."""
    return sum(tensor.nbytes for tensor in expected_parameters(module).values())


def count_parameters(model: nn.Module) -> int:
    """Numbers in all weights, shared ones once; of a packed weight those that it stands for."""
    beyond = sum(packed.shape.numel() - packed.parameter.numel() for packed in packed_tensors(model).values())
    return sum(weight.numel() for weight in expected_parameters(model).values()) + beyond


def name_dtypes(model: nn.Module) -> str:
    """What the parameters are held in: "bfloat16", or several such as "Q4_0+bfloat16"."""
    kinds = {name: packed.kind for name, packed in packed_tensors(model).items()}
    floats = {
        str(p.dtype).removeprefix("torch.") for name, p in expected_parameters(model).items() if name not in kinds
    }
    return "+".join(sorted({*kinds.values(), *floats}))


def _fill(model: CausalLM, batch: int, depth: int) -> States:
    """The state of a cache after `depth` random tokens a row."""
    cache = model.make_cache(batch, depth)
    prefill(model, _random_ids(model, batch, depth), cache, None, step_tokens(model, batch))
    return [layer.state() for layer in cache]


@torch.inference_mode()
def _run(model: CausalLM, case: Case, states: States | None) -> float:
    """Seconds that the case takes; the cache is made, and filled from `states`, beforehand."""
    cache = model.make_cache(case.batch, case.depth + case.tokens)
    if states is not None:
        for layer, state in zip(cache, states, strict=True):
            layer.restore(state, case.depth)
    ids = _random_ids(model, case.batch, case.tokens if case.kind == "pp" else 1)
    wait_for(model.device)
    begin = time.perf_counter()
    if case.kind == "pp":
        prefill(model, ids, cache, None, step_tokens(model, case.batch))
    else:
        _decode(model, ids[:, 0], cache, case.tokens)
    wait_for(model.device)
    return time.perf_counter() - begin


def _decode(model: CausalLM, tokens: Int[Tensor, "batch"], cache: Sequence[KVCache], steps: int) -> None:
    """Greedy steps and nothing else."""
    decode = graphed(model, cache, None, lambda tokens: decode_one(model, tokens, cache, None))
    for _ in range(steps):
        tokens = decode(tokens).argmax(-1)


def _random_ids(model: CausalLM, batch: int, time: int) -> Int[Tensor, "batch time"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, time), generator=generator).to(model.device)
