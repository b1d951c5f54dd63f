"""Prompt caches in use: restored equals fresh bit for bit, what is reused, what is not, and what the report says."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from families import MODELS, ORIGINAL, SLIDING_MODELS, WINDOW
from text_models import PROMPT, save_text_model
from torch import Tensor

from causallm import load_model
from causallm.config import GenerationConfig
from causallm.generation import generate
from causallm.prompt_cache import PromptCache, load_prompt_cache, save_prompt_cache
from causallm.prompt_cache.make import make_prompt_cache
from causallm.prompt_cache.reuse import ROLLBACK, common_columns, common_prefix
from causallm.prompt_ids import left_pad
from causallm.report import Report
from causallm.steps import prefill
from causallm.storage.storage import Storage

CHUNK = 8
HELD, WHOLE, NEW = 24, 41, 12
"""Tokens of the prompt that is kept (whole chunks, more than `WINDOW`), of the one that is answered, and generated."""
GREEDY = GenerationConfig(max_new_tokens=NEW)


def small(checkpoints: Checkpoints, name: str, **nntr_overrides: Any) -> Any:
    """A model of `families`; the dynamic rope goes beyond the trained length."""
    model = copy.copy(checkpoints.ours(name, init_seq_len=CHUNK, **nntr_overrides))
    model.max_length = 64
    return model


def random_rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def through_file(model: Any, held: PromptCache, path: Path) -> PromptCache:
    save_prompt_cache(path, model, held.cache, held.ids, rope_length=held.rope_length)
    return load_prompt_cache(path, model)


def tokens(model: Any, rows: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """What each row is continued with."""
    texts: list[list[int]] = [[] for _ in rows]
    for event in generate(model, rows, options.pop("config", GREEDY), **options):
        texts[event.row].append(event.token_id)
    return texts


@torch.inference_mode()
def logits_after(model: Any, rows: Sequence[Sequence[int]], held: PromptCache | None) -> tuple[Tensor, Tensor]:
    """The logits after the prompt, and those of some tokens after it one by one."""
    ids, padding = left_pad(rows, torch.device("cpu"))
    cache, reused = (model.make_cache(len(rows)), 0) if held is None else held.reuse(model, rows)
    first = prefill(model, ids[:, reused:], cache, padding, CHUNK)
    steps = [model(torch.full((len(rows), 1), token), cache, padding=padding) for token in (3, 1, 4, 1, 5)]
    return first, torch.cat(steps, 1)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_restored_is_fresh_bit_for_bit(checkpoints: Checkpoints, tmp_path: Path, name: str, dtype: str | None) -> None:
    """Growing and sliding caches of every family. The rope that turns each length otherwise is computed anew for a
    longer prompt; longrope turns both of these alike."""
    model = small(checkpoints, name, **({"kv_cache_dtype": dtype} if dtype else {}))
    (row,) = random_rows(WHOLE)
    held = through_file(model, make_prompt_cache(model, [row[:HELD]]), tmp_path / "cache")
    assert held.ids == [row[:HELD]]
    fresh = logits_after(model, [row], None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_after(model, [row], held), fresh, strict=True))
    report = Report()
    held = load_prompt_cache(tmp_path / "cache", model)
    assert tokens(model, [row], prompt_cache=held, report=report) == tokens(model, [row])
    assert report.reused_tokens == (0 if "dynamic" in name else HELD)
    held = load_prompt_cache(tmp_path / "cache", model)
    assert held.reuse(model, [row[:HELD]])[1] == HELD - 1


def test_longrope_is_computed_anew_where_a_prompt_grows_beyond_its_first_length(checkpoints: Checkpoints) -> None:
    model, (row,) = small(checkpoints, "longrope"), random_rows(WHOLE)
    for length, reused in ((ORIGINAL, 10), (ORIGINAL + 1, 0)):
        report = Report()
        held = make_prompt_cache(model, [row[:10]])
        assert tokens(model, [row[:length]], prompt_cache=held, report=report) == tokens(model, [row[:length]])
        assert report.reused_tokens == reused


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss", "qwen3-moe", "yarn"])
def test_a_batch_restored_is_fresh_bit_for_bit(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    """Rows of different lengths; both go on by as much, so that their columns stay where they are."""
    model, rows = small(checkpoints, name), random_rows(WHOLE, WHOLE - 5)
    begun = [row[: HELD - (WHOLE - len(row))] for row in rows]
    held = through_file(model, make_prompt_cache(model, begun), tmp_path / "cache")
    assert held.ids == begun
    assert held.padding == [0, 5]
    fresh = logits_after(model, rows, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_after(model, rows, held), fresh, strict=True))
    report, held = Report(), load_prompt_cache(tmp_path / "cache", model)
    assert tokens(model, rows, prompt_cache=held, report=report) == tokens(model, rows)
    assert report.reused_tokens == HELD + HELD - 5


def test_rows_that_begin_elsewhere_are_computed_anew(checkpoints: Checkpoints) -> None:
    model, rows = small(checkpoints, "llama"), random_rows(WHOLE, WHOLE - 5)
    held, report = make_prompt_cache(model, [row[:20] for row in rows]), Report()
    assert tokens(model, rows, prompt_cache=held, report=report) == tokens(model, rows)
    assert report.reused_tokens == 0


def test_common_columns() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
    assert common_columns([[1, 2, 3]], [[1, 2, 4]]) == 2
    assert common_columns([[1, 2, 3], [5]], [[1, 2, 3, 4], [5, 6]]) == 3
    assert common_columns([[1, 2, 3], [5]], [[1, 2, 3, 4], [6, 6]]) == 2
    assert common_columns([[1, 2, 3], [5]], [[1, 2, 3, 4], [5, 6, 7]]) == 0
    assert common_columns([[1]], [[1], [1]]) == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("common", [1, 10, HELD - 1, HELD])
def test_a_prompt_that_parts_ways_reuses_what_it_shares(checkpoints: Checkpoints, name: str, common: int) -> None:
    model, (row, other) = small(checkpoints, name), random_rows(HELD, 30)
    other = row[:common] + [(token + 1) % 97 if common < HELD and not place else token
                            for place, token in enumerate(row[common:] or other)]  # fmt: skip
    report = Report()
    assert tokens(model, [other], prompt_cache=make_prompt_cache(model, [row]), report=report) == tokens(model, [other])
    assert report.reused_tokens == common


def test_the_last_token_of_a_prompt_is_always_computed(checkpoints: Checkpoints) -> None:
    for name in ("llama", "gemma3"):
        model, (row,) = small(checkpoints, name), random_rows(HELD)
        for prompt in (row, row[:-3]):
            report = Report()
            held = make_prompt_cache(model, [row])
            assert tokens(model, [prompt], prompt_cache=held, report=report) == tokens(model, [prompt])
            assert report.reused_tokens == len(prompt) - 1


@pytest.mark.parametrize("name", SLIDING_MODELS[:3])
def test_a_sliding_cache_that_cannot_go_back_is_computed_anew(checkpoints: Checkpoints, name: str) -> None:
    model, (row,) = small(checkpoints, name), random_rows(WHOLE)
    cache = model.make_cache()
    prefill(model, torch.tensor([row]), cache, None, CHUNK)
    held, report = PromptCache([row], cache), Report()
    other = [*row[:30], 1, 2, 3]
    assert tokens(model, [other], prompt_cache=held, report=report) == tokens(model, [other])
    assert report.reused_tokens == 0
    assert report.lines()[3] == "reused: 0 of 33 prompt tokens, from the prompt cache"


def test_no_length_of_a_prompt_takes_its_way_back(checkpoints: Checkpoints) -> None:
    """A last chunk of one token would push what is before a window out for good."""
    model, (row,) = small(checkpoints, "mistral"), random_rows(WHOLE)
    for length in range(2, WHOLE):
        held = make_prompt_cache(model, [row[:length]])
        assert held.reuse(model, [row[:length]])[1] == length - 1, length
    assert WINDOW < WHOLE < ROLLBACK


def test_a_cache_is_used_again_after_an_answer_and_after_an_interruption(checkpoints: Checkpoints) -> None:
    model, (row, end, other) = small(checkpoints, "llama"), random_rows(HELD, 5, 7)
    held, report = make_prompt_cache(model, [row]), Report()
    prompts = [row + end, row + other]
    for prompt in prompts:
        expected = tokens(model, [prompt])
        broken: Any = generate(model, [prompt], GREEDY, prompt_cache=held)
        assert [next(broken).token_id for _ in range(3)] == expected[0][:3]
        broken.close()
        assert tokens(model, [prompt], prompt_cache=held, report=report) == expected
    assert report.reused_tokens == 2 * HELD
    assert held.ids == [row]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"static_cache": True},
        {"config": GenerationConfig(max_new_tokens=NEW, prompt_lookup_num_tokens=4)},
        {"config": GenerationConfig(max_new_tokens=NEW, do_sample=True, seed=3)},
    ],
    ids=["static", "lookup", "sampled"],
)
def test_options_of_generation_go_with_a_cache(checkpoints: Checkpoints, name: str, options: dict[str, Any]) -> None:
    model, (row, end, other) = small(checkpoints, name), random_rows(HELD, 5, 7)
    held, rows, report = make_prompt_cache(model, [row]), [row + end, row + other, row], Report()
    assert tokens(model, rows, prompt_cache=held, report=report, **options) == tokens(model, rows, **options)
    assert report.reused_tokens == 3 * HELD - 1
    plain = model.make_cache()
    prefill(model, torch.tensor([row]), plain, None, CHUNK)
    held = PromptCache([row], plain)
    assert tokens(model, [rows[0]], prompt_cache=held, **options) == tokens(model, [rows[0]], **options)


def test_several_prompts_leave_the_cache_as_it_was(checkpoints: Checkpoints) -> None:
    model, (row, end, other) = small(checkpoints, "gemma3"), random_rows(HELD, 5, 7)
    held = make_prompt_cache(model, [row])
    for _ in range(2):
        report = Report()
        tokens(model, [row + end, row + other], prompt_cache=held, report=report)
        assert report.reused_tokens == 2 * HELD


def test_the_rows_of_a_cache_are_those_of_the_prompts(checkpoints: Checkpoints) -> None:
    model, rows = small(checkpoints, "llama"), random_rows(12, 10)
    held = make_prompt_cache(model, rows)
    message = "the prompt cache has 2 rows, expected as many prompts that run together, got "
    with pytest.raises(ValueError, match=message + "3, 3 at a time"):
        generate(model, [*rows, rows[0]], GREEDY, prompt_cache=held)
    lookup = GenerationConfig(prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=message + "2, 1 at a time"):
        generate(model, rows, lookup, prompt_cache=held)


def test_only_what_is_new_is_computed(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (row,) = small(checkpoints, "llama"), random_rows(WHOLE)
    held, seen, progress = make_prompt_cache(model, [row[:HELD]]), [], []
    model_class = type(model)
    forward = model_class.forward

    def watched(self: Any, ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append(ids.shape[1])
        return forward(self, ids, *arguments, **options)

    monkeypatch.setattr(model_class, "forward", watched)
    report = Report()
    tokens(model, [row], prompt_cache=held, report=report, on_prefill=lambda *done: progress.append(done))
    assert sum(seen) == WHOLE - HELD + NEW - 1
    assert progress[-1] == (WHOLE, WHOLE)
    assert report.computed_tokens == WHOLE - HELD
    assert report.as_json()["reused_tokens"] == HELD
    assert report.as_json()["prompt_tokens"] == WHOLE
    assert report.lines()[0].startswith(f"prefill: {WHOLE - HELD} tokens, ")
    assert report.lines()[3] == f"reused: {HELD} of {WHOLE} prompt tokens, from the prompt cache"


def test_saving_part_of_a_cache(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for name in ("llama", "gemma3"):
        model, (row,) = small(checkpoints, name), random_rows(WHOLE)
        held = make_prompt_cache(model, [row])
        model.save_kvcache(tmp_path / "part", HELD, cache=held.cache, ids=row)
        assert held.cache[0].offset == WHOLE
        part = model.load_kvcache(tmp_path / "part")
        assert part.ids == [row[:HELD]]
        assert tokens(model, [row], prompt_cache=part) == tokens(model, [row])
        assert model.load_kvcache(tmp_path / "part", 20).ids == [row[:20]]
        for wrong in (0, HELD + 1):
            with pytest.raises(ValueError, match=f"holds {HELD} positions, {wrong} were asked for"):
                model.load_kvcache(tmp_path / "part", wrong)
        with pytest.raises(ValueError, match=f"cannot save {WHOLE + 1} positions of a cache that holds {WHOLE}"):
            model.save_kvcache(tmp_path / "no", WHOLE + 1, cache=held.cache, ids=row)
        with pytest.raises(ValueError, match=f"the cache holds {WHOLE} positions, the ids given are 3"):
            model.save_kvcache(tmp_path / "no", cache=held.cache, ids=[1, 2, 3])
        with pytest.raises(ValueError, match="expected ids"):
            model.save_kvcache(tmp_path / "no", cache=held.cache)
    assert not (tmp_path / "no").exists()


def test_a_static_cache_is_saved_as_well(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model, (row,) = small(checkpoints, "llama"), random_rows(WHOLE)
    cache = model.make_cache(1, 50)
    prefill(model, torch.tensor([row[:HELD]]), cache, None, CHUNK)
    held = through_file(model, PromptCache([row[:HELD]], cache), tmp_path / "cache")
    assert tokens(model, [row], prompt_cache=held) == tokens(model, [row])


def test_text_with_a_prompt_cache(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    model, report = load_model(tmp_path), Report()
    held = make_prompt_cache(model, [model.encode_prompt(PROMPT)])
    longer = PROMPT + " there was a girl"
    expected = model.generate_text(longer, max_new_tokens=20)
    assert model.generate_text(longer, max_new_tokens=20, prompt_cache=held, report=report) == expected
    assert report.reused_tokens is not None
    assert report.reused_tokens >= len(held.ids[0]) > 0


def test_a_prompt_without_room_is_not_kept(checkpoints: Checkpoints) -> None:
    model = small(checkpoints, "llama")
    with pytest.raises(ValueError, match="the prompt has 65 tokens, but the context is 64 tokens"):
        make_prompt_cache(model, random_rows(65))
    with pytest.raises(ValueError, match="the prompt is empty"):
        make_prompt_cache(model, [[]])


def budgeted(checkpoints: Checkpoints, name: str) -> Any:
    """A model as under a memory budget that was planned for the cache of one row."""
    model = small(checkpoints, name)
    model.storage = Storage()
    model.storage.positions = model.max_length
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_under_a_budget_there_is_one_cache(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    model, (row, end, other) = budgeted(checkpoints, name), random_rows(HELD, 5, 7)
    expected = [tokens(model, [prompt])[0] for prompt in (row + end, row + other, other)]
    for held in (make_prompt_cache(model, [row]), through_file(model, make_prompt_cache(model, [row]), tmp_path / "a")):
        full = [layer for layer in held.cache if layer.rollback is None]
        assert all(layer.limit == model.max_length for layer in full)
        report = Report()
        assert tokens(model, [row + end], prompt_cache=held, report=report) == expected[:1]
        assert report.reused_tokens == HELD
        assert all(layer in held.cache and layer.offset > HELD for layer in full)
        assert tokens(model, [row + other], prompt_cache=held) == expected[1:2]
        assert tokens(model, [other], prompt_cache=held) == expected[2:]
        assert not held.cache
        assert tokens(model, [row + end], prompt_cache=held) == expected[:1]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_under_a_budget_several_prompts_share_one_cache(checkpoints: Checkpoints, name: str) -> None:
    model, (row, end, other) = budgeted(checkpoints, name), random_rows(HELD, 5, 7)
    prompts = [row + end, row + other, row[:20] + other, row + end]
    expected, held = [tokens(model, [prompt])[0] for prompt in prompts], make_prompt_cache(model, [row])
    full, report = [layer for layer in held.cache if layer.rollback is None], Report()
    assert tokens(model, prompts, prompt_cache=held, report=report) == expected
    assert (report.reused_tokens or 0) >= HELD
    if name == "llama":
        assert report.reused_tokens == HELD + HELD + 20 + 20
        assert held.cache == full


def test_under_a_budget_a_cache_of_another_kind_is_moved_layer_by_layer(checkpoints: Checkpoints) -> None:
    row, end = random_rows(HELD, 5)
    held, model = make_prompt_cache(small(checkpoints, "llama"), [row]), budgeted(checkpoints, "llama")
    before, report = list(held.cache), Report()
    assert tokens(model, [row + end], prompt_cache=held, report=report) == tokens(model, [row + end])
    assert report.reused_tokens == HELD
    assert not any(layer in held.cache for layer in before)


def test_under_a_budget_more_positions_than_planned_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model, rows = small(checkpoints, "llama"), random_rows(HELD, HELD)
    made = make_prompt_cache(model, rows)
    save_prompt_cache(tmp_path / "rows", model, made.cache, made.ids)
    held = make_prompt_cache(model, rows[:1])
    save_prompt_cache(tmp_path / "a", model, held.cache, held.ids)
    model.save_kvcache(tmp_path / "raw", cache=held.cache, nntrainer=True)
    model = budgeted(checkpoints, "llama")
    model.max_length = model.storage.positions = HELD
    assert load_prompt_cache(tmp_path / "a", model).columns == HELD
    with pytest.raises(ValueError, match="rows holds 24 positions of each row, but the memory was planned for 12"):
        load_prompt_cache(tmp_path / "rows", model)
    with pytest.raises(ValueError, match="2 prompts of 24 tokens have no room together in the memory that was planned"):
        make_prompt_cache(model, rows)
    model.max_length = model.storage.positions = HELD - 1
    for name in ("a", "raw"):
        with pytest.raises(ValueError, match=f"{name} holds 24 positions .* planned for 23; raise max_seq_len"):
            model.load_kvcache(tmp_path / name, ids=rows[0])
