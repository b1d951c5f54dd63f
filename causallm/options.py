"""From what a caller asks for to one complete GenerationConfig."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import index
from typing import Any

from causallm.config import GenerationConfig
from causallm.penalties import bad_word_sequences
from causallm.sampling import check_sampling
from causallm.tokenizer import Tokenizer

LEAST = {"max_new_tokens": 1, "prompt_lookup_num_tokens": 0, "max_matching_ngram_size": 1}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def _several(value: Any) -> tuple[Any, ...]:
    """A tuple of what may be one text or number alone."""
    return (value,) if isinstance(value, str | int) else tuple(value)


def _texts(value: Any) -> tuple[str, ...]:
    texts = _several(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return texts


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(map(index, _several(value)))


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((index(token), float(bias)) for token, bias in pairs)


READERS: dict[str, Callable[[Any], Any]] = {
    "do_sample": bool,
    "temperature": float,
    "top_k": index,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "bad_words": _texts,
    "bad_words_ids": lambda words: tuple(map(_ids, words)),
    "logit_bias": _biases,
    "eos_token_id": _ids,
    "stop": _texts,
    "seed": lambda seed: seed if isinstance(seed, int) else _ids(seed),
    "max_new_tokens": index,
    "prompt_lookup_num_tokens": index,
    "max_matching_ngram_size": index,
}
"""Every option, and what makes one of the ways in which callers write it; TypeError or ValueError for others."""


def generation_options(
    base: GenerationConfig, tokenizer: Tokenizer | None, vocab_size: int, **given: Any
) -> GenerationConfig:
    """`base` with the options in `given` that are not None replaced; values out of range are a ValueError.

    Asking for a temperature, top_k, top_p, min_p or seed asks for sampling, unless do_sample says otherwise or the
    temperature is 0. bad_words are texts, added to bad_words_ids. A stop string that is a special token, which never
    shows in text, stops as a token. logit_bias may be a mapping of ids; what is a list may be one value alone.
    """
    chosen = {name: _read(name, value) for name, value in given.items() if value is not None}
    words = chosen.pop("bad_words", ())
    if "do_sample" not in chosen and any(name in chosen for name in SAMPLING):
        chosen["do_sample"] = chosen.get("temperature", base.temperature) != 0
    config = replace(base, **chosen)
    if words or config.stop:
        config = _with_texts(config, tokenizer, words)
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected at least {least}")
    check_sampling(config, vocab_size)
    return config


def _read(name: str, value: Any) -> Any:
    if name not in READERS:
        raise ValueError(f"unknown option '{name}'; known are: {', '.join(READERS)}")
    try:
        return READERS[name](value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}, which is not of the right kind") from None


def _with_texts(config: GenerationConfig, tokenizer: Tokenizer | None, words: tuple[str, ...]) -> GenerationConfig:
    """`config` with what its stop strings and `words` are in tokens."""
    if tokenizer is None:
        raise ValueError(
            "stop and bad_words are texts, but the model has no tokenizer; use eos_token_id, bad_words_ids"
        )
    ends = [tokenizer.token_id(text) for text in config.stop if text in tokenizer.special_tokens]
    sequences = bad_word_sequences(words, lambda text: tokenizer.encode(text, add_special_tokens=False))
    return replace(
        config,
        eos_token_id=(*config.eos_token_id, *(end for end in ends if end is not None)),
        bad_words_ids=config.bad_words_ids + sequences,
    )
