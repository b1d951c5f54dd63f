"""From a model folder or a GGUF file to a model that is ready to run."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

import causallm.models  # noqa: F401  registers the families
from causallm.config import GenerationConfig, ModelConfig, RuntimeConfig
from causallm.config.fields import DTYPES
from causallm.factory import Factory
from causallm.folder_source import FolderSource
from causallm.garbage import uncollected
from causallm.gguf.source import GgufSource, is_gguf
from causallm.model_source import ModelSource
from causallm.packing import choose_formats, pack_layers
from causallm.steps import Progress
from causallm.storage.attach import attach_storage, plan_storage
from causallm.storage.resident import read_weights, reads_weights
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.loader import load_weights
from causallm.weights.reader import WeightReader


@uncollected()
def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    **nntr_overrides: Any,
) -> Any:
    """Load a model folder or a GGUF file: configuration, Factory, construction on meta, weights, tokenizer.

    dtype: "float32", "bfloat16", "float16" (or a torch dtype) for everything; None keeps what the files say.
    nntr_overrides: keys of nntr_config.json that replace the file's. progress is called after each tensor, or each unit
    of those that a memory budget keeps in memory. FileNotFoundError or ValueError name what is missing or wrong.
    """
    model, weights = build_packed(find_source(Path(folder)), dtype, **nntr_overrides)
    planned = plan_storage(model, weights, torch.device(device))
    if planned and planned[0].whole:
        # All fits, and what is in memory as a whole needs no place to be fetched to.
        whole = {"memory_budget": None, "fsu": False}
        model = load_model(folder, device, dtype, progress, **{**nntr_overrides, **whole})
        model.storage.positions, model.storage.planned_bytes = planned[0].positions, planned[0].memory
        return model
    if planned:
        attach_storage(model, weights, *planned, progress)
    elif reads_weights(model, weights, torch.device(device)):
        read_weights(model, weights, progress)
    else:
        total, done = len(list(model.parameters())), count(1)
        load_weights(model, weights, device, (lambda _: progress(next(done), total)) if progress else None)
    model.generation_config = resolve_generation(model, model.tokenizer)
    return model.eval()


def build_packed(
    source: ModelSource, dtype: str | torch.dtype | None = None, **nntr_overrides: Any
) -> tuple[Transformer, WeightReader]:
    """The model on the meta device with its tokenizer, packed layers where its weights are or are to be packed, and
    what reads these."""
    model = build_model(source, dtype, **nntr_overrides)
    model.tokenizer = source.tokenizer(model.runtime_config.tokenizer_file)
    weights = source.weights(model)
    pack_layers(model, choose_formats(model, weights.formats()))
    return model, weights


def find_source(path: Path) -> ModelSource:
    """What reads the model at `path`, a folder or a GGUF file."""
    return GgufSource(path) if is_gguf(path) else FolderSource(path)


def build_model(
    source: Path | ModelSource, dtype: str | torch.dtype | None = None, **nntr_overrides: Any
) -> Transformer:
    """The model of a folder or GGUF file on the meta device, without weights or tokenizer."""
    source = find_source(source) if isinstance(source, Path) else source
    content = source.config_json()
    runtime = read_runtime(source, dtype, **nntr_overrides)
    architecture = resolve_architecture(content, runtime)
    model_class = Factory.find(architecture)
    config = ModelConfig.from_json(content, model_class.config_defaults, source.label("config.json"))
    if runtime.model_type == "embedding":
        config = replace(config, pooling=source.pooling())
    generation = GenerationConfig.from_json(source.generation_json(), source.label("generation_config.json"))
    model = Factory.create(architecture, config, generation, runtime)
    with torch.device("meta"):
        model.initialize()
    return model


def read_runtime(source: ModelSource, dtype: str | torch.dtype | None = None, **overrides: Any) -> RuntimeConfig:
    """How the source says to run its model, with `overrides` of nntr_config.json's keys and one dtype for all."""
    label = source.label("nntr_config.json")
    changes = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
    content = {**source.runtime_json(), **overrides}
    runtime = RuntimeConfig.from_json(content, f"{label} with {changes}" if changes else label)
    if runtime.head_cache_path is not None:
        beside = source.path if source.path.is_dir() else source.path.parent
        runtime = replace(runtime, head_cache_path=str(beside / runtime.head_cache_path))
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


def resolve_generation(model: Transformer, tokenizer: Tokenizer | None) -> GenerationConfig:
    """generation_config.json completed from the other files: special tokens, lengths, bad words."""
    generation, config, runtime = model.generation_config, model.config, model.runtime_config
    ends = (*generation.eos_token_id, *config.eos_token_id)
    beginnings = [generation.bos_token_id, config.bos_token_id]
    if tokenizer is not None:
        ends += () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        beginnings.append(tokenizer.bos_id)
    return replace(
        generation,
        bos_token_id=next((token for token in beginnings if token is not None), None),
        eos_token_id=tuple(dict.fromkeys(ends)),
        bad_words_ids=generation.bad_words_ids + tuple((word,) for word in runtime.bad_word_ids),
        max_new_tokens=runtime.num_to_generate or generation.max_new_tokens,
    )
