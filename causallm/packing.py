"""Which weights of a model are packed in block formats, and giving their layers the packed kind."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from causallm.transformer import Transformer
from causallm.weights.expected import fetched_parameters
from causallm.weights.names import weight_kind
from layers.embedding_layer import EmbeddingLayer
from layers.expert_store import FetchedExperts
from layers.gpt_oss_moe import GptOssExperts
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.packed_product import expanded
from layers.linear import FullyConnected
from layers.packed import PackedEmbedding, PackedLinear
from layers.packed_experts import PackedGptOssExperts

INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What rows get that do not fill the blocks of 256 of the first; as in llama.cpp."""
FUSED = ("gate_up_proj", "down_proj")
"""The tensors of all experts at once that can be packed."""


def choose_formats(model: Transformer, stored: Mapping[str, str]) -> dict[str, str]:
    """The format of each weight to be packed: a packed file's own, else what the runtime config asks for.

    Linear layers, fused experts, the embedding and the head can be packed; norms, biases and routers stay floats. A
    row that is no whole number of blocks gets the format of `INSTEAD`, or stays as it is; a warning tells. ValueError
    where a format is asked for that is only read.
    """
    if stored:
        return dict(stored)
    runtime, formats = model.runtime_config, dict[str, str]()
    embedding = runtime.embedding_format or (runtime.lmhead_format if model.config.tie_word_embeddings else None)
    wanted = {"linear": runtime.fc_format, "embedding": embedding, "lm_head": runtime.lmhead_format}
    for asked in filter(None, wanted.values()):
        BLOCK_FORMATS[asked].writer()
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
            yield from ((_joined(path, name), getattr(layer, name).shape[1]) for name in FUSED)
        elif isinstance(layer, FetchedExperts):
            yield from ((f"{path}.{name}", columns) for name, columns in _packable_experts(layer))


def _packable_experts(store: FetchedExperts) -> Iterator[tuple[str, int]]:
    """The same of experts that are fetched, each by its name under the store."""
    of_one = list(_packable(store.template))
    if isinstance(store.template, GptOssExperts):
        yield from of_one
    else:
        yield from ((f"{number}.{name}", columns) for number in range(len(store)) for name, columns in of_one)


def pack_layers(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Put packed layers, empty and on the meta device, where the weights named are; ValueError where there is none."""
    packable = dict(_packable(model))
    layers: dict[str, dict[str, str]] = {}
    rest = dict(formats)
    for path, store in [(path, m) for path, m in model.named_modules() if isinstance(m, FetchedExperts)]:
        names = {f"{path}.{name}": name for name, _ in _packable_experts(store)}
        _pack_experts(model, path, store, {names[name]: rest.pop(name) for name in names if name in rest})
    for name, kind in rest.items():
        if name not in packable:
            raise ValueError(f"tensor {name} is packed as {kind}, but the model has no layer of that name to hold it")
        path, _, attribute = name.rpartition(".")
        layers.setdefault(path, {})[attribute] = kind
    for path, kinds in layers.items():
        owner, _, attribute = path.rpartition(".")
        with torch.device("meta"):
            setattr(model.get_submodule(owner), attribute, _packed_layer(model.get_submodule(path), kinds))


def _pack_experts(model: nn.Module, path: str, store: FetchedExperts, formats: Mapping[str, str]) -> None:
    """Give the template of a store packed layers; `formats` are those of its experts by name under it."""
    if isinstance(store.template, GptOssExperts):
        if formats:
            owner, _, attribute = path.rpartition(".")
            with torch.device("meta"):
                packed = PackedGptOssExperts.in_place_of(store.template, formats)
            setattr(model.get_submodule(owner), attribute, FetchedExperts(packed, len(store)))
        return
    kinds: dict[str, list[str]] = {}
    for name, kind in formats.items():
        kinds.setdefault(name.partition(".")[2], []).append(kind)
    for name, each in kinds.items():
        if len(set(each)) > 1 or len(each) != len(store):
            raise ValueError(f"{path}: {name} is not packed alike in all experts, so that they cannot be fetched")
    pack_layers(store.template, {name: each[0] for name, each in kinds.items()})


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
    storage = getattr(model, "storage", None)
    if storage is not None and storage.packed is not None:
        return dict(storage.packed)
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear | PackedEmbedding):
            found[_joined(path, "weight")] = PackedTensor(layer.weight, layer.kind)
        elif isinstance(layer, PackedGptOssExperts):
            kinds = layer.kinds.items()
            found |= {_joined(path, name): PackedTensor(getattr(layer, name), kind) for name, kind in kinds}
        elif isinstance(layer, FetchedExperts):
            found |= {_joined(path, name): packed for name, packed in _packed_experts(layer).items()}
    return found


def _packed_experts(store: FetchedExperts) -> dict[str, PackedTensor]:
    """The packed weights of all experts that are fetched, on meta, by name under their store."""
    kinds = {name: packed.kind for name, packed in packed_tensors(store.template).items()}
    found = {}
    for name, weight in fetched_parameters(store).items():
        kind = kinds.get(name) or kinds.get(name.partition(".")[2])
        if kind:
            found[name] = PackedTensor(nn.Parameter(weight, requires_grad=False), kind)
    return found


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
