"""From a GGUF file's keys to the content of config.json, generation_config.json and nntr_config.json."""

import re
from collections import Counter
from typing import Any

from causallm.config.fields import Fields
from causallm.gguf.families import MODEL_TYPES, Family, family_of
from causallm.gguf.format import GgufFile
from causallm.gguf.rope_keys import read_rope
from causallm.gguf.tensor_types import FLOATS, PACKED

SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
"""generation_config.json's keys that GGUF has a key for."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Texts of tokens that end an answer whatever a file's keys say: llama.cpp's list for the families here.
ENDS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|end_of_text|>".split()
)
CONTROL = 3
SLIDING_EVERY = {"gemma3": 6, "gpt-oss": 2}
"""Every so many layers one attends to everything, where a file does not say which."""
POOLINGS = {1: "mean", 2: "cls", 3: "last"}


def read_family(file: GgufFile) -> Family:
    """The family; ValueError for one that is unknown, and for a file that is only a part of a model."""
    fields = Fields(file.metadata, str(file.path))
    kind, parts = fields.text("general.type", "model"), fields.integer("split.count", 0)
    if kind != "model":
        raise ValueError(f"{file.path}: general.type is '{kind}', expected a whole model")
    if parts > 1:
        raise ValueError(f"{file.path}: one of {parts} parts of a model; join them with llama-gguf-split --merge")
    return family_of(fields.text("general.architecture"), str(file.path))


def config_json(file: GgufFile, family: Family) -> dict[str, Any]:
    """What config.json would say; ValueError where keys are missing, wrong, or contradict the tensors."""
    keys, arch = Fields(file.metadata, str(file.path)), family.arch
    layers, heads = _layers(file, keys, arch), keys.integer(f"{arch}.attention.head_count", minimum=1)
    vocab, hidden = _shape(file, "token_embd.weight", 2)
    head_dim = keys.integer(f"{arch}.attention.key_length", hidden // heads, minimum=2)
    _check_head_dim(keys, arch, head_dim)
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": MODEL_TYPES[arch],
        "vocab_size": vocab,
        "hidden_size": keys.integer(f"{arch}.embedding_length", minimum=1),
        "intermediate_size": keys.integer(f"{arch}.feed_forward_length", 1, minimum=1),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(keys, arch, heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer(f"{arch}.context_length", minimum=1),
        "rms_norm_eps": keys.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "is_causal": keys.boolean(f"{arch}.attention.causal", True),
        **family.config,
        **_attention(file, keys, family, layers, head_dim),
        **_experts(file, keys, arch, layers),
        **read_rope(file, keys, family, head_dim),
    }
    for ours in ("bos", "eos", "padding"):
        content[f"{ours.removesuffix('ding')}_token_id"] = keys.optional_integer(f"tokenizer.ggml.{ours}_token_id")
    if dtype := float_dtype(file):
        content["dtype"] = dtype
    _check_sizes(file, content)
    return {key: value for key, value in content.items() if value is not None}


def float_dtype(file: GgufFile) -> str | None:
    """torch's name of the dtype of most matrices, None where one is packed."""
    kinds = Counter(info.kind for info in file.tensors.values() if len(info.shape) > 1)
    if not kinds or any(kind not in FLOATS for kind in kinds):
        return None
    return str(FLOATS[kinds.most_common(1)[0][0]]).removeprefix("torch.")


def runtime_json(file: GgufFile, family: Family) -> dict[str, Any]:
    """What nntr_config.json would say: packed weights are computed with in float32; a pooled model embeds."""
    kinds = Counter(PACKED[info.kind] for info in file.tensors.values() if info.kind in PACKED)
    content = {"model_tensor_type": f"{kinds.most_common(1)[0][0]}-FP32"} if kinds else {}
    return content | ({"model_type": "embedding"} if pooling(file, family) else {})


def pooling(file: GgufFile, family: Family) -> str | None:
    """How an embedding model pools; None for a language model."""
    return POOLINGS.get(Fields(file.metadata, str(file.path)).integer(f"{family.arch}.pooling_type", 0))


def generation_json(file: GgufFile) -> dict[str, Any]:
    """What generation_config.json would say."""
    keys = Fields(file.metadata, str(file.path))
    content = {ours: keys.raw(theirs) for ours, theirs in SAMPLING.items() if keys.raw(theirs) is not None}
    ends = [keys.optional_integer(f"tokenizer.ggml.{key}") for key in END_KEYS]
    tokens, types = keys.raw("tokenizer.ggml.tokens", []), keys.raw("tokenizer.ggml.token_type", [])
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        ends += [index for index, (token, kind) in pairs if kind == CONTROL and token in ENDS]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    return content | ({"do_sample": True} if content else {}) | ({"eos_token_id": known} if known else {})


def _shape(file: GgufFile, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in file.tensors:
        raise ValueError(f"{file.path}: tensor {name} is missing")
    shape = file.tensors[name].shape
    if len(shape) != dimensions:
        raise ValueError(f"{file.path}: tensor {name} has shape {list(shape)}, expected {dimensions} dimensions")
    return shape


def _layers(file: GgufFile, keys: Fields, arch: str) -> int:
    layers = keys.integer(f"{arch}.block_count", minimum=1)
    there = {int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if there != set(range(len(there))) or len(there) != layers:
        raise ValueError(f"{file.path}: {arch}.block_count is {layers}, but there are tensors of {len(there)} blocks")
    return layers


def _kv_heads(keys: Fields, arch: str, heads: int) -> int:
    """One number; a list of equal ones counts as that."""
    key = f"{arch}.attention.head_count_kv"
    value = keys.raw(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise keys.wrong(key, "the same for all layers")
        return Fields({key: value[0]}, keys.source).integer(key, minimum=1)
    return keys.integer(key, heads, minimum=1)


def _check_head_dim(keys: Fields, arch: str, head_dim: int) -> None:
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.wrong(key, f"{head_dim}, the length of a key")


def _attention(file: GgufFile, keys: Fields, family: Family, layers: int, head_dim: int) -> dict[str, Any]:
    """Sliding windows and score scaling. llama.cpp lets no layer of a Llama or Qwen file slide, and neither does one
    here unless the file lists which do."""
    arch = family.arch
    window = keys.optional_integer(f"{arch}.attention.sliding_window") or None
    pattern_key = f"{arch}.attention.sliding_window_pattern"
    pattern = keys.raw(pattern_key)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise keys.wrong(pattern_key, f"{layers} values, one a layer")
        slides = [bool(value) for value in pattern]
    else:
        every = keys.integer(pattern_key, SLIDING_EVERY.get(arch, 1))
        slides = [not every or (layer + 1) % every != 0 for layer in range(layers)]
    content: dict[str, Any] = {"use_sliding_window": window is not None}
    if window is not None:
        content["sliding_window"] = window
        content["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    elif arch in SLIDING_EVERY:
        content["layer_types"] = ["full_attention"] * layers
    if arch == "gemma3":
        content["query_pre_attn_scalar"] = _query_scalar(keys, arch, layers, head_dim)
        content["attn_logit_softcapping"] = keys.optional_number(f"{arch}.attn_logit_softcapping")
        content["final_logit_softcapping"] = keys.optional_number(f"{arch}.final_logit_softcapping")
    return content


def _query_scalar(keys: Fields, arch: str, layers: int, head_dim: int) -> int | float:
    """One over the square of the attention scale: ggml has no key for it and knows Gemma3 27B by its 62 layers."""
    scale = keys.optional_number(f"{arch}.attention.scale")
    if scale and 1e-6 < scale < 1e6:
        return float(f"{scale**-2:.6g}")
    if layers == 62:
        return keys.integer(f"{arch}.embedding_length") // keys.integer(f"{arch}.attention.head_count", minimum=1)
    return head_dim


def _experts(file: GgufFile, keys: Fields, arch: str, layers: int) -> dict[str, Any]:
    count = keys.integer(f"{arch}.expert_count", 0)
    if not count:
        return {}
    if arch == "llama":
        raise ValueError(f"{file.path}: Llama with {count} experts (Mixtral) is not supported")
    sparse = [layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" in file.tensors]
    for name in {f"blk.{layer}.{part}.weight" for layer in sparse for part in ("ffn_gate_inp", "ffn_up_exps")}:
        if _shape(file, name, 2 if "inp" in name else 3)[0] != count:
            raise ValueError(f"{file.path}: tensor {name} is not of {count} experts, as {arch}.expert_count says")
    width = keys.integer(f"{arch}.expert_feed_forward_length", keys.integer(f"{arch}.feed_forward_length", 1))
    chosen = {"num_experts_per_tok": keys.integer(f"{arch}.expert_used_count", minimum=1)}
    if arch == "gpt-oss":
        return {"num_local_experts": count, "intermediate_size": width, **chosen}
    return {
        "num_experts": count,
        "moe_intermediate_size": width,
        "norm_topk_prob": keys.boolean(f"{arch}.expert_weights_norm", True),
        "mlp_only_layers": [layer for layer in range(layers) if layer not in sparse],
        "decoder_sparse_step": 1,
        **chosen,
    }


def _check_sizes(file: GgufFile, content: dict[str, Any]) -> None:
    """No size may be beyond what the tensors bear out: a model is built from these numbers before it is filled."""
    largest = max(max(info.shape) for info in file.tensors.values())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "moe_intermediate_size"):
        if content.get(key, 0) > largest:
            raise ValueError(f"{file.path}: {key} is {content[key]}, but no tensor is longer than {largest}")
