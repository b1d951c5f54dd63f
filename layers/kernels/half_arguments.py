"""What half_arguments.h asks for, taken from modules: the parts of a decoder block's half as addresses and numbers."""

import ctypes
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from layers.expert_store import ResidentExperts
from layers.gpt_oss_moe import GptOssMoe
from layers.kernels.mixture_arguments import MixtureArguments, mixture_arguments
from layers.kernels.native import FLOATS, Address, Size
from layers.kernels.part_arguments import (
    BLOCK_NORMS,
    HEAD_NORMS,
    LayerArguments,
    NormArguments,
    StoredArguments,
    UnknownPartError,
    activation_code,
    layer,
    layer_of,
    norm,
    stored,
    width,
)
from layers.linear import FullyConnected
from layers.lm_head import LmHead
from layers.mha_core import MHACore
from layers.packed import PackedEmbedding, PackedLinear
from layers.qwen_moe import QwenMoe
from layers.swiglu import ClampedSwiGLU, SwiGLU
from layers.tie_word_embedding import TieWordEmbedding

ATTENTION, MLP, MOE, HEAD = 0, 1, 2, 3
PARTS = {
    ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "core"),
    MLP: ("gate_proj", "up_proj", "down_proj", "activation"),
    HEAD: (),
}
HEADS = (LmHead, FullyConnected, PackedLinear, TieWordEmbedding, PackedEmbedding)
"""Layers that give logits."""
NUMBERS: dict[type[nn.Module], Callable[[Any], Any]] = {
    MHACore: attrgetter("num_heads", "num_kv_heads", "head_dim", "scale", "score_softcap"),
    SwiGLU: attrgetter("activation"),
    ClampedSwiGLU: attrgetter("alpha", "limit"),
    QwenMoe: attrgetter("num_chosen", "norm_topk_prob"),
    GptOssMoe: attrgetter("num_chosen"),
    **{kind: attrgetter("epsilon") for kind in (*BLOCK_NORMS, *HEAD_NORMS)},
}
"""What the arguments hold of a module besides its weights."""


class Half(NamedTuple):
    """A half of `block`: x + post_norm(body(norm(x))), or x + body(norm(x)).

    kind: None for a body that the kernels do not know; an attention and an MLP have the children of `PARTS[kind]`, a
    mixture (QwenMoe, GptOssMoe) has its router and experts; expert_type is what experts that are modules of their own
    must be for the kernels to know what they do. What follows the last half is told like one (HEAD): a norm, and as
    block and body the layer that gives logits.
    """

    kind: int | None
    block: nn.Module
    body: nn.Module
    norm: nn.Module
    post_norm: nn.Module | None = None
    expert_type: type[nn.Module] | None = None

    def store(self) -> nn.Module | None:
        """A mixture's store of experts."""
        return self.body._modules.get("experts") if self.kind == MOE else None

    def experts(self) -> list[nn.Module]:
        """A mixture's experts where each is a module in memory."""
        store = self.store()
        return list(store.children()) if isinstance(store, ResidentExperts) else []

    def modules(self) -> list[nn.Module]:
        """All that take part but for `experts` and what is in them."""
        if self.kind == MOE:
            store = self.store()
            children = [*self.body.children(), *(() if self.experts() or store is None else store.children())]
        else:
            children = [] if self.kind is None else [self.body._modules[name] for name in PARTS[self.kind]]
        around = (self.block, self.body, self.norm, self.post_norm)
        return [module for module in (*around, *children) if module is not None]


class Tokens(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("x", "out")),
        *((name, Size) for name in ("batch", "time", "dim")),
        ("kind", ctypes.c_int),
    ]


class _AttentionHalf(ctypes.Structure):
    _fields_ = [
        *((name, NormArguments) for name in ("norm", "query_norm", "key_norm", "post_norm")),
        ("first", LayerArguments * 3),
        ("last", LayerArguments),
        ("sinks", StoredArguments),
        *((name, Address) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, Size) for name in ("key_row", "key_head", "key_step", "value_row", "value_head", "value_step")),
        *((name, Size) for name in ("scale_row", "scale_head")),
        *((name, Size) for name in ("past", "slot", "bias_row", "table_row")),
        *((name, Address) for name in ("bias", "cosines", "sines")),
        *((name, ctypes.c_int) for name in ("cache_kind", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class _MlpHalf(ctypes.Structure):
    _fields_ = [
        *((name, NormArguments) for name in ("norm", "post_norm")),
        ("first", LayerArguments * 2),
        ("last", LayerArguments),
        ("activation", ctypes.c_int),
    ]


class _Head(ctypes.Structure):
    _fields_ = [("norm", NormArguments), ("layer", LayerArguments), ("logits", Address)]


class _Body(ctypes.Union):
    _fields_ = [("attention", _AttentionHalf), ("mlp", _MlpHalf), ("moe", MixtureArguments), ("head", _Head)]


class HalfArguments(ctypes.Structure):
    """struct half; what changes from call to call is left to fill in."""

    _anonymous_ = ("body",)
    _fields_ = [("kind", ctypes.c_int), ("body", _Body)]


def half_arguments(half: Half, alive: list[Any]) -> HalfArguments:
    """The half's weights and numbers; UnknownPartError where the kernels do not know one of its parts.

    What the arguments point to besides weights is put into `alive`.
    """
    if half.kind == ATTENTION:
        return HalfArguments(kind=ATTENTION, attention=_attention_arguments(half))
    if half.kind == MLP:
        return HalfArguments(kind=MLP, mlp=_mlp_arguments(half))
    if half.kind == MOE:
        moe = mixture_arguments(half.body, half.norm, half.post_norm, half.expert_type, alive)
        return HalfArguments(kind=MOE, moe=moe)
    if half.kind == HEAD:
        return HalfArguments(kind=HEAD, head=_head_arguments(half))
    raise UnknownPartError


def _attention_arguments(half: Half) -> _AttentionHalf:
    attention: Any = half.body
    core = attention.core
    if type(core) is not MHACore or core.head_dim % 16 or core.num_heads % core.num_kv_heads:
        raise UnknownPartError
    dim, queries, keys = width(half.norm), core.num_heads * core.head_dim, core.num_kv_heads * core.head_dim
    key, value = (layer(part, keys, dim) for part in (attention.k_proj, attention.v_proj))
    return _AttentionHalf(
        norm=norm(half.norm, BLOCK_NORMS, dim),
        query_norm=norm(attention.q_norm, HEAD_NORMS, core.head_dim),
        key_norm=norm(attention.k_norm, HEAD_NORMS, core.head_dim),
        post_norm=norm(half.post_norm, BLOCK_NORMS, dim),
        first=(LayerArguments * 3)(layer(attention.q_proj, queries, dim), key, value),
        last=layer(attention.o_proj, dim, queries),
        sinks=stored(attention._parameters["sinks"], core.num_heads),
        heads=core.num_heads,
        kv_heads=core.num_kv_heads,
        head_dim=core.head_dim,
        scale=core.scale,
        softcap=core.score_softcap or 0.0,
    )


def _mlp_arguments(half: Half) -> _MlpHalf:
    mlp: Any = half.body
    dim, hidden = width(half.norm), mlp.down_proj.in_features
    return _MlpHalf(
        norm=norm(half.norm, BLOCK_NORMS, dim),
        post_norm=norm(half.post_norm, BLOCK_NORMS, dim),
        first=(LayerArguments * 2)(layer(mlp.gate_proj, hidden, dim), layer(mlp.up_proj, hidden, dim)),
        last=layer(mlp.down_proj, dim, hidden),
        activation=activation_code(mlp.activation),
    )


def _head_arguments(half: Half) -> _Head:
    head: Any = half.body
    if type(head) not in HEADS:
        raise UnknownPartError
    dim, kind = width(half.norm), getattr(head, "kind", None) or FLOATS.get(head.weight.dtype, "")
    projection = layer_of(head.weight, kind, head._parameters.get("bias"), head.weight.shape[0], dim)
    return _Head(norm=norm(half.norm, BLOCK_NORMS, dim), layer=projection)
