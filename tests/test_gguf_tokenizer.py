"""Tokenizers in GGUF: ids and text are those of the tokenizer that a file was written from."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import save_random_model
from sample_tokenizers import byte_fallback, byte_level, metaspace, word_piece
from test_tokenizer import QWEN3, STORIES, TEXTS
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from causallm.gguf.format import read_gguf
from causallm.gguf.pretokenizers import ALIASES, SPLITS
from causallm.gguf.read_tokenizer import HUGGING_FACE
from causallm.loading import find_source, load_model
from causallm.tokenizer import Tokenizer
from causallm.weights.convert import convert

TINY = Path(__file__).resolve().parents[1] / "res" / "tiny-stories"
HARD = [
    *(text for text in TEXTS if text),
    "I'll have 12345 of these; they're $3.50 each.\n\n  \tIndented   and\r\nmore…",
    "日本語のテキスト 中文 русский العربية HeLLo WORLDwide",
    "<|im_start|>user\nhello<|im_end|>",
    "x" * 50,
    "  leading and trailing  ",
    "a\u00a0b\u3000c",
]
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def converted(folder: Path, fill: Callable[[Path], Any], vocab: int) -> tuple[Path, Tokenizer]:
    """A GGUF file of a tiny model with that tokenizer, and the tokenizer of the folder that it was made from."""
    settings: dict[str, Any] = {"vocab_size": vocab, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    save_random_model(folder / "model", 1, "LlamaConfig", **settings)
    fill(folder / "model")
    convert(folder / "model", folder / "x.gguf")
    return folder / "x.gguf", Tokenizer.from_folder(folder / "model")


def save(backend: Backend, **config: Any) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**ROLES, **config}))

    return fill


def copy(source: Path) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        for path in [*source.glob("tokenizer*"), *source.glob("*.jinja")]:
            shutil.copy(path, folder)

    return fill


def split_by(name: str) -> Backend:
    """The byte-level sample with another split."""
    backend = byte_level()
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    backend = Backend.from_str(json.dumps(content))
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if name != "qwen2":
        backend.normalizer = normalizers.Sequence([])
        backend = Backend.from_str(json.dumps({**json.loads(backend.to_str()), "normalizer": None}))
    return backend


def assert_same(path: Path, source: Tokenizer) -> None:
    ours = find_source(path).tokenizer(None)
    for text in HARD:
        ids = source.encode_prompt(text)
        assert ours.encode_prompt(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == source.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == source.decode(ids), text
        assert ours.decode(ids, skip_special_tokens=False) == source.decode(ids, skip_special_tokens=False), text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (source.bos_id, source.eos_id, source.pad_id)
    assert ours.special_ids == source.special_ids
    assert (ours.chat_template and ours.chat_template.source) == (source.chat_template and source.chat_template.source)


@pytest.mark.parametrize("name", SPLITS)
def test_each_split_comes_back_by_its_name(name: str, tmp_path: Path) -> None:
    path, source = converted(tmp_path, save(split_by(name)), 430)
    metadata = read_gguf(path).metadata
    assert metadata["tokenizer.ggml.pre"] == name
    assert HUGGING_FACE not in metadata
    assert_same(path, source)


def test_the_repositorys_own(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "x.gguf")
    metadata = read_gguf(tmp_path / "x.gguf").metadata
    assert (metadata["tokenizer.ggml.pre"], HUGGING_FACE in metadata) == ("gpt-2", False)
    assert_same(tmp_path / "x.gguf", Tokenizer.from_folder(TINY))


def test_a_tokenizer_without_merges_has_an_empty_list(tmp_path: Path) -> None:
    """llama.cpp refuses a byte-level file where the key is missing."""
    symbols = pre_tokenizers.ByteLevel.alphabet()
    backend = Backend(models.BPE({symbol: index for index, symbol in enumerate(sorted(symbols))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.warns(UserWarning, match="no rules exactly"):
        path, source = converted(tmp_path, save(backend), 260)
    assert read_gguf(path).metadata["tokenizer.ggml.merges"] == []
    field = gguf.GGUFReader(path).fields["tokenizer.ggml.merges"]
    assert (field.types[0], len(field.data)) == (gguf.GGUFValueType.ARRAY, 0)
    assert find_source(path).tokenizer(None).encode("héllo", False) == source.encode("héllo", False)


@pytest.mark.parametrize("strip", [True, False])
def test_sentence_piece(strip: bool, tmp_path: Path) -> None:
    path, source = converted(tmp_path, save(byte_fallback(strip)), 500)
    metadata = read_gguf(path).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is strip
    assert HUGGING_FACE not in metadata
    assert_same(path, source)


def test_runs_of_spaces_that_are_tokens_of_their_own(tmp_path: Path) -> None:
    """Gemma's: listed as added tokens with "▁" for a space, which is what llama.cpp looks for in the text."""
    backend = byte_fallback(strip=False)
    backend.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("\n\n", normalized=False)])
    path, source = converted(tmp_path, save(backend), 500)
    metadata = read_gguf(path).metadata
    assert HUGGING_FACE not in metadata
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["  "], kinds["\n\n"]) == (4, 4)
    ours = find_source(path).tokenizer(None)
    assert ours.encode("a  b\n\nc", False) == [
        *source.encode("a", False), source.token_id("▁▁"), *source.encode("b\n\nc", False),
    ]  # fmt: skip
    assert ours.decode(ours.encode("a  b\n\nc")) == "a  b\n\nc"


@pytest.mark.parametrize("backend", [byte_level, lambda: with_lstrip(byte_fallback())])
def test_what_llama_cpp_has_no_rules_for_is_kept_whole(backend: Callable[[], Backend], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no rules exactly as this tokenizer's"):
        path, source = converted(tmp_path, save(backend()), 600)
    assert HUGGING_FACE in read_gguf(path).metadata
    assert_same(path, source)


def with_lstrip(backend: Backend) -> Backend:
    backend.add_tokens([AddedToken("<mark>", lstrip=True)])
    return backend


@pytest.mark.parametrize(("make", "what"), [(word_piece, "type WordPiece"), (metaspace, "neither of bytes")])
def test_kinds_that_llama_cpp_has_not_are_refused(make: Callable[[], Backend], what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=what):
        converted(tmp_path, save(make()), 600)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(("source", "vocab"), [(QWEN3, 151936), (STORIES, 512)])
def test_tokenizers_of_real_models(source: Path, vocab: int, tmp_path: Path) -> None:
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    path, tokenizer = converted(tmp_path, copy(source), vocab)
    assert HUGGING_FACE not in read_gguf(path).metadata
    assert_same(path, tokenizer)


def test_gguf_reads_the_vocabulary_that_we_write(tmp_path: Path) -> None:
    path, source = converted(tmp_path, save(byte_fallback()), 500)
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = [gguf.TokenType(kind).name for kind in fields["tokenizer.ggml.token_type"].contents()]
    by_name = dict(zip(tokens, types, strict=True))
    assert len(tokens) == 500
    assert all(tokens[index] == token for token, index in source.vocabulary().items())
    assert (by_name["<s>"], by_name["<0x0A>"], by_name["▁"], by_name["[PAD499]"]) == (
        "CONTROL", "BYTE", "NORMAL", "UNUSED",
    )  # fmt: skip
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == source.bos_id
    assert len(fields["tokenizer.ggml.scores"].contents()) == 500


def with_keys(path: Path, folder: Path, **changes: Any) -> Path:
    """A copy, made by the gguf package, in which keys of the tokenizer are others; None leaves one out."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(folder / "changed.gguf", "llama")
    for field in reader.fields.values():
        name = field.name.removeprefix("tokenizer.ggml.")
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = changes.get(name, field.contents())
        if value is not None:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "changed.gguf"


@pytest.mark.parametrize("alias", ["llama-v3", "refact", "deepseek-r1-qwen", "phi-2"])
def test_aliases_split_as_what_they_stand_for(alias: str, tmp_path: Path) -> None:
    path, source = converted(tmp_path, save(split_by(ALIASES[alias])), 430)
    ours = find_source(with_keys(path, tmp_path, pre=alias)).tokenizer(None)
    for text in HARD:
        assert ours.encode(text, add_special_tokens=False) == source.encode(text, add_special_tokens=False)


def test_an_unknown_split_is_warned_about(tmp_path: Path) -> None:
    path, _ = converted(tmp_path, save(split_by("default")), 430)
    with pytest.warns(UserWarning, match=r"tokenizer.ggml.pre is 'exotic'.*as by 'default'"):
        find_source(with_keys(path, tmp_path, pre="exotic")).tokenizer(None)


def test_llama_cpps_defaults_for_bos(tmp_path: Path) -> None:
    path, source = converted(tmp_path, save(split_by("llama-bpe"), add_bos_token=False), 430)
    assert find_source(path).tokenizer(None).encode_prompt("x") == source.encode_prompt("x")
    ours = find_source(with_keys(path, tmp_path, add_bos_token=None)).tokenizer(None)
    assert ours.encode_prompt("x") == [source.bos_id, *source.encode_prompt("x")]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected gpt2 or llama"),
        ({"tokens": None}, "tokens is missing"),
        ({"scores": None}, "scores is not a list of 500 numbers"),
        ({"bos_token_id": 500}, "bos_token_id is 500, expected one of the 500 tokens"),
    ],
)
def test_a_broken_vocabulary_is_named(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path, _ = converted(tmp_path, save(byte_fallback()), 500)
    with pytest.raises(ValueError, match=what):
        find_source(with_keys(path, tmp_path, **changes)).tokenizer(None)


def test_without_a_tokenizer_the_error_says_what_to_do(tmp_path: Path) -> None:
    path, _ = converted(tmp_path, save(byte_fallback()), 500)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer; name a tokenizer.json"):
        load_model(with_keys(path, tmp_path, model="none"))
    model = load_model(tmp_path / "changed.gguf", tokenizer_file="model/tokenizer.json")
    assert model.tokenizer.encode("Once")


def test_the_same_text_as_the_folder(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "x.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = load_model(tmp_path / "x.gguf"), load_model(TINY)
    prompts = ["Once upon a time", "The dog"]
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0}
    assert ours.generate_text(prompts, **options) == theirs.generate_text(prompts, **options)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_the_folder_made_from_a_file_has_the_same_tokenizer(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "x.gguf")
    convert(tmp_path / "x.gguf", tmp_path / "folder")
    again, source = Tokenizer.from_folder(tmp_path / "folder"), Tokenizer.from_folder(TINY)
    assert all(again.encode_prompt(text) == source.encode_prompt(text) for text in HARD)
    conversation = [{"role": "user", "content": "hi"}]
    assert again.render(conversation) == source.render(conversation)
