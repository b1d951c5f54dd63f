"""Halves of decoder blocks by the native kernels: norm, attention or MLP, and residual, on a CPU; and the head.

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

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from layers.expert_store import FetchedExperts
from layers.kernels import native
from layers.kernels.fetched_halves import mix_fetched
from layers.kernels.half_arguments import ATTENTION, HEAD, MLP, NUMBERS, Half, HalfArguments, Tokens, half_arguments
from layers.kernels.part_arguments import CACHE_CODES, CODES, UnknownPartError
from layers.kernels.prompt_halves import complete, prompt_through_halves
from layers.kv_cache import KVCache
from layers.linear import FullyConnected
from layers.packed import PackedLinear
from layers.precision import multiplies_bf16_fast
from layers.step import Step

FEW_TOKENS = 8
"""Rows up to which reading the weights is what a product costs."""
COURSE = "_native_course"
DTYPE = attrgetter("dtype")


class _Course:
    """The arguments of several halves, None where the kernels do not know a part, and what they were made from.

    It is kept in its owner's `__dict__`, to go when that goes; a copy of the owner makes its own.
    """

    def __init__(self, owner: nn.Module, halves: Sequence[Half], head: Half | None, wary: bool = False):
        modules = list(dict.fromkeys([owner, *(module for half in halves for module in half.modules())]))
        self.halves, self.head, self._wary = [half for half in halves if half.kind != HEAD], head, wary
        # These dictionaries live as long as their modules do.
        self._children = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        # Nobody calls an embedding when it serves as the head: hooks of its own are for tokens.
        called = [
            module for module in modules if head is None or module is not head.body or not hasattr(module, "project")
        ]
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._members, self._ids = _contents(self._children), list(map(id, _contents(self._parameters)))
        self._held = [tensor for tensor in _contents(self._parameters) if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._held))
        self._dtypes, self._sizes = list(map(DTYPE, self._held)), list(map(Tensor.numel, self._held))
        self._dictionaries = [module.__dict__ for module in called]
        self._numbered = [(NUMBERS[type(module)], module) for module in modules if type(module) in NUMBERS]
        self._numbers = [numbers(module) for numbers, module in self._numbered]
        self.attentions: list[Any] = [half.body._modules["core"] for half in halves if half.kind == ATTENTION]
        self._experts = {number: _Experts(experts) for number, half in enumerate(halves) if (experts := half.experts())}
        stores = [(half.body._modules, half.store()) for half in halves]
        self._fetched = [(held, store) for held, store in stores if isinstance(store, FetchedExperts)]
        floats = {*self._dtypes, *(dtype for experts in self._experts.values() for dtype in experts.dtypes)}
        floats |= {tensor.dtype for _, store in self._fetched for tensor in store.template.parameters()}
        floats -= {torch.uint8}
        self._dtype = floats.pop() if len(floats) == 1 else None
        layers = [layer for half in halves for layer in half.modules() if half.kind in (ATTENTION, MLP)]
        weights = {layer.weight.dtype for layer in layers if isinstance(layer, FullyConnected | PackedLinear)}
        self.prompt_dtype = _prompt_dtype(weights, self._dtype)
        self._arguments, self._alive = _made(halves)
        norm: Any = halves[0].norm if halves else None
        self._dim = norm.weight.shape[0] if self._arguments is not None else 0

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def serves(self, x: Tensor, step: Step, caches: Sequence[KVCache]) -> bool:
        """Whether x, the step and the caches have the sizes that the halves are for; where not, torch tells."""
        batch, time, dim = x.shape
        return (
            self._arguments is not None
            and len(caches) == len(self.attentions)
            and dim == self._dim
            and step.positions.shape[0] in (1, batch)
            and step.positions.shape[1] == time
            and all(
                cache.dtype in CACHE_CODES
                and cache.takes(time)
                and cache.holds(batch, core.num_kv_heads, core.head_dim)
                for cache, core in zip(caches, self.attentions, strict=True)
            )
        )

    def stands(self) -> bool:
        """Whether parts, parameters and their memory are still those that the arguments were made from."""
        return (
            _contents(self._children) == self._members
            and list(map(id, _contents(self._parameters))) == self._ids
            and list(map(Tensor.data_ptr, self._held)) == self._addresses
            and list(map(DTYPE, self._held)) == self._dtypes
            and list(map(Tensor.numel, self._held)) == self._sizes
            and [numbers(module) for numbers, module in self._numbered] == self._numbers
        )

    def arguments(self, dtype: torch.dtype) -> Any:
        """A copy to complete for one call, the head's last; None where the modules must be called one by one."""
        if self._arguments is None or any(self._hooks) or dtype != self._dtype:
            return None
        if not all(map(Tensor.is_contiguous, self._held)) or any("forward" in held for held in self._dictionaries):
            return None
        if self._wary:
            # Something was changed in an expert: what a hook there sees must not come from a call that is undone.
            if not all(experts.stand(range(len(experts))) for experts in self._experts.values()):
                return None
            self._wary = False
        if torch.is_grad_enabled() and (
            any(tensor.requires_grad for tensor in self._held)
            or any(experts.learn() for experts in self._experts.values())
        ):
            return None
        return type(self._arguments).from_buffer_copy(self._arguments)

    def waits(self) -> bool:
        """Whether the halves cannot be one call since experts of some must be fetched in between; cheaply told."""
        return len(self.halves) > 1 and any(held.get("experts") is store for held, store in self._fetched)

    def fetched(self) -> FetchedExperts | None:
        """The store of the only half where its experts are fetched."""
        return self._fetched[0][1] if self._fetched else None

    def place_for_choices(self, arguments: Any, tokens: int) -> dict[int, Any]:
        """Give each mixture of experts whose choice is asked for an array for it; returns the arrays."""
        arrays = {number: (ctypes.c_int * (tokens * arguments[number].moe.chosen))() for number in self._experts}
        for number, array in arrays.items():
            arguments[number].moe.used = ctypes.addressof(array)
        return arrays

    def chosen_stand(self, choices: dict[int, Any]) -> bool:
        """Whether all experts that a call chose are still those that the arguments were made from."""
        return all(experts.stand(set(choices[number])) for number, experts in self._experts.items())


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
        self._sizes = [list(map(Tensor.numel, held)) for held in self._held]
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
            now = self._tensors(number)
            if list(map(Tensor.data_ptr, now)) != self._addresses[number] or not all(map(Tensor.is_contiguous, now)):
                return False
            if list(map(Tensor.numel, now)) != self._sizes[number]:
                return False
        return True

    def learn(self) -> bool:
        """Whether any expert wants a gradient."""
        return any(tensor.requires_grad for held in self._held for tensor in held)


def _prompt_dtype(weights: set[torch.dtype], dtype: torch.dtype | None) -> torch.dtype | None:
    """What the products of many tokens are in, None where the modules must be called one by one.

    bf16 where the processor is fast at it and the weights are bf16, or are rounded more than that.
    """
    if weights <= {torch.bfloat16, torch.uint8} and dtype in (torch.float32, torch.bfloat16) and multiplies_bf16_fast():
        return torch.bfloat16
    return torch.float32 if weights <= {torch.float32, torch.uint8} and dtype == torch.float32 else None


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


def run_halves(
    owner: nn.Module,
    halves: Callable[[], Sequence[Half]],
    x: Float[Tensor, "batch time dim"],
    step: Step,
    caches: Sequence[KVCache] | None,
    head: Half | None = None,
    to_logits: bool = False,
) -> Float[Tensor, "batch time dim_or_vocab"] | None:
    """What the halves make of x one after the other, the caches of their attentions advanced; `to_logits`: what the
    head makes of that, for `FEW_TOKENS` tokens.

    None, and nothing done, where the kernels do not serve. `halves` is asked once for an `owner`, and again when one of
    the modules, or `head`, which is the last of them, has changed.
    """
    few = x.shape[0] * x.shape[1] <= FEW_TOKENS
    if caches is None or not _serves(x) or (to_logits and (head is None or not few)):
        return None
    course = owner.__dict__.get(COURSE)
    if course is not None and course.waits():
        return None
    if course is None or course.head != head or not course.stands():
        course = owner.__dict__[COURSE] = _Course(owner, halves(), head)
    if course.waits() or not course.serves(x, step, caches) or (arguments := course.arguments(x.dtype)) is None:
        return None
    if not few:
        wide = course.prompt_dtype
        return None if wide is None else prompt_through_halves(course.halves, arguments, x, step, caches, wide)
    if (store := course.fetched()) is not None:
        return mix_fetched(store, arguments[0], x)
    alive, waiting = [x], iter(caches)
    for half, argument in zip(course.halves, arguments, strict=False):
        if half.kind == ATTENTION:
            alive += complete(argument.attention, next(waiting), half.body.core, step, x)[0]
    out = result = torch.empty_like(x)
    if to_logits:
        result = x.new_empty(*x.shape[:2], arguments[-1].head.layer.rows)
        arguments[-1].head.logits = result.data_ptr()
    tokens = Tokens(x.data_ptr(), out.data_ptr(), *x.shape, CODES[x.dtype])
    choices = course.place_for_choices(arguments, x.shape[0] * x.shape[1])
    native.run_halves(arguments, len(course.halves) + to_logits, tokens)
    if not course.chosen_stand(choices):
        for cache in caches:
            cache.give_back(x.shape[1])
        owner.__dict__[COURSE] = _Course(owner, halves(), head, wary=True)
        return run_halves(owner, halves, x, step, caches, head, to_logits)
    return result


def _serves(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype in CODES
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not (_global_forward_hooks or _global_forward_pre_hooks)
        and _get_current_dispatch_mode() is None
        and native.library() is not None
    )
