"""nntr_config.json key by key: what each changes, what is refused or warned about, what a model makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints

from causallm.config import RuntimeConfig, read_json
from causallm.loading import build_model

NNTR: dict[str, tuple[Any, dict[str, Any]]] = {
    "model_type": ("embedding", {"model_type": "embedding"}),
    "model_tensor_type": (
        "BF16-FP32",
        {
            "dtype": torch.float32,
            "fc_layer_dtype": torch.bfloat16,
            "embedding_dtype": torch.bfloat16,
            "lmhead_dtype": torch.bfloat16,
        },
    ),
    "model_file_name": ("weights.bin", {"model_file_name": "weights.bin"}),
    "embedding_dtype": ("FP16", {"embedding_dtype": torch.float16, "lmhead_dtype": torch.float16}),
    "lmhead_dtype": ("FP16", {"lmhead_dtype": torch.float16}),
    "fc_layer_dtype": ("BF16", {"fc_layer_dtype": torch.bfloat16}),
    "lora_rank": (0, {}),
    "lora_alpha": (0, {}),
    "lora_target": ([], {}),
    "bad_word_ids": ([3, 4], {"bad_word_ids": (3, 4)}),
    "fsu": (True, {"fsu": True}),
    "fsu_lookahead": (2, {"fsu_lookahead": 2}),
    "mmap": (False, {"mmap": False}),
    "memory_budget": ("1.5GB", {"memory_budget": 1_500_000_000}),
    "num_to_generate": (7, {"num_to_generate": 7}),
    "init_seq_len": (7, {"init_seq_len": 7}),
    "max_seq_len": (7, {"max_seq_len": 7}),
    "batch_size": (2, {"batch_size": 2}),
    "tokenizer_file": ("tokenizer.json", {"tokenizer_file": "tokenizer.json"}),
    "sample_input": ("Hello", {"sample_input": "Hello"}),
    "is_causal": (False, {"is_causal": False}),
    "system_prompt": ({"head_prompt": "a", "tail_prompt": "b"}, {"head_prompt": "a", "tail_prompt": "b"}),
    "kv_cache_dtype": ("int8", {"kv_cache_dtype": torch.int8}),
    "hf_repo": ("a/b", {"hf_repo": "a/b"}),
}


@pytest.mark.parametrize("key", NNTR)
def test_each_key_of_nntr_config_changes_what_it_should_and_nothing_else(key: str) -> None:
    value, expected = NNTR[key]
    assert vars(RuntimeConfig.from_json({key: value})) == {**vars(RuntimeConfig()), **expected}


@pytest.mark.parametrize("key", NNTR)
def test_null_counts_as_absent(key: str) -> None:
    assert RuntimeConfig.from_json({key: None}) == RuntimeConfig()


def test_the_more_particular_dtype_counts() -> None:
    content = {"model_tensor_type": "BF16-FP32", "embedding_dtype": "FP16", "fc_layer_dtype": "FP32"}
    runtime = RuntimeConfig.from_json(content)
    assert runtime.fc_layer_dtype == torch.float32
    assert runtime.embedding_dtype == runtime.lmhead_dtype == torch.float16


NNTR_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"max_seqlen": 5}, "unknown key 'max_seqlen'; known are: .*max_seq_len"),
    ({"model_type": "VisionLM"}, "model_type is 'VisionLM', expected CausalLM or embedding"),
    ({"model_tensor_type": "FP32"}, "model_tensor_type is 'FP32', expected <weights>-<activations>"),
    ({"model_tensor_type": "FP32-Q4_0"}, "model_tensor_type is 'FP32-Q4_0', expected <weights>-<activations>"),
    ({"fc_layer_dtype": "Q2_K"}, "fc_layer_dtype is 'Q2_K', expected one of FP32, FP16, BF16, Q8_0, Q4_0, Q4_1, Q5_0"),
    ({"lmhead_dtype": "q6_k"}, "lmhead_dtype is 'q6_k', expected one of FP32"),
    ({"fc_layer_dtype": "INT5"}, "fc_layer_dtype is 'INT5', expected one of FP32"),
    ({"fc_layer_dtype": 32}, "fc_layer_dtype is 32, expected a string"),
    ({"lora_rank": 8}, "lora_rank is not 0, but adapters are not supported yet"),
    ({"bad_word_ids": "x"}, "bad_word_ids is 'x', expected a whole number or a list"),
    ({"num_to_generate": 0}, "num_to_generate is 0, expected a whole number of at least 1"),
    ({"init_seq_len": "many"}, "init_seq_len is 'many', expected a whole number"),
    ({"max_seq_len": 1.5}, "max_seq_len is 1.5, expected a whole number"),
    ({"batch_size": -1}, "batch_size is -1, expected a whole number of at least 1"),
    ({"is_causal": "no"}, "is_causal is 'no', expected true or false"),
    ({"fsu": 1}, "fsu is 1, expected true or false"),
    ({"fsu_lookahead": 0}, "fsu_lookahead is 0, expected a whole number of at least 1"),
    ({"memory_budget": "much"}, "memory_budget: 'much' is no amount of memory, expected a number of bytes such as 2GB"),
    ({"system_prompt": "Be kind"}, "system_prompt is 'Be kind', expected an object"),
    ({"system_prompt": {"head": "x"}}, "system_prompt: unknown key 'head'"),
    ({"system_prompt": {"kvcache": "x"}}, "system_prompt: kvcache is 'x', expected an object with pre_computed_"),
    ({"system_prompt": {"kvcache": {"path": "x"}}}, "system_prompt: kvcache: unknown key 'path'; known are: pre_"),
    (
        {"system_prompt": {"kvcache": {"sys_prompt_token_size": 3}}},
        "system_prompt: kvcache: pre_computed_cache_path is m",
    ),
    (
        {"system_prompt": {"kvcache": {"pre_computed_cache_path": "x", "sys_prompt_token_size": 0}}},
        "system_prompt: kvcache: sys_prompt_token_size is 0, expected a whole number of at least 1",
    ),
    ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4', expected one of FP32, .*int8"),
    ({"system_prompt": {"head_prompt": 3}}, "system_prompt: head_prompt is 3, expected a string"),
    ({"sample_input": 3}, "sample_input is 3, expected a string"),
]


@pytest.mark.parametrize(("content", "message"), NNTR_MISTAKES, ids=[message for _, message in NNTR_MISTAKES])
def test_mistakes_in_nntr_config_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^nntr_config.json: {message}"):
        RuntimeConfig.from_json(content)


def test_the_model_acts_on_nntr_config(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("qwen3")
    dtypes = {"model_tensor_type": "FP32-FP32", "embedding_dtype": "FP16", "lmhead_dtype": "BF16"}
    model: Any = build_model(folder, **dtypes, fc_layer_dtype="FP16", max_seq_len=24, is_causal=False)
    assert model.embed_tokens.weight.dtype == torch.float16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert model.norm.weight.dtype == torch.float32
    assert model.max_length == 24
    assert not model.is_causal
    everything = build_model(folder, "bfloat16", embedding_dtype="FP16")
    assert {parameter.dtype for parameter in everything.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="unknown dtype 'int3', expected one of FP32"):
        build_model(folder, "int3")


def test_a_model_takes_the_dtype_its_config_names(checkpoints: Checkpoints, tmp_path: Path) -> None:
    content = read_json(checkpoints.folder("qwen3") / "config.json")
    for name, dtype in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        (tmp_path / "config.json").write_text(json.dumps({**content, "dtype": name}))
        assert {parameter.dtype for parameter in build_model(tmp_path).parameters()} == {dtype}


def test_the_cache_of_the_head_prompt() -> None:
    kvcache = {"pre_computed_cache_path": "head.cache", "sys_prompt_token_size": 7}
    config = RuntimeConfig.from_json({"system_prompt": {"head_prompt": "a", "kvcache": kvcache}})
    assert (config.head_prompt, config.head_cache_path, config.head_cache_size) == ("a", "head.cache", 7)


def test_packed_weights_are_formats_and_floats_dtypes() -> None:
    config = RuntimeConfig.from_json(
        {"model_tensor_type": "Q4_0-FP32", "embedding_dtype": "Q6_K", "lmhead_dtype": "FP16"}
    )
    assert (config.dtype, config.fc_format, config.fc_layer_dtype) == (torch.float32, "Q4_0", None)
    assert (config.embedding_format, config.embedding_dtype) == ("Q6_K", None)
    assert (config.lmhead_format, config.lmhead_dtype) == (None, torch.float16)
