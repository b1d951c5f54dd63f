"""Halves of decoder blocks by the native kernels: norm, attention or MLP, and residual, on a CPU.

Between two products torch's operators and the calls to them cost as much as reading the weights does; here one call
does many halves for a few tokens, and for many tokens what lies between the products. It serves where every part is of
a kind that the kernels know and nobody looks at what passes between the parts (no hooks, no gradient); everywhere else
the modules are called one by one. Results differ in rounding: within a half values stay in fp32, whatever dtype the
model has.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.kernels import native
from layers.kernels.half_arguments import (
    ATTENTION,
    CODES,
    MLP,
    MOE,
    Half,
    HalfArguments,
    Tokens,
    UnknownPartError,
    half_arguments,
)
from layers.kernels.prompt_halves import complete, prompt_through_halves
from layers.kv_cache import KVCache
from layers.linear import FullyConnected
from layers.packed import PackedLinear
from layers.precision import multiplies_bf16_fast
from layers.step import Step

FEW_TOKENS = 8
"""Rows up to which reading the weights is what a product costs."""
DTYPE = attrgetter("dtype")


class _Course:
    """The arguments of several halves, None where the kernels do not know a part, and what they were made from."""

    def __init__(self, owner: nn.Module, halves: Sequence[Half], wary: bool = False):
        modules = list(dict.fromkeys([owner, *(module for half in halves for module in half.modules())]))
        self.halves, self._wary = halves, wary
        # These dictionaries live as long as their modules do.
        self._children = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._members, self._ids = _contents(self._children), list(map(id, _contents(self._parameters)))
        self._held = [tensor for tensor in _contents(self._parameters) if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._held))
        self._dtypes = list(map(DTYPE, self._held))
        self._experts = [_Experts(half.experts()) for half in halves if half.kind == MOE]
        floats = {*self._dtypes, *(dtype for experts in self._experts for dtype in experts.dtypes)} - {torch.uint8}
        self._dtype = floats.pop() if len(floats) == 1 else None
        # For many tokens the products are torch's, in bf16: right where the weights are, or are rounded more than that.
        layers = [layer for half in halves for layer in half.modules() if half.kind in (ATTENTION, MLP)]
        weights = {layer.weight.dtype for layer in layers if isinstance(layer, FullyConnected | PackedLinear)}
        self.suits_prompts = weights <= {torch.bfloat16, torch.uint8} and multiplies_bf16_fast()
        self._arguments, self._alive = _made(halves)

    def stands(self) -> bool:
        """Whether parts, parameters and their memory are still those that the arguments were made from."""
        return (
            _contents(self._children) == self._members
            and list(map(id, _contents(self._parameters))) == self._ids
            and list(map(Tensor.data_ptr, self._held)) == self._addresses
            and list(map(DTYPE, self._held)) == self._dtypes
        )

    def arguments(self, dtype: torch.dtype) -> Any:
        """A copy to complete for one call; None where the modules must be called one by one."""
        if self._arguments is None or any(self._hooks) or dtype != self._dtype:
            return None
        if self._wary:
            # Something was changed in an expert: what a hook there sees must not come from a call that is undone.
            if not all(experts.stand(range(len(experts))) for experts in self._experts):
                return None
            self._wary = False
        if torch.is_grad_enabled() and (
            any(tensor.requires_grad for tensor in self._held) or any(experts.learn() for experts in self._experts)
        ):
            return None
        return type(self._arguments).from_buffer_copy(self._arguments)

    def place_for_choices(self, arguments: Any, tokens: int) -> list[Any]:
        """Give each mixture of experts an array for the experts it chooses; returns the arrays."""
        mixtures = [argument.moe for argument in arguments if argument.kind == MOE]
        arrays = [(ctypes.c_int * (tokens * mixture.chosen))() for mixture in mixtures]
        for mixture, array in zip(mixtures, arrays, strict=True):
            mixture.used = ctypes.addressof(array)
        return arrays

    def chosen_stand(self, choices: list[Any]) -> bool:
        """Whether all experts that a call chose are still those that the arguments were made from."""
        return all(experts.stand(set(chosen)) for experts, chosen in zip(self._experts, choices, strict=True))


class _Experts:
    """What the experts of one mixture were. They are too many to be looked at for every token; those chosen are few,
    and looking at them after the call is as good, since what their weights were is kept alive here."""

    def __init__(self, experts: list[nn.Module]):
        modules = [list(expert.modules()) for expert in experts]
        self._hooks = [
            [one for part in parts for one in (part._forward_hooks, part._forward_pre_hooks)] for parts in modules
        ]
        self._children = [(expert._modules, list(expert._modules.values())) for expert in experts]
        self._parameters = [[part._parameters for part in parts if part._parameters] for parts in modules]
        self._held = [self._tensors(number) for number in range(len(experts))]
        self._addresses = [list(map(Tensor.data_ptr, held)) for held in self._held]
        self._alive = [tensor.detach() for held in self._held for tensor in held]
        self.dtypes = {tensor.dtype for held in self._held for tensor in held}

    def __len__(self) -> int:
        return len(self._held)

    def _tensors(self, number: int) -> list[Tensor]:
        return [tensor for held in self._parameters[number] for tensor in held.values() if tensor is not None]

    def stand(self, numbers: Iterable[int]) -> bool:
        """Whether these experts have the same parts and weights, and no hooks."""
        for number in numbers:
            children, before = self._children[number]
            if any(self._hooks[number]) or list(children.values()) != before:
                return False
            if list(map(Tensor.data_ptr, self._tensors(number))) != self._addresses[number]:
                return False
        return True

    def learn(self) -> bool:
        """Whether any expert wants a gradient."""
        return any(tensor.requires_grad for held in self._held for tensor in held)


def _contents(dictionaries: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _made(halves: Sequence[Half]) -> tuple[Any, list[Any]]:
    """The arguments of the halves, None where one is unknown, and what they point to."""
    alive: list[Any] = []
    try:
        return (
            (HalfArguments * len(halves))(*(half_arguments(half, alive) for half in halves)) if halves else None
        ), alive
    except UnknownPartError:
        return None, alive


_courses: WeakKeyDictionary[nn.Module, _Course] = WeakKeyDictionary()


def run_halves(
    owner: nn.Module,
    halves: Callable[[], Sequence[Half]],
    x: Float[Tensor, "batch time dim"],
    step: Step,
    caches: Sequence[KVCache] | None,
) -> Float[Tensor, "batch time dim"] | None:
    """What the halves make of x one after the other, the caches of their attentions advanced.

    None, and nothing done, where the kernels do not serve. `halves` is asked once for an `owner`, and again when one of
    the modules has changed.
    """
    if caches is None or not _serves(x) or not all(cache.takes(x.shape[1]) for cache in caches):
        return None
    course = _courses.get(owner)
    if course is None or not course.stands():
        course = _courses[owner] = _Course(owner, halves())
    arguments = course.arguments(x.dtype)
    if arguments is None or any(cache.dtype not in CODES for cache in caches):
        return None
    if x.shape[0] * x.shape[1] > FEW_TOKENS:
        return prompt_through_halves(course.halves, arguments, x, step, caches) if course.suits_prompts else None
    alive, waiting = [x], iter(caches)
    for half, argument in zip(course.halves, arguments, strict=True):
        if half.kind == ATTENTION:
            alive += complete(argument.attention, next(waiting), half.body.core, step, x)[0]
    out = torch.empty_like(x)
    tokens = Tokens(x.data_ptr(), out.data_ptr(), *x.shape, CODES[x.dtype])
    choices = course.place_for_choices(arguments, x.shape[0] * x.shape[1])
    native.run_halves(arguments, tokens)
    if not course.chosen_stand(choices):
        for cache in caches:
            cache.give_back(x.shape[1])
        _courses[owner] = _Course(owner, halves(), wary=True)
        return run_halves(owner, halves, x, step, caches)
    return out


def _serves(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype in CODES
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and native.library() is not None
    )
