"""What a model consists of, as bytes of files and of memory: blocks, head, experts, what is small, the embedding."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from causallm.causal_lm import CausalLM
from causallm.storage.experts import ExpertShape
from causallm.storage.head import head_parts
from causallm.storage.layout import Layout, Piece, lay_out
from causallm.storage.storage import HEAD
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.names import weight_kind
from causallm.weights.reader import WeightReader
from layers.expert_store import FetchedExperts
from layers.gpt_oss_moe import GptOssExperts
from layers.pages import PAGE

SMALL = 2**16
"""Bytes up to which a tensor is in memory whatever the budget: norms, biases."""
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Inventory:
    """units: blocks by number, and `HEAD`; small: what is always in memory; embedding: the table, which is also in
    `units` where it is the head too (tied). stores: layers of experts to be fetched, by number. head_parts: the head
    in units no larger than a block, for where it is streamed; as one where it cannot be parted."""

    units: Mapping[int, Layout]
    small: Layout
    embedding: Piece
    stores: Mapping[int, FetchedExperts]
    pieces: Mapping[str, Piece]
    paths: Mapping[int, str]
    tied: bool
    head_parts: Mapping[int, Layout]

    def expert_pieces(self, layer: int, number: int) -> list[Piece]:
        """An expert's weights in the order of its parameters."""
        store, path = self.stores[layer], self.paths[layer]
        names = [name for name, _ in store.template.named_parameters()]
        if not isinstance(store.template, GptOssExperts):
            return [self.pieces[f"{path}.{number}.{name}"] for name in names]
        return [_slice(self.pieces[f"{path}.{name}"], number) for name in names]

    def expert_shapes(self) -> dict[int, ExpertShape]:
        """What a layer's experts are like; layers whose experts are alike have the same object."""
        found: dict[tuple, ExpertShape] = {}
        shapes = {}
        for layer, store in self.stores.items():
            pieces = self.expert_pieces(layer, 0)
            key = (
                type(store.template),
                tuple((p.shape, p.dtype, p.transposed) for p in pieces),
                tuple((type(part), getattr(part, "kind", None)) for part in store.template.modules()),
            )
            shapes[layer] = found.setdefault(key, ExpertShape.of(store.template, pieces))
        return shapes

    @property
    def expert_count(self) -> int:
        """Experts of all layers."""
        return sum(len(store) for store in self.stores.values())


def take_inventory(model: Transformer, reader: WeightReader) -> Inventory:
    """Sort the weights of a model, built on meta and packed as the reader's files are.

    ValueError where a weight would have to be packed each time that it is read.
    """
    stores = {
        number: module
        for number, block in enumerate(model.layers)
        for module in block.modules()
        if isinstance(module, FetchedExperts)
    }
    paths = {number: path for path, module in model.named_modules() for number in stores if module is stores[number]}
    pieces = {name: _piece(name, weight, reader) for name, weight in expected_parameters(model).items()}
    units: dict[int, list[Piece]] = {}
    small: list[Piece] = []
    fetched = tuple(f"{path}." for path in paths.values())
    tied = model.config.tie_word_embeddings and isinstance(model, CausalLM)
    for name, piece in pieces.items():
        unit = _unit(name, tied)
        if fetched and name.startswith(fetched):
            continue
        if unit is None or piece.nbytes <= SMALL:
            if name != EMBEDDING or unit is not None:
                small.append(piece)
        else:
            units.setdefault(unit, []).append(piece)
    layouts = {unit: lay_out(members) for unit, members in units.items()}
    parts = _head_parts(layouts)
    return Inventory(layouts, lay_out(small), pieces[EMBEDDING], stores, pieces, paths, tied, parts)


def _head_parts(units: Mapping[int, Layout]) -> Mapping[int, Layout]:
    largest = max((layout.nbytes for unit, layout in units.items() if unit != HEAD), default=0)
    if HEAD not in units:
        return {}
    whole = units[HEAD]
    parts = head_parts(whole.pieces[0], largest - 2 * PAGE) if largest and len(whole.pieces) == 1 else {}
    return parts or {HEAD: whole}


def _unit(name: str, tied: bool) -> int | None:
    """Where a weight belongs; None: to what is always in memory, or, of the embedding, nowhere."""
    if block := re.match(r"layers\.(\d+)\.", name):
        return int(block[1])
    if name == EMBEDDING:
        return HEAD if tied else None
    return HEAD if weight_kind(name) == "lm_head" else None


def _piece(name: str, weight: Tensor, reader: WeightReader) -> Piece:
    stored = reader.meta(name)
    if stored.is_floating_point() and not weight.is_floating_point():
        raise ValueError(
            f"{name} is stored as floats and would be packed each time that it is read: pack the model once with "
            "`main.py quantize` and run that under a budget"
        )
    place = reader.place(name)
    transposed = place.transposed if place else stored.dim() > 1 and stored.stride(-2) < stored.stride(-1)
    return Piece(name, None, tuple(weight.shape), weight.dtype, stored.dtype, place, transposed)


def _slice(piece: Piece, number: int) -> Piece:
    """One expert of a fused tensor, with a first dimension of one."""
    place = None if piece.place is None else piece.place.slice_of(number, piece.shape[0])
    return Piece(piece.name, number, (1, *piece.shape[1:]), piece.dtype, piece.stored, place, piece.transposed)
