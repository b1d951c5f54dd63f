"""NNTrainer's .bin written down a second time: plain numpy over a Hugging Face checkpoint, family by family."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Value = tuple[str, Any]
"""What a run of values is ("matrix", "vector" or "router") and the values as they lie in the file."""

FORMATS = {
    "FP32": {"matrix": "<f4", "vector": "<f4", "router": "<f4"},
    "FP16": {"matrix": "<f2", "vector": "<f4", "router": "<f4"},
    "FP16-FP16": {"matrix": "<f2", "vector": "<f2", "router": "<f4"},
    "all FP16": {"matrix": "<f2", "vector": "<f2", "router": "<f2"},
}


def expected_bin(folder: Path, kind: str = "FP32", head: bool = True) -> bytes:
    """The file for the fp32 checkpoint in `folder`; without `head`, no lm_head."""
    values = expected_values(folder, head)
    return b"".join(np.ascontiguousarray(value).astype(FORMATS[kind][what]).tobytes() for what, value in values)


def expected_values(folder: Path, head: bool = True) -> list[Value]:
    """All runs of values in order."""
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    block = {"gemma3_text": gemma_block, "gpt_oss": gpt_oss_block}.get(config["model_type"], llama_block)
    one = 1.0 if config["model_type"] == "gemma3_text" else 0.0
    values = [("matrix", state["model.embed_tokens.weight"])]
    for layer in range(config["num_hidden_layers"]):
        values += block(state, f"model.layers.{layer}.")
    values.append(("vector", state["model.norm.weight"] + np.float32(one)))
    if head:
        values.append(("matrix", state["lm_head.weight"].T))
    return values


def expected_packed_bin(folder: Path, embedding: str, head: bool) -> bytes:
    """The Q4_0 file for x86; the embedding in plain rows of "Q4_0" or in "FP32". A head is there where it is untied."""
    (_, table), *values = expected_values(folder, head)
    start = q4_0(table).tobytes() if embedding == "Q4_0" else table.astype("<f4").tobytes()
    return start + b"".join(
        q4_0x8(q4_0(value.T)) if what == "matrix" else np.ascontiguousarray(value).astype("<f4").tobytes()
        for what, value in values
    )


def q4_0(rows: Any) -> Any:
    """Plain ggml rows (out, bytes) as the gguf package packs them."""
    import gguf

    return gguf.quants.quantize(np.ascontiguousarray(rows, dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)


def q4_0x8(plain: Any) -> bytes:
    """Eight rows interleaved, one byte after the other."""
    out = bytearray()
    for group in range(0, len(plain), 8):
        for block in range(0, plain.shape[1], 18):
            for row in range(group, group + 8):
                out += bytes(plain[row, block : block + 2])
            for start in (block + 2, block + 10):
                for row in range(group, group + 8):
                    for place in range(start, start + 8):
                        out.append(int(plain[row, place]) ^ 0x88)
    return bytes(out)


def linear(state: dict[str, Any], name: str) -> Iterator[Value]:
    yield "matrix", state[f"{name}.weight"].T
    if f"{name}.bias" in state:
        yield "vector", state[f"{name}.bias"]


def llama_block(state: dict[str, Any], layer: str) -> Iterator[Value]:
    yield "vector", state[f"{layer}input_layernorm.weight"]
    for letter in "qkvo":
        yield from linear(state, f"{layer}self_attn.{letter}_proj")
        if f"{layer}self_attn.{letter}_norm.weight" in state:
            yield "vector", state[f"{layer}self_attn.{letter}_norm.weight"]
    yield "vector", state[f"{layer}post_attention_layernorm.weight"]
    if f"{layer}mlp.gate.weight" in state:
        yield "router", state[f"{layer}mlp.gate.weight"].T
        for expert in range(len(state[f"{layer}mlp.gate.weight"])):
            for name in ("up", "gate", "down"):
                yield "matrix", state[f"{layer}mlp.experts.{expert}.{name}_proj.weight"].T
    else:
        for name in ("up", "gate", "down"):
            yield from linear(state, f"{layer}mlp.{name}_proj")


def gemma_block(state: dict[str, Any], layer: str) -> Iterator[Value]:
    one = np.float32(1.0)
    yield "vector", state[f"{layer}input_layernorm.weight"] + one
    for letter in "qkv":
        yield from linear(state, f"{layer}self_attn.{letter}_proj")
    yield "vector", state[f"{layer}self_attn.q_norm.weight"] + one
    yield "vector", state[f"{layer}self_attn.k_norm.weight"] + one
    yield from linear(state, f"{layer}self_attn.o_proj")
    yield "vector", state[f"{layer}post_attention_layernorm.weight"] + one
    yield "vector", state[f"{layer}pre_feedforward_layernorm.weight"] + one
    for name in ("gate", "up", "down"):
        yield "matrix", state[f"{layer}mlp.{name}_proj.weight"].T
    yield "vector", state[f"{layer}post_feedforward_layernorm.weight"] + one


def gpt_oss_block(state: dict[str, Any], layer: str) -> Iterator[Value]:
    yield "vector", state[f"{layer}input_layernorm.weight"]
    for letter in "qkv":
        yield from linear(state, f"{layer}self_attn.{letter}_proj")
    yield "vector", state[f"{layer}self_attn.sinks"]
    yield from linear(state, f"{layer}self_attn.o_proj")
    yield "vector", state[f"{layer}post_attention_layernorm.weight"]
    yield "router", state[f"{layer}mlp.router.weight"].T
    yield "vector", state[f"{layer}mlp.router.bias"]
    gate_up, gate_up_bias = (state[f"{layer}mlp.experts.gate_up_proj{end}"] for end in ("", "_bias"))
    down, down_bias = (state[f"{layer}mlp.experts.down_proj{end}"] for end in ("", "_bias"))
    for expert in range(len(down)):
        yield "matrix", gate_up[expert][:, 1::2]
        yield "vector", gate_up_bias[expert][1::2]
        yield "matrix", gate_up[expert][:, 0::2]
        yield "vector", gate_up_bias[expert][0::2]
        yield "matrix", down[expert]
        yield "vector", down_bias[expert]
