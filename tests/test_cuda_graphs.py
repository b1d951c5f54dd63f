"""Decoding by a recorded step, with a recording that computes again in place of a CUDA graph: the same numbers."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import MODELS, TIME, prompt, relative_error
from torch import Tensor

import causallm.cuda_graphs
from causallm.config import GenerationConfig
from causallm.cuda_graphs import GraphDecoder, capture_for, graphed, obstacle
from causallm.generation import generate
from causallm.steps import decode_one, prefill
from layers.kv_cache import KVCache

PADDING = torch.tensor([0, 2, 4])
END = 26
"""Columns of most comparisons, past `WINDOW` and `ORIGINAL` in every row."""
TOLERANCE = 2e-5
MIXTURES = tuple(name for name, (kind, _) in MODELS.items() if kind in ("Qwen3MoeConfig", "GptOssConfig"))
RECORDED = tuple(name for name in MODELS if name not in MIXTURES)


class Recorder:
    """Stands for a graph: `replay` writes into the tensor that the first run returned; counts what is done."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.recorded += 1
        result = function().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(function())

        return replay, result


@pytest.fixture(autouse=True)
def _no_native_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch's operators, as a GPU has it."""
    monkeypatch.setattr("layers.mha_core.attends_natively", lambda *_: False)


def refuse(tokens: Tensor) -> Tensor:
    raise AssertionError("the recorded step was not used")


def filled(model: Any, ids: Tensor, padding: Tensor | None, capacity: int | None) -> list[KVCache]:
    cache = model.make_cache(len(ids), capacity)
    prefill(model, ids, cache, padding, 16)
    return cache


def both_ways(
    model: Any, columns: int, padding: Tensor | None = None, capacity: int | None = None, end: int = END
) -> tuple[Tensor, Tensor, Recorder, list[KVCache], list[KVCache]]:
    """Logits of the steps from the first `columns` tokens of a prompt to `end`, recorded and plain, and both caches."""
    ids, recorder = prompt(3 if padding is not None else 2), Recorder()
    ours, plain = (filled(model, ids[:, :columns], padding, capacity) for _ in range(2))
    decoder = GraphDecoder(model, ours, padding, refuse, recorder)
    steps = range(columns, end)
    found = torch.stack([decoder(ids[:, step]).clone() for step in steps])
    expected = torch.stack([decode_one(model, ids[:, step], plain, padding) for step in steps])
    return found, expected, recorder, ours, plain


@pytest.mark.parametrize(
    ("name", "padding"),
    [*((name, PADDING) for name in RECORDED), *((name, None) for name in ("llama", "mistral", "gemma3", "longrope"))],
    ids=lambda value: value if isinstance(value, str) else "alone" if value is None else "padded",
)
def test_every_family_and_rope_decodes_the_same(checkpoints: Any, name: str, padding: Tensor | None) -> None:
    """From before a window is full, or after, and across the length at which some rotary kinds change."""
    model = checkpoints.ours(name)
    assert obstacle(model, model.make_cache(2)) is None
    columns = 5 if padding is not None else 12
    found, expected, recorder, ours, plain = both_ways(model, columns, padding)
    assert relative_error(found, expected) < TOLERANCE
    assert recorder.replayed == END - columns
    for one, other in zip(ours, plain, strict=True):
        assert one.offset == other.offset == END
        state = other.state()
        for part, tensor in one.state().items():
            torch.testing.assert_close(tensor, state[part], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama MQA, head_dim 12"])
def test_a_cache_that_never_moves_is_recorded_once(checkpoints: Any, name: str) -> None:
    found, expected, recorder, *_ = both_ways(checkpoints.ours(name), 3, capacity=TIME)
    assert relative_error(found, expected) < TOLERANCE
    assert recorder.recorded == 1


@pytest.mark.parametrize("name", ["qwen3 sliding, tied", "gemma3"])
@pytest.mark.parametrize("capacity", [None, TIME])
def test_it_is_recorded_again_when_memory_moves_or_more_of_it_is_seen(
    checkpoints: Any, name: str, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("causallm.cuda_graphs.FEWEST_SLOTS", 4)
    monkeypatch.setattr(KVCache, "step", 8)
    found, expected, recorder, *_ = both_ways(checkpoints.ours(name), 3, torch.tensor([0, 1, 2]), capacity, TIME)
    assert relative_error(found, expected) < TOLERANCE
    # 4, 8, 16, 32 and 40 slots; in between a cache that grows has moved.
    assert recorder.recorded == 5 if capacity else recorder.recorded > 5


def test_slots_not_used_yet_are_not_seen_whatever_lies_there(checkpoints: Any) -> None:
    model, ids = checkpoints.ours("gemma3"), prompt()
    cache = model.make_cache(2, TIME)
    for layer in cache:
        layer.reserve(min(TIME, layer.limit or 8))
        for held in (layer._keys, layer._values):
            held.fill_(torch.nan)
    prefill(model, ids[:, :3], cache, None, 16)
    decoder = GraphDecoder(model, cache, None, refuse, Recorder())
    plain = filled(model, ids[:, :3], None, None)
    for step in range(3, 20):
        assert relative_error(decoder(ids[:, step]), decode_one(model, ids[:, step], plain, None)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_decode_the_same_but_for_their_rounding(checkpoints: Any, dtype: str) -> None:
    found, expected, *_ = both_ways(checkpoints.ours("qwen3", dtype), 12)
    assert found.dtype == expected.dtype == getattr(torch, dtype)
    assert relative_error(found.float(), expected.float()) < 0.05


def test_plain_steps_can_come_in_between(checkpoints: Any) -> None:
    """A hook that appears is called, and the cache goes on."""
    model, ids = checkpoints._load("qwen3", None), prompt()
    ours, plain = (filled(model, ids[:, :8], None, None) for _ in range(2))
    recorder = Recorder()
    decoder = GraphDecoder(model, ours, None, lambda tokens: decode_one(model, tokens, ours, None), recorder)
    called: list[int] = []
    for step in range(8, 20):
        hook = model.norm.register_forward_hook(lambda *_: called.append(1)) if step == 12 else None
        assert relative_error(decoder(ids[:, step]), decode_one(model, ids[:, step], plain, None)) < TOLERANCE
        if hook is not None:
            hook.remove()
    assert recorder.replayed == 11
    assert len(called) == 2


def test_a_recording_that_fails_leaves_plain_steps_and_a_warning(checkpoints: Any) -> None:
    def fail(function: Callable[[], Tensor]) -> Any:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    model, ids = checkpoints.ours("gemma3"), prompt()
    ours, plain = (filled(model, ids[:, :12], None, None) for _ in range(2))
    decoder = GraphDecoder(model, ours, None, lambda tokens: decode_one(model, tokens, ours, None), fail)
    with pytest.warns(UserWarning, match="not as one CUDA graph: operation not permitted when stream is capturing$"):
        found = decoder(ids[:, 12]).clone()
    assert torch.equal(found, decode_one(model, ids[:, 12], plain, None))
    assert torch.equal(decoder(ids[:, 13]), decode_one(model, ids[:, 13], plain, None))
    assert ours[0].offset == 14


def test_a_full_cache_is_an_error_as_ever(checkpoints: Any) -> None:
    model, ids = checkpoints.ours("qwen3"), prompt()
    cache = filled(model, ids[:, :4], None, 5)
    decoder = GraphDecoder(model, cache, None, lambda tokens: decode_one(model, tokens, cache, None), Recorder())
    decoder(ids[:, 4])
    with pytest.raises(ValueError, match="the cache holds 5 positions, but 6 are needed"):
        decoder(ids[:, 5])
    assert [layer.offset for layer in cache] == [5] * len(cache)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A device that records."""
    recorder = Recorder()
    monkeypatch.setattr(causallm.cuda_graphs, "capture_for", lambda device: recorder)
    return recorder


def tokens_of(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[tuple[int, int]]:
    config = GenerationConfig(max_new_tokens=20, **options)
    return [(event.row, event.token_id) for event in generate(model, prompts, config)]


@pytest.mark.parametrize("name", ["qwen2 sliding, tied", "gemma3", "longrope"])
def test_generate_uses_it(checkpoints: Any, name: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = checkpoints.ours(name), [prompt(1, 9)[0].tolist(), prompt(1, 4, seed=1)[0].tolist()]
    found = tokens_of(model, prompts)
    assert recorder.replayed == 19
    monkeypatch.undo()
    assert found == tokens_of(model, prompts)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (MIXTURES[0], {}, "a mixture of experts is routed by the processor"),
        ("gpt-oss", {}, "a mixture of experts is routed by the processor"),
        ("qwen3", {"kv_cache_dtype": "int8"}, "the cache is of a kind that only the processor can write to"),
    ],
)
def test_what_cannot_be_recorded_is_generated_plainly_with_a_warning(
    checkpoints: Any, name: str, options: dict[str, Any], reason: str, recorder: Recorder
) -> None:
    model = checkpoints.ours(name, **options)
    with pytest.warns(UserWarning, match=f"not as one CUDA graph: {reason}"):
        found = tokens_of(model, [[1, 2, 3]])
    assert len(found) == 20
    assert recorder.recorded == 0


def test_other_obstacles_are_named(checkpoints: Any) -> None:
    model = checkpoints._load("qwen3", None)
    cache = model.make_cache(1)
    assert obstacle(model, cache) is None
    hook = model.layers[2].mlp.register_forward_pre_hook(lambda *_: None)
    assert obstacle(model, cache) == "a recorded step would not call the hooks"
    hook.remove()
    model.storage.whole = False
    assert obstacle(model, cache) == "the weights are fetched as they are needed"
    model.storage.whole = True
    model.__class__ = type("Mine", (type(model),), {"forward": lambda self, *_, **__: None})
    assert obstacle(model, cache) == "Mine has a forward of its own"


def test_a_cpu_records_nothing(checkpoints: Any) -> None:
    model = checkpoints.ours("qwen3")
    assert capture_for(torch.device("cpu")) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphed(model, model.make_cache(1), None, refuse) is refuse
