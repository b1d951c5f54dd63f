"""Calls of the native attention kernels, for one token and for many."""

import ctypes

import torch
from torch import Tensor

from layers.kernels import native
from layers.kernels.native import FLOATS, KINDS, Address, Size

MANY_HEADS = 96
"""Query heads for one of keys and values, at most (MANY_ROWS of processors.h)."""


def has_attend_many() -> bool:
    """Whether there is a kernel for the attention of many tokens, faster than torch's operators."""
    return (loaded := native.library()) is not None and bool(loaded.causallm_attends_many())


def attends_many(query: Tensor, key: Tensor) -> bool:
    """Whether it serves so many query heads (dimension 1) for those of keys and values."""
    return has_attend_many() and query.shape[1] <= MANY_HEADS * key.shape[1]


class AttentionArguments(ctypes.Structure):
    """struct attention of processors.h."""

    _fields_ = [
        *((name, Address) for name in "query bias sinks keys values out key_scales value_scales".split()),
        *((name, Size) for name in "past key_row key_head key_step value_row value_head value_step".split()),
        *((name, Size) for name in ("scale_row", "scale_head", "bias_row", "query_row")),
        *((name, ctypes.c_int) for name in ("batch", "time", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of one token: query (batch, heads, 1, head_dim) fp32 over (batch, kv_heads, past, head_dim).

    bias is (batch or 1, past) fp32, sinks (heads) fp32; all are contiguous in their last dimension.
    """
    batch, heads, _, head_dim = query.shape
    query, out = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    arguments = AttentionArguments(
        query.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        None,
        None,
        key.shape[2],
        *key.stride()[:3],
        *value.stride()[:3],
        0,
        0,
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        heads * head_dim,
        batch,
        1,
        heads,
        key.shape[1],
        head_dim,
        scale,
        softcap or 0.0,
    )
    if native.kernels().causallm_attend(ctypes.byref(arguments), KINDS[FLOATS[key.dtype]], torch.get_num_threads()):
        raise MemoryError(f"no memory for attention over {key.shape[2]} positions")
    return out


class ManyAttentionArguments(ctypes.Structure):
    """struct many_attention of processors.h."""

    _fields_ = [
        *((name, Address) for name in ("query", "keys", "values", "bias", "sinks", "out")),
        *((name, Size) for name in "past key_row key_head key_step value_row value_head value_step".split()),
        *((name, Size) for name in ("bias_row", "causal_time", "time")),
        *((name, ctypes.c_int) for name in "kind cache_kind bias_kind batch heads kv_heads head_dim".split()),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def attend_many(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal_time: int,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of many tokens: query (batch, heads, time, head_dim) over (batch, kv_heads, past, head_dim).

    bias is (batch or 1, time, past), sinks (heads) fp32; of the last `causal_time` keys a token sees its own and those
    before it. Keys and values are contiguous in their last dimension. Returns (batch, heads, time, head_dim) in query's
    dtype.
    """
    batch, heads, time, head_dim = query.shape
    query = query.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = query.new_empty(batch, time, heads, head_dim)
    arguments = ManyAttentionArguments(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        key.shape[2],
        *key.stride()[:3],
        *value.stride()[:3],
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        causal_time,
        time,
        KINDS[FLOATS[query.dtype]],
        KINDS[FLOATS[key.dtype]],
        0 if bias is None else KINDS[FLOATS[bias.dtype]],
        batch,
        heads,
        key.shape[1],
        head_dim,
        scale,
        softcap or 0.0,
    )
    if native.kernels().causallm_attend_many(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError(f"no memory for attention of {time} tokens over {key.shape[2]} positions")
    return out.transpose(1, 2)
