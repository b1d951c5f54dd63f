"""generation_config.json: how text is drawn from a model."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from causallm.config.fields import Fields

DEFAULT_NEW_TOKENS = 512
DEFAULT_NGRAM = 2
"""transformers' default of max_matching_ngram_size."""

# Keys that are read into a field of another name.
READ_KEYS = frozenset({"stop_strings", "sequence_bias"})
# Keys that do not change which text one greedy or sampled answer to a prompt is, or that max_new_tokens stands for.
IGNORED_KEYS = frozenset(
    "_commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit "
    "assistant_ensemble_weight assistant_lookbehind cache_config cache_implementation compile_config "
    "continuous_batching_config decoder_start_token_id disable_compile early_stopping generation_kwargs "
    "is_assistant length_penalty low_memory max_cache_len max_length num_assistant_tokens "
    "num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores "
    "prefill_chunk_size remove_invalid_values renormalize_logits return_dict "
    "return_dict_in_generate speculation_type target_lookbehind transformers_version trust_remote_code use_cache "
    "use_mtp".split()
)
# What transformers' GenerationConfig takes for "off", where that is neither null, false nor an empty list.
NEUTRAL = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
}


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling and stopping. Zero (top_k, min_p, penalties) or one (top_p, repetition_penalty) means off.

    prompt_lookup_num_tokens: how many tokens `causallm.prompt_lookup` drafts a step at most, 0 for none.
    max_matching_ngram_size: how many last tokens it looks for at most. Both change how fast a text comes, not which.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | tuple[int, ...] | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = DEFAULT_NGRAM

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str = "generation_config.json") -> "GenerationConfig":
        """Read generation_config.json's content; a key that asks for what is not done is warned about by name."""
        fields = Fields(content, source)
        _warn_unknown(content, source)
        return cls(
            do_sample=fields.boolean("do_sample", False),
            temperature=fields.number("temperature", 1.0),
            top_k=fields.integer("top_k", 0),
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            presence_penalty=fields.number("presence_penalty", 0.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0),
            bad_words_ids=_bad_words_ids(fields),
            logit_bias=_logit_bias(fields),
            eos_token_id=fields.integers("eos_token_id"),
            bos_token_id=fields.optional_integer("bos_token_id"),
            pad_token_id=fields.optional_integer("pad_token_id", minimum=-1),
            stop=fields.texts("stop_strings"),
            seed=fields.optional_integer("seed"),
            max_new_tokens=fields.integer("max_new_tokens", DEFAULT_NEW_TOKENS, minimum=1),
            prompt_lookup_num_tokens=fields.integer("prompt_lookup_num_tokens", 0),
            max_matching_ngram_size=fields.integer("max_matching_ngram_size", DEFAULT_NGRAM, minimum=1),
        )


def _bad_words_ids(fields: Fields) -> tuple[tuple[int, ...], ...]:
    """[[id, ...], ...]: each list a sequence of tokens that may not come about."""
    words = fields.raw("bad_words_ids", [])
    try:
        return tuple(tuple(int(token) for token in word) for word in words)
    except (TypeError, ValueError):
        raise fields.wrong("bad_words_ids", "a list of lists of token ids") from None


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    """transformers' `sequence_bias`, single tokens only: [[[id], bias], ...]."""
    pairs = fields.raw("sequence_bias", [])
    try:
        return tuple((int(token), float(bias)) for (token,), bias in pairs)
    except (TypeError, ValueError):
        raise fields.wrong("sequence_bias", "a list of [[token id], bias], one token each") from None


def _warn_unknown(content: Mapping[str, Any], source: str) -> None:
    known = set(GenerationConfig.__dataclass_fields__) - {"stop", "logit_bias"} | READ_KEYS | IGNORED_KEYS
    off = {key for key, value in content.items() if value is None or value is False or value in ([], NEUTRAL.get(key))}
    unknown = sorted(set(content) - known - off)
    if unknown:
        warnings.warn(f"{source}: not acted on: {', '.join(unknown)}", stacklevel=3)
