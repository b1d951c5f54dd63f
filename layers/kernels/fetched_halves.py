"""A mixture of experts for a few tokens by the native kernels, while those of its experts that are missing are read."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layers.expert_store import FetchedExperts
from layers.kernels import native
from layers.kernels.half_arguments import Tokens
from layers.kernels.mixture_arguments import fetched_table
from layers.kernels.part_arguments import CODES


def mix_fetched(
    store: FetchedExperts, arguments: Any, x: Float[Tensor, "batch time dim"]
) -> Float[Tensor, "batch time dim"]:
    """What the half with this store makes of x: its experts are used as they come to lie in memory, and summed at last.

    Between the native calls no thread is busy, so that the processor is free for those who read.
    """
    mixture, dim = arguments.moe, x.shape[-1]
    pairs = x.shape[0] * x.shape[1] * mixture.chosen
    out, room = torch.empty_like(x), torch.empty(pairs * (dim + 1))
    used = (ctypes.c_int * pairs)()
    mixture.used, mixture.outputs = ctypes.addressof(used), room.data_ptr()
    mixture.weights = mixture.outputs + pairs * dim * room.element_size()
    tokens = Tokens(x.data_ptr(), out.data_ptr(), *x.shape, CODES[x.dtype])
    native.mixture_step(native.ROUTE, arguments, tokens)
    for part in store.parts(list(dict.fromkeys(used))):
        table = fetched_table(store, part, dim)
        mixture.experts = ctypes.addressof(table)
        native.mixture_step(native.USE, arguments, tokens)
    native.mixture_step(native.SUM, arguments, tokens)
    return out
