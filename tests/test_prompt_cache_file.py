"""Files of prompt caches: each thing they depend on is refused by its name, and so is every damage; a kill leaves the
file that was there."""

import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import save_random_model
from text_models import PROMPT, TEMPLATE, save_text_model

from causallm import load_model
from causallm.prompt_cache import load_prompt_cache, save_prompt_cache
from causallm.prompt_cache.file import FORMAT, is_prompt_cache
from causallm.prompt_cache.fingerprint import BLOCK, MOST, _samples, hash_weights
from causallm.prompt_cache.make import make_prompt_cache

MISTRAL: dict[str, Any] = {"sliding_window": 8, "head_dim": 16, "intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_text_model(folder, "MistralConfig", template=TEMPLATE, **MISTRAL)
    return folder


@pytest.fixture(scope="module")
def cached(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache file of the model."""
    path, model = tmp_path_factory.mktemp("cache") / "prompt.cache", load_model(folder)
    held = make_prompt_cache(model, [model.encode_prompt(PROMPT)])
    save_prompt_cache(path, model, held.cache, held.ids)
    return path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def retrained(folder: Path) -> None:
    """The same shapes, other numbers."""
    settings = json.loads((folder / "config.json").read_text())
    sizes = {name: settings[name] for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers")}
    save_random_model(folder, 2, "MistralConfig", **sizes, **MISTRAL)


def one_number_at_the_end(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1
    safetensors.torch.save_file(weights, path)


CHANGES: dict[str, tuple[str, Callable[[Path], object], dict[str, Any]]] = {
    "other weights": ("weights", retrained, {}),
    "the last number of a weight": ("weights", one_number_at_the_end, {}),
    "weights in bf16": ("weight_dtypes", lambda folder: None, {"model_tensor_type": "BF16-FP32"}),
    "packed weights": ("weight_dtypes", lambda folder: None, {"fc_layer_dtype": "Q8_0"}),
    "activations": (
        "activation_dtype",
        lambda folder: None,
        {"model_tensor_type": "FP32-BF16", "kv_cache_dtype": "FP32"},
    ),
    "cache dtype": ("cache_dtype", lambda folder: None, {"kv_cache_dtype": "float16"}),
    "8 bits": ("cache_dtype", lambda folder: None, {"kv_cache_dtype": "int8"}),
    "tokenizer": ("tokenizer", lambda folder: change(folder / "tokenizer_config.json", add_eos_token=True), {}),
    "template": (
        "chat_template",
        lambda folder: change(folder / "tokenizer_config.json", chat_template=TEMPLATE + " "),
        {},
    ),
    "rope": (
        "rope",
        lambda folder: change(
            folder / "config.json", rope_theta=500.0, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
        ),
        {},
    ),
    "window": ("windows", lambda folder: change(folder / "config.json", sliding_window=9), {}),
    "pattern": (
        "windows",
        lambda folder: change(folder / "config.json", layer_types=["sliding_attention", "full_attention"]),
        {},
    ),
    "heads": ("heads", lambda folder: change(folder / "config.json", num_attention_heads=2, head_dim=32), {}),
    "architecture": (
        "architecture",
        lambda folder: change(folder / "config.json", architectures=["LlamaForCausalLM"]),
        {},
    ),
    "epsilon": ("config", lambda folder: change(folder / "config.json", rms_norm_eps=1e-3), {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_is_refused_by_its_name(folder: Path, cached: Path, tmp_path: Path, name: str) -> None:
    field, alter, overrides = CHANGES[name]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert load_prompt_cache(cached, load_model(other)).ids
    alter(other)
    if field == "heads":
        # Weights of that shape.
        model = load_model(folder)
        model.config = dataclasses.replace(model.config, num_attention_heads=2, head_dim=32)
    else:
        model = load_model(other, **overrides)
    with pytest.raises(ValueError, match=rf"^{cached} does not fit this model: {field} differs: found .+, expected .+"):
        load_prompt_cache(cached, model)


def test_an_adapter_is_a_difference(folder: Path, cached: Path) -> None:
    model = load_model(folder)
    projection = model.layers[0].self_attn.q_proj
    projection.lora_A = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"adapter differs: found none, expected [0-9a-f]{64}"):
        load_prompt_cache(cached, model)


def test_another_version_is_refused(folder: Path, cached: Path, tmp_path: Path) -> None:
    content = cached.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"')
    (tmp_path / "new").write_bytes(content)
    with pytest.raises(ValueError, match="format version 2, expected 1"):
        load_prompt_cache(tmp_path / "new", load_model(folder))


def _hash(weights: dict[str, torch.Tensor]) -> str:
    return hash_weights(sorted(weights.items()), len(weights))


def test_hashes_see_every_part_of_a_weight() -> None:
    small = {"a": torch.arange(1000.0)}
    for place in (0, 500, 999):
        other = {"a": small["a"].clone()}
        other["a"][place] += 1
        assert _hash(other) != _hash(small)
    large = {"a": torch.zeros(MOST * BLOCK, dtype=torch.float32)}
    last = large["a"].numel() - BLOCK // 4
    for place in (0, last, last + BLOCK // 4 - 1, last // (MOST - 1) // 1, last // (MOST - 1) * 7 + 8):
        other = {"a": large["a"].clone()}
        other["a"][place] += 1
        assert _hash(other) != _hash(large)
    assert _hash({"b": small["a"]}) != _hash(small)
    assert _hash({"a": small["a"].view(10, 100)}) != _hash(small)
    assert _hash({"a": small["a"].view(torch.int32).view(1000)}) != _hash(small)
    assert _hash({"a": small["a"].clone()}) == _hash(small)


def test_a_weight_that_lies_transposed_is_hashed_where_it_lies() -> None:
    weight = torch.randn(300, 400)
    assert _hash({"a": weight.t().contiguous().t()}) != _hash({"a": weight + 1})
    assert _hash({"a": torch.empty(0, 3)})


def test_the_file_is_read_by_safetensors(folder: Path, cached: Path) -> None:
    tensors = safetensors.torch.load_file(cached)
    assert tensors["ids"].tolist() == [load_model(folder).encode_prompt(PROMPT)]
    assert tensors["padding"].tolist() == [0]
    assert {"layers.0.keys", "layers.1.values", "checksum"} <= set(tensors)
    with safetensors.safe_open(cached, "pt") as file:
        assert file.metadata()["format"] == FORMAT
        assert "sliding" not in file.metadata()["windows"]
        assert json.loads(file.metadata()["windows"]) == [8, 8]


def test_a_truncated_file_is_refused_by_name(folder: Path, cached: Path, tmp_path: Path) -> None:
    model, content, path = load_model(folder), cached.read_bytes(), tmp_path / "short"
    for length in (0, 1, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"^{path}"):
            load_prompt_cache(path, model)
        with pytest.raises(ValueError, match=f"^{path}"):
            model.load_kvcache(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=f"^{path}: truncated or damaged"):
        load_prompt_cache(path, model)


def test_a_foreign_file_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    with pytest.raises(ValueError, match=r"model.safetensors: no prompt cache, its header's format is 'pt'"):
        load_prompt_cache(folder / "model.safetensors", model)
    for content in (b"GGUF" + bytes(100), b"{}", os.urandom(1000)):
        (tmp_path / "foreign").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{tmp_path / 'foreign'}"):
            load_prompt_cache(tmp_path / "foreign", model)
        with pytest.raises(ValueError, match=f"^{tmp_path / 'foreign'} is no prompt cache of this program"):
            model.load_kvcache(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="there is no prompt cache"):
        model.load_kvcache(tmp_path / "missing")
    assert not is_prompt_cache(tmp_path / "foreign")


def test_every_bit_counts(folder: Path, cached: Path, tmp_path: Path) -> None:
    """But for the white space that aligns the header."""
    model, content, path, rng = load_model(folder), cached.read_bytes(), tmp_path / "flipped", random.Random(1)
    (size,) = struct.unpack("<Q", content[:8])
    places = [*range(8), *rng.sample(range(8, 8 + size), 300), *rng.sample(range(8 + size, len(content)), 100)]
    for place in [*places, len(content) - 1]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"^{path}"):
            load_prompt_cache(path, model)


def test_numbers_that_changed_are_said_to_be_damage(folder: Path, cached: Path, tmp_path: Path) -> None:
    flipped = bytearray(cached.read_bytes())
    flipped[-1000] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged: its checksum is not that of its content"):
        load_prompt_cache(tmp_path / "flipped", load_model(folder))


def test_a_file_that_was_loaded_may_be_replaced(folder: Path, cached: Path, tmp_path: Path) -> None:
    """What was mapped has been copied."""
    path, model = tmp_path / "cache", load_model(folder)
    shutil.copy(cached, path)
    held = load_prompt_cache(path, model)
    before = held.cache[0].state()["keys"]
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(held.cache[0].state()["keys"], before)
    save_prompt_cache(path, model, held.cache, held.ids)
    assert load_prompt_cache(path, model).ids == held.ids
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


SAVING = """
import sys, time
import causallm.weights.safetensors_writer as writer
from pathlib import Path
from causallm import load_model
from causallm.prompt_cache.make import make_prompt_cache

model = load_model(sys.argv[1])
write = writer.write_tensor
written = []

def slow(*arguments):
    if len(written) == 3:
        print("halfway", flush=True)
        time.sleep(60)
    written.append(write(*arguments))
    return written[-1]

writer.write_tensor = slow
held = make_prompt_cache(model, [list(range(20))])
model.save_kvcache(sys.argv[2], cache=held.cache, ids=held.ids)
"""


def test_a_kill_while_saving_leaves_the_old_file(folder: Path, cached: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copy(cached, path)
    command = [sys.executable, "-c", SAVING, str(folder), str(path)]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"halfway\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert path.read_bytes() == cached.read_bytes()
    assert load_prompt_cache(path, load_model(folder)).ids


def test_a_place_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    held = make_prompt_cache(model, [[1, 2, 3]])
    with pytest.raises(OSError, match=r"cannot write .*such: No such file"):
        save_prompt_cache(tmp_path / "no" / "such", model, held.cache, held.ids)


def test_of_a_large_weight_next_to_nothing_is_read() -> None:
    blocks = list(_samples(torch.arange(10**6).view(torch.uint8), MOST))
    assert [block.numel() for block in blocks] == [BLOCK] * MOST
    starts = [int(block.view(torch.int64)[0]) for block in blocks if block.storage_offset() % 8 == 0]
    assert starts[0] == 0
    assert starts[-1] == 10**6 - BLOCK // 8
