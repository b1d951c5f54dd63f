"""The cache verb and --prompt-cache on the command line, and the cache's dtype."""

import json
from pathlib import Path

import pytest
from embedding_folders import save_embedding_model
from sample_tokenizers import byte_level, save
from test_cli import mistake
from text_models import PROMPT, TEMPLATE, save_text_model

from causallm import load_model
from causallm.cli import main
from causallm.prompt_cache import load_prompt_cache

Captured = pytest.CaptureFixture[str]
SHORT = ("-n", "12")
LONGER = PROMPT + " there was a girl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_text_model(folder, template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def cached(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "prompt.cache"
    assert main(["cache", str(folder), PROMPT, "-o", str(path), "--raw"]) == 0
    return path


def test_a_cache_is_written_and_what_it_cost_goes_to_stderr(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "out"
    assert main(["cache", str(folder), PROMPT, "-o", str(path), "--raw"]) == 0
    output = capsys.readouterr()
    ids = load_model(folder).tokenizer.encode_prompt(PROMPT)
    prefill, load, cache, file = output.err.splitlines()
    assert output.out == ""
    assert prefill.startswith(f"prefill: {len(ids)} tokens, ")
    assert load.startswith("load: ")
    assert cache.startswith("cache: float32, ")
    assert file == f"{path}: {path.stat().st_size / 1e6:.1f} MB"
    assert load_prompt_cache(path, load_model(folder)).ids == [ids]


def test_prompts_become_tokens_as_they_do_when_run(folder: Path, tmp_path: Path) -> None:
    model, path, file = load_model(folder), tmp_path / "out", tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    for arguments, encoded in (
        ([PROMPT], model.encode_prompt(PROMPT)),
        (["--prompt", PROMPT, "--chat"], model.encode_prompt(PROMPT, chat=True)),
        (["--prompt-file", str(file), "--raw"], model.encode_prompt(PROMPT, chat=False)),
        (["--prompt-file", str(file), "--system", "Be kind."], model.encode_prompt(PROMPT, "Be kind.")),
        (
            [PROMPT, "--template-var", "thinking=false"],
            model.encode_prompt(PROMPT, template_variables={"thinking": False}),
        ),
    ):
        assert main(["cache", str(folder), *arguments, "-o", str(path)]) == 0
        assert model.load_kvcache(path).ids == [encoded]


def test_run_reuses_what_the_prompt_begins_with(folder: Path, cached: Path, capsys: Captured) -> None:
    capsys.readouterr()
    model = load_model(folder)
    held = len(model.tokenizer.encode_prompt(PROMPT))
    for prompt in (LONGER, PROMPT):
        arguments = [str(folder), prompt, *SHORT, "--raw", "--prompt-cache", str(cached)]
        assert main(arguments) == 0
        output = capsys.readouterr()
        total = len(model.tokenizer.encode_prompt(prompt))
        assert output.out == model.generate_text(prompt, max_new_tokens=12, chat=False) + "\n"
        assert f"\nreused: {min(held, total - 1)} of {total} prompt tokens, from the prompt cache\n" in output.err
        assert main([*arguments, "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert (content["reused_tokens"], content["prompt_tokens"]) == (min(held, total - 1), total)


def test_without_a_prompt_the_cached_one_is_answered(folder: Path, cached: Path, capsys: Captured) -> None:
    capsys.readouterr()
    assert main([str(folder), *SHORT, "--prompt-cache", str(cached)]) == 0
    expected = load_model(folder).generate_text(PROMPT, max_new_tokens=12, chat=False)
    assert capsys.readouterr().out == expected + "\n"


def test_several_prompts_are_one_batch(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    path, model = tmp_path / "batch", load_model(folder)
    assert main(["cache", str(folder), PROMPT, "--prompt", "girl", "-o", str(path), "--raw"]) == 0
    capsys.readouterr()
    assert main([str(folder), *SHORT, "--prompt-cache", str(path)]) == 0
    expected = model.generate_text([PROMPT, "girl"], max_new_tokens=12, chat=False)
    answers = [f"==> {prompt} <==\n{text}\n" for prompt, text in zip((PROMPT, "girl"), expected, strict=True)]
    assert capsys.readouterr().out == "\n".join(answers)


def test_bench_begins_with_the_cache(folder: Path, cached: Path, capsys: Captured) -> None:
    small = ["--prompt", "5", "--generate", "0", "--repeat", "1", "--threads", "1", "--output", "json"]
    capsys.readouterr()
    assert main(["bench", str(folder), *small, "--prompt-cache", str(cached)]) == 0
    held = len(load_model(folder).tokenizer.encode_prompt(PROMPT))
    assert [test["test"] for test in json.loads(capsys.readouterr().out)["tests"]] == [f"pp5 @ d{held}"]


def test_nntrainers_file(folder: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "raw", load_model(folder)
    assert main(["cache", str(folder), PROMPT, "-o", str(path), "--raw", "--nntrainer"]) == 0
    ids = model.tokenizer.encode_prompt(PROMPT)
    assert path.stat().st_size == 2 * 2 * (10 + len(ids) * 2 * 8 * 2)
    assert model.load_kvcache(path, ids=ids).columns == len(ids)


def test_mistakes_are_one_line(folder: Path, cached: Path, tmp_path: Path, capsys: Captured) -> None:
    save_embedding_model(tmp_path / "vectors", "Qwen3Config", vocab_size=422)
    save(byte_level(), tmp_path / "vectors")
    (tmp_path / "junk").write_bytes(b"junk" * 10)
    batch = tmp_path / "batch"
    assert main(["cache", str(folder), PROMPT, "--prompt", "girl", "-o", str(batch), "--raw"]) == 0
    capsys.readouterr()
    model, vectors = str(folder), str(tmp_path / "vectors")
    for arguments, message in (
        (["cache", model, "-o", "x"], "no prompt was given, expected the text that later prompts will begin with"),
        (["cache", model, PROMPT], "the following arguments are required: -o/--output"),
        (["cache", model, "x", "-o", "x", "--truncate"], "--truncate: without its beginning a prompt has nothing"),
        (["cache", vectors, "x", "-o", "x"], "is an embedding model, expected one that generates text"),
        (["cache", model, PROMPT * 300, "-o", "x", "--raw"], "tokens, but the context is 512 tokens"),
        ([vectors, "x", "--prompt-cache", str(cached)], "is an embedding model, which has no use for one"),
        ([model, "x", "--prompt-cache", str(tmp_path / "none")], "there is no prompt cache"),
        ([model, "x", "--prompt-cache", str(tmp_path / "junk")], "is no prompt cache of this program"),
        (
            [model, "x", "--prompt-cache", str(cached), "--cache-dtype", "int8"],
            "cache_dtype differs: found float32,",
        ),
        ([model, "x", "--cache-dtype", "int4"], "kv_cache_dtype (--cache-dtype) is 'int4', expected one of"),
        ([model, "x", "--prompt-cache", str(batch)], "the prompt cache has 2 rows, expected as many prompts"),
        (["bench", model, "--prompt-cache", str(batch)], "the prompt cache has rows of different lengths"),
    ):
        assert message in mistake(capsys, *arguments)


def test_the_dtype_of_the_cache(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    path, sizes = tmp_path / "packed", {}
    for name in ("int8", "float16", "bfloat16", "float32"):
        assert main([str(folder), PROMPT, *SHORT, "--static-cache", "--cache-dtype", name, "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["cache_dtype"] == name
        sizes[name] = content["cache_bytes"]
    assert sizes["float32"] == 2 * sizes["float16"] == 2 * sizes["bfloat16"]
    assert sizes["int8"] * 16 == sizes["float16"] * (8 + 4)
    assert main(["cache", str(folder), PROMPT, "-o", str(path), "--cache-dtype", "int8"]) == 0
    assert main([str(folder), PROMPT, *SHORT, "--cache-dtype", "int8", "--prompt-cache", str(path)]) == 0
    assert main(["inspect", str(folder), "--cache-dtype", "int8"]) == 0
    assert f"key-value cache: {2 * 2 * 2 * (8 + 4)} bytes a token" in capsys.readouterr().out
