"""From a model folder to a model that is ready to run."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

import causallm.models  # noqa: F401  registers the families
from causallm.config import GenerationConfig, ModelConfig, RuntimeConfig, read_json
from causallm.config.fields import DTYPES
from causallm.config.pooling import read_pooling
from causallm.factory import Factory
from causallm.generation import Progress
from causallm.packing import choose_formats, pack_layers
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.loader import load_weights
from causallm.weights.open import open_weights


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    **nntr_overrides: Any,
) -> Any:
    """Load a model folder: JSON files, Factory, construction on meta, weights, tokenizer; ready to run.

    dtype: "float32", "bfloat16", "float16" (or a torch dtype) for everything; None keeps what the files say.
    nntr_overrides: keys of nntr_config.json that replace the file's. progress is called after each tensor.
    FileNotFoundError or ValueError name what is missing or wrong.
    """
    folder = Path(folder)
    model = build_model(folder, dtype, **nntr_overrides)
    model.tokenizer = Tokenizer.from_folder(folder, model.runtime_config.tokenizer_file)
    weights = open_weights(folder, model)
    pack_layers(model, choose_formats(model, weights.formats()))
    total, done = len(list(model.parameters())), count(1)
    load_weights(model, weights, device, (lambda _: progress(next(done), total)) if progress else None)
    model.generation_config = resolve_generation(model, model.tokenizer)
    return model.eval()


def build_model(folder: Path, dtype: str | torch.dtype | None = None, **nntr_overrides: Any) -> Transformer:
    """The model of a folder on the meta device, without weights or tokenizer."""
    content = read_config_json(folder)
    runtime = read_runtime(folder, dtype, **nntr_overrides)
    architecture = resolve_architecture(content, runtime)
    model_class = Factory.find(architecture)
    config = ModelConfig.from_json(content, model_class.config_defaults, str(folder / "config.json"))
    if runtime.model_type == "embedding":
        config = replace(config, pooling=read_pooling(folder))
    generation = folder / "generation_config.json"
    generation_config = (
        GenerationConfig.from_json(read_json(generation), str(generation))
        if generation.is_file()
        else GenerationConfig()
    )
    model = Factory.create(architecture, config, generation_config, runtime)
    with torch.device("meta"):
        model.initialize()
    return model


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; the error for a missing one says how to fetch the model where it can be."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}")
    path = folder / "config.json"
    if path.is_file():
        return read_json(path)
    hint = ""
    if (folder / "nntr_config.json").is_file() and read_json(folder / "nntr_config.json").get("hf_repo"):
        hint = f"; fetch the model with: python main.py download {folder}"
    raise FileNotFoundError(f"{folder} has no config.json{hint}")


def read_runtime(folder: Path, dtype: str | torch.dtype | None = None, **overrides: Any) -> RuntimeConfig:
    """nntr_config.json of a folder, if any, with `overrides` of its keys and one dtype for everything."""
    path = folder / "nntr_config.json"
    content = read_json(path) if path.is_file() else {}
    changes = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
    runtime = RuntimeConfig.from_json({**content, **overrides}, f"{path} with {changes}" if changes else str(path))
    if dtype is None:
        return runtime
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype '{dtype}', expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    return replace(runtime, dtype=dtype, fc_layer_dtype=None, embedding_dtype=None, lmhead_dtype=None)


EMBEDDINGS = {
    "Qwen2ForCausalLM": "Qwen2Embedding",
    "Qwen2Model": "Qwen2Embedding",
    "Qwen3ForCausalLM": "Qwen3Embedding",
    "Qwen3Model": "Qwen3Embedding",
    "Gemma3ForCausalLM": "EmbeddingGemma",
    "Gemma3TextModel": "EmbeddingGemma",
}
"""The embedding variant of an architecture, chosen by "model_type": "embedding" in nntr_config.json."""


def resolve_architecture(content: dict[str, Any], runtime: RuntimeConfig) -> str:
    """The name to ask the Factory for; ValueError where config.json names none."""
    names = content.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"config.json: architectures is {names!r}, expected a list with one name")
    return EMBEDDINGS.get(names[0], names[0]) if runtime.model_type == "embedding" else names[0]


def resolve_generation(model: Transformer, tokenizer: Tokenizer) -> GenerationConfig:
    """generation_config.json completed from the other files: special tokens, lengths, bad words."""
    generation, config, runtime = model.generation_config, model.config, model.runtime_config
    ends = (*generation.eos_token_id, *config.eos_token_id)
    if tokenizer.eos_id is not None:
        ends += (tokenizer.eos_id,)
    beginnings = (generation.bos_token_id, config.bos_token_id, tokenizer.bos_id)
    return replace(
        generation,
        bos_token_id=next((token for token in beginnings if token is not None), None),
        eos_token_id=tuple(dict.fromkeys(ends)),
        bad_words_ids=generation.bad_words_ids + tuple((word,) for word in runtime.bad_word_ids),
        max_new_tokens=runtime.num_to_generate or generation.max_new_tokens,
    )
