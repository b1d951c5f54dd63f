"""Halves of decoder blocks for many tokens: products by themselves, the native kernels between them."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layers.kernels import native
from layers.kernels.half_arguments import ATTENTION, MLP, Half
from layers.kernels.part_arguments import CACHE_CODES
from layers.kv_cache import KVCache, Room
from layers.mha_core import attend
from layers.step import Mask, Step


def prompt_through_halves(
    halves: Sequence[Half],
    arguments: Any,
    x: Float[Tensor, "batch time dim"],
    step: Step,
    caches: Sequence[KVCache],
    dtype: torch.dtype,
) -> Float[Tensor, "batch time dim"]:
    """What the halves make of x one after the other, the caches of their attentions advanced; products in `dtype`."""
    waiting = iter(caches)
    for half, argument in zip(halves, arguments, strict=False):
        body: Any = half.body
        if half.kind == ATTENTION:
            change = _attention(body, argument.attention, x, step, next(waiting), dtype)
        elif half.kind == MLP:
            change = _mlp(body, argument.mlp, x, dtype)
        else:
            change = body(half.norm(x))
        x = x + (change if half.post_norm is None else half.post_norm(change))
    return x


def _attention(attention: Any, argument: Any, x: Tensor, step: Step, cache: KVCache, dtype: torch.dtype) -> Tensor:
    core = attention.core
    rows = _normalised(argument.norm, x, dtype)
    query, key, value = attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows)
    alive, mask, room = complete(argument, cache, core, step, x)
    turned = query.new_empty(x.shape[0], core.num_heads, x.shape[1], core.head_dim)
    native.turn(argument, query, key, value, turned)
    del alive  # what the kernel was given the addresses of
    keys, values = room.floats(dtype)
    mixed = attend(turned, keys, values, mask, core.scale, core.score_softcap, attention.sinks)
    return attention.o_proj(mixed.transpose(1, 2).flatten(-2))


def _mlp(mlp: Any, argument: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    rows = _normalised(argument.norm, x, dtype)
    gate, up = mlp.gate_proj(rows), mlp.up_proj(rows)
    native.gate(argument.activation, gate, up, gate)
    return mlp.down_proj(gate)


def _normalised(norm: ctypes.Structure, x: Tensor, dtype: torch.dtype) -> Tensor:
    rows = torch.empty_like(x, dtype=dtype)
    native.normalise(norm, x, rows)
    return rows


def complete(argument: Any, cache: KVCache, core: Any, step: Step, x: Tensor) -> tuple[list[Tensor], Mask, Room]:
    """Say where the cache, the rotary tables and the mask lie.

    Returns the tensors that must outlive the call, the mask, and the cache's memory.
    """
    room = cache.claim(x.shape[1])
    keys, values = room.keys, room.values
    argument.keys, argument.values = keys.data_ptr(), values.data_ptr()
    argument.key_row, argument.key_head, argument.key_step, _ = keys.stride()
    argument.value_row, argument.value_head, argument.value_step, _ = values.stride()
    argument.cache_kind, argument.past, argument.slot = CACHE_CODES[keys.dtype], room.past, room.slot
    cosines, sines = step.rotary(core.rope)
    if cosines.dtype != torch.float32:
        cosines, sines = cosines.float(), sines.float()
    argument.cosines, argument.sines = cosines.data_ptr(), sines.data_ptr()
    argument.table_row = 0 if cosines.shape[0] == 1 else cosines.stride(0)
    mask = step.mask(core.window, room.columns)
    alive = [keys, values, cosines, sines]
    if room.scales is not None:
        argument.key_scales, argument.value_scales = (scales.data_ptr() for scales in room.scales)
        argument.scale_row, argument.scale_head = room.scales[0].stride()[:2]
        alive += room.scales
    if mask.bias is not None:
        bias = mask.bias.float().contiguous()
        argument.bias, argument.bias_row = bias.data_ptr(), 0 if bias.shape[0] == 1 else bias.stride(0)
        alive.append(bias)
    return alive, mask, room
