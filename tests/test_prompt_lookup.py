"""Drafts against a search by hand, and text with drafts against plain decoding: the same events, fewer steps.

The models are random and in fp32, where no two likeliest tokens are so close that rounding could swap them.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints, quiet_transformers
from families import MODELS, SLIDING_MODELS
from text_models import PROMPT, save_text_model

from causallm import load_model
from causallm.config import GenerationConfig
from causallm.generation import generate
from causallm.prompt_lookup import PromptLookup, rotates_alike
from causallm.report import Lookup, Report
from layers.rope import Rope

FEW = tuple((token, 8.0) for token in range(4))
"""A bias towards a few tokens, so that drafts of random text come true now and then."""
GREEDY = GenerationConfig(max_new_tokens=40, logit_bias=FEW)
SAMPLED = replace(GREEDY, do_sample=True, temperature=1.2, top_k=20, top_p=0.95, seed=3, logit_bias=FEW)
PENALISED = replace(
    GREEDY,
    repetition_penalty=1.05,
    presence_penalty=0.02,
    frequency_penalty=0.02,
    logit_bias=FEW,
    bad_words_ids=((1, 2), (3, 0)),
)
RULES = {"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED}


def random_ids(length: int, seed: int = 0, vocab: int = 97) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def drafted(config: GenerationConfig, most: int = 6) -> GenerationConfig:
    return replace(config, prompt_lookup_num_tokens=most)


def long(model: Any) -> Any:
    """The model with a context of 64, beyond the trained length of the ropes that depend on it."""
    model = copy.copy(model)
    model.max_length = 64
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with a tokenizer."""
    folder = tmp_path_factory.mktemp("lookup")
    save_text_model(folder)
    return load_model(folder)


def followed(tokens: Sequence[int], longest: int, count: int) -> list[int]:
    """What a search from the end finds; the copy is made token by token."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if list(tokens[start : start + size]) == list(tokens[-size:]):
                copied = list(tokens)
                for step in range(count):
                    copied.append(copied[start + size + step])
                return copied[len(tokens) :]
    return []


@pytest.mark.parametrize("longest", [1, 2, 3, 20])
@pytest.mark.parametrize("vocab", [2, 5, 40])
def test_drafts_are_what_a_search_by_hand_finds(longest: int, vocab: int) -> None:
    tokens = random_ids(7, seed=longest, vocab=vocab)
    lookup, found = PromptLookup(tokens, longest, 8), 0
    for _ in range(5):
        lookup.learn(1, 1)
    assert lookup.length == 8
    for number in range(60):
        draft = lookup.draft(8)
        assert draft == followed(tokens, longest, 8)
        assert lookup.draft(3) == draft[:3]
        found += bool(draft)
        tokens += random_ids(1 + number % 3, seed=number, vocab=vocab)
    assert found > 20


def test_the_first_tokens_have_nothing_to_copy() -> None:
    assert PromptLookup([], 3, 8).draft(8) == []
    assert PromptLookup([4], 3, 8).draft(8) == []
    assert PromptLookup([4, 5], 3, 8).draft(8) == []


def test_drafts_grow_while_they_come_true() -> None:
    lookup, lengths = PromptLookup([1, 1], 2, 10), []
    for came_true in (1, 2, 4, 8, 10, 2, 3, 5):
        lengths.append(len(lookup.draft(99)))
        lookup.learn(lengths[-1], came_true)
    assert lengths == [1, 2, 4, 8, 10, 10, 3, 6]
    assert lookup.length == 6


def test_after_a_wrong_draft_none_is_made_until_one_would_have_been_right() -> None:
    tokens = [1, 2, 3, 1]
    lookup = PromptLookup(tokens, 2, 10)
    assert lookup.draft(9) == [2]
    tokens.append(1)
    lookup.learn(1, 0)
    # Expected are 1, nothing, 5 and 5.
    for came, length in ((5, 0), (5, 0), (1, 0), (5, 1)):
        assert lookup.draft(9) == []
        tokens.append(came)
        lookup.learn(0, 0)
        assert lookup.length == length
    assert lookup.draft(9) == [5]
    lookup.learn(1, 1)
    assert lookup.draft(0) == []
    lookup.learn(0, 0)
    assert lookup.length == 2


def test_only_ropes_that_depend_on_the_length_forbid_a_draft() -> None:
    dynamic = Rope("dynamic", 8, factor=2.0, max_positions=16)
    searched = Rope("longrope", 4, original_positions=16, short_factor=(1.0, 1.0), long_factor=(2.0, 2.0))
    cases = ((3, 16, True, True), (15, 17, False, False), (17, 18, False, True), (17, 17, True, True))
    for first, last, with_dynamic, with_searched in cases:
        assert rotates_alike([Rope("default", 8)], first, last)
        assert rotates_alike([Rope("default", 8), dynamic], first, last) is with_dynamic
        assert rotates_alike([searched], first, last) is with_searched


@pytest.mark.parametrize(
    ("name", "rules"),
    [(name, "greedy") for name in MODELS]
    + [(name, rules) for name in ("llama", "gemma3", "gpt-oss", "longrope") for rules in ("sampled", "penalised")],
)
def test_every_family_gives_what_it_gives_without_drafts(checkpoints: Checkpoints, name: str, rules: str) -> None:
    """Sliding windows are passed early (8 of 53 tokens), also by drafts longer than they are.

    The prompt is of the tokens that the text is of, in another order, so that most drafts from it are wrong.
    """
    model, prompt = long(checkpoints.ours(name)), random_ids(13, vocab=4)
    plain = list(generate(model, [prompt], RULES[rules]))
    counts = Lookup()
    for most in (3, 20) if name in SLIDING_MODELS else (5,):
        report = Report()
        assert list(generate(model, [prompt], drafted(RULES[rules], most), report=report)) == plain
        assert report.lookup is not None
        counts.drafted += report.lookup.drafted
        counts.accepted += report.lookup.accepted
    assert len(plain) == 40
    if "dynamic" not in name:
        assert counts.accepted > 0
    if rules != "greedy":
        assert counts.accepted < counts.drafted


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_a_static_cache_is_never_overrun(checkpoints: Checkpoints, name: str) -> None:
    """It has not one column to spare: a draft ends where the text must."""
    model = long(checkpoints.ours(name))
    for length, tokens in ((50, 14), (14, 50), (62, 2), (63, 1), (9, 12)):
        config = replace(GREEDY, max_new_tokens=tokens, logit_bias=((7, 1e4),))
        events = list(generate(model, [random_ids(length)], drafted(config, 20), static_cache=True))
        assert [event.token_id for event in events] == [7] * tokens
        assert [event.finish for event in events] == [None] * (tokens - 1) + ["length"]


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [("LlamaConfig", {}), ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "tie_word_embeddings": False})],
)
def test_text_is_that_of_transformers_with_and_without_its_own_drafts(
    tmp_path: Path, class_name: str, settings: dict[str, Any]
) -> None:
    reference = save_text_model(tmp_path, class_name, **settings)
    model = load_model(tmp_path)
    ids = torch.tensor([model.tokenizer.encode_prompt(PROMPT)])
    limit = {"max_new_tokens": 60, "do_sample": False}
    with quiet_transformers():
        expected = reference.generate(ids, **limit)[0, ids.shape[1] :].tolist()
        theirs = reference.generate(ids, **limit, prompt_lookup_num_tokens=4)[0, ids.shape[1] :].tolist()
    ours = [event.token_id for event in model.stream(PROMPT, **limit, prompt_lookup_num_tokens=4)]
    assert ours == theirs == expected


def test_a_repetition_takes_few_steps(checkpoints: Checkpoints) -> None:
    """Drafts of 1, 2, 4, 8 and then 10, the last as long as there is room: 44 tokens after the first in 7 steps."""
    model, report = checkpoints.ours("llama"), Report()
    columns: list[int] = []
    hook = model.embed_tokens.register_forward_hook(lambda _, inputs, __: columns.append(inputs[0].shape[1]))
    config = drafted(GenerationConfig(max_new_tokens=45, logit_bias=((7, 1e4),)), 10)
    events = list(generate(model, [[5, 7, 7]], config, report=report))
    hook.remove()
    assert [event.token_id for event in events] == [7] * 45
    assert columns == [3, 2, 3, 5, 9, 11, 11, 3]
    assert report.lookup == Lookup(steps=7, drafted=37, accepted=37)
    assert (report.generated_tokens, report.first_tokens, report.tokens_per_step) == (45, 1, 44 / 7)


def test_the_report_counts_what_was_computed_and_kept(llama: Any) -> None:
    report, columns = Report(), []
    hook = llama.embed_tokens.register_forward_hook(lambda _, inputs, __: columns.append(inputs[0].shape[1]))
    prompts = [random_ids(30, seed, vocab=400) for seed in (1, 2)]
    events = list(generate(llama, prompts, drafted(replace(SAMPLED, max_new_tokens=60)), report=report))
    hook.remove()
    counts = report.lookup
    assert counts is not None
    assert counts.steps == len(columns) - 2
    assert counts.steps + counts.drafted == sum(columns) - 60
    assert len(events) == 2 + counts.steps + counts.accepted == 120
    assert 0 < counts.accepted < counts.drafted
    assert report.generation_seconds > 0


OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "logit_bias": dict.fromkeys(range(100, 104), 5.0)}


def test_ends_within_a_draft(llama: Any) -> None:
    """By length after each number of tokens, by each stop string, by each token: the same events to the last."""
    prompt = llama.tokenizer.encode_prompt(PROMPT)
    whole = list(llama.stream([prompt], **OPTIONS))
    text = "".join(event.text for event in whole)
    ends: list[dict[str, Any]] = [{"max_new_tokens": count} for count in range(1, 60, 3)]
    ends += [{"eos_token_id": token} for token in {event.token_id for event in whole}]
    ends += [{"stop": ["never", text[start : start + 3]]} for start in range(0, len(text) - 3, 5)]
    within, accepted = 0, 0
    for end in ends:
        report = Report()
        plain = list(llama.stream([prompt], **{**OPTIONS, **end}))
        assert list(llama.stream([prompt], report=report, prompt_lookup_num_tokens=8, **{**OPTIONS, **end})) == plain
        assert report.lookup is not None
        within += plain[-1].finish in ("eos", "stop")
        accepted += report.lookup.accepted
    assert within > 15
    assert accepted > 100


def test_events_come_one_a_token_as_they_are_chosen(llama: Any) -> None:
    """The tokens of one step are not held back for each other: the second event needs no further step."""
    columns: list[int] = []
    hook = llama.embed_tokens.register_forward_hook(lambda _, inputs, __: columns.append(inputs[0].shape[1]))
    config = drafted(replace(GREEDY, logit_bias=((100, 1e4),)))
    seen = []
    for event in generate(llama, [[100, 100, 100]], config):
        assert event.row == 0
        seen.append(len(columns))
    hook.remove()
    assert seen[:8] == [1, 2, 2, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("rules", RULES)
def test_several_prompts_run_one_after_the_other(checkpoints: Checkpoints, rules: str) -> None:
    model, prompts = long(checkpoints.ours("gemma3")), [random_ids(length, seed=length) for length in (3, 17, 9)]
    plain = list(generate(model, prompts, RULES[rules]))
    sizes: list[int] = []
    hook = model.embed_tokens.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    events = list(generate(model, prompts, drafted(RULES[rules])))
    hook.remove()
    assert set(sizes) == {1}
    assert [event.row for event in events] == sorted(event.row for event in events)
    assert events == sorted(plain, key=lambda event: event.row)


def test_sampling_draws_one_number_a_token_whatever_was_drafted(llama: Any) -> None:
    """Seeds that differ give other texts, so that the comparison means something."""
    texts = set()
    for seed in range(4):
        options = {**OPTIONS, "temperature": 1.0, "seed": seed}
        plain = list(llama.stream(PROMPT, **options))
        assert list(llama.stream(PROMPT, prompt_lookup_num_tokens=5, **options)) == plain
        texts.add("".join(event.text for event in plain))
    assert len(texts) == 4


def test_a_ring_that_cannot_go_back_is_made_only_without_drafts(checkpoints: Checkpoints) -> None:
    """What `rollback` is for: without it gemma3's caches refuse beyond the window."""
    model = checkpoints.ours("gemma3")
    with torch.inference_mode():
        for rollback in (0, 4):
            cache = model.make_cache(rollback=rollback)
            model(torch.tensor([random_ids(20)]), cache)
            model(torch.tensor([random_ids(5)]), cache)
            if rollback:
                for layer in cache:
                    layer.truncate(21)
                assert {layer.offset for layer in cache} == {21}
            else:
                with pytest.raises(ValueError, match="cannot go back to 21"):
                    cache[0].truncate(21)
