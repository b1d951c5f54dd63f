"""Which weights of a model are packed in block formats, and giving their layers the packed kind."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from causallm.transformer import Transformer
from causallm.weights.names import weight_kind
from layers.embedding_layer import EmbeddingLayer
from layers.gpt_oss_moe import GptOssExperts
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.packed_product import expanded
from layers.linear import FullyConnected
from layers.packed import PackedEmbedding, PackedLinear
from layers.packed_experts import PackedGptOssExperts

INSTEAD = {"Q4_K": "Q8_0", "Q6_K": "Q8_0"}
"""What rows get that do not fill the blocks of 256 of the first."""
FUSED = ("gate_up_proj", "down_proj")
"""The tensors of all experts at once that can be packed."""


def choose_formats(model: Transformer, stored: Mapping[str, str]) -> dict[str, str]:
    """The format of each weight to be packed: a packed file's own, else what the runtime config asks for.

    Linear layers, fused experts, the embedding and the head can be packed; norms, biases and routers stay floats. A
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


def _packable(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and columns of each weight whose layer has a packed kind."""
    for path, layer in model.named_modules():
        if isinstance(layer, FullyConnected | EmbeddingLayer):
            yield f"{path}.weight", layer.weight.shape[1]
        elif isinstance(layer, GptOssExperts):
            yield from ((f"{path}.{name}", getattr(layer, name).shape[1]) for name in FUSED)


def pack_layers(model: Transformer, formats: Mapping[str, str]) -> None:
    """Put packed layers, empty and on the meta device, where the weights named are; ValueError where there is none."""
    packable = dict(_packable(model))
    layers: dict[str, dict[str, str]] = {}
    for name, kind in formats.items():
        if name not in packable:
            raise ValueError(f"tensor {name} is packed as {kind}, but the model has no layer of that name to hold it")
        path, _, attribute = name.rpartition(".")
        layers.setdefault(path, {})[attribute] = kind
    for path, kinds in layers.items():
        owner, _, attribute = path.rpartition(".")
        with torch.device("meta"):
            setattr(model.get_submodule(owner), attribute, _packed_layer(model.get_submodule(path), kinds))


def _packed_layer(layer: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """kinds: the format of each of the layer's tensors to be packed."""
    if isinstance(layer, GptOssExperts):
        return PackedGptOssExperts.in_place_of(layer, kinds)
    if isinstance(layer, FullyConnected):
        return PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, kinds["weight"])
    assert isinstance(layer, EmbeddingLayer)
    dtype = layer.activation_dtype or torch.get_default_dtype()
    return PackedEmbedding(layer.num_embeddings, layer.dim, layer.scale, kinds["weight"], dtype)


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight of a model: its format and its shape as floats."""

    parameter: nn.Parameter
    kind: str

    @property
    def shape(self) -> torch.Size:
        """That of the floats, as a checkpoint has them."""
        *experts, rows, row_bytes = self.parameter.shape
        columns = BLOCK_FORMATS[self.kind].row_values(row_bytes)
        return torch.Size((*experts, columns, rows) if experts else (rows, columns))

    def dequantize(self) -> Tensor:
        """The floats, in fp32."""
        return unpack_weight(self.parameter.detach(), self.kind)


def packed_tensors(model: nn.Module) -> dict[str, PackedTensor]:
    """The packed weights of a model by name."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear | PackedEmbedding):
            found[f"{path}.weight"] = PackedTensor(layer.weight, layer.kind)
        elif isinstance(layer, PackedGptOssExperts):
            found |= {f"{path}.{name}": PackedTensor(getattr(layer, name), kind) for name, kind in layer.kinds.items()}
    return found


def packed_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """Of a weight (rows, columns), or of fused experts (experts, in, out): the shape of the bytes, an output a row."""
    *experts, rows, columns = shape if len(shape) == 2 else (shape[0], shape[2], shape[1])
    return (*experts, rows, BLOCK_FORMATS[kind].row_bytes(columns))


def pack_weight(weight: Float[Tensor, "rows columns"] | Float[Tensor, "experts in out"], kind: str) -> Tensor:
    """The bytes of a weight or of fused experts, shaped as `packed_shape` says; see `BlockFormat.pack` for errors."""
    if weight.dim() == 2:
        return BLOCK_FORMATS[kind].pack(weight)
    packed = torch.empty(packed_shape(weight.shape, kind), dtype=torch.uint8)
    for rows, expert in zip(packed, weight, strict=True):
        rows.copy_(BLOCK_FORMATS[kind].pack(expert.t()))
    return packed


def unpack_weight(
    packed: UInt8[Tensor, "rows row_bytes"] | UInt8[Tensor, "experts out row_bytes"], kind: str
) -> Tensor:
    """The fp32 values of `pack_weight`'s bytes."""
    if packed.dim() == 2:
        return expanded(packed, kind)
    return torch.stack([expanded(expert, kind).t() for expert in packed])
