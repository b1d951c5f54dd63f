"""Generated tokens: against transformers, against the same row alone, every rule on the first token, every end."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints, quiet_transformers
from families import SIZES
from text_models import PROMPT, save_text_model

from causallm import load_model
from causallm.config import GenerationConfig
from causallm.generation import Event, generate
from causallm.options import generation_options
from causallm.penalties import TokenHistory, adjust_logits
from causallm.prompt_ids import fit_prompt
from causallm.report import Report
from causallm.steps import prefill
from causallm.transformer import DEFAULT_CHUNK
from layers.kv_cache import KVCache

MAX_LENGTH = 64
"""Of the models in `families`."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with a tokenizer and no chat template, context 512."""
    folder = tmp_path_factory.mktemp("llama")
    save_text_model(folder)
    return load_model(folder)


def small(checkpoints: Checkpoints, name: str, **nntr_overrides: Any) -> Any:
    """A model of `families` that may be changed; the dynamic rope goes beyond the trained length."""
    model = copy.copy(checkpoints.ours(name, **nntr_overrides))
    model.max_length = MAX_LENGTH
    return model


def random_ids(length: int, seed: int = 0, vocab: int = SIZES["vocab_size"]) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows_of(events: Iterator[Event], count: int) -> list[list[Event]]:
    """The events of each row."""
    rows: list[list[Event]] = [[] for _ in range(count)]
    for event in events:
        rows[event.row].append(event)
    return rows


def ids(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events]


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def alone(model: Any, prompt: Sequence[int], config: GenerationConfig, **options: Any) -> list[int]:
    """The tokens that continue one prompt."""
    return ids(list(generate(model, [prompt], config, **options)))


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("LlamaConfig", {}),
        ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "tie_word_embeddings": False}),
    ],
)
def test_greedy_is_that_of_transformers(tmp_path: Path, class_name: str, settings: dict[str, Any]) -> None:
    reference = save_text_model(tmp_path, class_name, **settings)
    model = load_model(tmp_path)
    prompt = torch.tensor([model.tokenizer.encode_prompt(PROMPT)])
    limit = {"max_new_tokens": 64, "do_sample": False}
    with quiet_transformers():
        whole = reference.generate(prompt, **limit)[0, prompt.shape[1] :].tolist()
        ends = [whole[40], model.tokenizer.eos_id]
        ended = reference.generate(prompt, **limit, eos_token_id=ends)[0, prompt.shape[1] :].tolist()
    assert len(whole) == 64
    assert len(set(whole)) > 10
    assert ids(list(model.stream(PROMPT, max_new_tokens=64))) == whole
    events = list(model.stream(PROMPT, max_new_tokens=64, eos_token_id=ends))
    assert ids(events) == ended
    assert len(ended) < 64
    assert events[-1].finish == "eos"


def test_the_end_of_sequence_tokens_of_all_files_count(tmp_path: Path) -> None:
    save_text_model(tmp_path, generation={"eos_token_id": [40, 41]}, eos_token_id=42)
    model = load_model(tmp_path)
    end = model.tokenizer.token_id("</s>")
    assert model.generation_config.eos_token_id == (40, 41, 42, end)
    for token in (40, 41, 42, end, 43):
        events = list(model.stream(PROMPT, logit_bias={token: 1000.0}, max_new_tokens=3))
        assert ids(events) == ([token] if token != 43 else [43] * 3)
        assert events[-1].finish == ("eos" if token != 43 else "length")


SAMPLED = GenerationConfig(do_sample=True, temperature=1.3, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=11)


@pytest.mark.parametrize(
    ("config", "static_cache"),
    [(GenerationConfig(), False), (GenerationConfig(), True), (SAMPLED, False)],
    ids=["greedy", "static", "sampled"],
)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss", "qwen3-moe", "dynamic", "longrope"])
def test_a_row_of_a_batch_is_what_it_is_alone(
    checkpoints: Checkpoints, name: str, config: GenerationConfig, static_cache: bool
) -> None:
    model = small(checkpoints, name)
    config = replace(config, max_new_tokens=15)
    prompts = [random_ids(length, seed=length) for length in (3, 17, 40, 39)]
    batch = rows_of(generate(model, prompts, config, static_cache=static_cache), 4)
    assert len({tuple(ids(row)) for row in batch}) == 4
    for number, (prompt, row) in enumerate(zip(prompts, batch, strict=True)):
        seed = config.seed + number if isinstance(config.seed, int) else None
        assert ids(row) == alone(model, prompt, replace(config, seed=seed))


def test_each_row_of_a_batch_ends_on_its_own(llama: Any) -> None:
    prompts = [random_ids(length, seed=length, vocab=400) for length in (4, 9, 2)]
    config = GenerationConfig(max_new_tokens=30)
    whole = [alone(llama, prompt, config) for prompt in prompts]
    # The first row ends late, the second early and the third, unless it says the same, not at all.
    ends = (whole[0][20], whole[1][3])
    rows = rows_of(generate(llama, prompts, replace(config, eos_token_id=ends)), 3)
    for row, tokens in zip(rows, whole, strict=True):
        places = [tokens.index(end) + 1 for end in ends if end in tokens]
        assert ids(row) == tokens[: min(places, default=30)]
        assert [event.finish for event in row[:-1]] == [None] * (len(row) - 1)
        assert row[-1].finish == ("eos" if places else "length")
    assert len({len(row) for row in rows}) > 1


def test_batch_size_bounds_how_many_rows_run_together_and_changes_nothing_else(checkpoints: Checkpoints) -> None:
    prompts = [random_ids(length, seed=length) for length in (3, 17, 9, 30, 5)]
    config = replace(SAMPLED, max_new_tokens=6)
    together = rows_of(generate(small(checkpoints, "llama"), prompts, config), 5)
    model, sizes, report = small(checkpoints, "llama", batch_size=2), [], Report()
    hook = model.embed_tokens.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    apart = rows_of(generate(model, prompts, config, report=report), 5)
    hook.remove()
    assert apart == together
    assert sizes == [2] * 12 + [1] * 6
    assert (report.prompt_tokens, report.generated_tokens) == (64, 30)


def test_no_prompts_give_no_events(checkpoints: Checkpoints) -> None:
    assert list(generate(small(checkpoints, "llama"), [], GenerationConfig())) == []


def test_sampling_repeats_with_the_seed_and_only_then(llama: Any) -> None:
    def draw(**options: Any) -> list[int]:
        return ids(list(llama.stream(PROMPT, max_new_tokens=20, temperature=1.5, **options)))

    assert draw(seed=7) == draw(seed=7)
    assert draw(seed=7) != draw(seed=8)
    assert draw() != draw()
    assert ids(rows_of(llama.stream([PROMPT] * 2, seed=[3, 7], temperature=1.5, max_new_tokens=20), 2)[1]) == draw(
        seed=7
    )


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}, {"temperature": 0.0}, {"do_sample": False}],
    ids=str,
)
def test_what_leaves_one_token_is_greedy(llama: Any, options: dict[str, Any]) -> None:
    greedy = ids(list(llama.stream(PROMPT, max_new_tokens=20)))
    assert ids(list(llama.stream(PROMPT, max_new_tokens=20, **{"temperature": 1.5, "seed": 3, **options}))) == greedy


def prompt_that_ends_in_itself(model: Any) -> tuple[list[int], int]:
    """A prompt whose likeliest next token is in it, so that a repetition penalty changes that, and this token."""
    for seed in range(1000):
        prompt = random_ids(60, seed, vocab=400)
        with torch.inference_mode():
            token = int(model(torch.tensor([prompt]))[0, -1].argmax())
        if token in prompt[:-1]:
            return prompt, token
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("sampled", [False, True])
def test_the_first_token_obeys_every_rule(llama: Any, sampled: bool) -> None:
    prompt, token = prompt_that_ends_in_itself(llama)
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 1, "seed": 1} if sampled else {}
    with torch.inference_mode():
        logits = llama(torch.tensor([prompt]))[:, -1]
    assert ids(list(llama.stream([prompt], max_new_tokens=1, **drawn))) == [token]
    for rule in (
        {"repetition_penalty": 10.0},
        {"bad_words_ids": [[token]]},
        {"bad_words_ids": [[*prompt[-2:], token]]},
        {"logit_bias": {token: -1000.0}},
    ):
        config = options_of(llama, **rule)
        expected = int(adjust_logits(logits, [TokenHistory(prompt)], config).argmax())
        assert expected != token
        assert ids(list(llama.stream([prompt], max_new_tokens=1, **rule, **drawn))) == [expected], rule


def options_of(model: Any, **options: Any) -> GenerationConfig:
    return generation_options(model.generation_config, model.tokenizer, model.config.vocab_size, **options)


def test_penalties_count_what_was_generated(llama: Any) -> None:
    prompt = random_ids(50, vocab=400)
    assert len(set(ids(list(llama.stream([prompt], max_new_tokens=60))))) < 60
    for rule in ({"presence_penalty": 1e4}, {"frequency_penalty": 1e4}):
        new = ids(list(llama.stream([prompt], max_new_tokens=60, **rule)))
        assert len(set(new)) == 60
        assert set(new) & set(prompt)
    new = ids(list(llama.stream([prompt], max_new_tokens=60, repetition_penalty=1e4)))
    assert not set(new) & set(prompt)


def test_bad_words_never_come_and_their_parts_may(llama: Any) -> None:
    greedy = ids(list(llama.stream(PROMPT, max_new_tokens=40)))
    banned = [greedy[7:9], greedy[15:18]]
    new = ids(list(llama.stream(PROMPT, max_new_tokens=40, bad_words_ids=banned)))
    assert new[:8] == greedy[:8]
    for word in banned:
        assert word not in [new[start : start + len(word)] for start in range(40)]


def test_a_bad_word_as_text_never_comes(llama: Any) -> None:
    favoured = dict.fromkeys(llama.tokenizer.encode("time") + llama.tokenizer.encode(" time"), 1000.0)
    options: dict[str, Any] = {"max_new_tokens": 300, "logit_bias": favoured, "temperature": 1.0, "seed": 1}
    assert "time" in text(list(llama.stream(PROMPT, **options)))
    assert "time" not in text(list(llama.stream(PROMPT, **options, bad_words="time")))


def test_text_is_what_decoding_at_once_gives(llama: Any) -> None:
    """The random model writes broken UTF-8, which is held back as long as it may become whole."""
    for seed in range(5):
        prompt = random_ids(10, seed, vocab=400)
        events = list(llama.stream([prompt], max_new_tokens=30))
        shown = llama.tokenizer.decode(prompt).removesuffix("\ufffd")
        whole = llama.tokenizer.decode(prompt + ids(events))
        assert whole.startswith(shown)
        assert whole.endswith(text(events))
        assert len(text(events)) > 10


def test_stop_strings_wherever_they_are_cut_by_tokens(llama: Any) -> None:
    whole = list(llama.stream(PROMPT, max_new_tokens=40))
    seen = [text(whole[: count + 1]) for count in range(40)]
    crossing = 0
    for start in range(0, len(seen[-2]) - 6, 3):
        for length in (1, 2, 5):
            stop = seen[-2][start : start + length]
            tokens = next(count for count in range(40) if stop in seen[count]) + 1
            events = list(llama.stream(PROMPT, max_new_tokens=40, stop=["never this", stop]))
            assert text(events) == seen[-1][: seen[-1].index(stop)]
            assert ids(events) == ids(whole[:tokens])
            assert events[-1].finish == "stop"
            crossing += all(stop not in event.text for event in whole)
    assert crossing > 10


def test_what_is_held_back_for_a_stop_string_comes_out_at_every_end(llama: Any) -> None:
    whole = list(llama.stream(PROMPT, max_new_tokens=22))
    stop = text(whole)[-3:] + "never"
    assert text(list(llama.stream(PROMPT, max_new_tokens=22, stop=stop))) == text(whole)
    options = {"max_new_tokens": 22, "eos_token_id": first_after_a_character(whole).token_id}
    ended = list(llama.stream(PROMPT, **options))
    assert ended[-1].finish == "eos"
    held = list(llama.stream(PROMPT, **options, stop=text(ended)[-1] + "never"))
    assert held[-1].finish == "eos"
    assert held[-1].text
    assert text(held) == text(ended)


def first_after_a_character(events: Sequence[Event]) -> Event:
    """The first event of a new token after text that ends in a whole character."""
    for number in range(3, len(events)):
        shown = events[number - 1].text
        if shown and not shown.endswith("\ufffd") and events[number].token_id not in ids(events[:number]):
            return events[number]
    raise AssertionError("no such event")


def test_a_stop_string_that_only_the_end_completes_still_stops(llama: Any) -> None:
    """Half a character is held back and comes out, replaced, with the last token."""
    half = llama.tokenizer.encode("é")[0] if len(llama.tokenizer.encode("é")) > 1 else llama.tokenizer.encode("글")[0]
    events = list(llama.stream(PROMPT, max_new_tokens=1, logit_bias={half: 1e4}, stop="\ufffd"))
    assert (text(events), events[-1].finish) == ("", "stop")


def test_a_stop_string_that_is_a_special_token_stops_though_it_never_shows(llama: Any) -> None:
    token = llama.tokenizer.token_id("<|im_end|>")
    options: dict[str, Any] = {"max_new_tokens": 5, "logit_bias": {token: 1e4}}
    assert len(list(llama.stream(PROMPT, **options))) == 5
    assert [event.finish for event in llama.stream(PROMPT, stop="<|im_end|>", **options)] == ["eos"]


@pytest.mark.parametrize("chunk", [1, 7, 31])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss", "dynamic", "longrope"])
def test_a_prompt_in_chunks_gives_what_it_gives_whole(checkpoints: Checkpoints, name: str, chunk: int) -> None:
    prompts = [random_ids(30), random_ids(11, seed=1)]
    config = GenerationConfig(max_new_tokens=12)
    expected = rows_of(generate(small(checkpoints, name), prompts, config), 2)
    model, columns, progress = small(checkpoints, name, init_seq_len=chunk), [], []
    hook = model.embed_tokens.register_forward_hook(lambda _, inputs, __: columns.append(inputs[0].shape[1]))
    chunked = generate(model, prompts, config, on_prefill=lambda done, total: progress.append((done, total)))
    assert [ids(row) for row in rows_of(chunked, 2)] == [ids(row) for row in expected]
    hook.remove()
    assert max(columns) == min(chunk, 30)
    assert sum(columns[: len(progress)]) == 30
    assert progress == [(min(start + chunk, 30), 30) for start in range(0, 30, chunk)]


def test_the_cache_has_its_memory_before_the_first_chunk(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "step", 4)
    cache, sizes = llama.make_cache(), []
    ids = torch.tensor([random_ids(30)])
    prefill(llama, ids, cache, None, 7, lambda *_: sizes.append(sum(layer.nbytes for layer in cache)))
    assert len(sizes) == 5
    assert len(set(sizes)) == 1


def test_prompts_are_cut_into_chunks_by_default(llama: Any) -> None:
    model, progress = copy.copy(llama), []
    model.max_length = 2 * DEFAULT_CHUNK
    prompt = random_ids(DEFAULT_CHUNK + 5, vocab=400)
    next(generate(model, [prompt], GenerationConfig(), on_prefill=lambda *step: progress.append(step)))
    assert progress == [(DEFAULT_CHUNK, DEFAULT_CHUNK + 5), (DEFAULT_CHUNK + 5, DEFAULT_CHUNK + 5)]


@pytest.mark.parametrize("static_cache", [False, True])
def test_text_ends_where_the_context_does(checkpoints: Checkpoints, static_cache: bool) -> None:
    model = small(checkpoints, "llama")
    config = GenerationConfig(max_new_tokens=50)
    for length, room in ((MAX_LENGTH - 1, 1), (MAX_LENGTH - 3, 3), (14, 50)):
        events = list(generate(model, [random_ids(length)], config, static_cache=static_cache))
        assert len(events) == room
        assert events[-1].finish == "length"


@pytest.mark.parametrize("static_cache", [False, True])
def test_rows_have_the_whole_context_each(checkpoints: Checkpoints, static_cache: bool) -> None:
    """The short row goes on long after the long one, beyond as many padded columns as the context has positions."""
    model = small(checkpoints, "llama")
    prompts = [random_ids(60), random_ids(4, seed=1)]
    rows = rows_of(generate(model, prompts, GenerationConfig(max_new_tokens=55), static_cache=static_cache), 2)
    assert [len(row) for row in rows] == [4, 55]
    assert ids(rows[1]) == alone(model, prompts[1], GenerationConfig(max_new_tokens=55))


@pytest.mark.parametrize("length", [MAX_LENGTH, MAX_LENGTH + 9])
def test_a_prompt_that_does_not_fit_is_refused_with_the_counts(checkpoints: Checkpoints, length: int) -> None:
    model = small(checkpoints, "llama")
    with pytest.raises(ValueError, match=rf"prompt has {length} tokens, but the context is {MAX_LENGTH} tokens"):
        generate(model, [[1, 2], random_ids(length)], GenerationConfig())


def test_a_prompt_that_does_not_fit_loses_its_beginning_if_it_may(checkpoints: Checkpoints) -> None:
    model, prompt = small(checkpoints, "llama"), random_ids(70)
    config = GenerationConfig(max_new_tokens=10)
    with pytest.warns(UserWarning, match="^16 of the prompt's 70 tokens are left out$"):
        new = alone(model, prompt, config, truncate=True)
    assert new == alone(model, prompt[16:], config)
    assert len(new) == 10
    assert alone(model, prompt[:63], config, truncate=True) == alone(model, prompt[:63], config)


@pytest.mark.filterwarnings("ignore:.* left out")
def test_a_truncated_prompt_keeps_half_of_the_context_and_the_beginning_of_sequence() -> None:
    prompt = [7, *random_ids(99)]
    for new_tokens, kept in ((10, 54), (32, 32), (500, 32)):
        config = GenerationConfig(max_new_tokens=new_tokens)
        assert fit_prompt(prompt, config, 64, True) == prompt[-kept:]
        assert fit_prompt(prompt, replace(config, bos_token_id=7), 64, True) == [7, *prompt[1 - kept :]]
        assert fit_prompt(prompt, replace(config, bos_token_id=8), 64, True) == prompt[-kept:]
    for max_length in (1, 2, 3):
        assert len(fit_prompt(prompt, GenerationConfig(bos_token_id=7), max_length, True)) == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty: it has no tokens"),
        ([[3], []], "the prompt is empty: it has no tokens"),
        ([[3, 97]], "the prompt has token id 97, expected 0 <= id < 97"),
        ([[-1, 3]], "the prompt has token id -1, expected 0 <= id < 97"),
    ],
)
def test_prompts_without_or_with_unknown_tokens_are_refused(
    checkpoints: Checkpoints, prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(small(checkpoints, "llama"), prompts, GenerationConfig())


def test_an_interruption_leaves_a_true_report(checkpoints: Checkpoints) -> None:
    model, report = small(checkpoints, "llama"), Report()
    events: list[Event] = []

    def interrupt(*_: Any) -> None:
        if len(events) == 10:
            raise KeyboardInterrupt

    def collect() -> None:
        for event in generate(model, [[1, 2], [3]], GenerationConfig(), report=report):
            events.append(event)

    hook = model.embed_tokens.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect()
    hook.remove()
    assert len(events) == 10
    assert (report.prompt_tokens, report.generated_tokens, report.first_tokens) == (3, 10, 2)
    assert report.prefill_seconds > 0
    assert report.generation_seconds > 0


def test_a_model_that_gives_no_number_says_so(checkpoints: Checkpoints) -> None:
    model = small(checkpoints, "llama")
    hook = model.norm.register_forward_hook(lambda _, __, hidden: hidden * torch.nan)
    with pytest.raises(ValueError, match="no token can be chosen"):
        alone(model, [1, 2], GenerationConfig())
    hook.remove()
