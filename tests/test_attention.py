"""Attention against its definition in fp64, alone and over caches, with every option."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from layers import mha_core
from layers.kv_cache import KVCache, StaticKVCache
from layers.mha_core import MHACore, attend
from layers.rope import Rope, inverse_frequencies, rotary_tables, rotate
from layers.sliding_cache import SlidingKVCache
from layers.step import Mask, Step

HEAD_DIM = 8


@pytest.fixture(params=[3, 128], autouse=True)
def _query_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences in several blocks of queries, and in one."""
    monkeypatch.setattr(mha_core, "QUERY_BLOCK", request.param)


def mask_of(allowed: Tensor) -> Mask:
    return Mask(torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf))


def make_step(offset: int, time: int, dtype: torch.dtype = torch.float32) -> Step:
    return Step(offset, time, dtype, torch.device("cpu"))


def spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Head by head in fp64; `allowed` is (batch or 1, 1, time, past)."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, _, _ = query.shape
    group = heads // key.shape[1]
    mixed = torch.empty_like(query)
    for row, head in itertools.product(range(batch), range(heads)):
        scores = query[row, head] @ key[row, head // group].T * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.exp() * allowed[min(row, len(allowed) - 1), 0]
        total = weights.sum(-1, keepdim=True) + (0.0 if sinks is None else math.exp(sinks[head]))
        mixed[row, head] = weights / total @ value[row, head // group]
    return mixed.float()


def random_inputs(heads: int, kv_heads: int, time: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((heads, time), (kv_heads, past), (kv_heads, past))
    query, key, value = (torch.randn(2, count, length, HEAD_DIM) for count, length in shapes)
    return query, key, value


@pytest.mark.parametrize("options", [(None, False), (1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("kind", ["all", "causal", "masked", "masked by row"])
@pytest.mark.parametrize("time", [1, 6])
def test_attend_is_its_definition(
    time: int, kind: str, heads: int, kv_heads: int, options: tuple[float | None, bool]
) -> None:
    softcap, with_sinks = options
    past = time if kind == "causal" else 9
    query, key, value = random_inputs(heads, kv_heads, time, past)
    sinks = torch.randn(heads) if with_sinks else None
    allowed = torch.ones(1, 1, time, past, dtype=torch.bool)
    mask = Mask()
    if kind == "causal":
        allowed, mask = allowed.tril(), make_step(0, time).mask(None, (range(time),))
    elif kind.startswith("masked"):
        allowed = torch.rand(2 if "row" in kind else 1, 1, time, past) < 0.5
        allowed[..., 0] = True
        mask = mask_of(allowed)
    found = attend(query, key, value, mask, 0.3, softcap, sinks)
    expected = spelled_out(query, key, value, allowed, 0.3, softcap, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [1, 6])
def test_attend_takes_keys_of_another_dtype_and_answers_in_that_of_the_query(dtype: torch.dtype, time: int) -> None:
    query, key, value = random_inputs(4, 2, time, 9)
    allowed = torch.ones(1, 1, time, 9, dtype=torch.bool)
    found = attend(query, key.to(dtype), value.to(dtype), Mask(), 0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, spelled_out(query, key, value, allowed, 0.3), rtol=0.0, atol=0.02)
    assert attend(query.to(dtype), key, value, Mask(), 0.3).dtype == dtype


def test_large_scores_do_not_overflow() -> None:
    query, key, value = random_inputs(2, 2, 3, 4)
    for sinks in (None, torch.tensor([300.0, -300.0])):
        found = attend(1000 * query, 1000 * key, value, Mask(), 1.0, sinks=sinks)
        assert found.isfinite().all()


def test_a_large_sink_takes_everything() -> None:
    query, key, value = random_inputs(2, 2, 3, 4)
    found = attend(query, key, value, Mask(), 1.0, sinks=torch.tensor([50.0, -50.0]))
    assert found[:, 0].abs().max() < 1e-6
    torch.testing.assert_close(found[:, 1], attend(query, key, value, Mask(), 1.0)[:, 1])


ROPE = Rope("default", HEAD_DIM)
TIME = 23
HEADS, KV_HEADS = 4, 2


def whole(core: MHACore, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """All positions at once by the definition, from the same rotation."""
    tables = rotary_tables(inverse_frequencies(ROPE, TIME)[None], torch.arange(TIME)[None], 1.0, torch.float32)
    query, key = (rotate(x.unflatten(-1, (-1, HEAD_DIM)), *tables).transpose(1, 2) for x in (query, key))
    value = value.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
    allowed = (distance >= 0) & (distance < (core.window or TIME))
    mixed = spelled_out(query, key, value, allowed[None, None], core.scale, core.score_softcap, sinks)
    return mixed.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("pieces", [[23], [10, 13], [1] * 23, [3, 1, 1, 9, 1, 2, 1, 1, 4], [22, 1]])
@pytest.mark.parametrize("window", [None, 1, 5, 23])
@pytest.mark.parametrize("options", [(None, False), (2.0, True)])
def test_any_cut_of_the_sequence_gives_the_same(
    pieces: list[int], window: int | None, options: tuple[float | None, bool]
) -> None:
    softcap, with_sinks = options
    core = MHACore(HEADS, KV_HEADS, HEAD_DIM, ROPE, HEAD_DIM**-0.5, window, softcap)
    sinks = torch.randn(HEADS) if with_sinks else None
    query = torch.randn(2, TIME, HEADS * HEAD_DIM)
    key, value = torch.randn(2, TIME, KV_HEADS * HEAD_DIM), torch.randn(2, TIME, KV_HEADS * HEAD_DIM)
    expected = whole(core, query, key, value, sinks)
    shape = (2, KV_HEADS, HEAD_DIM, torch.float32)
    caches = [KVCache(*shape), StaticKVCache(*shape, capacity=TIME)]
    if window is not None:
        caches.append(SlidingKVCache(*shape, window=window))
    for cache in caches:
        mixed = []
        for x in zip(*(tensor.split(pieces, 1) for tensor in (query, key, value)), strict=True):
            mixed.append(core(*x, make_step(cache.offset, x[0].shape[1]), cache, sinks))
        torch.testing.assert_close(torch.cat(mixed, 1), expected, rtol=1e-4, atol=1e-5)
    if len(pieces) == 1:
        alone = core(query, key, value, make_step(0, TIME), None, sinks)
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [[23], [10, 13], [1] * 23])
@pytest.mark.parametrize("window", [None, 5])
def test_short_floats_err_by_their_rounding(dtype: torch.dtype, pieces: list[int], window: int | None) -> None:
    core = MHACore(HEADS, KV_HEADS, HEAD_DIM, ROPE, HEAD_DIM**-0.5, window)
    query = torch.randn(2, TIME, HEADS * HEAD_DIM).to(dtype)
    key, value = (torch.randn(2, TIME, KV_HEADS * HEAD_DIM).to(dtype) for _ in range(2))
    expected = whole(core, query.float(), key.float(), value.float(), None)
    cache = KVCache(2, KV_HEADS, HEAD_DIM, dtype)
    mixed = [
        core(*x, make_step(cache.offset, x[0].shape[1], dtype), cache)
        for x in zip(*(tensor.split(pieces, 1) for tensor in (query, key, value)), strict=True)
    ]
    found = torch.cat(mixed, 1)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_over_several_query_blocks_are_those_of_the_definition(
    documents: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mha_core, "QUERY_BLOCK", 5)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(4, 2, 12, 12)]
    numbers = torch.tensor([[0] * 4 + [1] * 8, [0] * 12]) if documents else None
    step = Step(0, 12, torch.float32, torch.device("cpu"), documents=numbers)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    allowed = ((distance >= 0) & (distance < (window or 12))).expand(2, 1, 12, 12)
    if numbers is not None:
        allowed = allowed & (numbers[:, None, :, None] == numbers[:, None, None, :])
    found = attend(*inputs, step.mask(window, (range(12),)), 0.3)
    expected = spelled_out(*inputs, allowed, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(found.shape)
    own, right = (torch.autograd.grad((result * weights).sum(), inputs) for result in (found, expected))
    torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(mha_core, "KEPT_QUERIES", 1)
    fused = attend(*inputs, step.mask(window, (range(12),)), 0.3)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)


def test_autocast_attends_in_its_dtype_from_end_to_end() -> None:
    query, key, value = random_inputs(4, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        mask = make_step(0, 6).mask(2, (range(6),))
        found = attend(query, key, value, mask, 0.3)
    assert mask.bias is not None
    assert mask.bias.dtype == torch.bfloat16
    short = [tensor.bfloat16() for tensor in (query, key, value)]
    assert torch.equal(found, attend(*short, mask, 0.3))
