"""Putting tensors into a model built on meta: mapped and assigned, strict both ways."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from causallm.causal_lm import CausalLM
from causallm.packing import pack_weight, packed_tensors
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.names import module_name
from causallm.weights.reader import WeightReader
from layers.pages import Slabs


def load_weights(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> None:
    """Give every parameter of `model` its tensor from `tensors`, whose names may have Hugging Face's prefix.

    A tensor of the parameter's dtype is assigned as it is (a mapped file stays mapped), another is cast, or packed
    where the model's layer is a packed one, into huge pages where the system has them, and what was mapped of it given
    back, so that memory holds the model and one tensor more. An unknown, repeated, missing or misshapen tensor is a
    ValueError naming it. `progress` is called with each name.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    packed, slabs, device = packed_tensors(model), Slabs(), torch.device(device)
    for name, tensor in _matched(model, tensors):
        pack = name in packed and tensor.is_floating_point()
        loaded = pack_weight(tensor, packed[name].kind) if pack else tensor
        if device.type != "cpu":
            loaded = loaded.to(device, dtypes[name])
        elif pack or tensor.dtype != dtypes[name] or not tensor.is_cpu:
            loaded = slabs.copy(loaded, dtypes[name])
        assign(model, name, loaded)
        if isinstance(tensors, WeightReader) and loaded is not tensor:
            tensors.release(name)
        if progress:
            progress(name)


def check_weights(model: Transformer, reader: WeightReader) -> None:
    """The errors of `load_weights`, without reading any tensor."""
    for _ in _matched(model, ((name, reader.meta(name)) for name in reader.names())):
        pass


def _matched(model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield our name and tensor of all that `model` takes; at the end complain of those that did not come."""
    shapes = {name: parameter.shape for name, parameter in expected_parameters(model).items()}
    packed = packed_tensors(model)
    seen: set[str] = set()
    for full_name, tensor in tensors:
        name = module_name(full_name)
        if name not in shapes:
            if _is_spare(model, name):
                continue
            raise ValueError(f"unexpected tensor {full_name} {list(tensor.shape)}: the model has none of that name")
        if name in seen:
            raise ValueError(f"tensor {full_name} appears twice")
        floats = tensor.is_floating_point()
        expected = packed[name].shape if name in packed and floats else shapes[name]
        if tensor.shape != expected:
            raise ValueError(f"tensor {full_name} has shape {list(tensor.shape)}, the model expects {list(expected)}")
        if not floats and not (name in packed and tensor.dtype == torch.uint8):
            raise ValueError(f"tensor {full_name} has dtype {tensor.dtype}, expected a float type")
        seen.add(name)
        yield name, tensor
    missing = [name for name in shapes if name not in seen]
    if missing:
        raise ValueError(f"{len(missing)} of {len(shapes)} tensors are missing, the first is {missing[0]}")


def _is_spare(model: Transformer, name: str) -> bool:
    """Checkpoints of tied models may carry the head, which is the embedding; an embedding model needs none."""
    return name == "lm_head.weight" and (model.config.tie_word_embeddings or not isinstance(model, CausalLM))


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter `name` by one that holds `tensor`."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
