"""Halves of decoder blocks by the native kernels: norm, attention or MLP, and residual, on a CPU.

Between two products torch's operators and the calls to them cost as much as reading the weights does; here one call
does many halves for a few tokens, and for many tokens what lies between the products. It serves where every part is of
a kind that the kernels know and nobody looks at what passes between the parts (no hooks, no gradient); everywhere else
the modules are called one by one. Results differ in rounding: within a half values stay in fp32, whatever dtype the
model has.
"""

from collections.abc import Callable, Sequence
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

    def __init__(self, owner: nn.Module, halves: Sequence[Half]):
        modules = list(dict.fromkeys([owner, *(module for half in halves for module in half.modules())]))
        self.halves = halves
        # These dictionaries live as long as their modules do.
        self._children = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._held, self._members = self._tensors(), self._modules()
        self._ids, self._addresses = list(map(id, self._held)), list(map(Tensor.data_ptr, self._held))
        self._dtypes = list(map(DTYPE, self._held))
        floats = set(self._dtypes) - {torch.uint8}
        self._dtype = floats.pop() if len(floats) == 1 else None
        # For many tokens the products are torch's, in bf16: right where the weights are, or are rounded more than that.
        weights = {layer.weight.dtype for layer in modules if isinstance(layer, FullyConnected | PackedLinear)}
        self.suits_prompts = weights <= {torch.bfloat16, torch.uint8} and multiplies_bf16_fast()
        try:
            self._arguments: Any = (HalfArguments * len(halves))(*map(half_arguments, halves)) if halves else None
        except UnknownPartError:
            self._arguments = None

    def _tensors(self) -> list[Tensor]:
        return [tensor for held in self._parameters for tensor in held.values() if tensor is not None]

    def _modules(self) -> list[nn.Module | None]:
        return [module for children in self._children for module in children.values()]

    def stands(self) -> bool:
        """Whether parts, parameters and their memory are still those that the arguments were made from."""
        return (
            self._modules() == self._members
            and list(map(id, self._tensors())) == self._ids
            and list(map(Tensor.data_ptr, self._held)) == self._addresses
            and list(map(DTYPE, self._held)) == self._dtypes
        )

    def arguments(self, dtype: torch.dtype) -> Any:
        """A copy to complete for one call; None where the modules must be called one by one."""
        if self._arguments is None or any(self._hooks) or dtype != self._dtype:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._held):
            return None
        return type(self._arguments).from_buffer_copy(self._arguments)


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
    native.run_halves(arguments, tokens)
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
