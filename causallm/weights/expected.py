"""Which weights a model has, those included that are only in memory when a token needs them."""

import torch
from torch import Tensor, nn

from layers.expert_store import FetchedExperts
from layers.gpt_oss_moe import GptOssExperts


def expected_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All weights by our names: the parameters, and for experts that are fetched tensors on meta of their shapes."""
    storage = getattr(model, "storage", None)
    if storage is not None and storage.expected is not None:
        return dict(storage.expected)
    found: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, FetchedExperts):
            found |= {f"{path}.{name}": tensor for name, tensor in fetched_parameters(module).items()}
    return found


def fetched_parameters(store: FetchedExperts) -> dict[str, Tensor]:
    """The weights of all experts of a store, by their names under it."""
    weights = dict(store.template.named_parameters())
    if isinstance(store.template, GptOssExperts):
        return {
            name: torch.empty((len(store), *weight.shape[1:]), dtype=weight.dtype, device="meta")
            for name, weight in weights.items()
        }
    return {f"{number}.{name}": weight for number in range(len(store)) for name, weight in weights.items()}
