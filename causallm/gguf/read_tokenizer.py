"""From a GGUF file's tokenizer keys to a `tokenizers` backend, special tokens and chat template."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from causallm.chat_template import ChatTemplate
from causallm.config.fields import Fields
from causallm.gguf import pretokenizers
from causallm.gguf.format import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, llama.cpp's llama_token_type."""
START = "tokenizer.ggml."
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
HUGGING_FACE = "tokenizer.huggingface.json"
SPACE = "▁"


def has_tokenizer(file: GgufFile) -> bool:
    """Whether the file holds one; a converter may leave it out."""
    return file.metadata.get(START + "model", "none") != "none"


def read_backend(file: GgufFile) -> Backend:
    """The backend; ValueError where keys are missing, wrong, or ask for a kind that is not read."""
    keys = Fields(file.metadata, str(file.path))
    if whole := keys.text(HUGGING_FACE):
        return _checked(file, lambda: Backend.from_str(whole))
    tokens, types = _tokens(keys), _types(keys)
    vocabulary = {token: index for index, token in enumerate(tokens) if not _is_padding(token, index, types)}
    model = keys.text(START + "model")
    if model == "gpt2":
        backend = _checked(file, lambda: _byte_level(keys, vocabulary))
    elif model == "llama":
        backend = _checked(file, lambda: _sentence_piece(keys, vocabulary, types))
    else:
        raise keys.wrong(START + "model", "gpt2 or llama")
    for index, token in enumerate(tokens):
        if types[index] in (CONTROL, USER_DEFINED) and token:
            backend.add_tokens([AddedToken(token, normalized=False, special=types[index] == CONTROL)])
    _frame(backend, keys, tokens)
    return backend


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """What tokenizer_config.json would say: tokens with a role, and whether a prompt gets BOS and EOS."""
    keys = Fields(file.metadata, str(file.path))
    tokens = _tokens(keys)
    content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in ROLES.items():
        if (token := _role(keys, name, tokens)) is not None:
            content[role] = token
    return {**content, "add_bos_token": _adds_bos(keys), "add_eos_token": keys.boolean(START + "add_eos_token", False)}


def chat_template(file: GgufFile) -> ChatTemplate | None:
    """The chat template, if any; ValueError where it is none."""
    keys = Fields(file.metadata, str(file.path))
    source = keys.text("tokenizer.chat_template")
    return ChatTemplate(source, keys.text("tokenizer.chat_template.tool_use") or None) if source else None


def _checked(file: GgufFile, make: Any) -> Backend:
    try:
        return make()
    except ValueError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file.path}: not a tokenizer that the tokenizers library takes: {error}") from error


def _tokens(keys: Fields) -> Sequence[str]:
    tokens = keys.raw(START + "tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ValueError(f"{keys.source}: {START}tokens is missing or not a list of texts, so there is no tokenizer")
    return tokens


def _types(keys: Fields) -> Sequence[int]:
    types = keys.raw(START + "token_type")
    count = len(_tokens(keys))
    if types is None:
        return [NORMAL] * count
    if not isinstance(types, list) or len(types) != count:
        raise ValueError(f"{keys.source}: {START}token_type is not a list of {count} numbers, one a token")
    return types


def _is_padding(token: str, index: int, types: Sequence[int]) -> bool:
    """What llama.cpp's converter fills a vocabulary with up to the rows of the embedding."""
    return types[index] == UNUSED and token == f"[PAD{index}]"


def split_name(keys: Fields) -> str:
    """The name of the splitting rules, one of `pretokenizers.SPLITS`."""
    name = keys.text(START + "pre", "default")
    known = pretokenizers.ALIASES.get(name, name)
    if known not in pretokenizers.SPLITS:
        warnings.warn(
            f"{keys.source}: tokenizer.ggml.pre is '{name}', which is not known: text is split as by 'default', and "
            "token ids may be others than the model was trained with",
            stacklevel=2,
        )
        return "default"
    return known


def _byte_level(keys: Fields, vocabulary: dict[str, int]) -> Backend:
    merges = keys.raw(START + "merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges[:1]):
        raise keys.wrong(START + "merges", "a list of texts")
    pairs = [_pair(keys, merge) for merge in merges]
    name = split_name(keys)
    backend = Backend(BPE(vocabulary, pairs, ignore_merges=name in pretokenizers.WHOLE_WORDS))
    if (normalizer := pretokenizers.normalizer(name)) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pretokenizers.splitter(name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(keys: Fields, merge: str) -> tuple[str, str]:
    """Two tokens with a space between; one of them may begin with a space itself."""
    first, space, second = merge[:1], *merge[1:].partition(" ")[1:]
    left = merge[: len(merge) - len(second) - 1]
    if not (first and space and second):
        raise ValueError(f"{keys.source}: {START}merges has '{merge}', expected two tokens with a space between")
    return left, second


def _sentence_piece(keys: Fields, vocabulary: dict[str, int], types: Sequence[int]) -> Backend:
    scores = keys.raw(START + "scores")
    if not isinstance(scores, list) or len(scores) != len(types) or not isinstance(scores[0], float):
        raise ValueError(f"{keys.source}: {START}scores is not a list of {len(types)} numbers, one a token")
    mergeable = {token: index for token, index in vocabulary.items() if types[index] in (NORMAL, UNUSED)}
    unknown = _role(keys, "unknown", _tokens(keys))
    known = unknown if unknown in vocabulary else None
    model = BPE(vocabulary, merges_by_score(mergeable, scores), unk_token=known, fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    prefixed = keys.boolean(START + "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return backend


def merges_by_score(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best token first.

    SentencePiece joins the neighbours whose whole has the highest score; a list of merges in that order does the same.
    """
    merges = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((scores[index], cut, len(right), left, right))
    merges.sort(key=lambda merge: (-merge[0], -merge[1], -merge[2]))
    return [(left, right) for *_, left, right in merges]


def _role(keys: Fields, name: str, tokens: Sequence[str]) -> str | None:
    key = f"{START}{name}_token_id"
    index = keys.optional_integer(key)
    if index is not None and index >= len(tokens):
        raise keys.wrong(key, f"one of the {len(tokens)} tokens")
    return None if index is None else tokens[index]


def _adds_bos(keys: Fields) -> bool:
    """llama.cpp's defaults: SentencePiece does, of the others only some."""
    by_default = keys.text(START + "model") == "llama" or (
        pretokenizers.ALIASES.get(keys.text(START + "pre"), keys.text(START + "pre")) in pretokenizers.BEGINS
    )
    return keys.boolean(START + "add_bos_token", by_default)


def _frame(backend: Backend, keys: Fields, tokens: Sequence[str]) -> None:
    """Let the backend itself put BOS and EOS around a text."""
    bos = _role(keys, "bos", tokens) if _adds_bos(keys) else None
    eos = _role(keys, "eos", tokens) if keys.boolean(START + "add_eos_token", False) else None
    around = [token for token in (bos, eos) if token is not None]
    if around:
        backend.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
        )


def backend_json(file: GgufFile) -> dict[str, Any]:
    """tokenizer.json's content."""
    content: dict[str, Any] = json.loads(read_backend(file).to_str())
    return content
