"""Mixtures of experts in the structs of half_arguments.h, whether their experts are in memory or are fetched."""

import ctypes
from collections.abc import Mapping
from typing import Any

from torch import nn

from layers.expert_store import Expert, FetchedExperts, ResidentExperts
from layers.kernels.native import KINDS, Address, Size
from layers.kernels.part_arguments import (
    BLOCK_NORMS,
    LayerArguments,
    NormArguments,
    UnknownPartError,
    activation_code,
    layer,
    layer_of,
    norm,
    width,
)
from layers.packed_experts import PackedGptOssExperts
from layers.qwen_moe import QwenMoe

MOST_CHOSEN = 64
"""Experts of one token in experts.h."""
CLAMPED = 2
"""gpt-oss's activation in processors.h."""
DESCRIBED = "_native_expert"


class ExpertArguments(ctypes.Structure):
    """struct expert."""

    _fields_ = [("first", LayerArguments * 2), ("last", LayerArguments)]


class MixtureArguments(ctypes.Structure):
    """struct moe_half; `used`, and for fetched experts `experts`, `weights` and `outputs`, are left to fill in."""

    _fields_ = [
        *((name, NormArguments) for name in ("norm", "post_norm")),
        ("router", LayerArguments),
        *((name, Address) for name in ("experts", "used", "weights", "outputs")),
        ("hidden", Size),
        *((name, ctypes.c_int) for name in ("count", "chosen", "normalised", "activation", "packed")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    ]


class _Described:
    """An expert as the kernels see it; a copy of a module that holds one makes its own."""

    def __init__(self, arguments: ExpertArguments, activation: int, alpha: float = 0.0, limit: float = 0.0):
        self.arguments, self.address = arguments, ctypes.addressof(arguments)
        self.activation = (activation, alpha, limit)
        layers = (*arguments.first, arguments.last)
        self.kinds = [one.kind for one in layers]
        self.sizes = [(one.rows, one.columns) for one in layers]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def mixture_arguments(
    moe: Any, before: nn.Module, after: nn.Module | None, expert_type: type[nn.Module] | None, alive: list[Any]
) -> MixtureArguments:
    """A mixture between two norms; UnknownPartError where the kernels do not know one of its parts.

    expert_type: what experts that are modules of their own must be. What the arguments point to besides weights is put
    into `alive`; experts that are fetched are left out.
    """
    gate, normalised = (moe.gate, moe.norm_topk_prob) if isinstance(moe, QwenMoe) else (moe.router, True)
    dim, count = width(before), len(moe.experts)
    experts = _all(moe.experts, expert_type, dim)
    hidden = {one.arguments.last.columns for one in experts}
    activations = {one.activation for one in experts}
    if not 0 < moe.num_chosen <= min(MOST_CHOSEN, count) or len(hidden) > 1 or len(activations) > 1:
        raise UnknownPartError
    router, (activation, alpha, limit) = layer(gate, count, dim), activations.pop()
    arguments = MixtureArguments(
        norm=norm(before, BLOCK_NORMS, dim),
        post_norm=norm(after, BLOCK_NORMS, dim),
        router=router,
        hidden=hidden.pop(),
        count=count,
        chosen=moe.num_chosen,
        normalised=normalised,
        activation=activation,
        packed=max(router.kind, *(kind for one in experts for kind in one.kinds)) > KINDS["F16"],
        alpha=alpha,
        limit=limit,
    )
    if not isinstance(moe.experts, FetchedExperts):
        table = _table(count, {number: one.address for number, one in enumerate(experts)})
        alive += [experts, table]
        arguments.experts = ctypes.addressof(table)
    return arguments


def fetched_table(store: FetchedExperts, part: Mapping[int, Expert], dim: int) -> ctypes.Array:
    """What `MixtureArguments.experts` points to where only these experts are in memory.

    What is said of an expert is kept in its module: a cache gives the same module for the same memory.
    """
    return _table(len(store), {number: _address(store, expert, dim) for number, expert in part.items()})


def _table(count: int, addresses: Mapping[int, int]) -> ctypes.Array:
    table = (Address * count)()
    for number, address in addresses.items():
        table[number] = address
    return table


def _address(store: FetchedExperts, expert: Expert, dim: int) -> int:
    assert isinstance(expert, nn.Module)
    described = expert.__dict__.get(DESCRIBED)
    if described is None:
        described = expert.__dict__[DESCRIBED] = _describe(expert, type(store.template), dim)
        template = _describe(store.template, type(store.template), dim)
        if (described.kinds, described.sizes) != (template.kinds, template.sizes):
            raise RuntimeError(f"the cache gave an expert of layer {store.layer} that is not like the others")
    return described.address


def _all(store: nn.Module, expert_type: type[nn.Module] | None, dim: int) -> list[_Described]:
    """All experts of a store, or the one that all are like."""
    if type(store) is ResidentExperts:
        return [_describe(expert, expert_type, dim) for expert in store.children()]
    if type(store) is FetchedExperts and isinstance(store, FetchedExperts):
        return [_describe(store.template, expert_type, dim)]
    if type(store) is PackedGptOssExperts and isinstance(store, PackedGptOssExperts):
        return [_fused(store, number, dim) for number in range(len(store))]
    raise UnknownPartError


def _describe(expert: nn.Module, expert_type: type[nn.Module] | None, dim: int) -> _Described:
    """An expert that is a module of its own."""
    if type(expert) is PackedGptOssExperts and isinstance(expert, PackedGptOssExperts):
        return _fused(expert, 0, dim)
    if type(expert) is not expert_type:
        raise UnknownPartError
    return _separate(expert, dim)


def _separate(expert: Any, dim: int) -> _Described:
    hidden = expert.down_proj.in_features
    first = (LayerArguments * 2)(*(layer(part, hidden, dim) for part in (expert.gate_proj, expert.up_proj)))
    return _Described(ExpertArguments(first, layer(expert.down_proj, dim, hidden)), activation_code(expert.activation))


def _fused(experts: PackedGptOssExperts, number: int, dim: int) -> _Described:
    """One of gpt-oss's, whose gates and ups are alternating rows; floats lie transposed, which no kernel reads."""
    hidden, activation = experts.gate_up_proj.shape[1] // 2, experts.activation

    def part(name: str, rows: int, columns: int) -> LayerArguments:
        weight, bias = getattr(experts, name)[number], getattr(experts, f"{name}_bias")[number]
        return layer_of(weight, experts.kinds.get(name, ""), bias, rows, columns)

    first = (LayerArguments * 2)(part("gate_up_proj", 2 * hidden, dim))
    arguments = ExpertArguments(first, part("down_proj", dim, hidden))
    return _Described(arguments, CLAMPED, activation.alpha, activation.limit)
