"""Rotary settings in GGUF's keys, and the tensor of frequency divisors that stands for Llama 3's scaling."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causallm.config.fields import Fields
from causallm.config.model import ModelConfig
from causallm.gguf.families import Family
from causallm.gguf.format import GgufFile
from causallm.gguf.names import ROPE_FACTORS
from causallm.weights.mapped_file import MappedFile
from layers.rope import Rope, inverse_frequencies

LOCAL_THETA = 10000.0
"""Base of Gemma3's sliding layers."""
# Llama 3.1 and 3.2 have the same three numbers and differ in the factor, which is the largest divisor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CLOSE = 1e-4


def read_rope(file: GgufFile, keys: Fields, family: Family, head_dim: int) -> dict[str, Any]:
    """config.json's rotary keys; ValueError for a scaling that GGUF has a name for and this has not."""
    arch = family.arch
    theta = keys.number(f"{arch}.rope.freq_base", 10000.0)
    kind = keys.text(f"{arch}.rope.scaling.type", "linear")
    factor = keys.number(f"{arch}.rope.scaling.factor", keys.number(f"{arch}.rope.scale_linear", 0.0)) or 1.0
    if theta <= 0 or factor <= 0 or not math.isfinite(theta * factor):
        raise ValueError(f"{file.path}: rotary base {theta} and factor {factor}, expected positive numbers")
    scaling: dict[str, Any] = {"rope_type": "default"}
    if ROPE_FACTORS in file.tensors:
        scaling = divisors_as_scaling(_divisors(file, head_dim), theta, head_dim)
    elif kind == "yarn":
        default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": keys.integer(
                f"{arch}.rope.scaling.original_context_length", keys.integer(f"{arch}.context_length", minimum=1), 1
            ),
            "beta_fast": keys.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": default * keys.number(f"{arch}.rope.scaling.attn_factor", 1.0),
            "truncate": arch != "gpt-oss",
        }
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1.0 else scaling
    elif kind != "none":
        raise keys.wrong(f"{arch}.rope.scaling.type", "none, linear or yarn")
    full = {**scaling, "rope_theta": theta}
    if arch != "gemma3":
        return {"rope_theta": theta, "rope_parameters": full}
    local = keys.number(f"{arch}.rope.freq_base_swa", LOCAL_THETA)
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _divisors(file: GgufFile, head_dim: int) -> Float[Tensor, "half"]:
    info = file.tensors[ROPE_FACTORS]
    if info.shape != (head_dim // 2,) or info.kind != "F32":
        raise ValueError(f"{file.path}: tensor {ROPE_FACTORS} is {info.kind} {list(info.shape)}, expected F32 of half "
                         f"the length of a head, {head_dim // 2}")  # fmt: skip
    divisors = MappedFile(file.path).tensor(info.offset, info.shape, torch.float32).clone()
    if not (divisors.isfinite() & (divisors > 0)).all():
        raise ValueError(f"{file.path}: tensor {ROPE_FACTORS} has values that are not positive numbers")
    return divisors


def divisors_as_scaling(divisors: Float[Tensor, "half"], theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling where its usual numbers give these divisors, else the kind that lists them (LongRoPE's)."""
    rope = Rope("llama3", head_dim, theta, float(divisors.max()), original_positions=8192)
    if torch.allclose(divisors_of(rope), divisors, rtol=CLOSE, atol=0):
        return {"rope_type": "llama3", "factor": rope.factor, **LLAMA3}
    factors = divisors.tolist()
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}


def divisors_of(rope: Rope) -> Float[Tensor, "half"]:
    """By what a rotary embedding divides the plain frequencies, at any length."""
    plain = Rope("default", rope.head_dim, rope.theta)
    return inverse_frequencies(plain, 1) / inverse_frequencies(rope, 1)


def write_rope(config: ModelConfig, arch: str) -> tuple[dict[str, Any], Float[Tensor, "half"] | None]:
    """GGUF's rotary keys, and the divisors where they need a tensor; ValueError for a kind that has no place there."""
    full, sliding = config.ropes["full_attention"], config.ropes["sliding_attention"]
    start = f"{arch}.rope."
    keys: dict[str, Any] = {start + "dimension_count": config.head_dim, start + "freq_base": full.theta}
    slides = "sliding_attention" in config.layer_types and config.sliding_window is not None
    if arch == "gemma3":
        if slides and sliding.kind != "default":
            raise ValueError(f"GGUF has no place for rope_type '{sliding.kind}' on sliding layers")
        keys[start + "freq_base_swa"] = sliding.theta
    elif slides and sliding != full and "full_attention" in config.layer_types:
        raise ValueError("GGUF has no place for other rotary settings on sliding layers in this family")
    if full.kind == "linear":
        keys |= {start + "scaling.type": "linear", start + "scaling.factor": full.factor}
    elif full.kind == "yarn":
        if full.truncate != (arch != "gpt-oss"):
            raise ValueError(f"GGUF has no place for YaRN with truncate {str(full.truncate).lower()} in this family")
        default = 0.1 * math.log(full.factor) + 1.0 if full.factor > 1 else 1.0
        keys |= {
            start + "scaling.type": "yarn",
            start + "scaling.factor": full.factor,
            start + "scaling.original_context_length": full.original_positions,
            start + "scaling.yarn_beta_fast": full.beta_fast,
            start + "scaling.yarn_beta_slow": full.beta_slow,
        }
        if abs(full.attention_factor / default - 1) > CLOSE / 100:
            keys[start + "scaling.attn_factor"] = full.attention_factor / default
    elif full.kind == "llama3" or (full.kind == "longrope" and _lists_divisors(full)):
        return keys, divisors_of(full)
    elif full.kind != "default":
        raise ValueError(f"GGUF has no place for rope_type '{full.kind}'")
    return keys, None


def _lists_divisors(rope: Rope) -> bool:
    """Whether a LongRoPE is the kind that `divisors_as_scaling` gives: the same at every length, and not scaled."""
    return rope.short_factor == rope.long_factor and rope.attention_factor == 1.0
