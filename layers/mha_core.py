"""Attention proper: rotation, cache, mask and weighted sum; the projections around it belong to the block."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from layers.kernels import native, native_attention
from layers.kv_cache import KVCache
from layers.lm_head import softcap
from layers.rope import Rope, rotate
from layers.step import Mask, Step

QUERY_BLOCK = 128
"""Queries whose scores are held at once: bounds memory and skips most keys that come after. Best of 64 to 512 for
512 tokens on two CPU cores, in fp32 and bf16; there it is also faster than scaled_dot_product_attention."""
KEPT_QUERIES = 2048
"""Tokens up to which the probabilities are kept for their gradients, half a square per head."""


class MHACore(nn.Module):
    """Grouped-query attention over a cache, with an optional sliding window, score softcap and sinks."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Rope,
        scale: float,
        window: int | None = None,
        score_softcap: float | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope, self.scale, self.window, self.score_softcap = rope, scale, window, score_softcap

    def forward(
        self,
        query: Float[Tensor, "batch time heads_x_head_dim"],
        key: Float[Tensor, "batch time kv_heads_x_head_dim"],
        value: Float[Tensor, "batch time kv_heads_x_head_dim"],
        step: Step,
        cache: KVCache | None,
        sinks: Float[Tensor, "heads"] | None = None,
    ) -> Float[Tensor, "batch time heads_x_head_dim"]:
        cosines, sines = step.rotary(self.rope)
        query = rotate(query.unflatten(-1, (-1, self.head_dim)), cosines, sines).transpose(1, 2)
        key = rotate(key.unflatten(-1, (-1, self.head_dim)), cosines, sines).transpose(1, 2)
        value = value.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is None:
            columns: tuple[range, ...] = (range(step.end),)
        else:
            key, value, columns = cache.update(key, value)
        mask = step.mask(self.window, columns)
        mixed = attend(query, key, value, mask, self.scale, self.score_softcap, sinks)
        return mixed.transpose(1, 2).flatten(-2)


def attend(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads past head_dim"],
    value: Float[Tensor, "batch kv_heads past head_dim"],
    mask: Mask,
    scale: float,
    score_softcap: float | None = None,
    sinks: Float[Tensor, "heads"] | None = None,
) -> Float[Tensor, "batch heads time head_dim"]:
    """softmax(query key^T * scale) value, each key-value head serving heads / kv_heads query heads.

    A sink (gpt-oss) is one more score per head that takes probability and gives no value. Under autocast all is done
    in its dtype; the softmax of short floats sums in fp32 anyway.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query = query.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return attend(query, key, value, mask, scale, score_softcap, sinks)
    if attends_natively(query, key, value, sinks):
        wide = None if sinks is None else sinks.float()
        if query.shape[2] != 1:
            bias = None if mask.plain or mask.bias is None else mask.bias[:, 0]
            return native_attention.attend_many(query, key, value, bias, mask.causal_time, wide, scale, score_softcap)
        bias = None if mask.bias is None else mask.bias[:, 0, 0].float()
        return native_attention.attend(query.float(), key, value, bias, wide, scale, score_softcap).to(query.dtype)
    key, value = key.to(query.dtype), value.to(query.dtype)
    if score_softcap is None and sinks is None:
        if query.shape[2] == 1:
            return _attend_one(query * scale, key, value, mask)
        if _fused(query):
            square = mask.plain and query.shape[2] == key.shape[2]
            bias = None if square else mask.bias
            return functional.scaled_dot_product_attention(
                query, key, value, bias, is_causal=square, scale=scale, enable_gqa=True
            )
    blocks = query.split(QUERY_BLOCK, 2)
    return torch.cat(
        [
            _attend_block(block * scale, key, value, mask, number * QUERY_BLOCK, score_softcap, sinks)
            for number, block in enumerate(blocks)
        ],
        2,
    )


def attends_natively(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether a native kernel serves: on a CPU, no gradient, a cache of floats in whole vectors."""
    parts = (query, key, value) if sinks is None else (query, key, value, sinks)
    return (
        query.device.type == "cpu"
        and key.dtype in native.FLOATS
        and value.dtype == key.dtype
        and query.dtype in native.FLOATS
        and key.shape[3] % 16 == 0
        and key.stride(3) == value.stride(3) == 1
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))
        and not torch.compiler.is_compiling()
        and (native.library() is not None if query.shape[2] == 1 else native_attention.attends_many(query, key))
    )


def _fused(query: Tensor) -> bool:
    """Where the fused operator is used: not on a CPU, where it is the slower, but for fp16 there; and for gradients of
    so many tokens that all probabilities, kept for them, would take much memory."""
    if query.device.type != "cpu" or query.dtype == torch.float16:
        return True
    return query.requires_grad and query.shape[2] > KEPT_QUERIES


def _attend_one(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads past head_dim"],
    value: Float[Tensor, "batch kv_heads past head_dim"],
    mask: Mask,
) -> Float[Tensor, "batch heads 1 head_dim"]:
    """One token: with the cache on the left of the product no operator copies it to transpose it."""
    batch, kv_heads, _, head_dim = key.shape
    scores = key @ query.view(batch, kv_heads, -1, head_dim).transpose(2, 3)
    if mask.bias is not None:
        scores = scores + mask.bias.transpose(2, 3)
    return (scores.softmax(2).transpose(2, 3) @ value).view(query.shape)


def _attend_block(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads past head_dim"],
    value: Float[Tensor, "batch kv_heads past head_dim"],
    mask: Mask,
    start: int,
    score_softcap: float | None,
    sinks: Float[Tensor, "heads"] | None,
) -> Float[Tensor, "batch heads time head_dim"]:
    """Queries `start`, `start` + 1, ... of a step by explicit scores, against the keys that any of them may see."""
    batch, heads, time, head_dim = query.shape
    past = key.shape[2] - mask.hidden_keys(start + time)
    key, value = key[:, :, :past], value[:, :, :past]
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scores = softcap(grouped @ key.transpose(2, 3), score_softcap).view(batch, heads, time, past)
    if mask.bias is not None:
        scores = _masked(scores, mask, start)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, time, 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return (weights.reshape(batch, key.shape[1], -1, past) @ value).view(query.shape)


def _masked(scores: Float[Tensor, "batch heads time past"], mask: Mask, start: int) -> Tensor:
    """Scores and the mask's bias, in place where autograd would not copy all of them for that."""
    assert mask.bias is not None
    time, past = scores.shape[2:]
    # Of keys in plain causal order only the block's own need masking; those before it are all visible.
    first = past - time if mask.plain else 0
    bias = mask.bias[:, :, start : start + time, first:past].to(scores.dtype)
    if scores.requires_grad:
        return scores + (functional.pad(bias, (first, 0)) if first else bias)
    scores[..., first:] += bias
    return scores
