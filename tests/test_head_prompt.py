"""nntr_config.json's system_prompt.kvcache: the head prompt's file made, used and refused, the answers unchanged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from text_models import PROMPT, TEMPLATE, save_text_model

from causallm import load_model
from causallm.cli import main
from causallm.prompt_cache import load_prompt_cache
from causallm.prompt_cache.make import make_prompt_cache
from causallm.report import Report

HEAD, TAIL = "You are a cat. You are kind. ", " Answer:"
GEMMA = {"head_dim": 16, "sliding_window": 24, "tie_word_embeddings": False}
KIND: dict[str, dict[str, Any]] = {"LlamaConfig": {}, "Gemma3TextConfig": GEMMA}
Captured = pytest.CaptureFixture[str]


def make(folder: Path, class_name: str = "LlamaConfig", template: str | None = None, **kvcache: Any) -> Path:
    """A model folder whose nntr_config.json has head, tail and kvcache."""
    kvcache = {"pre_computed_cache_path": "head.cache", **kvcache}
    system = {"head_prompt": HEAD, "tail_prompt": TAIL, "kvcache": kvcache}
    save_text_model(folder, class_name, nntr={"system_prompt": system}, template=template, **KIND[class_name])
    return folder


def without(folder: Path) -> Any:
    """The model with head and tail, but no file."""
    return load_model(folder, system_prompt={"head_prompt": HEAD, "tail_prompt": TAIL})


def answer(model: Any, prompt: Any = PROMPT, **options: Any) -> tuple[Any, Report]:
    report = Report()
    return model.generate_text(prompt, max_new_tokens=20, report=report, **options), report


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["raw", "chat"])
@pytest.mark.parametrize("class_name", KIND)
def test_the_first_run_answers_and_saves_and_the_next_reuses(
    tmp_path: Path, class_name: str, template: str | None
) -> None:
    make(tmp_path, class_name, template)
    expected, plain = answer(without(tmp_path))
    assert plain.reused_tokens is None
    assert not (tmp_path / "head.cache").exists()
    text, report = answer(load_model(tmp_path))
    assert (text, report.reused_tokens, report.computed_tokens) == (expected, 0, plain.prompt_tokens)
    content = (tmp_path / "head.cache").read_bytes()
    model = load_model(tmp_path)
    (ids,) = load_prompt_cache(tmp_path / "head.cache", model).ids
    assert model.tokenizer.decode(ids, skip_special_tokens=False).endswith(HEAD.rstrip())
    text, report = answer(model)
    assert (text, report.reused_tokens) == (expected, len(ids))
    assert (tmp_path / "head.cache").read_bytes() == content
    other, report = answer(model, "girl")
    assert other == answer(without(tmp_path), "girl")[0] != expected
    assert report.reused_tokens == len(ids)
    prompts = [PROMPT, "girl", "xyz", "12"]
    texts, report = answer(model, prompts)
    assert texts == [answer(without(tmp_path), prompt)[0] for prompt in prompts]
    assert report.reused_tokens is not None
    assert report.reused_tokens >= 4 * (len(ids) - 1)


def test_several_prompts_pay_for_the_head_once(tmp_path: Path) -> None:
    model = load_model(make(tmp_path))
    texts, report = answer(model, [PROMPT, "girl"])
    assert texts == [answer(without(tmp_path), prompt)[0] for prompt in (PROMPT, "girl")]
    assert report.reused_tokens == len(load_prompt_cache(tmp_path / "head.cache", model).ids[0])


def test_no_more_than_the_size_asked_for_is_kept(tmp_path: Path) -> None:
    model = load_model(make(tmp_path, sys_prompt_token_size=4))
    expected = answer(without(tmp_path))[0]
    for reused in (0, 4):
        text, report = answer(model)
        assert (text, report.reused_tokens) == (expected, reused)
    assert len(load_prompt_cache(tmp_path / "head.cache", model).ids[0]) == 4
    smaller = load_model(make(tmp_path, sys_prompt_token_size=3))
    assert answer(smaller)[1].reused_tokens == 3


def test_a_head_that_changed_is_told(tmp_path: Path) -> None:
    answer(load_model(make(tmp_path)))
    system = {"head_prompt": "You are a dog.", "kvcache": {"pre_computed_cache_path": "head.cache"}}
    changed = load_model(tmp_path, system_prompt=system)
    with pytest.warns(UserWarning, match=r"head.cache was made of another text than head_prompt: \d+ of its \d+"):
        text, _ = answer(changed)
    assert text == answer(load_model(tmp_path, system_prompt={"head_prompt": "You are a dog."}))[0]


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    answer(load_model(make(tmp_path)))
    save_text_model(tmp_path / "other", seed=2)
    nntr = json.loads((tmp_path / "nntr_config.json").read_text())
    nntr["system_prompt"]["kvcache"]["pre_computed_cache_path"] = str(tmp_path / "head.cache")
    with pytest.raises(ValueError, match=r"head.cache does not fit this model: weights differs"):
        answer(load_model(tmp_path / "other", **nntr))


@pytest.mark.parametrize("size", [None, 5])
def test_nntrainers_own_file_is_used(tmp_path: Path, size: int | None) -> None:
    make(tmp_path, sys_prompt_token_size=size)
    plain = without(tmp_path)
    ids = plain.tokenizer.encode_prompt(HEAD)
    held = plain.load_kvcache(_saved_head(tmp_path), ids=None)
    plain.save_kvcache(tmp_path / "head.cache", cache=held.cache, nntrainer=True)
    text, report = answer(load_model(tmp_path))
    assert report.reused_tokens == (size or held.columns)
    assert held.columns <= len(ids)
    assert text == answer(plain)[0]


def _saved_head(folder: Path) -> Path:
    """The head's ids as they stand alone, cut where a prompt begins, computed by the run itself."""
    copy = folder / "copy"
    shutil.copytree(folder, copy)
    save = copy / "nntr_config.json"
    nntr = json.loads(save.read_text())
    nntr["system_prompt"]["kvcache"].pop("sys_prompt_token_size", None)
    save.write_text(json.dumps(nntr))
    answer(load_model(copy))
    return copy / "head.cache"


def test_nntrainers_file_of_another_head_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    plain = without(tmp_path)
    ids = plain.tokenizer.encode_prompt(HEAD * 3)
    held = make_prompt_cache(plain, [ids])
    plain.save_kvcache(tmp_path / "head.cache", cache=held.cache, nntrainer=True)
    with pytest.raises(ValueError, match=rf"stands for {len(ids)} tokens, but there are ids of \d+"):
        answer(load_model(tmp_path))


def test_the_command_line_answers_and_a_cache_of_its_own_takes_precedence(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path)
    expected = answer(without(tmp_path))[0] + "\n"
    for reused in (0, 22):
        assert main([str(tmp_path), PROMPT, "-n", "20"]) == 0
        output = capsys.readouterr()
        assert output.out == expected
        assert f"\nreused: {reused} of 37 prompt tokens, from the prompt cache\n" in output.err
    assert main(["cache", str(tmp_path), PROMPT, "-o", str(tmp_path / "mine")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path), PROMPT, "-n", "20", "--prompt-cache", str(tmp_path / "mine"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["text"] == [expected[:-1]]
    assert content["reused_tokens"] == content["prompt_tokens"] - 1


def test_without_a_head_there_is_nothing_to_keep(tmp_path: Path) -> None:
    save_text_model(tmp_path, nntr={"system_prompt": {"kvcache": {"pre_computed_cache_path": "head.cache"}}})
    _, report = answer(load_model(tmp_path))
    assert report.reused_tokens is None
    assert not (tmp_path / "head.cache").exists()


def test_token_ids_are_answered_without_the_head(tmp_path: Path) -> None:
    model = load_model(make(tmp_path))
    assert answer(model, [[1, 2, 3]])[1].reused_tokens is None
    assert not (tmp_path / "head.cache").exists()
