"""What a cache depends on: the model and tokenizer that made it, field by field, so that a difference has a name."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from causallm.packing import packed_tensors
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters

BLOCK = 1024
"""Bytes of one sample of a weight."""
SAMPLES = 16384
"""Samples of all weights together, about."""
FEWEST, MOST = 3, 32
"""Samples of one weight: its first bytes, its last, and between them blocks at equal distances."""
ADAPTER = ".lora_"
"""In the names of an adapter's weights, as PEFT writes them."""

NUMBERS = frozenset(
    "hidden_size intermediate_size rms_norm_eps hidden_act is_causal query_pre_attn_scalar attn_logit_softcapping "
    "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers "
    "swiglu_limit swiglu_alpha".split()
)
"""Fields of ModelConfig that change keys and values, and have no entry of their own."""


def fingerprint(model: Transformer) -> dict[str, str]:
    """Everything that keys and values follow from but the tokens, as text, in the order in which it is compared."""
    cfg, tokenizer = model.config, model.tokenizer
    template = None if tokenizer is None else tokenizer.chat_template
    layers = range(cfg.num_hidden_layers)
    adapters = {name: parameter for name, parameter in model.named_parameters() if ADAPTER in name}
    weights = ((name, weight) for name, weight in model.storage.weights(model) if name not in adapters)
    return {
        "architecture": cfg.architecture,
        "layers": str(cfg.num_hidden_layers),
        "heads": f"{cfg.num_attention_heads} of {cfg.head_dim}, {cfg.num_key_value_heads} for keys and values",
        "windows": json.dumps([cfg.window(layer) for layer in layers]),
        "rope": json.dumps([asdict(rope) for rope in dict.fromkeys(map(cfg.rope, layers))]),
        "activation_dtype": _name(model.dtype),
        "weight_dtypes": _weight_dtypes(model),
        "cache_dtype": _name(model.cache_dtype),
        "tokenizer": "none" if tokenizer is None else tokenizer.fingerprint(),
        "chat_template": "none" if template is None else _digest([template.source, template.tool_use]),
        "adapter": hash_weights(sorted(adapters.items()), len(adapters)) if adapters else "none",
        "config": json.dumps({name: getattr(cfg, name) for name in sorted(NUMBERS)}),
        "weights": hash_weights(weights, len(expected_parameters(model)) - len(adapters)),
    }


def hash_weights(weights: Iterable[tuple[str, Tensor]], number: int) -> str:
    """sha256 over name, shape, dtype and samples of the bytes of every weight; all bytes of small ones.

    `weights` are so many, in the order of their names.

    A mapped file is read only where samples are, so 4 billion weights cost no more than 40 million. Training, merging
    and converting change nearly every number and so what is sampled; a single number changed by hand may go unseen.
    """
    count = min(max(SAMPLES // max(number, 1), FEWEST), MOST)
    digest = hashlib.sha256()
    for name, parameter in weights:
        digest.update(json.dumps([name, list(parameter.shape), _name(parameter.dtype)]).encode())
        for block in _samples(_bytes_in_memory(parameter.detach()), count):
            digest.update(block.cpu().numpy().data)
    return digest.hexdigest()


def _samples(flat: Tensor, count: int) -> Iterator[Tensor]:
    """`count` blocks of a row of bytes, the first at its beginning, the last at its end."""
    last = flat.numel() - BLOCK
    if flat.numel() <= count * BLOCK:
        yield flat
        return
    for number in range(count):
        start = last * number // (count - 1)
        yield flat[start : start + BLOCK]


def _bytes_in_memory(tensor: Tensor) -> Tensor:
    """All bytes in a row, in the order in which they lie where they lie without gaps (a transposed view of a file)."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).contiguous().view(-1).view(torch.uint8)


def _weight_dtypes(model: Transformer) -> str:
    packed = packed_tensors(model)
    dtypes = {packed[name].kind if name in packed else _name(p.dtype) for name, p in expected_parameters(model).items()}
    return ", ".join(sorted(dtypes))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
