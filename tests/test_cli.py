"""The command line: what goes to stdout, what to stderr, and one line for every mistake."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from embedding_folders import save_embedding_model
from sample_tokenizers import byte_level, save
from text_models import PROMPT, TEMPLATE, save_text_model
from tqdm import tqdm

import causallm.generation
from causallm import load_model
from causallm.cli import VERBS, main, reporting_errors

MAIN = Path(__file__).resolve().parents[1] / "main.py"
Captured = pytest.CaptureFixture[str]
SHORT = ("-n", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    save_text_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save_text_model(folder, template=TEMPLATE, nntr={"sample_input": PROMPT})
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    return load_model(folder).generate_text(PROMPT, max_new_tokens=12)


def report_lines(error: str, *further: str) -> list[str]:
    """The lines of the report, which are all that stderr may have; `further`: what those after three begin with."""
    lines = error.splitlines()
    assert [line.split(":")[0] for line in lines] == ["prefill", "generation", "load", *further]
    return lines


def test_text_goes_to_stdout_and_the_report_to_stderr(folder: Path, expected: str, capsys: Captured) -> None:
    """No progress bar either, as there is no terminal."""
    assert main([str(folder), PROMPT, *SHORT]) == 0
    output = capsys.readouterr()
    assert output.out == expected + "\n"
    prompt_tokens = len(load_model(folder).encode_prompt(PROMPT))
    prefill, generation, rest, cache = report_lines(output.err, "cache")
    assert prefill.startswith(f"prefill: {prompt_tokens} tokens, ")
    assert generation.startswith("generation: 12 tokens, ")
    assert "peak memory" in rest
    assert cache == "cache: float32, 0.1 MB"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "MODEL", PROMPT, *SHORT],
        [*SHORT, "MODEL", PROMPT],
        ["MODEL", *SHORT, PROMPT],
        ["MODEL", *SHORT, "--", PROMPT],
    ],
    ids=str,
)
def test_arguments_stand_in_any_order(folder: Path, expected: str, capsys: Captured, arguments: list[str]) -> None:
    assert main([str(folder) if argument == "MODEL" else argument for argument in arguments]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_options_of_generation_are_those_of_the_library(folder: Path, capsys: Captured) -> None:
    model = load_model(folder)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("--temperature 1.5 --seed 3", {"temperature": 1.5, "seed": 3}),
        ("--top-k 5 --seed 3", {"top_k": 5, "seed": 3}),
        ("--top-p 0.7 --seed 3", {"top_p": 0.7, "seed": 3}),
        ("--min-p 0.2 --seed 3", {"min_p": 0.2, "seed": 3}),
        ("--temperature 1.5 --greedy", {}),
        ("--repetition-penalty 3", {"repetition_penalty": 3.0}),
        ("--presence-penalty 9", {"presence_penalty": 9.0}),
        ("--frequency-penalty 9", {"frequency_penalty": 9.0}),
        ("--logit-bias 70=50 --logit-bias 71=-3.5", {"logit_bias": {70: 50.0, 71: -3.5}}),
        ("--bad-word-ids 111 --bad-word-ids 119,199", {"bad_words_ids": [[111], [119, 199]]}),
        ("--bad-word o --bad-word ly", {"bad_words": ["o", "ly"]}),
        ("--stop o --stop ly", {"stop": ["o", "ly"]}),
        ("--static-cache", {"static_cache": True}),
        ("--prompt-lookup 5", {"prompt_lookup_num_tokens": 5}),
    ]
    greedy = model.generate_text(PROMPT, max_new_tokens=20) + "\n"
    for text, options in cases:
        assert main([str(folder), PROMPT, "-n", "20", *text.split()]) == 0
        shown = capsys.readouterr().out
        assert shown == model.generate_text(PROMPT, max_new_tokens=20, **options) + "\n", text
        assert (shown == greedy) == (text in ("--temperature 1.5 --greedy", "--static-cache", "--prompt-lookup 5")), (
            text
        )


def test_options_of_the_model(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    arguments = ["--dtype", "bfloat16", "--max-length", "20", "--chunk", "3", "--threads", "1", "--device", "cpu"]
    assert main([str(folder), PROMPT, "-n", "100", *arguments]) == 0
    model = load_model(folder, dtype="bfloat16", max_seq_len=20, init_seq_len=3)
    assert capsys.readouterr().out == model.generate_text(PROMPT, max_new_tokens=100) + "\n"
    assert threads == [1]


def test_set_takes_values_of_every_kind(chat: Path, capsys: Captured) -> None:
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("num_to_generate=3", {"num_to_generate": 3}),
        ("model_tensor_type=BF16-FP32", {"model_tensor_type": "BF16-FP32"}),
        ("bad_word_ids=[111, 119]", {"bad_word_ids": [111, 119]}),
        ('system_prompt={"head_prompt": "<|im_start|>"}', {"system_prompt": {"head_prompt": "<|im_start|>"}}),
        ("fsu=false", {"fsu": False}),
        ("max_seq_len=null", {"max_seq_len": None}),
        ("sample_input=Hello = world", {"sample_input": "Hello = world"}),
    )
    for text, options in cases:
        assert main([str(chat), "--set", "num_to_generate=9", "--set", text]) == 0
        model = load_model(chat, **{"num_to_generate": 9, **options})
        prompt = model.runtime_config.sample_input
        assert capsys.readouterr().out == model.generate_text(prompt, chat=False) + "\n"


def test_the_chat_template_is_used_where_it_should_be(chat: Path, capsys: Captured) -> None:
    model = load_model(chat)
    wrapped = model.tokenizer.render([{"role": "user", "content": PROMPT}])
    for arguments, options in (
        ([PROMPT], {"chat": True}),
        ([PROMPT, "--chat"], {"chat": True}),
        ([PROMPT, "--raw"], {"chat": False}),
        ([PROMPT, "--system", "Be kind."], {"system": "Be kind."}),
        ([PROMPT, "--template-var", "thinking=false"], {"template_variables": {"thinking": False}}),
        (["--chat"], {"chat": True}),
        ([], {"chat": False}),
    ):
        assert main([str(chat), *arguments, *SHORT]) == 0
        assert capsys.readouterr().out == model.generate_text(PROMPT, max_new_tokens=12, **options) + "\n"
    assert main([str(chat), wrapped, *SHORT]) == 0
    assert capsys.readouterr().out == model.generate_text(PROMPT, max_new_tokens=12) + "\n"


def test_several_prompts_are_answered_one_after_the_other(folder: Path, expected: str, capsys: Captured) -> None:
    other = load_model(folder).generate_text("girl", max_new_tokens=12)
    for arguments in ([], ["--set", "batch_size=1"], ["--set", "batch_size=2"]):
        assert main([str(folder), PROMPT, "--prompt", "girl", "--prompt", PROMPT, *SHORT, *arguments]) == 0
        output = capsys.readouterr()
        answers = (f"==> {text} <==\n{answer}\n" for text, answer in ((PROMPT, expected), ("girl", other)) * 2)
        assert output.out == "\n".join(list(answers)[:3])
        assert "generation: 36 tokens" in report_lines(output.err, "cache")[1]


def test_a_long_prompt_is_one_short_line_above_its_answer(folder: Path, capsys: Captured) -> None:
    assert main([str(folder), "girl\n \tgirl", "--prompt", "ab" * 99, *SHORT]) == 0
    headers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("==> ")]
    assert headers[0] == "==> girl girl <=="
    assert headers[1] == f"==> {'ab' * 34}a... <=="


@pytest.mark.parametrize("content", [PROMPT, PROMPT + "\n", PROMPT + "\r\n", "\ufeff" + PROMPT])
def test_a_prompt_from_a_file_or_stdin(
    folder: Path, expected: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    for path in (str(file), "-"):
        assert main([str(folder), "--prompt-file", path, *SHORT]) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_drafts_are_in_the_report(folder: Path, expected: str, capsys: Captured) -> None:
    arguments = [str(folder), PROMPT, "--prompt-lookup", "4", *SHORT]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out == expected + "\n"
    assert "drafted tokens accepted" in report_lines(output.err, "cache", "lookup")[-1]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["text"] == [expected]
    assert content["tokens_per_step"] >= 1
    assert content["draft_tokens"] >= content["draft_tokens_accepted"]
    assert (content["cache_dtype"], content["cache_bytes"] > 0) == ("float32", True)


def test_json_is_one_object_and_nothing_else(folder: Path, expected: str, capsys: Captured) -> None:
    assert main([str(folder), PROMPT, "--prompt", "girl", "--json", *SHORT]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 1
    content = json.loads(output.out)
    assert content["text"][0] == expected
    assert [len(tokens) for tokens in content["tokens"]] == [12, 12]
    assert content["finish"] == ["length", "length"]
    assert content["generated_tokens"] == 24
    assert {"prefill_tps", "generation_tps", "peak_memory_bytes", "load_ms"} <= set(content)


def test_an_embedding_model_prints_vectors(tmp_path: Path, capsys: Captured) -> None:
    save_embedding_model(tmp_path, "Qwen3Config", vocab_size=422)
    save(byte_level(), tmp_path)
    vectors = load_model(tmp_path).encode([PROMPT, "girl"])
    assert main([str(tmp_path), PROMPT, "--prompt", "girl"]) == 0
    output = capsys.readouterr()
    shown = torch.tensor([[float(value) for value in line.split()] for line in output.out.splitlines()])
    torch.testing.assert_close(shown, vectors, atol=1e-5, rtol=1e-4)
    tokens = sum(len(load_model(tmp_path).tokenizer.encode_prompt(text)) for text in (PROMPT, "girl"))
    prefill, load = output.err.splitlines()
    assert prefill.startswith(f"prefill: {tokens} tokens, ")
    assert re.fullmatch(r"load: \d+ ms, peak memory: \d+ MB", load)
    assert main([str(tmp_path), PROMPT, "--prompt", "girl", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    torch.testing.assert_close(torch.tensor(content["vectors"]), vectors)
    assert content["prompt_tokens"] == tokens
    assert not any("generat" in key or "first" in key for key in content)


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a decoding step."""
    taken: list[None] = []
    decode_one = causallm.generation.decode_one

    def step(*arguments: Any) -> Any:
        taken.append(None)
        if len(taken) == steps:
            raise KeyboardInterrupt
        return decode_one(*arguments)

    monkeypatch.setattr(causallm.generation, "decode_one", step)


def test_an_interruption_keeps_what_there_is(
    folder: Path, expected: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(8, monkeypatch)
    assert main([str(folder), PROMPT, "--prompt", "girl", *SHORT]) == 130
    output = capsys.readouterr()
    header, first, between, other, second, rest = output.out.split("\n")
    assert (header, between, other) == (f"==> {PROMPT} <==", "", "==> girl <==")
    assert expected.startswith(first.removesuffix("\ufffd"))
    assert len(first) > 3
    assert (len(second) > 3, rest) == (True, "")
    assert report_lines(output.err, "cache")[1].startswith("generation: 16 tokens")


def test_an_interruption_keeps_json_whole(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(5, monkeypatch)
    assert main([str(folder), PROMPT, "--prompt", "girl", "--json"]) == 130
    content = json.loads(capsys.readouterr().out)
    assert content["finish"] == ["interrupted", "interrupted"]
    assert [len(tokens) for tokens in content["tokens"]] == [5, 5]


class Terminal(io.StringIO):
    """A text file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_progress_bars_until_the_text_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(
        "causallm.commands.run.tqdm", lambda **options: tqdm(**{**options, "delay": 1e-9, "mininterval": 0})
    )
    assert main([str(folder), PROMPT * 3, "--chunk", "4", *SHORT]) == 0
    model = load_model(folder)
    tokens, answer = len(model.encode_prompt(PROMPT * 3)), model.generate_text(PROMPT * 3, max_new_tokens=12)
    bars, report = terminal.getvalue().split(answer)
    assert bars.index("loading: ") < bars.index(f"| 4/{tokens} [") < bars.index(f"| 8/{tokens} [")
    assert bars.endswith(" \r")
    report_lines(report.removeprefix("\n"), "cache")


def test_a_short_prompt_has_no_progress_bar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([str(folder), PROMPT, *SHORT]) == 0
    assert "prompt:" not in terminal.getvalue()


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(folder: Path, capsys: Captured) -> None:
    assert main([str(folder), PROMPT * 100, "--max-length", "600", "-n", "4", "--truncate"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("warning: max_seq_len (--max-length) 600 is more than the 512 positions")
    assert lines[1].endswith("tokens are left out")


def damaged(folder: Path, target: Path, damage: Callable[[Path], object]) -> str:
    """A copy of a model folder with something wrong with it."""
    shutil.copytree(folder, target)
    damage(target)
    return str(target)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer: looked for "),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    (lose_a_shard, "model-00001-of-00002.safetensors is missing"),
    (lambda folder: cut(folder / "model.safetensors"), "truncated or damaged"),
    (lambda folder: change(folder / "config.json", architectures=["Mystery"]), "unknown architecture 'Mystery'; known"),
    (lambda folder: change(folder / "config.json", architectures=None), "architectures is None, expected a list"),
    (lambda folder: change(folder / "config.json", intermediate_size=47), "the model expects [32, 47]"),
    (lambda folder: change(folder / "config.json", vocab_size=100), "the model expects [100, 32]"),
    (lambda folder: change(folder / "config.json", num_hidden_layers=3), "are missing, the first is layers.2."),
    (lambda folder: change(folder / "config.json", hidden_size="many"), "hidden_size is 'many', expected a whole"),
    (lambda folder: (folder / "config.json").write_text('{\n"a": 1,\n}'), "config.json:3: broken JSON"),
    (lambda folder: (folder / "generation_config.json").write_text("\n["), "generation_config.json:2: broken JSON"),
    (lambda folder: (folder / "nntr_config.json").write_text("3"), "nntr_config.json:1: expected a JSON object"),
    (lambda folder: (folder / "nntr_config.json").write_text('{"max_len": 3}'), "unknown key 'max_len'; known are"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model"'), "tokenizer.json:1: broken JSON"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{'"), "tokenizer_config.json:1: broken JSON"),
    (lambda folder: change(folder / "generation_config.json", temperature=-1), "temperature: got -1.0, expected"),
]


def mistake(capsys: Captured, *arguments: str) -> str:
    """Runs what must fail; returns the one line on stderr."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    return output.err


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_folder_is_one_line(
    folder: Path, tmp_path: Path, capsys: Captured, damage: Callable[[Path], object], message: str
) -> None:
    assert message in mistake(capsys, damaged(folder, tmp_path / "damaged", damage), PROMPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("MODEL", "no prompt was given, and nntr_config.json has no sample_input"),
        ("missing x", "there is no model folder missing"),
        ("MODEL x --prompt-file missing.txt", "missing.txt: No such file or directory"),
        ("MODEL --prompt-file MODEL/model.safetensors", "model.safetensors is not UTF-8 text at byte"),
        ("MODEL --prompt-file /dev/null", "the prompt is empty"),
        ("MODEL --prompt=", "the prompt is empty"),
        ("MODEL x --max-length 1", "the prompt has 1 tokens, but the context is 1 tokens"),
        ("MODEL x --chat", "no chat template beside"),
        ("MODEL x --system y", "needs the chat template"),
        ("MODEL x --raw --chat", "not allowed with argument --raw"),
        ("MODEL x --temperature -1", "temperature: got -1.0, expected a finite number >= 0"),
        ("MODEL x --temperature hot", "argument --temperature: invalid float value: 'hot'"),
        ("MODEL x --top-k -3", "top_k: got -3"),
        ("MODEL x --top-p 1.5", "top_p: got 1.5"),
        ("MODEL x --min-p nan", "min_p: got nan"),
        ("MODEL x --repetition-penalty 0", "repetition_penalty: got 0.0"),
        ("MODEL x --presence-penalty inf", "presence_penalty: got inf"),
        ("MODEL x --frequency-penalty nan", "frequency_penalty: got nan"),
        ("MODEL x --logit-bias 3", "--logit-bias: got ['3'], expected ID=BIAS"),
        ("MODEL x --logit-bias 9999=1", "logit_bias: got token id 9999"),
        ("MODEL x --bad-word-ids 1;2", "--bad-word-ids: got ['1;2'], expected token ids"),
        ("MODEL x --bad-word=", "bad word ''"),
        ("MODEL x --stop=", "empty stop string"),
        ("MODEL x --seed 99999999999999999999", "seed: got 99999999999999999999, expected a 64-bit integer"),
        ("MODEL x -n 0", "max_new_tokens: got 0, expected at least 1"),
        ("MODEL x --threads 0", "--threads: got 0, expected 1 to "),
        ("MODEL x --threads 100000", "--threads: got 100000, expected 1 to "),
        ("MODEL x --chunk 0", "with init_seq_len=0: init_seq_len (--chunk) is 0, expected a whole number of"),
        ("MODEL x --max-length -5", "with max_seq_len=-5: max_seq_len (--max-length) is -5, expected"),
        ("MODEL x --max-length=-5", "with max_seq_len=-5: max_seq_len (--max-length) is -5, expected"),
        ("MODEL x --set max_seq_len=-5", "with max_seq_len=-5: max_seq_len is -5, expected"),
        ("MODEL x --cache-dtype int3", "kv_cache_dtype (--cache-dtype) is 'int3', expected one of"),
        (
            "MODEL x --max-length 9 --set k=1",
            "kv_cache_dtype, lmhead_dtype, lora_alpha, lora_rank, lora_target, max_se",
        ),
        ("MODEL xyz --max-length 2", "raise max_seq_len (--max-length) where the model allows it, or ask to truncate"),
        ("MODEL x --dtype int3", "unknown dtype 'int3', expected one of"),
        ("MODEL x --device nowhere", "--device: 'nowhere' cannot be used here"),
        ("MODEL x --device hpu", "--device: 'hpu' cannot be used here"),
        ("MODEL x --device meta", "--device: 'meta' holds no numbers"),
        ("MODEL x --set max_len=3", "with max_len=3: unknown key 'max_len'; known are"),
        ("MODEL x --set max_seq_len", "--set: got 'max_seq_len', expected NAME=VALUE"),
        ("MODEL x --set =3", "--set: got '=3', expected NAME=VALUE"),
        ("MODEL x --set model_tensor_type=Q2_K-FP32", "model_tensor_type is 'Q2_K-FP32', expected one of FP32"),
        ("MODEL x --set bad_word_ids=[9999]", "bad_words_ids: got token id 9999"),
        ("MODEL x --template-var thinking", "--template-var: got 'thinking', expected NAME=VALUE"),
        ("MODEL x --template-var messages=1", "--template-var: messages is the conversation"),
        ("MODEL x --plugin missing.py", "there is no plug-in file missing.py"),
        ("MODEL x --revision main", "--revision is for hub ids"),
        ("MODEL x --no-such-option", "unrecognized arguments: --no-such-option"),
        ("MODEL x y z", "unrecognized arguments: y z"),
        ("run", "the following arguments are required: MODEL (see main.py run --help)"),
        ("convert MODEL", "the following arguments are required: -o/--output"),
        ("convert MODEL -o MODEL/no/such/x.safetensors", "no/such"),
        ("download missing", "there is no folder missing, and it is no hub id"),
        ("download MODEL", "has no nntr_config.json with hf_repo"),
        ("inspect missing", "there is no model folder missing"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys: Captured, arguments: str, message: str) -> None:
    assert message in mistake(capsys, *arguments.replace("MODEL", str(folder)).split())


def test_a_weight_file_is_answered_with_what_it_needs(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    line = mistake(capsys, str(folder / "model.safetensors"), "x")
    assert f"name its folder: {folder} --set model_file_name=model.safetensors" in line
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "x.bin").write_bytes(b"weights")
    (bare / "notes.txt").write_bytes(b"text")
    line = mistake(capsys, str(bare / "x.bin"), "x")
    assert "x.bin has no config.json beside it: put the model's config.json and tokenizer.json there" in line
    for arguments in ([str(bare), "x"], ["convert", str(bare / "x.bin"), "-o", str(tmp_path / "y")]):
        assert "has no config.json, without which x.bin cannot be read: put" in mistake(capsys, *arguments)
    assert "notes.txt is a file, expected a model folder or a .gguf" in mistake(capsys, str(bare / "notes.txt"), "x")


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (MemoryError(), ""),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4096000000000 bytes. Error code 12 (Cannot allocate memory)"), ", 4,096,000 MB more"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), ", 20.00 MiB more"),
        (RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"), ""),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_one_line_with_advice(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, error: Exception, amount: str
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("causallm.commands.run.open_model", exhausted)
    line = mistake(capsys, str(folder), "x")
    assert line.startswith(f"error: out of memory{amount}")
    assert all(word in line for word in ("--max-length", "quantize", "--memory-budget"))


def test_torch_reports_exhausted_memory_as_is_known(capsys: Captured) -> None:
    """The message is torch's own, whatever its version: no memory can hold this."""
    assert reporting_errors(lambda: len(torch.empty(2**60, dtype=torch.int8))) == 2
    assert capsys.readouterr().err.startswith("error: out of memory, 1,152,921,504,607 MB more could not be had")


def test_another_failure_of_the_program_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        reporting_errors(lambda: len(torch.ones(2, 3) @ torch.ones(2, 3)))


def test_a_prompt_that_is_too_long_is_refused_with_the_counts(folder: Path, capsys: Captured) -> None:
    tokens = len(load_model(folder).encode_prompt(PROMPT * 300))
    line = mistake(capsys, str(folder), PROMPT * 300)
    assert f"the prompt has {tokens} tokens, but the context is 512 tokens" in line


def test_a_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for arguments in (["no-such-owner/name", "x"], ["download", "no-such-owner/name"]):
        assert "cannot fetch no-such-owner/name from the Hugging Face hub" in mistake(capsys, *arguments)


def test_a_hub_id_is_run_from_where_it_was_fetched_to(
    folder: Path, expected: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions: list[str | None] = []

    def snapshot_download(*_: Any, revision: str | None, **__: Any) -> str:
        revisions.append(revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["no-such-owner/name", PROMPT, "--revision", "v2", *SHORT]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main(["download", "no-such-owner/name"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert revisions == ["v2", None]


OPTIONS = """
    --bad-word --bad-word-ids --cache-dtype --chat --chunk --device --dtype --frequency-penalty --greedy --help --json
    --logit-bias --max-length --max-new-tokens --memory-budget --min-p --no-mmap --plugin --presence-penalty --prompt
    --prompt-cache --prompt-file --prompt-lookup --raw --repetition-penalty --revision --seed --set --static-cache
    --stop --system --temperature --template-var --threads --top-k --top-p --truncate
"""


def test_the_options_of_run_are_these(capsys: Captured) -> None:
    """A script that uses one must not find it gone; to add one is to add it here."""
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    output = capsys.readouterr()
    shown = {
        word.strip("[],")
        for line in output.out.splitlines()
        for word in line.split()
        if word.strip("[").startswith("--")
    }
    assert shown == set(OPTIONS.split())
    assert output.err == ""


def test_help_lists_the_verbs_and_so_does_a_command_without_arguments(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr()
    assert all(f"\n  {verb} " in output.out for verb in VERBS)
    assert output.err == ""
    assert main([]) == 2
    again = capsys.readouterr()
    assert (again.out, again.err) == ("", output.out)


def test_the_version_is_that_of_the_package(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    project = tomllib.loads((MAIN.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out.startswith(f"causallm {project['version']}, torch {torch.__version__}, Python 3.")


WITHOUT_TORCH = """
import sys
from causallm.cli import main
main(sys.argv[1:])
sys.exit(7 if "torch" in sys.modules else 0)
"""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["chta"]], ids=str)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, cwd=MAIN.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_package_exports_is_there_when_asked_for() -> None:
    """In a process that has imported nothing else, so that families are registered by the first name alone."""
    script = "from causallm import Factory; print(*Factory.known()); import causallm; causallm.nothing"
    done = subprocess.run([sys.executable, "-c", script], cwd=MAIN.parent, capture_output=True, text=True)
    assert "LlamaForCausalLM" in done.stdout.split()
    assert done.stderr.rstrip().endswith("AttributeError: module 'causallm' has no attribute 'nothing'")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert capsys.readouterr().out.startswith("usage: main.py")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for more text than anybody waits for."""
    folder = tmp_path_factory.mktemp("endless")
    save_text_model(folder, max_position_embeddings=10**7, generation={"max_new_tokens": 10**6})
    return folder


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process of its own, its stdout buffered as it is for users."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, str(MAIN), *arguments], env=environment, **options)


def test_ctrl_c_ends_a_process_with_its_report(endless: Path) -> None:
    # A shell that runs the tests in the background may let them ignore it, and their processes with them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with start(str(endless), PROMPT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    report_lines(error.decode(), "cache")


def test_a_reader_that_goes_away_is_no_error(endless: Path) -> None:
    with start(str(endless), PROMPT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_output_that_cannot_be_written_is_one_line(folder: Path) -> None:
    with (
        open("/dev/full", "wb") as full,
        start(str(folder), PROMPT, "--json", stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.decode() == "error: [Errno 28] No space left on device\n"


def test_a_real_terminal_shows_loading_and_a_pipe_gets_the_text(folder: Path, expected: str) -> None:
    terminal, its_other_end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with start(
        str(folder), "--prompt-file", "-", *SHORT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=its_other_end
    ) as process:
        os.close(its_other_end)
        output, _ = process.communicate(PROMPT.encode(), timeout=60)
    assert process.returncode == 0
    assert output.decode() == expected + "\n"
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    os.close(terminal)
    assert b"loading: " in shown
    assert b"prefill: " in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that nobody holds the other end any more
        return b""
