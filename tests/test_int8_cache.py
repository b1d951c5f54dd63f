"""The cache of 8 bits: how near its numbers are, what it costs, and that a model computes with it as with any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from families import FAMILIES, in_pieces, our_forward, prompt, relative_error
from test_kernels import LEVELS, needs_kernels
from text_models import PROMPT, save_text_model

from causallm import load_model
from causallm.perplexity import perplexity
from causallm.report import Report
from layers.int8_cache import Int8KVCache, position_bytes, quantize
from layers.kernels import halves, native
from layers.kv_cache import KVCache


def test_numbers_are_within_half_a_step() -> None:
    x = torch.randn(2, 3, 5, 16) * torch.logspace(-6, 6, 5)[:, None]
    codes, scales = quantize(x)
    steps = x.abs().amax(-1, keepdim=True) / 127
    assert ((codes * scales - x).abs() <= 0.501 * steps).all()
    assert codes.abs().amax(-1).eq(127).all()


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize(torch.zeros(1, 2, 3, 4))
    assert torch.equal(codes * scales, torch.zeros(1, 2, 3, 4))


def test_what_is_given_back_has_the_dtype_that_came() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cache = Int8KVCache(KVCache(1, 1, 4, torch.int8), KVCache(1, 1, 1, torch.float32))
        keys, values, _ = cache.update(*torch.randn(2, 1, 1, 3, 4, dtype=dtype))
        assert keys.dtype == values.dtype == dtype
        assert cache.dtype == torch.int8


def test_a_state_of_floats_is_refused() -> None:
    cache = Int8KVCache(KVCache(1, 1, 4, torch.int8), KVCache(1, 1, 1, torch.float32))
    floats = KVCache(1, 1, 4, torch.float32)
    floats.update(*torch.randn(2, 1, 1, 3, 4))
    with pytest.raises(ValueError, match="the state's keys are no bytes with a scale each"):
        cache.restore(floats.state(), 3)
    assert cache.offset == 0


class Rounding(KVCache):
    """Keeps every column, as floats, which are rounded to 127 steps as they come."""

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return super().update(*(_rounded(x) for x in (keys, values)))

    def takes(self, time: int) -> bool:
        """The native kernels would write into it what is not rounded."""
        return False


def _rounded(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / step) * step


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_every_family_computes_with_the_rounded_numbers(
    checkpoints: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all columns: what the sliding ones of them mask away makes no difference. By the modules alone: what the
    kernels compute differs in the last bits, and a number between two steps may be rounded to the other."""
    monkeypatch.setattr(halves, "_serves", lambda _: False)
    ids, model, cuts = prompt(), checkpoints.ours(name, kv_cache_dtype="int8"), (13, 14, 33, 34)
    cfg = model.config
    rounding = [Rounding(2, cfg.num_key_value_heads, cfg.head_dim, torch.float32) for _ in model.layers]
    logits = in_pieces(our_forward(model), ids, cuts)
    assert all(layer.dtype == torch.int8 for layer in model.make_cache())
    assert relative_error(logits, in_pieces(our_forward(model, rounding), ids, cuts)) < 1e-5
    off = relative_error(logits, in_pieces(our_forward(checkpoints.ours(name)), ids, cuts))
    assert 1e-4 < off < 0.5


NATIVE = ("qwen3", "qwen3-moe", "gemma3", "gemma3 score softcap", "gpt-oss", "gpt-oss tied, clamping")
"""Heads of whole vectors."""


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NATIVE)
@torch.inference_mode()
def test_the_kernels_write_and_read_what_the_modules_do(
    checkpoints: Checkpoints, name: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for numbers between two steps, which are rounded to either."""
    ids, model, cuts = prompt(), checkpoints.ours(name, kv_cache_dtype="int8"), (13, 14, 15, 33, 34)
    served: list[int] = []
    run, turn = native.run_halves, native.turn
    monkeypatch.setattr(native, "run_halves", lambda *arguments: (served.append(arguments[1]), run(*arguments))[1])
    monkeypatch.setattr(native, "turn", lambda *arguments: (served.append(0), turn(*arguments))[1])
    native.choose(level)
    try:
        fast = model.make_cache(2)
        logits = in_pieces(our_forward(model, fast), ids, cuts)
        assert max(served) > 0 == min(served)
        monkeypatch.setattr(halves, "_serves", lambda _: False)
        slow = model.make_cache(2)
        expected = in_pieces(our_forward(model, slow), ids, cuts)
    finally:
        native.choose(native.AVX512)
    assert relative_error(logits, expected) < 1e-2
    for one, other in zip(fast, slow, strict=True):
        found, wanted = one.state(), other.state()
        for part in ("keys", "values"):
            apart = (found[part].int() - wanted[part].int()).abs()
            assert apart.max() <= 1
            assert apart.float().mean() < 0.01
            assert relative_error(found[f"{part[:-1]}_scales"], wanted[f"{part[:-1]}_scales"]) < 2e-3


def test_the_cache_is_as_large_as_it_is_said_to_be(tmp_path: Path) -> None:
    save_text_model(tmp_path, head_dim=16)
    sizes = {}
    for name in ("int8", "float16", "float32"):
        model = load_model(tmp_path, kv_cache_dtype=name)
        assert model.cache_dtype == getattr(torch, name)
        cache = model.make_cache(1, 100)
        sizes[name] = sum(layer.nbytes for layer in cache)
        assert sizes[name] == 100 * len(cache) * model.cache_position_bytes
    assert sizes["float32"] == 2 * sizes["float16"]
    assert sizes["int8"] == sizes["float16"] * (16 + 4) // 32
    assert position_bytes(64, torch.int8) == 68


def test_text_comes_and_the_report_names_the_cache(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    model, report = load_model(tmp_path, kv_cache_dtype="int8"), Report()
    texts = [
        model.generate_text([PROMPT, "girl"], max_new_tokens=20, report=report, **options)
        for options in ({}, {"static_cache": True}, {"prompt_lookup_num_tokens": 4})
    ]
    assert texts[0] == texts[1] == texts[2]
    assert any(line.startswith("cache: int8, ") for line in report.lines())


def test_perplexity_shows_what_8_bits_cost(checkpoints: Checkpoints) -> None:
    ids = prompt(1).tolist()[0]
    scores: dict[Any, float] = {
        dtype: perplexity(checkpoints.ours("llama", kv_cache_dtype=dtype), ids, 40, 20).nats
        for dtype in (None, "float32", "int8")
    }
    assert scores["float32"] == pytest.approx(scores[None], rel=1e-5)
    assert scores["int8"] != pytest.approx(scores[None], rel=1e-5)
    assert scores["int8"] == pytest.approx(scores[None], rel=0.02)
