"""What half_arguments.h asks for, taken from modules: the parts of a decoder block's half as addresses and numbers."""

import ctypes
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from layers.activation import ACTIVATIONS
from layers.expert_store import ResidentExperts
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.native import FLOATS, KINDS, Address, Size
from layers.linear import FullyConnected
from layers.mha_core import MHACore
from layers.packed import PackedLinear
from layers.qwen_moe import QwenMoe
from layers.reshaped_rms_norm import OffsetReshapedRMSNorm, ReshapedRMSNorm
from layers.rms_norm import OffsetRMSNorm, RMSNorm
from layers.swiglu import SwiGLU

CODES = {dtype: KINDS[kind] for dtype, kind in FLOATS.items()}
"""Numbers of the dtypes that vectors may have."""
ACTIVATION_CODES = {
    id(ACTIVATIONS[name]): code for name, code in (("silu", 0), ("swish", 0), ("gelu_pytorch_tanh", 1), ("gelu_new", 1))
}
HEAD_NORMS = (ReshapedRMSNorm, OffsetReshapedRMSNorm)
BLOCK_NORMS = (RMSNorm, OffsetRMSNorm)
ATTENTION, MLP, MOE = 0, 1, 2
PARTS = {
    ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "core"),
    MLP: ("gate_proj", "up_proj", "down_proj", "activation"),
    MOE: ("gate", "experts"),
}
NUMBERS: dict[type[nn.Module], Callable[[Any], Any]] = {
    MHACore: attrgetter("num_heads", "num_kv_heads", "head_dim", "scale", "score_softcap"),
    SwiGLU: attrgetter("activation"),
    QwenMoe: attrgetter("num_chosen", "norm_topk_prob"),
    **{kind: attrgetter("epsilon") for kind in (*BLOCK_NORMS, *HEAD_NORMS)},
}
"""What the arguments hold of a module besides its weights."""
MOST_CHOSEN = 64
"""Experts of one token in experts.h."""


class Half(NamedTuple):
    """A half of `block`: x + post_norm(body(norm(x))), or x + body(norm(x)).

    kind: None for a body that the kernels do not know, else body has the children of `PARTS[kind]`; expert_type is
    what a mixture's experts must be for the kernels to know what they do.
    """

    kind: int | None
    block: nn.Module
    body: nn.Module
    norm: nn.Module
    post_norm: nn.Module | None = None
    expert_type: type[nn.Module] | None = None

    def experts(self) -> list[nn.Module]:
        """A mixture's experts."""
        experts = self.body._modules["experts"] if self.kind == MOE else None
        return [] if experts is None else list(experts.children())

    def modules(self) -> list[nn.Module]:
        """All that take part but for `experts` and what is in them."""
        children = [] if self.kind is None else [self.body._modules[name] for name in PARTS[self.kind]]
        around = (self.block, self.body, self.norm, self.post_norm)
        return [module for module in (*around, *children) if module is not None]


class UnknownPartError(Exception):
    """A part of the half is of a kind that the kernels do not know."""


class _Stored(ctypes.Structure):
    _fields_ = [("values", Address), ("kind", ctypes.c_int)]


class _Layer(ctypes.Structure):
    _fields_ = [("weight", Address), ("bias", _Stored), ("rows", Size), ("columns", Size), ("kind", ctypes.c_int)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _Stored), ("epsilon", ctypes.c_float), ("offset", ctypes.c_float)]


class Tokens(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("x", "out")),
        *((name, Size) for name in ("batch", "time", "dim")),
        ("kind", ctypes.c_int),
    ]


class _AttentionHalf(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("norm", "query_norm", "key_norm", "post_norm")),
        ("first", _Layer * 3),
        ("last", _Layer),
        ("sinks", _Stored),
        *((name, Address) for name in ("keys", "values")),
        *((name, Size) for name in ("key_row", "key_head", "key_step", "value_row", "value_head", "value_step")),
        *((name, Size) for name in ("past", "slot", "bias_row", "table_row")),
        *((name, Address) for name in ("bias", "cosines", "sines")),
        *((name, ctypes.c_int) for name in ("cache_kind", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class _MlpHalf(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("norm", "post_norm")),
        ("first", _Layer * 2),
        ("last", _Layer),
        ("activation", ctypes.c_int),
    ]


class _MoeHalf(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("norm", "post_norm")),
        ("router", _Layer),
        *((name, Address) for name in ("experts", "used")),
        *((name, ctypes.c_int) for name in ("count", "chosen", "normalised", "activation")),
    ]


class _Body(ctypes.Union):
    _fields_ = [("attention", _AttentionHalf), ("mlp", _MlpHalf), ("moe", _MoeHalf)]


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
        return HalfArguments(kind=MOE, moe=_moe_arguments(half, alive))
    raise UnknownPartError


def _attention_arguments(half: Half) -> _AttentionHalf:
    attention: Any = half.body
    core = attention.core
    if type(core) is not MHACore or core.head_dim % 16 or core.num_heads % core.num_kv_heads:
        raise UnknownPartError
    dim, queries, keys = _width(half.norm), core.num_heads * core.head_dim, core.num_kv_heads * core.head_dim
    key, value = (_layer(layer, keys, dim) for layer in (attention.k_proj, attention.v_proj))
    return _AttentionHalf(
        norm=_norm(half.norm, BLOCK_NORMS, dim),
        query_norm=_norm(attention.q_norm, HEAD_NORMS, core.head_dim),
        key_norm=_norm(attention.k_norm, HEAD_NORMS, core.head_dim),
        post_norm=_norm(half.post_norm, BLOCK_NORMS, dim),
        first=(_Layer * 3)(_layer(attention.q_proj, queries, dim), key, value),
        last=_layer(attention.o_proj, dim, queries),
        sinks=_stored(attention._parameters["sinks"], core.num_heads),
        heads=core.num_heads,
        kv_heads=core.num_kv_heads,
        head_dim=core.head_dim,
        scale=core.scale,
        softcap=core.score_softcap or 0.0,
    )


def _mlp_arguments(half: Half) -> _MlpHalf:
    mlp: Any = half.body
    dim, hidden = _width(half.norm), mlp.down_proj.in_features
    return _MlpHalf(
        norm=_norm(half.norm, BLOCK_NORMS, dim),
        post_norm=_norm(half.post_norm, BLOCK_NORMS, dim),
        first=(_Layer * 2)(_layer(mlp.gate_proj, hidden, dim), _layer(mlp.up_proj, hidden, dim)),
        last=_layer(mlp.down_proj, dim, hidden),
        activation=_activation(mlp.activation),
    )


def _moe_arguments(half: Half, alive: list[Any]) -> _MoeHalf:
    moe: Any = half.body
    experts: Any = moe.experts
    if type(experts) is not ResidentExperts or any(type(expert) is not half.expert_type for expert in experts):
        raise UnknownPartError
    members: list[Any] = list(experts)
    dim, hidden = _width(half.norm), members[0].down_proj.in_features
    layers = []
    for one in members:
        layers += [
            _layer(one.gate_proj, hidden, dim),
            _layer(one.up_proj, hidden, dim),
            _layer(one.down_proj, dim, hidden),
        ]
    # The first expert tells whether rows are rounded for all.
    alike = all(len({one.kind for one in layers[role::3]}) == 1 for role in range(3))
    activations = {_activation(one.activation) for one in members}
    if not 0 < moe.num_chosen <= min(MOST_CHOSEN, len(members)) or not alike or len(activations) > 1:
        raise UnknownPartError
    table = (_Layer * len(layers))(*layers)
    alive.append(table)
    return _MoeHalf(
        norm=_norm(half.norm, BLOCK_NORMS, dim),
        post_norm=_norm(half.post_norm, BLOCK_NORMS, dim),
        router=_layer(moe.gate, len(members), dim),
        experts=ctypes.addressof(table),
        count=len(members),
        chosen=moe.num_chosen,
        normalised=moe.norm_topk_prob,
        activation=activations.pop(),
    )


def _activation(activation: nn.Module) -> int:
    if not isinstance(activation, SwiGLU) or type(activation) is not SwiGLU:
        raise UnknownPartError
    if id(activation.activation) not in ACTIVATION_CODES:
        raise UnknownPartError
    return ACTIVATION_CODES[id(activation.activation)]


def _width(norm: Any) -> int:
    if not isinstance(norm, RMSNorm):
        raise UnknownPartError
    return norm.weight.shape[0]


def _stored(tensor: Tensor | None, count: int) -> _Stored:
    if tensor is None:
        return _Stored()
    if tensor.shape != (count,) or tensor.dtype not in CODES or not tensor.is_contiguous():
        raise UnknownPartError
    return _Stored(tensor.data_ptr(), CODES[tensor.dtype])


def _layer(module: nn.Module, rows: int, columns: int) -> _Layer:
    if not isinstance(module, FullyConnected | PackedLinear) or type(module) not in (FullyConnected, PackedLinear):
        raise UnknownPartError
    weight = module.weight
    if isinstance(module, PackedLinear):
        kind, width = module.kind, BLOCK_FORMATS[module.kind].row_bytes(columns)
    else:
        kind, width = FLOATS.get(weight.dtype, ""), columns
    if kind not in KINDS or weight.shape != (rows, width) or not weight.is_contiguous():
        raise UnknownPartError
    return _Layer(weight.data_ptr(), _stored(module.bias, rows), rows, columns, KINDS[kind])


def _norm(module: nn.Module | None, kinds: tuple[type[RMSNorm], ...], dim: int) -> _Norm:
    """An absent norm has no weight."""
    if module is None or type(module) is nn.Identity:
        return _Norm()
    if type(module) not in kinds or not isinstance(module, RMSNorm) or not isinstance(module.epsilon, float):
        raise UnknownPartError
    return _Norm(_stored(module.weight, dim), module.epsilon, float(isinstance(module, OffsetRMSNorm)))
