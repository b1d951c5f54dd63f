"""The order of tensors in NNTrainer's headerless `.bin` and their dtypes, as data.

Embedding, blocks, final norm, head; within a block the order of NNTrainer's graph, a bias right after its weight.
Linear weights are stored (in, out). The head is also written where it is tied to the embedding.

Sources: Llama, Qwen2, Qwen3 and Qwen3-MoE as checked byte for byte against the application (up before gate);
gpt-oss as nnstreamer/nntrainer's res/gpt-oss-20b/weight_converter.py (commit e912694) and gpt_oss_moe_layer.cpp;
Gemma3 and EmbeddingGemma as nntrainer/nntrainer's models/gemma3/gemma3_causallm.cpp (commit 11987c1) and
res/gemma3/weight_converter.py (commit b059ecd): v before q_norm, gate before up, norms as 1 + w, the dense layers of
an embedding model at the end. Later NNTrainer revisions write gate before up for every family and no tied head; such
files cannot be told by their size except by the missing head, and are not read.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from causallm.causal_lm import CausalLM
from causallm.config import RuntimeConfig
from causallm.embedding_model import EmbeddingModel
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.names import weight_kind
from causallm.weights.reader import Index
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.rms_norm import OffsetRMSNorm

Stored = torch.dtype | str
"""How values lie in the file: a float dtype, or the name of a block format."""
Storage = Mapping[str, Stored]
"""That of each kind of weight (`causallm.weights.names.weight_kind`)."""

BLOCK = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.q_norm",
    "self_attn.k_proj",
    "self_attn.k_norm",
    "self_attn.v_proj",
    "self_attn.sinks",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate",
    "mlp.router",
    "mlp.experts",
    "mlp.up_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
SANDWICH_BLOCK = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "post_feedforward_layernorm",
)
EXPERT = ("up_proj", "gate_proj", "down_proj")
EVEN, ODD, ALL = slice(0, None, 2), slice(1, None, 2), slice(None)


@dataclass(frozen=True)
class Entry:
    """One run of values in the file: the part `index` of our tensor `name`, of shape `shape` before transposing.

    offset: stored as 1 + w. ignored: only written, never read (a tied head).
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    transposed: bool = False
    offset: bool = False
    index: Index = ()
    ignored: bool = False

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, ...]:
        """Rows and columns to be packed: outputs and inputs of a linear weight, vocabulary and dim of a table."""
        return self.shape[::-1] if self.index else self.shape

    @property
    def rows(self) -> Index:
        """The part of the packed tensor, (experts, out, row_bytes) where `index` is of (experts, in, out)."""
        return self.index[:1] + self.index[2:]

    def nbytes(self, stored: Stored) -> int:
        """Bytes in the file."""
        if isinstance(stored, torch.dtype):
            return self.count * stored.itemsize
        return self.matrix[0] * BLOCK_FORMATS[stored].row_bytes(self.matrix[1])


def has_spare_head(model: Transformer) -> bool:
    """Whether NNTrainer's own file of this model ends with a head that a tied model does not need."""
    return isinstance(model, CausalLM) and model.config.tie_word_embeddings


def count_dense(model: Transformer) -> int:
    """How many dense layers an embedding model has."""
    return len(model.dense) if isinstance(model, EmbeddingModel) else 0


def is_sandwich(model: nn.Module) -> bool:
    """Whether blocks have norms around attention and MLP (Gemma3), which are stored in another order."""
    return any(name.endswith("pre_feedforward_layernorm.weight") for name, _ in model.named_parameters())


def layout(model: Transformer, spare_head: bool) -> tuple[Entry, ...]:
    """All entries of a model's file in order; with `spare_head` the embedding once more, transposed, at the end.

    `model` may be on the meta device. ValueError where it has a weight for which the format has no place.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in expected_parameters(model).items()}
    offsets = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, OffsetRMSNorm)}
    order = SANDWICH_BLOCK if is_sandwich(model) else BLOCK
    stems = ["embed_tokens"]
    stems += [f"layers.{layer}.{stem}" for layer in range(len(model.layers)) for stem in order]
    stems += ["norm", "lm_head"]
    stems += [f"dense.{number}.linear" for number in range(count_dense(model))]
    entries = [entry for stem in stems for entry in _entries(stem, shapes, offsets)]
    if left := set(shapes) - {entry.name for entry in entries}:
        raise ValueError(f"NNTrainer's .bin has no place for the weight {min(left)} of {type(model).__name__}")
    if spare_head:
        name = "embed_tokens.weight"
        entries.append(Entry(name, shapes[name], "lm_head", transposed=True, ignored=True))
    return tuple(entries)


def _entries(stem: str, shapes: Mapping[str, tuple[int, ...]], offsets: set[str]) -> Iterator[Entry]:
    """Those of one module, none where the model does not have it."""
    if stem.endswith("mlp.experts"):
        yield from (_fused_experts(stem, shapes) if f"{stem}.gate_up_proj" in shapes else _experts(stem, shapes))
    for name in (stem, f"{stem}.weight", f"{stem}.bias"):
        if name in shapes:
            kind = weight_kind(name)
            yield Entry(name, shapes[name], kind, kind in ("linear", "lm_head", "router"), name in offsets)


def _experts(stem: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
    expert = 0
    while f"{stem}.{expert}.{EXPERT[0]}.weight" in shapes:
        for projection in EXPERT:
            yield from _entries(f"{stem}.{expert}.{projection}", shapes, set())
        expert += 1


def _fused_experts(stem: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
    """gpt-oss: up in the odd columns and gate in the even ones of a tensor that is (experts, in, out) already."""
    experts, hidden, dim = shapes[f"{stem}.down_proj"]
    parts: tuple[tuple[str, tuple[int, int], Index], ...] = (
        ("gate_up_proj", (dim, hidden), (ODD,)),
        ("gate_up_proj", (dim, hidden), (EVEN,)),
        ("down_proj", (hidden, dim), ()),
    )
    for expert in range(experts):
        for name, shape, columns in parts:
            yield Entry(f"{stem}.{name}", shape, "linear", index=(expert, ALL, *columns))
            yield Entry(f"{stem}.{name}_bias", shape[1:], "bias", index=(expert, *columns))


def storage(
    matrix: Stored,
    vector: Stored,
    router: Stored = torch.float32,
    embedding: Stored | None = None,
    lm_head: Stored | None = None,
) -> Storage:
    """The storage of a file by what decides them in NNTrainer.

    matrix: model_tensor_type's first half; vector (norms, biases, sinks): its second half, the activations' dtype;
    the router is always FP32 in the application; embedding_dtype and lmhead_dtype decide theirs.
    """
    return {
        "linear": matrix,
        "embedding": embedding or matrix,
        "lm_head": lm_head or embedding or matrix,
        "norm": vector,
        "bias": vector,
        "router": router,
    }


FLOATS = {torch.float32: "FP32", torch.float16: "FP16"}
"""The format's float dtypes."""

FP32 = storage(torch.float32, torch.float32)
FP16 = storage(torch.float16, torch.float32)

STORAGES: dict[str, Storage] = {
    "FP32": FP32,
    "FP16": FP16,
    "FP16 with FP32 embedding": storage(torch.float16, torch.float32, embedding=torch.float32),
    "FP16 with FP16 activations": storage(torch.float16, torch.float16),
    "FP16 throughout": storage(torch.float16, torch.float16, torch.float16),
}
"""What a file may be when nothing says so. "FP16" (model_tensor_type FP16-FP32) is the one that is written; NNTrainer's
own Python converters write "FP16 throughout"."""


def configured_storage(runtime: RuntimeConfig) -> Storage | None:
    """What nntr_config.json says of the file; None where it says nothing, or a dtype that the format has not."""
    matrix = runtime.fc_format or runtime.fc_layer_dtype
    if matrix is None:
        return None
    said = storage(
        matrix,
        runtime.dtype or torch.float32,
        embedding=runtime.embedding_format or runtime.embedding_dtype,
        lm_head=runtime.lmhead_format or runtime.lmhead_dtype,
    )
    return said if {stored for stored in said.values() if not isinstance(stored, str)} <= set(FLOATS) else None


def file_size(entries: Sequence[Entry], dtypes: Storage) -> int:
    """Bytes of a file."""
    return sum(entry.nbytes(dtypes[entry.kind]) for entry in entries)
