"""nntr_config.json: how a model is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from causallm.byte_size import parse_bytes
from causallm.config.fields import DTYPES, Fields
from layers.kernels.block_formats import BLOCK_FORMATS

MODEL_TYPES = ("CausalLM", "embedding")
FLOAT_NAMES = ("FP32", "FP16", "BF16")
QUANTIZED = tuple(BLOCK_FORMATS)
CACHE_DTYPES = {**DTYPES, "int8": torch.int8, "INT8": torch.int8}
HEAD_CACHE_KEYS = ("pre_computed_cache_path", "sys_prompt_token_size")

KEYS = frozenset(
    "model_type model_tensor_type model_file_name embedding_dtype lmhead_dtype fc_layer_dtype lora_rank lora_alpha "
    "lora_target bad_word_ids fsu fsu_lookahead num_to_generate init_seq_len max_seq_len batch_size tokenizer_file "
    "sample_input is_causal system_prompt hf_repo kv_cache_dtype memory_budget mmap".split()
)


@dataclass(frozen=True)
class RuntimeConfig:
    """The content of nntr_config.json; None leaves a choice to the model's other files.

    init_seq_len is the number of prompt tokens taken in one step, max_seq_len the context in tokens, batch_size how
    many prompts run together. dtype is that of activations and, but for kv_cache_dtype, of the cache, the other dtypes
    those of weights; weights to be packed have a format, one of `QUANTIZED`, instead. head_cache_path names the file
    that keeps head_prompt's keys and values, head_cache_size how many tokens of it at most. memory_budget is the bytes
    that the whole process may take; with it, or with fsu, weights are read from the disk when they are needed,
    fsu_lookahead blocks ahead. mmap: weights are mapped from their files, else read into memory.
    """

    model_type: str = "CausalLM"
    model_file_name: str | None = None
    dtype: torch.dtype | None = None
    fc_layer_dtype: torch.dtype | None = None
    embedding_dtype: torch.dtype | None = None
    lmhead_dtype: torch.dtype | None = None
    fc_format: str | None = None
    embedding_format: str | None = None
    lmhead_format: str | None = None
    bad_word_ids: tuple[int, ...] = ()
    num_to_generate: int | None = None
    init_seq_len: int | None = None
    max_seq_len: int | None = None
    batch_size: int | None = None
    tokenizer_file: str | None = None
    sample_input: str | None = None
    is_causal: bool | None = None
    head_prompt: str = ""
    tail_prompt: str = ""
    head_cache_path: str | None = None
    head_cache_size: int | None = None
    kv_cache_dtype: torch.dtype | None = None
    memory_budget: int | None = None
    fsu: bool = False
    fsu_lookahead: int | None = None
    mmap: bool = True
    hf_repo: str | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str = "nntr_config.json") -> "RuntimeConfig":
        """Read nntr_config.json's content; an unknown key, a wrong value or an unsupported one is a ValueError."""
        unknown = sorted(set(content) - KEYS)
        if unknown:
            raise ValueError(f"{source}: unknown key '{unknown[0]}'; known are: {', '.join(sorted(KEYS))}")
        fields = Fields(content, source)
        model_type = fields.text("model_type", "CausalLM")
        if model_type.lower() not in [known.lower() for known in MODEL_TYPES]:
            raise fields.wrong("model_type", " or ".join(MODEL_TYPES))
        _refuse_later_work(fields)
        weights, activations = _tensor_types(fields)
        linear = _weight_type(fields, "fc_layer_dtype") or weights
        embedding = _weight_type(fields, "embedding_dtype") or weights
        head = _weight_type(fields, "lmhead_dtype") or embedding
        system, head_cache = _system_prompt(fields)
        return cls(
            model_type="embedding" if model_type.lower() == "embedding" else "CausalLM",
            model_file_name=fields.text("model_file_name") or None,
            dtype=activations,
            fc_layer_dtype=DTYPES.get(linear or ""),
            embedding_dtype=DTYPES.get(embedding or ""),
            lmhead_dtype=DTYPES.get(head or ""),
            fc_format=linear if linear in QUANTIZED else None,
            embedding_format=embedding if embedding in QUANTIZED else None,
            lmhead_format=head if head in QUANTIZED else None,
            bad_word_ids=fields.integers("bad_word_ids"),
            num_to_generate=fields.optional_integer("num_to_generate", minimum=1),
            init_seq_len=fields.optional_integer("init_seq_len", minimum=1),
            max_seq_len=fields.optional_integer("max_seq_len", minimum=1),
            batch_size=fields.optional_integer("batch_size", minimum=1),
            tokenizer_file=fields.text("tokenizer_file") or None,
            sample_input=fields.text("sample_input") or None,
            is_causal=None if fields.raw("is_causal") is None else fields.boolean("is_causal", True),
            head_prompt=system.text("head_prompt"),
            tail_prompt=system.text("tail_prompt"),
            head_cache_path=head_cache.text("pre_computed_cache_path") or None,
            head_cache_size=head_cache.optional_integer("sys_prompt_token_size", minimum=1),
            kv_cache_dtype=_cache_dtype(fields),
            memory_budget=_budget(fields),
            fsu=fields.boolean("fsu", False),
            mmap=fields.boolean("mmap", True),
            fsu_lookahead=fields.optional_integer("fsu_lookahead", minimum=1),
            hf_repo=fields.text("hf_repo") or None,
        )


def _tensor_types(fields: Fields) -> tuple[str | None, torch.dtype | None]:
    """model_tensor_type is "<weights>-<activations>"."""
    text = fields.text("model_tensor_type")
    if not text:
        return None, None
    weights, _, activations = text.partition("-")
    if activations not in DTYPES:
        raise fields.wrong("model_tensor_type", f"<weights>-<activations>, activations one of {', '.join(FLOAT_NAMES)}")
    return _weight_type(fields, "model_tensor_type", weights), DTYPES[activations]


def _weight_type(fields: Fields, key: str, value: str | None = None) -> str | None:
    name = fields.text(key) if value is None else value
    if name and name not in DTYPES and name not in QUANTIZED:
        raise fields.wrong(key, f"one of {', '.join((*FLOAT_NAMES, *QUANTIZED))}")
    return name or None


def _refuse_later_work(fields: Fields) -> None:
    """Keys that are understood but not served yet: refused where the answer would differ, else warned about."""
    if fields.integer("lora_rank", 0):
        raise ValueError(f"{fields.source}: lora_rank is not 0, but adapters are not supported yet")


def _budget(fields: Fields) -> int | None:
    value = fields.raw("memory_budget")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise fields.wrong("memory_budget", "a number of bytes such as 2GB, 1.5GB or 700MiB")
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{fields.source}: memory_budget: {error}") from None


def _cache_dtype(fields: Fields) -> torch.dtype | None:
    name = fields.text("kv_cache_dtype")
    if name and name not in CACHE_DTYPES:
        raise fields.wrong("kv_cache_dtype", f"one of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES.get(name)


def _system_prompt(fields: Fields) -> tuple[Fields, Fields]:
    """The keys of system_prompt, and those of its kvcache; an unknown one is a ValueError."""
    system = _object(fields, "system_prompt", ("head_prompt", "tail_prompt", "kvcache"))
    head_cache = _object(system, "kvcache", HEAD_CACHE_KEYS)
    if head_cache.content and not head_cache.text("pre_computed_cache_path"):
        raise ValueError(f"{head_cache.source}: pre_computed_cache_path is missing, expected the cache's file")
    return system, head_cache


def _object(fields: Fields, key: str, known: Sequence[str]) -> Fields:
    content = fields.raw(key, {})
    if not isinstance(content, dict):
        raise fields.wrong(key, f"an object with {' and '.join(known)}")
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ValueError(f"{fields.source}: {key}: unknown key '{unknown[0]}'; known are: {', '.join(known)}")
    return Fields(content, f"{fields.source}: {key}")
