"""From a tokenizer to the keys of a GGUF file."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from causallm.gguf import pretokenizers
from causallm.gguf.read_tokenizer import (
    BYTE,
    CONTROL,
    HUGGING_FACE,
    NORMAL,
    SPACE,
    START,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_by_score,
)
from causallm.tokenizer import Tokenizer

# A merge has a score above this; what no merge makes is never asked for its own.
UNMERGED = -1e6
PREPENDED = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]


def tokenizer_keys(tokenizer: Tokenizer | None, rows: int, ends: Sequence[int]) -> dict[str, Any]:
    """The keys of a vocabulary filled up to the `rows` of the embedding; `ends` are the ids that end an answer.

    Where llama.cpp's rules are not exactly the tokenizer's, tokenizer.json is written too, which this project reads
    instead, and a warning says so. ValueError for a kind that llama.cpp has not.
    """
    if tokenizer is None:
        return {START + "model": "none"}
    content = tokenizer.backend_json()
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']} cannot be written as GGUF, only BPE")
    tokens, types = _vocabulary(content, rows)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    if model.get("byte_fallback"):
        keys, exact = _sentence_piece(content, tokens, types, merges)
    else:
        keys, exact = _byte_level(content, merges)
    if not exact or any(
        token[flag] for token in content["added_tokens"] for flag in ("lstrip", "rstrip", "single_word")
    ):
        warnings.warn(
            "llama.cpp has no rules exactly as this tokenizer's, it may give other token ids; tokenizer.json is put "
            "into the file as well, which this project reads",
            stacklevel=2,
        )
        keys[HUGGING_FACE] = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    adds_bos, adds_eos = tokenizer.adds
    return {
        **keys,
        START + "tokens": tokens,
        START + "token_type": types,
        **_roles(tokenizer, ends),
        START + "add_bos_token": adds_bos,
        START + "add_eos_token": adds_eos,
        **_templates(tokenizer),
    }


def _vocabulary(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id."""
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    if max(by_id) >= rows:
        raise ValueError(f"the tokenizer has ids up to {max(by_id)}, but the embedding has only {rows} rows")
    tokens, types = [], []
    for index in range(rows):
        token = by_id.get(index, f"[PAD{index}]")
        kind = NORMAL if index in by_id else UNUSED
        if index in added:
            kind = CONTROL if added[index]["special"] else USER_DEFINED
            if kind == USER_DEFINED and content["model"].get("byte_fallback"):
                token = token.replace(SPACE, " ")  # looked for in the text before spaces are replaced
        elif content["model"].get("byte_fallback") and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            kind = BYTE
        elif token == content["model"].get("unk_token"):
            kind = UNKNOWN
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _byte_level(content: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> tuple[dict[str, Any], bool]:
    splits = _splits(content.get("pre_tokenizer"))
    name = next((name for name, expressions in pretokenizers.SPLITS.items() if expressions == splits), None)
    if splits is None:
        raise ValueError("a BPE tokenizer neither of bytes nor with a fallback to bytes cannot be written as GGUF")
    exact = (
        name is not None
        and (content["normalizer"] or {}).get("type") == ("NFC" if name in pretokenizers.COMPOSED else None)
        and content["model"]["ignore_merges"] == (name in pretokenizers.WHOLE_WORDS)
    )
    # llama.cpp refuses a file without the list, be it empty.
    pairs = [" ".join(merge) for merge in merges]
    return {START + "model": "gpt2", START + "pre": name or "default", START + "merges": pairs}, exact


def _splits(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions that a byte-level pre-tokenizer splits by; () for others than `pretokenizers` has, None where it
    is not of bytes."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    if steps[-1].get("type") != "ByteLevel":
        return None
    found = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex"))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [pretokenizers.GPT2] if step["use_regex"] else []
        else:
            return ()
    return tuple(found)


def _sentence_piece(
    content: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]
) -> tuple[dict[str, Any], bool]:
    """Scores that make SentencePiece's rule give the order of the merges: a token has that of its first one.

    Merges that make an added token do not count: those are found in the text before anything is merged.
    """
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    scores = [float(-rank[token]) if token in rank else UNMERGED for token in tokens]
    mergeable = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    normalizer = content["normalizer"] or {}
    steps = normalizer.get("normalizers") or [normalizer]
    prefixed = any(step.get("type") == "Prepend" for step in steps)
    pre = content["pre_tokenizer"]
    exact = (
        steps == (PREPENDED if prefixed else PREPENDED[1:])
        and (pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "}))
        and _same_order(
            merges_by_score(mergeable, scores), [pair for pair in merges if mergeable.keys() >= {*pair, "".join(pair)}]
        )
    )
    keys = {
        START + "model": "llama",
        START + "pre": "default",
        START + "scores": scores,
        START + "add_space_prefix": prefixed,
    }
    return keys, exact


def _same_order(first: Sequence[tuple[str, ...]], second: Sequence[tuple[str, ...]]) -> bool:
    """Whether two lists of merges make the same tokens one after the other, from the same parts in whatever order."""
    return set(first) == set(second) and ["".join(pair) for pair in first] == ["".join(pair) for pair in second]


def _roles(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, int]:
    unknown = None if tokenizer.unk_token is None else tokenizer.token_id(tokenizer.unk_token)
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(ends), None)
    others = [index for index in ends if index != eos]
    ids = {
        "bos": tokenizer.bos_id,
        "eos": eos,
        "unknown": unknown,
        "padding": tokenizer.pad_id,
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    return {f"{START}{name}_token_id": index for name, index in ids.items() if index is not None}


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    template = tokenizer.chat_template
    if template is None:
        return {}
    keys: dict[str, Any] = {"tokenizer.chat_template": template.source}
    if template.tool_use is not None:
        keys |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": template.tool_use}
    return keys
