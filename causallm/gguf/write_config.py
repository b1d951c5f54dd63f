"""From a model's configuration to the keys of a GGUF file."""

import warnings
from typing import Any

from causallm.config import GenerationConfig, ModelConfig
from causallm.embedding_model import EmbeddingModel
from causallm.gguf.families import FAMILIES, WRITTEN_AS, Family
from causallm.gguf.read_config import POOLINGS, SAMPLING, SLIDING_EVERY
from causallm.transformer import Transformer

SWIGLU = (7.0, 1.702)
"""Limit and alpha of gpt-oss's activation; GGUF has no key for others."""
ACTIVATIONS = {"gemma3": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gpt-oss": None}
"""The activations that ggml's graph of a family has; of the others silu; None: the config's key says nothing."""


def written_family(model: Transformer) -> Family:
    """The ggml architecture to write a model as; ValueError where there is none."""
    name = model.config.architecture
    if name not in WRITTEN_AS:
        raise ValueError(f"{name} cannot be written as GGUF; those that can are {', '.join(WRITTEN_AS)}")
    return FAMILIES[WRITTEN_AS[name]]


def config_keys(model: Transformer, family: Family) -> dict[str, Any]:
    """The keys of an architecture, but for the rotary ones; ValueError for what GGUF has no key for.

    Warnings name what llama.cpp does not act on, or does not load: this project does.
    """
    config, arch = model.config, family.arch
    _refuse(config, arch)
    for reason, names in (
        ("does not act on", _ignored(config, arch)),
        ("loads no file with", _unloadable(config, arch)),
    ):
        if names:
            warnings.warn(f"llama.cpp {reason} {' and '.join(names)} in {arch}; this project does", stacklevel=2)
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **_sliding(config, arch),
    }
    if arch == "gemma3":
        scalar = config.query_pre_attn_scalar or config.head_dim
        if scalar != _usual_scalar(config):
            keys["attention.scale"] = float(scalar**-0.5)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key) is not None:
                keys[key] = float(getattr(config, key))
    if config.num_experts:
        keys["expert_count"], keys["expert_used_count"] = config.num_experts, config.num_experts_per_tok
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
        if arch == "qwen3moe" and not config.norm_topk_prob:
            keys["expert_weights_norm"] = False
    if isinstance(model, EmbeddingModel):
        keys["pooling_type"] = _pooling_type(model)
    if not model.is_causal:
        keys["attention.causal"] = False
    return {f"{arch}.{key}": value for key, value in keys.items()}


def generation_keys(generation: GenerationConfig) -> dict[str, Any]:
    """Sampling, where the model's files ask for any."""
    if not generation.do_sample:
        return {}
    neutral = GenerationConfig()
    pairs = ((theirs, getattr(generation, ours), getattr(neutral, ours)) for ours, theirs in SAMPLING.items())
    return {theirs: value for theirs, value, off in pairs if value != off or theirs.endswith("temp")}


def _refuse(config: ModelConfig, arch: str) -> None:
    usual = ACTIVATIONS.get(arch, ("silu", "swish"))
    if usual is not None and config.hidden_act not in usual:
        raise ValueError(f"GGUF has no key for hidden_act '{config.hidden_act}' in {arch}")
    if arch == "gpt-oss" and (config.swiglu_limit, config.swiglu_alpha) != SWIGLU:
        raise ValueError(f"GGUF has no key for swiglu_limit {config.swiglu_limit} and alpha {config.swiglu_alpha}")
    if arch != "gemma3" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        raise ValueError(f"GGUF has no key for soft-capped logits in {arch}")


def _ignored(config: ModelConfig, arch: str) -> list[str]:
    """What the file says and llama.cpp's graph does without."""
    window = config.sliding_window or config.max_position_embeddings
    slides = "sliding_attention" in config.layer_types and window < config.max_position_embeddings
    found = {
        "a sliding window": arch not in SLIDING_EVERY and slides,
        "attn_logit_softcapping": config.attn_logit_softcapping is not None,
        "query_pre_attn_scalar": arch == "gemma3" and config.query_pre_attn_scalar not in (None, _usual_scalar(config)),
        "norm_topk_prob": arch == "qwen3moe" and not config.norm_topk_prob,
    }
    return [name for name, is_so in found.items() if is_so]


def _unloadable(config: ModelConfig, arch: str) -> list[str]:
    """What makes tensors that llama.cpp does not expect, or leaves out some that it does."""
    sparse = {layer for layer in range(config.num_hidden_layers) if (layer + 1) % config.decoder_sparse_step == 0}
    dense = len(sparse - set(config.mlp_only_layers)) < config.num_hidden_layers
    found = {
        "layers without experts": arch == "qwen3moe" and dense,
        "biases of attention": arch in ("qwen3", "qwen3moe", "gemma3") and config.attention_bias,
        "a tied head": arch == "gpt-oss" and config.tie_word_embeddings,
    }
    return [name for name, is_so in found.items() if is_so]


def _usual_scalar(config: ModelConfig) -> int:
    """One over the square of the attention scale that llama.cpp takes for Gemma3; 62 layers are the 27B."""
    return config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim


def _sliding(config: ModelConfig, arch: str) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if config.sliding_window is None or not any(slides):
        return {}
    every = SLIDING_EVERY.get(arch)
    usual = every is not None and slides == [(layer + 1) % every != 0 for layer in range(len(slides))]
    pattern = {} if usual else {"attention.sliding_window_pattern": slides}
    return {"attention.sliding_window": config.sliding_window, **pattern}


def _pooling_type(model: EmbeddingModel) -> int:
    pooling = model.config.pooling
    mode = pooling.pooling if pooling else model.default_pooling
    if mode not in POOLINGS.values() or (pooling and pooling.dense):
        raise ValueError(f"GGUF has no key for pooling '{mode}'" + (" with dense layers" if pooling else ""))
    return {name: number for number, name in POOLINGS.items()}[mode]
