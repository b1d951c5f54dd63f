"""GGUF files made by the gguf package from tiny Hugging Face folders, as llama.cpp's converter makes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from families import GEMMA, GPT_OSS, MOE, ROPES
from safetensors.numpy import load_file

GEMMA_27 = {**GEMMA, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}
SCALED = {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LLAMA", "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, head_dim 12": ("LLAMA", "LlamaConfig", {"head_dim": 12, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "mistral": ("LLAMA", "MistralConfig", {"sliding_window": None}),
    "llama3": ("LLAMA", *ROPES["llama3"]),
    "yarn": ("LLAMA", *ROPES["yarn"]),
    "linear": ("LLAMA", *ROPES["linear"]),
    "qwen2": ("QWEN2", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("QWEN3", "Qwen3Config", {"head_dim": 16}),
    "qwen3moe": ("QWEN3MOE", "Qwen3MoeConfig", {**MOE, "norm_topk_prob": True}),
    "gemma3": ("GEMMA3", "Gemma3TextConfig", {**GEMMA_27, "final_logit_softcapping": 5.0}),
    "gemma3, linear": ("GEMMA3", "Gemma3TextConfig", {**GEMMA_27, "rope_parameters": {**SCALED, **LOCAL}}),
    "gpt-oss": ("GPT_OSS", "GptOssConfig", GPT_OSS),
}
"""Models that llama.cpp runs: the gguf package's name of the architecture, transformers' class, settings."""
FUSED = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


def write(folder: Path, path: Path, arch: str, pack: Callable[[str, Any], Any] | None = None) -> None:
    """The model of `folder` as llama.cpp's converter would write it; `pack` may give a matrix another type."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    number = getattr(gguf.MODEL_ARCH, arch)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[number])
    add_keys(writer, config, arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    for theirs, values in changed(load_file(folder / "model.safetensors"), config, arch, names):
        router_or_vector = values.ndim == 1 or "ffn_gate_inp" in theirs or not theirs.endswith(".weight")
        packed = None if pack is None or router_or_vector else pack(theirs, values)
        if packed is None:
            writer.add_tensor(theirs, values.astype(np.float32))
        else:
            writer.add_tensor(theirs, packed[0], raw_dtype=packed[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_keys(writer: Any, config: dict[str, Any], arch: str) -> None:
    """The hyperparameters, by the package's own methods."""
    import gguf

    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if arch in ("GEMMA3", "GPT_OSS"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if experts := config.get("num_local_experts", config.get("num_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))


def changed(tensors: dict[str, Any], config: dict[str, Any], arch: str, names: Any) -> list[tuple[str, Any]]:
    """Tensors with llama.cpp's names, and values as its converter changes them."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    written: list[tuple[str, Any]] = []
    experts: dict[str, list[Any]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        values, parts = tensors[name].astype(np.float32), name.split(".")
        if arch == "LLAMA" and parts[-2] in heads:
            halves = values.reshape(heads[parts[-2]], 2, values.shape[0] // heads[parts[-2]] // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if arch == "GEMMA3" and name.endswith("norm.weight"):
            values = values + 1
        if "experts" in parts and arch == "QWEN3MOE":
            merged = f"model.layers.{parts[2]}.mlp.experts.{parts[6]}.weight"
            experts.setdefault(names.get_name(merged, try_suffixes=(".weight",)), []).append(values)
        elif "experts" in parts:
            written += gpt_oss_experts(parts[2], parts[-1], values)
        else:
            written.append(
                (names.get_name(name + (".weight" if "sinks" in name else ""), (".weight", ".bias")), values)
            )
    written += [(name, np.stack(values)) for name, values in experts.items()]
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        written.append(("rope_freqs.weight", llama3_divisors(rope, config["head_dim"])))
    return written


def gpt_oss_experts(layer: str, name: str, values: Any) -> list[tuple[str, Any]]:
    """Fused experts: transposed weights, gate and up from alternating columns."""
    kind = "bias" if name.endswith("_bias") else "weight"
    if kind == "weight":
        values = values.swapaxes(1, 2)
    theirs = FUSED[name.removesuffix("_bias")]
    parts = [values] if len(theirs) == 1 else [values[:, ::2], values[:, 1::2]]
    return [
        (f"blk.{layer}.{name}.{kind}", np.ascontiguousarray(part)) for name, part in zip(theirs, parts, strict=True)
    ]


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> Any:
    """What llama.cpp's converter stores for Llama 3's scaling, wavelength by wavelength."""
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
        divisors.append(
            1.0 if wavelength < original / high else rope["factor"] if wavelength > original / low else blended
        )
    return np.array(divisors, dtype=np.float32)
