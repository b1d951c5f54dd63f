"""Weights that are read while a model runs give bit for bit what they give in memory, from every kind of file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_models import (  # noqa: F401  fixtures among them
    SHAPES,
    assert_same,
    between,
    planned,
    save_mxfp4,
    save_shape,
    shapes,
    smallest,
    streamed,
    tight,
)

from causallm import load_model
from causallm.packing import packed_tensors
from causallm.prompt_cache.fingerprint import fingerprint
from causallm.storage.computing import BLOCK_SHARE, CAST_BYTES, scratch_bytes
from causallm.storage.disk import THREADS
from causallm.weights.convert import convert
from causallm.weights.quantize import quantize
from causallm.weights.reader import BLOCK_BYTES, PART_BYTES
from layers.pages import PAGE

pytestmark = [
    pytest.mark.usefixtures("tight"),
    pytest.mark.filterwarnings("ignore:the budget has room for"),
    pytest.mark.filterwarnings("ignore:llama.cpp"),
]

Shapes = Callable[[str], Path]


def assert_streams(path: Path, dtype: str | None = None, share: float = 0.0, **nntr: Any) -> Any:
    """Under a budget between the smallest (share 0) and all (1) as in memory; returns the resident model."""
    resident = load_model(path, dtype=dtype, **nntr)
    model = streamed(path, dtype, memory_budget=between(path, share, dtype, **nntr), **nntr)
    assert_same(model, resident)
    assert fingerprint(model) == fingerprint(resident)
    model.storage.close()
    return resident


@pytest.mark.parametrize("name", ["mistral", "qwen3-moe", "gpt-oss"])
def test_shards(name: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    convert(shapes(name), tmp_path / "m", max_shard_bytes=40_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert_streams(tmp_path / "m")


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe"])
def test_our_converted_file(name: str, tmp_path: Path) -> None:
    folder = save_shape(tmp_path / "m", name)
    convert(folder, folder / "ours.safetensors", dtype=torch.bfloat16)
    assert_streams(folder, model_file_name="ours.safetensors")
    assert_streams(folder, "float32", model_file_name="ours.safetensors")


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_folders(name: str, kind: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    quantize(shapes(name), tmp_path / "packed", kind)
    assert packed_tensors(assert_streams(tmp_path / "packed", share=0.5 if kind == "Q8_0" else 0.0))


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256_weights(name: str, kind: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    save_shape(tmp_path / "m", name, **wide, **({"moe_intermediate_size": 256} if name == "qwen3-moe" else {}))
    quantize(tmp_path / "m", tmp_path / "packed", kind, "Q6_K")
    assert_streams(tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32), ("gemma3", torch.float32), ("qwen3-moe", torch.float32),
        ("qwen3-moe", torch.float16), ("gpt-oss", torch.float16),
    ],
)  # fmt: skip
def test_nntrainers_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_shape(tmp_path / "m", name)
    convert(folder, folder / "model.bin", dtype=dtype)
    kind = "FP32-FP32" if dtype == torch.float32 else "FP16-FP32"
    assert_streams(folder, model_file_name="model.bin", model_tensor_type=kind)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3", "gpt-oss"])
def test_nntrainers_packed_file(name: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    quantize(shapes(name), tmp_path / "packed", "Q4_0", output_format="bin")
    assert_streams(tmp_path / "packed")


@pytest.mark.parametrize("name", SHAPES)
def test_gguf_floats(name: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    convert(shapes(name), tmp_path / "m.gguf")
    assert_streams(tmp_path / "m.gguf", share=0.4)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3", "gpt-oss"])
def test_gguf_packed(name: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    quantize(shapes(name), tmp_path / "packed", "Q4_0", "Q8_0")
    convert(tmp_path / "packed", tmp_path / "m.gguf")
    assert_streams(tmp_path / "m.gguf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_in_mxfp4(dtype: str, tmp_path: Path) -> None:
    assert_streams(save_mxfp4(tmp_path / "m"), dtype)


def test_experts_of_a_gguf_file_in_mxfp4(shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    gguf, oracle = pytest.importorskip("gguf"), pytest.importorskip("gguf_oracle")
    kind = gguf.GGMLQuantizationType.MXFP4

    def pack(name: str, values: Any) -> Any:
        return (gguf.quants.quantize(values, kind), kind) if "exps" in name else None

    oracle.write(save_shape(tmp_path / "f", "gpt-oss", hidden_size=64), tmp_path / "m.gguf", "GPT_OSS", pack)
    assert_streams(tmp_path / "m.gguf")


def test_what_is_computed_counts_what_is_read_for_it(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "m", hidden_size=256, intermediate_size=512)
    model = streamed(folder, memory_budget=smallest(folder))
    layer = model.layers[0].mlp.experts
    before, reader = model.storage.counts(), model.storage._reader
    layer.begin([1]).wait()
    brought = model.storage.counts() - before
    sizes = [reader.meta(f"layers.0.mlp.experts.{name}").shape for name in ("gate_up_proj", "down_proj")]
    packed = sum(experts * rows * columns * 17 // 32 // experts for experts, columns, rows in sizes)
    biases = sum(4 * columns for _, _, columns in sizes)
    assert brought.misses == 1
    assert packed <= brought.read_bytes <= packed + biases + 8 * PAGE
    model.storage.close()


def test_memory_to_compute_in(shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    """None where the file has what the memory is to have, no more than for a part of the largest tensor elsewhere."""

    def scratch(path: Path, dtype: str) -> int:
        return scratch_bytes(planned(path, dtype=dtype)[1].pieces.values())

    assert scratch(shapes("gpt-oss"), "float32") == 0
    assert 0 < scratch(shapes("gpt-oss"), "bfloat16") <= THREADS * CAST_BYTES
    packed = save_mxfp4(tmp_path / "m")
    assert 0 < scratch(packed, "float32") <= THREADS * (5 * PART_BYTES + 2 * PAGE + BLOCK_SHARE * BLOCK_BYTES)
    assert scratch(packed, "bfloat16") > scratch(shapes("gpt-oss"), "bfloat16")
