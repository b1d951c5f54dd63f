"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts, but for the layers config.json excepts."""

from torch import nn

from causallm.causal_lm import CausalLM
from causallm.factory import Factory
from causallm.models.qwen3 import Qwen3Transformer
from layers.qwen_moe import QwenMoe


class Qwen3MoeTransformer(Qwen3Transformer):
    """Layer i is sparse when (i + 1) is a multiple of `decoder_sparse_step` and i not in `mlp_only_layers`."""

    config_defaults = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 0,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }

    def registerCustomLayers(self) -> None:
        super().registerCustomLayers()
        self.registry.register("qwen_moe", QwenMoe)

    def createMlp(self, layer_id: int) -> nn.Module:
        cfg = self.config
        if layer_id in cfg.mlp_only_layers or (layer_id + 1) % cfg.decoder_sparse_step or not cfg.num_experts:
            return super().createMlp(layer_id)
        return self.createLayer(
            "qwen_moe",
            gate=self.make_linear(cfg.hidden_size, cfg.num_experts),
            experts=self.make_experts(cfg.num_experts, lambda: self.make_mlp(cfg.moe_intermediate_size)),
            num_chosen=cfg.num_experts_per_tok,
            norm_topk_prob=cfg.norm_topk_prob,
        )


class Qwen3MoeCausalLM(CausalLM, Qwen3MoeTransformer):
    """Qwen3-MoE with a language-model head."""


# NNTrainer's names for the same model with its experts streamed or cached, which `make_experts` looks at.
for architecture in ("Qwen3MoeForCausalLM", "Qwen3SlimMoeForCausalLM", "Qwen3CachedSlimMoeForCausalLM"):
    Factory.registerModel(architecture, Qwen3MoeCausalLM)
