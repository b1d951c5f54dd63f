"""What a model needs, read from its configuration and the headers of its files: bytes held and bytes read a token."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from causallm.causal_lm import CausalLM
from causallm.loading import build_model
from causallm.model_source import ModelSource
from causallm.packing import choose_formats, pack_layers, packed_tensors
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.loader import check_weights
from causallm.weights.names import weight_kind
from causallm.weights.reader import WeightReader


@dataclass(frozen=True)
class Weights:
    """Bytes, by how much of them a token needs: of `table`, an embedding that is not also the head, one row; all of
    `always`; of `experts` a share."""

    table: int
    always: int
    experts: int
    share: float

    @property
    def total(self) -> int:
        """All of them."""
        return self.table + self.always + self.experts

    @property
    def per_token(self) -> float:
        """Those that a decoding step of one row reads."""
        return self.always + self.experts * self.share


@dataclass(frozen=True)
class Needs:
    """memory: weights as they are when loaded; files: as they lie on the disk, None where `missing` says why.

    experts: of a layer, of which a token takes `chosen`; 0 without. context: the most tokens. windows: of each layer,
    None where it keeps all tokens. position_bytes: of one token in one layer's cache; 0 of a model that generates
    nothing.
    """

    architecture: str
    parameters: int
    dtypes: str
    memory: Weights
    files: Weights | None
    missing: str | None
    experts: int
    chosen: int
    context: int
    windows: tuple[int | None, ...]
    position_bytes: int

    @property
    def generates(self) -> bool:
        """Whether it makes text, token by token."""
        return self.position_bytes > 0

    def cache_bytes(self, length: int) -> int:
        """Of keys and values of one row of `length` tokens."""
        return self.position_bytes * sum(min(length, window or length) for window in self.windows)


def read_needs(source: ModelSource, dtype: str | None = None, **overrides: object) -> Needs:
    """What the model of a source needs when it is loaded so (see `load_model`); it may have no weights yet.

    ValueError where weights are missing, too many or misshapen: their headers are compared with the model.
    """
    model = build_model(source, dtype, **overrides)
    reader: WeightReader | None = None
    missing: str | None = None
    try:
        reader = source.weights(model)
    except FileNotFoundError as error:
        missing = str(error)
    pack_layers(model, choose_formats(model, reader.formats() if reader else {}))
    if reader:
        check_weights(model, reader)
    cfg, generates = model.config, isinstance(model, CausalLM)
    weights, packed = expected_parameters(model), packed_tensors(model)
    floats = {str(weight.dtype).removeprefix("torch.") for name, weight in weights.items() if name not in packed}
    return Needs(
        architecture=cfg.architecture,
        parameters=sum(packed.get(name, weight).shape.numel() for name, weight in weights.items()),
        dtypes="+".join(sorted(floats | {tensor.kind for tensor in packed.values()})),
        memory=_weights(model, ((name, weight.nbytes) for name, weight in weights.items())),
        files=_weights(model, _stored(source, model, reader)) if reader else None,
        missing=missing,
        experts=cfg.num_experts,
        chosen=cfg.num_experts_per_tok if cfg.num_experts else 0,
        context=model.max_length,
        windows=tuple(cfg.window(layer_id) for layer_id in range(cfg.num_hidden_layers)),
        position_bytes=model.cache_position_bytes if generates else 0,
    )


def _weights(model: Transformer, sizes: Iterable[tuple[str, int]]) -> Weights:
    cfg = model.config
    parts = {"table": 0, "always": 0, "experts": 0}
    for name, nbytes in sizes:
        if ".experts." in name:
            parts["experts"] += nbytes
        elif weight_kind(name) == "embedding" and not cfg.tie_word_embeddings:
            parts["table"] += nbytes
        else:
            parts["always"] += nbytes
    return Weights(**parts, share=cfg.num_experts_per_tok / cfg.num_experts if cfg.num_experts else 0.0)


def _stored(source: ModelSource, model: Transformer, reader: WeightReader) -> Iterable[tuple[str, int]]:
    """Bytes of each weight in its file; those that are stored in another form than they are read in (MXFP4, NNTrainer's
    blocks) share what is left of the files in proportion to their sizes when read."""
    places = {name: reader.place(name) for name in reader.names()}
    files = {place.path for place in places.values() if place} or {_only_file(source, model)}
    left = sum(file.stat().st_size for file in files) - sum(place.nbytes for place in places.values() if place)
    computed = {name: reader.meta(name).nbytes for name, place in places.items() if place is None}
    scale = left / max(1, sum(computed.values()))
    for name, place in places.items():
        yield name, place.nbytes if place else int(scale * computed[name])


def _only_file(source: ModelSource, model: Transformer) -> Path:
    return source.path if source.path.is_file() else source.path / str(model.runtime_config.model_file_name)
