"""Sending each token to its chosen experts and summing what comes back; shared by all mixture-of-experts layers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layers.expert_store import ExpertStore


def mix_experts(
    x: Float[Tensor, "tokens dim"],
    chosen: Int[Tensor, "tokens chosen"],
    weights: Float[Tensor, "tokens chosen"],
    experts: ExpertStore,
) -> Float[Tensor, "tokens dim"]:
    """Sum over chosen experts of weight * expert(x), each expert run once on all of its tokens.

    Sums are taken in the order of the experts' numbers, so that the result does not depend on the order in which the
    store yields them: what comes early is kept until its turn, at most (tokens * chosen, dim) values.
    """
    mixed = torch.zeros_like(x)
    order = chosen.flatten().argsort(stable=True)
    tokens, flat_weights = order // chosen.shape[1], weights.flatten()[order]
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    asked = [expert_id for expert_id, count in enumerate(counts) if count]
    early: dict[int, Tensor] = {}
    turns = iter(asked)
    turn = next(turns, None)
    for expert_id, expert in experts.fetch(asked):
        part = slice(starts[expert_id], starts[expert_id + 1])
        early[expert_id] = (expert(x[tokens[part]]) * flat_weights[part, None]).to(mixed.dtype)
        while turn in early:
            mixed.index_add_(0, tokens[starts[turn] : starts[turn + 1]], early.pop(turn))
            turn = next(turns, None)
    return mixed
