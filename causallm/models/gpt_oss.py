"""gpt-oss: attention sinks, alternating sliding layers, biased projections and a mixture of fused experts."""

import torch
from torch import nn

from causallm.blocks import Attention
from causallm.causal_lm import CausalLM
from causallm.factory import Factory
from causallm.transformer import Transformer
from layers.expert_store import FetchedExperts
from layers.gpt_oss_moe import GptOssExperts, GptOssMoe


class GptOssTransformer(Transformer):
    """Every layer is a mixture of experts; even layers slide."""

    config_defaults = {
        "attention_bias": True,
        "head_dim": 64,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
    }

    def registerCustomLayers(self) -> None:
        super().registerCustomLayers()
        self.registry.register("gpt_oss_moe", GptOssMoe)

    def createAttention(self, layer_id: int) -> Attention:
        attention = super().createAttention(layer_id)
        attention.sinks = nn.Parameter(torch.zeros(self.config.num_attention_heads, dtype=self.dtype))
        return attention

    def createMlp(self, layer_id: int) -> nn.Module:
        cfg = self.config
        experts: GptOssExperts | FetchedExperts = GptOssExperts(
            1 if self.fetches_experts else cfg.num_experts,
            cfg.hidden_size,
            cfg.intermediate_size,
            cfg.swiglu_alpha,
            cfg.swiglu_limit,
            self.runtime_config.fc_layer_dtype or self.dtype,
        )
        if self.fetches_experts:
            experts = FetchedExperts(experts, cfg.num_experts)
        router = self.make_linear(cfg.hidden_size, cfg.num_experts, bias=True)
        return self.createLayer("gpt_oss_moe", router=router, experts=experts, num_chosen=cfg.num_experts_per_tok)


class GptOssCausalLM(CausalLM, GptOssTransformer):
    """gpt-oss with a language-model head."""


for architecture in ("GptOssForCausalLM", "GptOssCachedSlimCausalLM"):
    Factory.registerModel(architecture, GptOssCausalLM)
