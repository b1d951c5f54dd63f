"""Which weights of a model are packed in block formats, and giving their layers the packed kind."""

import warnings
from collections.abc import Mapping

import torch

from causallm.transformer import Transformer
from causallm.weights.names import weight_kind
from layers.embedding_layer import EmbeddingLayer
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.linear import FullyConnected
from layers.packed import PackedEmbedding, PackedLinear

INSTEAD = {"Q4_K": "Q8_0", "Q6_K": "Q8_0"}
"""What rows get that do not fill the blocks of 256 of the first."""


def choose_formats(model: Transformer, stored: Mapping[str, str]) -> dict[str, str]:
    """The format of each weight to be packed: a packed file's own, else what the runtime config asks for.

    Linear layers, the embedding and the head can be packed; norms, biases, routers and fused experts stay floats. A
    row that is no whole number of blocks gets the format of `INSTEAD`, or stays as it is; a warning tells.
    """
    if stored:
        return dict(stored)
    runtime, formats = model.runtime_config, dict[str, str]()
    embedding = runtime.embedding_format or (runtime.lmhead_format if model.config.tie_word_embeddings else None)
    wanted = {"linear": runtime.fc_format, "embedding": embedding, "lm_head": runtime.lmhead_format}
    changed: dict[str, int] = {}
    for name, columns in _packable(model):
        kind = wanted.get(weight_kind(name))
        if kind is None:
            continue
        fits = next((k for k in (kind, INSTEAD.get(kind)) if k and columns % BLOCK_FORMATS[k].values == 0), None)
        if fits != kind:
            note = f"{kind} needs rows of a multiple of {BLOCK_FORMATS[kind].values}: {fits or 'not packed'} instead"
            changed[note] = changed.get(note, 0) + 1
        if fits:
            formats[name] = fits
    for note, count in changed.items():
        warnings.warn(f"{note} for {count} weights", stacklevel=3)
    return formats


def _packable(model: Transformer) -> list[tuple[str, int]]:
    """Name and columns of each weight whose layer has a packed kind."""
    layers = model.named_modules()
    return [
        (f"{path}.weight", layer.weight.shape[1])
        for path, layer in layers
        if isinstance(layer, FullyConnected | EmbeddingLayer)
    ]


def pack_layers(model: Transformer, formats: Mapping[str, str]) -> None:
    """Put packed layers, empty and on the meta device, where the weights named are; ValueError where there is none."""
    packable = dict(_packable(model))
    for name, kind in formats.items():
        if name not in packable:
            raise ValueError(f"tensor {name} is packed as {kind}, but the model has no layer of that name to hold it")
        path = name.removesuffix(".weight")
        owner, _, attribute = path.rpartition(".")
        with torch.device("meta"):
            setattr(model.get_submodule(owner), attribute, _packed_layer(model.get_submodule(path), kind))


def _packed_layer(layer: torch.nn.Module, kind: str) -> PackedLinear | PackedEmbedding:
    if isinstance(layer, FullyConnected):
        return PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, kind)
    assert isinstance(layer, EmbeddingLayer)
    dtype = layer.activation_dtype or torch.get_default_dtype()
    return PackedEmbedding(layer.num_embeddings, layer.dim, layer.scale, kind, dtype)


def packed_tensors(model: Transformer) -> dict[str, PackedLinear | PackedEmbedding]:
    """The packed layer of each packed weight, by the weight's name."""
    return {
        f"{path}.weight": layer
        for path, layer in model.named_modules()
        if isinstance(layer, PackedLinear | PackedEmbedding)
    }
