"""Training text: where documents end, and which tokens of a conversation the loss counts."""

import json
from pathlib import Path
from typing import Any

import pytest
from sample_tokenizers import byte_level, save
from text_models import TEMPLATE
from train_runs import LLAMA, content, settings, write

from causallm.cli import main
from causallm.tokenizer import Tokenizer
from causallm.training import corpus
from causallm.training.corpus import Document, read_documents
from causallm.training.encode import answer_end, encode_document
from causallm.training.model_folder import sample_input
from causallm.training.new_tokenizer import make_tokenizer
from causallm.training.settings import TokenizerSettings

MARK = "<|endoftext|>"


def texts(path: Path, separator: str = MARK) -> list[str]:
    return [document.text for document in read_documents([str(path)], separator)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 13, 14, 1000])
@pytest.mark.parametrize("separator", [MARK, "\n\n", "ab", "aba", "\n"])
def test_documents_are_what_stands_between_marks(
    tmp_path: Path, separator: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a chunk's border cuts a mark."""
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    raw = f"{MARK}one{MARK} two lines\nof a\n\nkind {MARK}{MARK}  \n<|endof{MARK}ababa abab\n\n\nlast <|endoftext|"
    (tmp_path / "a.txt").write_text(raw)
    expected = [part.strip() for part in raw.split(separator) if part.strip()]
    assert texts(tmp_path / "a.txt", separator) == expected


def test_without_a_separator_a_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f" one{MARK}\ntwo ")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("three")
    read = read_documents([str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")], "")
    assert [document.text for document in read] == [f"one{MARK}\ntwo", "three"]


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def test_json_lines_hold_texts_and_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = lines(tmp_path / "a.jsonl", {"text": f"a{MARK}b\n\nc"}, "", {"text": ""}, {"messages": messages, "id": 3})
    read = list(read_documents([str(path)], MARK))
    assert read == [Document(f"a{MARK}b\n\nc"), Document(messages=tuple(messages))]
    assert [document.texts() for document in read] == [[f"a{MARK}b\n\nc"], ["Hi", "Ho"]]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{", "broken JSON"),
        ("3", "expected an object with 'text' or 'messages'"),
        ({"txt": "a"}, "expected an object with 'text'"),
        ({"text": 3}, "expected an object with 'text'"),
        ({"messages": []}, "'messages' that are not empty"),
        ({"messages": "Hi"}, "'messages' that are not empty"),
        ({"messages": ["Hi"]}, "expected messages that are objects"),
        ({"messages": [{"role": "user"}]}, "expected messages that are objects"),
        ({"messages": [{"role": "user", "content": None}]}, "expected messages that are objects"),
        ({"messages": [{"content": "Hi"}]}, "expected messages that are objects"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "begins with an answer"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, entry: Any, expected: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "a"}, entry)
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{expected}"):
        list(read_documents([str(path)], MARK))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_files_that_are_missing_or_no_text_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no data file .*{name}"):
        list(read_documents([str(tmp_path / name)], MARK))
    (tmp_path / name).write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=f"{name}: not UTF-8 text"):
        list(read_documents([str(tmp_path / name)], MARK))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train": ["missing.txt"]}, "there is no data file missing.txt"),
        ({"train": ["EMPTY.txt"]}, "EMPTY.txt: the data is empty, expected text"),
        ({"train": ["SHORT.txt"], "validation_fraction": 0}, "SHORT.txt: the data has 6 tokens, expected more than"),
        ({"validation": ["EMPTY.txt"]}, "EMPTY.txt: the data is empty, expected text"),
        ({"validation": ["SHORT.txt"]}, "SHORT.txt: the data has 6 tokens, expected more than context_length 16"),
        ({"train": ["BROKEN.jsonl"]}, "BROKEN.jsonl:1: broken JSON"),
        ({"train": ["CHAT.jsonl"]}, "there is no chat template: set tokenizer.chat_template"),
    ],
)
def test_data_that_cannot_be_trained_on(
    tmp_path: Path, data: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY.txt").write_text(" \n\n")
    Path("SHORT.txt").write_text("Hello")
    Path("BROKEN.jsonl").write_text("{")
    lines(Path("CHAT.jsonl"), {"messages": [{"role": "user", "content": "Hi"}]})
    assert main(["train", str(write(tmp_path, content(tmp_path, data=data)))]) == 2
    output = capsys.readouterr().err
    assert expected in output
    assert output.count("error:") == 1
    assert "Traceback" not in output


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, content(tmp_path, model={**LLAMA, "vocab_size": 256}))
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == "error: model.vocab_size is 256, but the tokenizer has 257 tokens\n"


@pytest.fixture
def chat(tmp_path: Path) -> Tokenizer:
    """A tokenizer whose template says <s> first and <|im_end|> after each turn; </s> ends documents."""
    folder = tmp_path / "chat"
    folder.mkdir()
    save(byte_level(), folder, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    return Tokenizer.from_folder(folder)


def test_the_sample_input_of_a_model_that_chats_is_a_message(chat: Tokenizer, tmp_path: Path) -> None:
    text = sample_input(settings(tmp_path, log={"sample_prompts": ["Tell me."]}), chat)
    assert text is not None
    assert text.count("Tell me.") == 1
    ids = chat.encode_prompt(text)
    assert ids == chat.encode(chat.render([message("user", "Tell me.")]), add_special_tokens=False)
    assert ids.count(chat.bos_id) == 1
    assert sample_input(settings(tmp_path, log={"sample_prompts": [text]}), chat) == text


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one answer": [message("user", "Tell me."), message("assistant", "Once upon a time")],
    "system, two answers": [
        message("system", "Be kind."),
        message("user", "Hello, world?"),
        message("assistant", "Hello! Hello!"),
        message("user", "Hello! Hello!"),
        message("assistant", "assistant\nuser\n"),
    ],
    "ends with a question": [message("user", "1"), message("assistant", "12"), message("user", "123")],
    "no answer": [message("system", "abc"), message("user", "def")],
    "two answers in a row": [message("user", "a"), message("assistant", "b"), message("assistant", "c")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_loss_counts_answers_and_their_ends(chat: Tokenizer, name: str) -> None:
    """The expected mask is put together by hand from what the template writes around a message."""
    messages = CONVERSATIONS[name]
    expected_ids, expected_counts = chat.encode("<s>", add_special_tokens=False), [False]
    for turn in messages:
        head, body = f"<|im_start|>{turn['role']}\n", f"{turn['content']}<|im_end|>\n"
        is_answer = turn["role"] == "assistant"
        for text, counted in (head, False), (body, is_answer):
            ids = chat.encode(text, add_special_tokens=False)
            expected_ids += ids
            expected_counts += [counted] * len(ids)
    expected_ids += chat.encode("</s>", add_special_tokens=False)
    expected_counts.append(messages[-1]["role"] == "assistant")
    ids, counts = encode_document(Document(messages=tuple(messages)), chat)
    assert chat.decode(ids, False) == chat.decode(expected_ids, False)
    assert (ids, counts) == (expected_ids, expected_counts)
    rendered = chat.render(messages, add_generation_prompt=False)
    assert ids[:-1] == chat.encode(rendered, add_special_tokens=False)
    ends = [counted for token, counted in zip(ids, counts, strict=True) if token == chat.token_id("<|im_end|>")]
    assert ends == [turn["role"] == "assistant" for turn in messages]


def test_generation_stops_at_the_end_of_an_answer(chat: Tokenizer, tmp_path: Path) -> None:
    assert answer_end(chat) == chat.token_id("<|im_end|>")
    save(byte_level(), tmp_path, eos_token="</s>")
    assert answer_end(Tokenizer.from_folder(tmp_path)) is None
    for template in ("{{ messages[-1].content }}", "{{ messages[-1].content }} .", "{{ raise_exception('no') }}"):
        save(byte_level(), tmp_path, eos_token="</s>", chat_template=template)
        assert answer_end(Tokenizer.from_folder(tmp_path)) is None


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    save(byte_level(), tmp_path, eos_token="</s>", chat_template=template)
    document = Document(messages=tuple(CONVERSATIONS["one answer"]))
    with pytest.raises(ValueError, match="the chat template rewrites earlier turns"):
        encode_document(document, Tokenizer.from_folder(tmp_path))


def test_a_text_begins_as_a_prompt_does_and_ends_once(tmp_path: Path) -> None:
    save(byte_level(), tmp_path, eos_token="</s>", bos_token="<s>")
    plain = Tokenizer.from_folder(tmp_path)
    ids, counts = encode_document(Document("Once upon"), plain)
    assert ids == [*plain.encode("Once upon"), plain.token_id("</s>")]
    assert counts == [True] * len(ids)
    save(byte_level(), tmp_path, eos_token="</s>", bos_token="<s>", add_bos_token=True, add_eos_token=True)
    adding = Tokenizer.from_folder(tmp_path)
    assert encode_document(Document("Once upon"), adding)[0] == [adding.token_id("<s>"), *ids]
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_document(Document("Once"), Tokenizer.from_folder(tmp_path))


def test_a_vocabulary_without_room_for_merges_is_of_characters(tmp_path: Path) -> None:
    settings = TokenizerSettings(vocab_size=258, special_tokens=("<a>",), eos_token="<b>")
    tokenizer = make_tokenizer(settings, ["abc abc abc " * 50], tmp_path)
    assert tokenizer.vocab_size == 258
    assert (tokenizer.token_id("<a>"), tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    text = "abc abc: Züge!\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<b>")[-1] == 1
    assert make_tokenizer(TokenizerSettings(vocab_size=300), ["abc abc abc " * 50], tmp_path).encode("abc") != ids[:3]


def test_an_existing_tokenizer_is_taken_over(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save(byte_level(), source, eos_token="</s>", chat_template=TEMPLATE)
    original = Tokenizer.from_folder(source)
    target.mkdir()
    (target / "chat_template.jinja").write_text("of an earlier run")
    for file in (source, source / "tokenizer.json"):
        taken = make_tokenizer(TokenizerSettings(file=str(file)), [], target)
        assert taken.fingerprint() == original.fingerprint()
        assert taken.chat_template is not None
        assert taken.chat_template.source == TEMPLATE
    replaced = make_tokenizer(TokenizerSettings(file=str(source), chat_template="{{ 1 }}"), [], target)
    assert replaced.chat_template is not None
    assert replaced.chat_template.source == "{{ 1 }}"
    again = make_tokenizer(TokenizerSettings(file=str(target)), [], target)
    assert again.fingerprint() == original.fingerprint()
    for missing in ("nowhere", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="there is no tokenizer file"):
            make_tokenizer(TokenizerSettings(file=missing), [], target)
    with pytest.raises(FileNotFoundError, match=r"there is no chat template file nowhere\.jinja"):
        make_tokenizer(TokenizerSettings(file=str(source), chat_template="nowhere.jinja"), [], target)
