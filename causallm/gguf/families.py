"""What GGUF calls the families: ggml's architecture names, their tensors, and how their values differ from ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**ATTENTION, **MLP, "ffn_norm": "post_attention_layernorm"}
SANDWICH = {
    **ATTENTION,
    **MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT_OSS = {
    **ATTENTION,
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


@dataclass(frozen=True)
class Family:
    """One ggml architecture.

    block: GGUF's name of each part of a block, and ours. rotates_pairs: rows of query and key lie in the order of
    interleaved rotary pairs. counts_norms_from_one: what is stored is one more than Hugging Face's norm weights.
    fused_experts: all experts of a layer are two tensors of ours, gate and up in alternating columns.
    config: what Hugging Face's config.json must say beyond what GGUF's keys do.
    """

    arch: str
    architecture: str
    block: Mapping[str, str]
    rotates_pairs: bool = False
    counts_norms_from_one: bool = False
    fused_experts: bool = False
    config: Mapping[str, object] = field(default_factory=dict)


FAMILIES = {
    family.arch: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA, rotates_pairs=True),
        Family("qwen2", "Qwen2ForCausalLM", LLAMA),
        Family("qwen3", "Qwen3ForCausalLM", LLAMA),
        Family("qwen3moe", "Qwen3MoeForCausalLM", {**LLAMA, "ffn_gate_inp": "mlp.gate"}),
        Family(
            "gemma3",
            "Gemma3ForCausalLM",
            SANDWICH,
            counts_norms_from_one=True,
            config={"hidden_activation": "gelu_pytorch_tanh"},
        ),
        Family("gpt-oss", "GptOssForCausalLM", GPT_OSS, fused_experts=True),
    )
}
MODEL_TYPES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
}  # fmt: skip
"""Hugging Face's model_type of each ggml architecture."""
WRITTEN_AS = {
    "MistralForCausalLM": "llama",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3",
    "Qwen3SlimMoeForCausalLM": "qwen3moe",
    "Qwen3CachedSlimMoeForCausalLM": "qwen3moe",
    "GptOssCachedSlimCausalLM": "gpt-oss",
    **{family.architecture: arch for arch, family in FAMILIES.items()},
}
"""ggml's architecture for each of ours; Mistral is Llama there."""


def family_of(arch: str, source: str) -> Family:
    """The family of a file's general.architecture; ValueError with the known ones where there is none."""
    if arch not in FAMILIES:
        raise ValueError(f"{source}: unknown architecture '{arch}'; known are: {', '.join(FAMILIES)}")
    return FAMILIES[arch]
