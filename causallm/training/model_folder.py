"""The result of a training run: an ordinary Hugging Face model folder, which transformers loads too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from causallm.config import ModelConfig
from causallm.factory import Factory
from causallm.tokenizer import Tokenizer
from causallm.training.encode import answer_end
from causallm.training.settings import Settings
from causallm.weights.atomic_file import atomic_file
from causallm.weights.safetensors_reader import SINGLE
from causallm.weights.safetensors_writer import write_safetensors

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
    "GptOssForCausalLM": "gpt_oss",
}
"""transformers finds the class of a model by `model_type`; ours by `architectures`."""


def write_model_folder(
    folder: Path,
    config: Mapping[str, Any],
    cfg: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    settings: Settings,
    tokenizer: Tokenizer,
) -> None:
    """Write configurations and safetensors beside the tokenizer that is there; config.json, written last, ends it.

    weights are by our names. config is config.json's content as the settings have it, cfg what was read from it.
    """
    names = {name if name.startswith("lm_head.") else f"model.{name}": name for name in weights}
    metas = {name: weights[ours].to("meta") for name, ours in names.items()}
    write_safetensors(folder / SINGLE, metas, lambda name: weights[names[name]], {"format": "pt"})
    _write_json(folder / "generation_config.json", generation_json(settings, tokenizer))
    runtime = {"model_type": "CausalLM", "sample_input": sample_input(settings, tokenizer)}
    _write_json(folder / "nntr_config.json", {key: value for key, value in runtime.items() if value})
    _write_json(folder / "config.json", config_json(config, cfg))


def sample_input(settings: Settings, tokenizer: Tokenizer) -> str | None:
    """The first of the run's samples as the run takes it: in the chat template, which nothing puts around it later."""
    first = next(iter(settings.log.sample_prompts), None)
    if first is None or tokenizer.chat_template is None or tokenizer.carries_special_tokens(first):
        return first
    return tokenizer.render([{"role": "user", "content": first}])


def config_json(config: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """config.json: what the settings say, and what transformers would assume otherwise than we do."""
    assumed: dict[str, Any] = {
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.rms_norm_eps,
        "tie_word_embeddings": cfg.tie_word_embeddings,
    }
    model_class = Factory.find(cfg.architecture)
    for architecture, model_type in MODEL_TYPES.items():
        if Factory.find(architecture) is model_class:
            assumed["model_type"] = model_type
    return {**assumed, **config}


def generation_json(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: the settings' keys, and special tokens; text ends with a document or an answer."""
    ends = [token for token in (tokenizer.eos_id, answer_end(tokenizer)) if token is not None]
    tokens = {
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id,
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {**{key: value for key, value in tokens.items() if value is not None}, **settings.generation}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
