"""Perplexity against transformers' own losses on the same windows, and what the verb prints and refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints, quiet_transformers
from embedding_folders import save_embedding_model
from families import prompt
from sample_tokenizers import byte_fallback, byte_level, save
from test_cli import Terminal, mistake
from text_models import save_text_model

from causallm import load_model, logit_blocks
from causallm.cli import main
from causallm.perplexity import Perplexity, perplexity, windows
from causallm.storage.storage import Storage

Captured = pytest.CaptureFixture[str]
STORIES = Path(__file__).resolve().parents[1] / "res" / "tiny-stories"
TEXT = "Once upon a time there was a naïve little girl named Lily. She didn't like 123 cafés 😀! " * 4


def transformers_nats(reference: Any, ids: list[int], window: int, stride: int) -> list[tuple[float, int]]:
    """(sum of -log p, tokens) of each window, from transformers' loss over labels, of which others are masked."""
    results, scored = [], set()
    for begin in range(0, len(ids), stride):
        part = torch.tensor([ids[begin : begin + window]])
        labels = part.clone()
        for column in range(part.shape[1]):
            if begin + column in scored or column == 0:
                labels[0, column] = -100
            scored.add(begin + column)
        count = int((labels != -100).sum())
        if count:
            with torch.no_grad():
                results.append((reference(part, labels=labels, use_cache=False).loss.item() * count, count))
        if begin + window >= len(ids):
            break
    return results


def check(ours: Perplexity, expected: list[tuple[float, int]]) -> None:
    nats, tokens = sum(nats for nats, _ in expected), sum(count for _, count in expected)
    assert (ours.tokens, ours.windows) == (tokens, len(expected))
    assert ours.nats == pytest.approx(nats, rel=1e-5)
    assert ours.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert ours.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3", "gpt-oss", "longrope"])
@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [
        (50, 20, 10),
        (50, 20, 20),
        (47, 20, 7),
        (41, 20, 20),  # the last window has one token, which nothing is before
        (50, 17, 1),  # beyond the 16 tokens from which on longrope turns to other factors
        (12, 20, 10),
        (20, 20, 10),
        (2, 64, 64),
    ],
)
def test_it_is_that_of_transformers(checkpoints: Checkpoints, name: str, length: int, window: int, stride: int) -> None:
    ids = prompt(1, length, seed=length)[0].tolist()
    ours = perplexity(checkpoints.ours(name), ids, window, stride)
    check(ours, transformers_nats(checkpoints.reference(name), ids, window, stride))


def test_no_token_is_scored_twice_and_none_left_out_but_those_without_context() -> None:
    for length in range(2, 30):
        for window in range(2, 12):
            for stride in range(1, window + 1):
                scored = [token for _, first, end in windows(length, window, stride) for token in range(first, end)]
                openings = set(range(0, length, stride)) if stride == window else {0}
                assert scored == [token for token in range(length) if token not in openings]
                for begin, first, end in windows(length, window, stride):
                    assert begin < first < end <= begin + window


def test_only_the_logits_of_scored_tokens_are_computed(checkpoints: Checkpoints) -> None:
    assert sizes_of_logits(checkpoints.ours("llama")) == [19, 10, 5]


def test_logits_are_computed_some_at_a_time(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = checkpoints.ours("llama"), prompt(1, 35)[0].tolist()
    whole = perplexity(model, ids, 20, 10)
    monkeypatch.setattr(logit_blocks, "LOGITS_AT_ONCE", 8 * model.config.vocab_size)
    assert sizes_of_logits(model) == [8, 8, 3, 8, 2, 5]
    assert perplexity(model, ids, 20, 10).nats == pytest.approx(whole.nats, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "longrope"])
def test_windows_in_steps_score_the_same(name: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a memory budget, which is planned for steps of a chunk."""
    model, ids = checkpoints.ours(name, init_seq_len=7), prompt(1, 50)[0].tolist()
    whole = perplexity(model, ids, 20, 10)
    monkeypatch.setattr(model, "storage", Storage())
    model.storage.positions = model.max_length
    assert max(sizes_of_logits(model)) == 7
    assert perplexity(model, ids, 20, 10).nats == pytest.approx(whole.nats, rel=1e-5)


def sizes_of_logits(model: Any) -> list[int]:
    """Positions whose logits are computed at once, in order."""
    shapes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(len(logits)))
    try:
        perplexity(model, prompt(1, 35)[0].tolist(), 20, 10)
    finally:
        hook.remove()
    return shapes


def test_progress_goes_to_the_end(checkpoints: Checkpoints) -> None:
    steps: list[tuple[int, int]] = []
    perplexity(checkpoints.ours("llama"), prompt(1, 35)[0].tolist(), 20, 10, lambda *step: steps.append(step))
    assert steps == [(20, 35), (30, 35), (35, 35)]


def test_scores_that_are_no_numbers_are_refused(checkpoints: Checkpoints) -> None:
    model = checkpoints._load("llama", None)
    torch.nn.init.constant_(model.norm.weight, torch.inf)
    with pytest.raises(ValueError, match=r"tokens 1 to 19 are not finite numbers in torch\.float32"):
        perplexity(model, prompt(1, 35)[0].tolist(), 20, 10)


def test_a_model_that_sees_what_it_predicts_is_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(ValueError, match="attends in both directions"):
        perplexity(checkpoints.ours("llama", is_causal=False), [1, 2, 3], 20, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    save_text_model(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def reference_of(folder: Path) -> tuple[Any, Any]:
    """transformers' model, in fp32, and tokenizer."""
    import transformers

    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("options", ["", "--window 64 --stride 64", "--window 50 --stride 13"])
def test_the_story_teller_is_as_transformers_finds_it(text: Path, capsys: Captured, options: str) -> None:
    arguments = [str(STORIES), "--text", str(text), "--dtype", "float32", *options.split()]
    assert main(["perplexity", *arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    model, tokenizer = reference_of(STORIES)
    ids = tokenizer(TEXT)["input_ids"]
    assert (
        (shown["window"], shown["stride"]) == (int(options.split()[1]), int(options.split()[3]))
        if options
        else (512, 256)
    )
    expected = transformers_nats(model, ids, shown["window"], shown["stride"])
    check(Perplexity(shown["nats_per_token"] * shown["tokens"], shown["tokens"], shown["windows"]), expected)
    mean = sum(nats for nats, _ in expected) / sum(count for _, count in expected)
    assert shown["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    # No special token stands before the text: all of its tokens, at what those scored cost on average.
    assert shown["bits_per_byte"] == pytest.approx(mean * len(ids) / math.log(2) / len(TEXT.encode()), rel=1e-4)
    assert min(shown["tokens_per_second"], shown["load_ms"], shown["peak_memory_bytes"]) > 0


def test_the_tokens_that_begin_a_sequence_are_those_of_the_tokenizer(
    text: Path, tmp_path: Path, capsys: Captured
) -> None:
    save_text_model(tmp_path / "model", max_position_embeddings=200)
    save(byte_fallback(), tmp_path / "model", bos_token="<s>")
    assert main(["perplexity", str(tmp_path / "model"), "--text", str(text), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    model, tokenizer = reference_of(tmp_path / "model")
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    expected = transformers_nats(model, ids, 200, 100)
    assert (shown["window"], shown["stride"], shown["tokens"]) == (200, 100, len(ids) - 1)
    assert shown["nats_per_token"] * shown["tokens"] == pytest.approx(sum(nats for nats, _ in expected), rel=1e-5)
    # Every token of the text is scored, so that the whole cost lies on its bytes.
    bits = sum(nats for nats, _ in expected) / math.log(2)
    assert shown["bits_per_byte"] == pytest.approx(bits / len(TEXT.encode()), rel=1e-5)


def test_the_figures_go_to_stdout_and_nothing_else_goes_anywhere(folder: Path, text: Path, capsys: Captured) -> None:
    arguments = ["perplexity", str(folder), "--text", str(text), "--window", "64", "--stride", "32"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = dict(line.split(": ") for line in output.out.splitlines())
    assert list(lines) == ["perplexity", "nats per token", "bits per byte", "tokens scored", "speed"]
    assert lines["perplexity"] == f"{figures['perplexity']:.4f}"
    assert lines["nats per token"] == f"{figures['nats_per_token']:.4f}"
    assert lines["bits per byte"] == f"{figures['bits_per_byte']:.4f}"
    assert lines["tokens scored"] == f"{figures['tokens']}, in {figures['windows']} windows of 64 tokens, 32 apart"
    assert lines["speed"].endswith(" tokens/s")


def test_a_terminal_has_a_progress_bar(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["perplexity", str(folder), "--text", str(text)]) == 0
    assert "scoring: " in terminal.getvalue()


def test_text_is_scored_as_it_is_but_for_a_byte_order_mark(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    shown = []
    for content in ("A little girl\r\n", "\ufeffA little girl\r\n", "A little girl"):
        (tmp_path / "text").write_bytes(content.encode())
        assert main(["perplexity", str(folder), "--text", str(tmp_path / "text"), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    tokenizer = load_model(folder).tokenizer
    assert [row["tokens"] for row in shown[:2]] == [len(tokenizer.encode("A little girl\r\n")) - 1] * 2
    assert shown[0]["bits_per_byte"] == shown[1]["bits_per_byte"]
    assert shown[2]["tokens"] < shown[0]["tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--text TEXT --stride 0", "stride: got 0, expected 1 to 512, the window"),
        ("--text TEXT --window 20 --stride 21", "stride: got 21, expected 1 to 20, the window"),
        ("--text TEXT --window 513", "window: got 513, expected 2 to 512, the model's context"),
        ("--text TEXT --window 1", "window: got 1, expected 2 to 512"),
        ("--text TEXT --window x", "argument --window: invalid int value: 'x'"),
        ("--text TEXT --threads 0", "--threads: got 0, expected 1 to "),
        ("--text missing.txt", "missing.txt: No such file or directory"),
        ("--text /dev/null", "the text has 0 tokens, expected at least 2"),
        ("--text SHORT", "the text has 1 tokens, expected at least 2"),
        ("--text MODEL/model.safetensors", "model.safetensors is not UTF-8 text at byte"),
        ("", "the following arguments are required: --text"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, text: Path, capsys: Captured, options: str, message: str) -> None:
    short = text.with_name("short.txt")
    short.write_text("a", encoding="utf-8")
    for name, path in (("TEXT", text), ("SHORT", short), ("MODEL", folder)):
        options = options.replace(name, str(path))
    assert message in mistake(capsys, "perplexity", str(folder), *options.split())


def test_an_embedding_model_is_refused(text: Path, tmp_path: Path, capsys: Captured) -> None:
    save_embedding_model(tmp_path / "model", "Qwen3Config", vocab_size=422)
    save(byte_level(), tmp_path / "model")
    line = mistake(capsys, "perplexity", str(tmp_path / "model"), "--text", str(text))
    assert "is an embedding model, expected one that predicts text" in line


def test_a_tokenizer_of_another_model_is_refused(text: Path, tmp_path: Path, capsys: Captured) -> None:
    save_text_model(tmp_path / "model", vocab_size=100)
    assert "does the tokenizer belong to the model?" in mistake(
        capsys, "perplexity", str(tmp_path / "model"), "--text", str(text)
    )
