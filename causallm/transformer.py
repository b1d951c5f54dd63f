"""The template method: how every model is put together and run, with hooks for what families change."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causallm.blocks import Attention, DecoderBlock, Mlp, run_blocks
from causallm.config import GenerationConfig, ModelConfig, RuntimeConfig
from causallm.storage.storage import Storage
from causallm.tokenizer import Tokenizer
from layers.embedding_layer import EmbeddingLayer
from layers.expert_store import ExpertStore, FetchedExperts, ResidentExperts
from layers.int8_cache import SCALE, Int8KVCache, position_bytes
from layers.kernels import native
from layers.kernels.half_arguments import Half
from layers.kv_cache import KVCache, StaticKVCache
from layers.linear import FullyConnected
from layers.mha_core import MHACore
from layers.registry import LayerRegistry
from layers.rms_norm import RMSNorm
from layers.sliding_cache import SlidingKVCache
from layers.step import Step
from layers.swiglu import SwiGLU
from layers.tie_word_embedding import TieWordEmbedding

DEFAULT_CHUNK = 512
"""Prompt tokens in one step where nntr_config.json has no init_seq_len."""


class Transformer(nn.Module):
    """A decoder body: embedding, blocks, final norm. As it stands it is Llama's; families override hooks.

    Life: `Model(cfg, generation_cfg, nntr_cfg)` calls `setupParameters`; `initialize()` calls `registerCustomLayers`
    and `constructModel`, which asks the other hooks for the parts. Hooks return modules. Construction works under
    `torch.device("meta")`.
    """

    config_defaults: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False}
    """What this family assumes of keys that config.json leaves out."""
    in_steps: ClassVar[bool] = True
    """Whether it takes a text in step by step over a cache of keys and values; else at once and without one."""

    def __init__(self, cfg: ModelConfig, generation_cfg: GenerationConfig, nntr_cfg: RuntimeConfig):
        super().__init__()
        self.tokenizer: Tokenizer | None = None
        self.storage = Storage()
        self.setupParameters(cfg, generation_cfg, nntr_cfg)

    def setupParameters(self, cfg: ModelConfig, generation_cfg: GenerationConfig, nntr_cfg: RuntimeConfig) -> None:
        """Take over the configuration and derive what construction needs from it."""
        self.config, self.generation_config, self.runtime_config = cfg, generation_cfg, nntr_cfg
        self.dtype = nntr_cfg.dtype or cfg.dtype or torch.float32
        self.is_causal = cfg.is_causal if nntr_cfg.is_causal is None else nntr_cfg.is_causal
        self.max_length = nntr_cfg.max_seq_len or cfg.max_position_embeddings
        if self.max_length > cfg.max_position_embeddings:
            warnings.warn(
                f"max_seq_len {self.max_length} is more than the {cfg.max_position_embeddings} positions that the "
                "model was made for (max_position_embeddings)",
                stacklevel=2,
            )
        self.qkv_bias = self.o_bias = cfg.attention_bias
        self.fetches_experts = nntr_cfg.memory_budget is not None or "Slim" in cfg.architecture
        self.attention_scale = cfg.head_dim**-0.5
        self.embedding_scale = 1.0

    def initialize(self) -> None:
        """Register layer types, then build the modules."""
        self.registry = LayerRegistry()
        self.registerCustomLayers()
        self.constructModel()

    def registerCustomLayers(self) -> None:
        """Fill `self.registry`: which class each layer type string stands for."""
        for type_name, creator in (
            ("fully_connected", FullyConnected),
            ("embedding_layer", EmbeddingLayer),
            ("tie_word_embeddings", TieWordEmbedding),
            ("rms_norm", RMSNorm),
            ("swiglu", SwiGLU),
            ("mha_core", MHACore),
        ):
            self.registry.register(type_name, creator)

    def constructModel(self) -> None:
        """Make the embedding, the blocks and the final norm."""
        cfg = self.config
        self.embed_tokens = self.createLayer(
            "tie_word_embeddings" if cfg.tie_word_embeddings else "embedding_layer",
            num_embeddings=cfg.vocab_size,
            dim=cfg.hidden_size,
            scale=self.embedding_scale,
            dtype=self.runtime_config.embedding_dtype or self.dtype,
            activation_dtype=self.dtype,
        )
        self.layers = nn.ModuleList(
            self.createTransformerDecoderBlock(layer_id) for layer_id in range(cfg.num_hidden_layers)
        )
        self.norm = self.make_norm()

    def createTransformerDecoderBlock(self, layer_id: int) -> nn.Module:
        """One block; override for another order of residuals."""
        return DecoderBlock(
            self.createAttention(layer_id), self.createMlp(layer_id), self.make_norm(), self.make_norm()
        )

    def createAttention(self, layer_id: int) -> Attention:
        """The attention of one block."""
        cfg = self.config
        query_width = cfg.num_attention_heads * cfg.head_dim
        key_width = cfg.num_key_value_heads * cfg.head_dim
        return Attention(
            q_proj=self.make_linear(cfg.hidden_size, query_width, self.qkv_bias),
            k_proj=self.make_linear(cfg.hidden_size, key_width, self.qkv_bias),
            v_proj=self.make_linear(cfg.hidden_size, key_width, self.qkv_bias),
            o_proj=self.make_linear(query_width, cfg.hidden_size, self.o_bias),
            core=self.createLayer(
                "mha_core",
                num_heads=cfg.num_attention_heads,
                num_kv_heads=cfg.num_key_value_heads,
                head_dim=cfg.head_dim,
                rope=cfg.rope(layer_id),
                scale=self.attention_scale,
                window=cfg.window(layer_id),
                score_softcap=cfg.attn_logit_softcapping,
            ),
        )

    def createMlp(self, layer_id: int) -> nn.Module:
        """The feed-forward part of one block."""
        return self.make_mlp(self.config.intermediate_size)

    def createCache(self, layer_id: int, batch: int, capacity: int | None, rollback: int = 0) -> KVCache:
        """The cache of one layer: sliding where its attention slides, else fixed at `capacity` or growing; in 8 bits
        where nntr_config.json's kv_cache_dtype says so.

        rollback: how many columns of an update can be taken back right after it; without limit where nothing slides.
        """
        cfg, window = self.config, self.config.window(layer_id)

        def make(head_dim: int, dtype: torch.dtype) -> KVCache:
            shape = (batch, cfg.num_key_value_heads, head_dim, dtype, self.device)
            if window is not None:
                return SlidingKVCache(*shape, window=window, rollback=rollback)
            return KVCache(*shape) if capacity is None else StaticKVCache(*shape, capacity=capacity)

        held = make(cfg.head_dim, self.cache_dtype)
        return Int8KVCache(held, make(1, SCALE)) if self.cache_dtype == torch.int8 else held

    def createLayer(self, type_name: str, **properties: Any) -> Any:
        """A layer of the class registered for `type_name`."""
        return self.registry.create(type_name, **properties)

    def make_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """A "fully_connected" layer of the model's weight dtype."""
        dtype = self.runtime_config.fc_layer_dtype or self.dtype
        return self.createLayer(
            "fully_connected", in_features=in_features, out_features=out_features, bias=bias, dtype=dtype
        )

    def make_norm(self, type_name: str = "rms_norm", dim: int | None = None) -> nn.Module:
        """A normalisation over the hidden size, or over `dim`."""
        cfg = self.config
        return self.createLayer(type_name, dim=dim or cfg.hidden_size, epsilon=cfg.rms_norm_eps, dtype=self.dtype)

    def make_mlp(self, hidden: int) -> Mlp:
        """A gated MLP of inner size `hidden`."""
        dim, bias = self.config.hidden_size, self.config.mlp_bias
        return Mlp(
            gate_proj=self.make_linear(dim, hidden, bias),
            up_proj=self.make_linear(dim, hidden, bias),
            down_proj=self.make_linear(hidden, dim, bias),
            activation=self.createLayer("swiglu", activation=self.config.hidden_act),
        )

    def make_experts(self, count: int, make: Callable[[], nn.Module]) -> ExpertStore:
        """The experts of a mixture, each as `make` makes it: all in memory, or read when a token chose them where the
        architecture's name or a memory budget asks for that."""
        return FetchedExperts(make(), count) if self.fetches_experts else ResidentExperts(make() for _ in range(count))

    def make_cache(self, batch: int = 1, capacity: int | None = None, rollback: int = 0) -> list[KVCache]:
        """One empty cache per layer; `capacity` positions are allocated at once where it is given.

        rollback: how many positions `truncate` must be able to take back right after they came, whatever the window.
        """
        given = {"rollback": rollback} if rollback else {}  # a family's own createCache need not know of it
        return [self.createCache(layer_id, batch, capacity, **given) for layer_id in range(len(self.layers))]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight: Any = self.norm.weight
        return weight.device

    @property
    def chunk(self) -> int:
        """The most tokens of a row in one step."""
        return self.runtime_config.init_seq_len or DEFAULT_CHUNK if self.in_steps else self.max_length

    @property
    def cache_dtype(self) -> torch.dtype:
        """That of keys and values: kv_cache_dtype of nntr_config.json, else the activations', but fp16 for packed
        weights where kernels read it (NNTrainer)."""
        if self.runtime_config.kv_cache_dtype is not None:
            return self.runtime_config.kv_cache_dtype
        packed = self.runtime_config.fc_format is not None and self.dtype == torch.float32
        on_cpu = self.device.type in ("cpu", "meta")
        return torch.float16 if packed and on_cpu and native.library() is not None else self.dtype

    @property
    def cache_position_bytes(self) -> int:
        """Bytes that the keys and values of one position and layer take in the cache of one row."""
        return 2 * self.config.num_key_value_heads * position_bytes(self.config.head_dim, self.cache_dtype)

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Sequence[KVCache] | None = None,
        *,
        padding: Int[Tensor, "batch"] | None = None,
        rope_length: int | None = None,
        documents: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Normalised hidden states of all positions; with a cache, `ids` continue what it holds.

        padding: how many columns on the left of each row are no tokens, the same at every step of a sequence.
        rope_length, documents (without a cache only): see `layers.step.Step`.
        """
        x, step = self._begin(ids, cache, padding, rope_length, documents)
        return self._hidden(x, step, cache)

    def _begin(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Sequence[KVCache] | None,
        padding: Int[Tensor, "batch"] | None,
        rope_length: int | None,
        documents: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time dim"], Step]:
        """What the blocks take; ValueError where there is nothing to compute or no place for it."""
        if ids.shape[1] == 0:
            raise ValueError("there are no tokens to compute, expected at least one a row")
        if cache is not None and not self.is_causal:
            raise ValueError("a model that attends in both directions has no use for a key-value cache")
        limits = [layer.limit for layer in cache or () if layer.limit is not None]
        if cache and limits and cache[0].offset + ids.shape[1] > min(limits):
            # Before any layer advances: where others slide, they could not go back.
            needed = cache[0].offset + ids.shape[1]
            raise ValueError(f"the cache holds {min(limits)} positions, but {needed} are needed")
        x = self.embed_tokens(ids)
        return x, Step(
            cache[0].offset if cache else 0,
            ids.shape[1],
            x.dtype,
            x.device,
            padding=padding,
            causal=self.is_causal,
            rope_length=rope_length,
            documents=documents,
        )

    def _hidden(
        self, x: Float[Tensor, "batch time dim"], step: Step, cache: Sequence[KVCache] | None, head: Half | None = None
    ) -> Float[Tensor, "batch time dim"]:
        return self.norm(run_blocks(self.layers, x, step, cache, self.storage, head))
