"""Reading safetensors: mapped, from one file or shards, and one clear line for whatever is wrong with them."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from converting import loaded
from families import SIZES
from safetensors.torch import load_file, save_file
from torch import Tensor

from causallm.loading import build_model
from causallm.weights.loader import check_weights, load_weights
from causallm.weights.open import open_weights
from causallm.weights.safetensors_reader import SafetensorsReader

NORM = "model.layers.1.input_layernorm.weight"
Change = Callable[[dict[str, Tensor]], Any]


def changed(source: Path, folder: Path, change: Change = lambda state: None) -> Path:
    """A copy of a model folder whose tensors went through `change`."""
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(source: Path, folder: Path) -> Path:
    """The same weights in three shards with an index, as transformers writes them."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    places = {name: files[number % 3] for number, name in enumerate(state)}
    for file in files:
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    write_index(folder, places)
    return folder


def write_index(folder: Path, places: dict[str, str]) -> None:
    content = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def read_index(folder: Path) -> dict[str, str]:
    places: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return places


def refused(folder: Path) -> str:
    """The one line with which both loading and checking refuse a folder."""
    messages = []
    for step in (load_weights, check_weights):
        model = build_model(folder)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            step(model, open_weights(folder, model))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def test_shards_give_the_same_weights(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = loaded(sharded(checkpoints.folder("llama"), tmp_path / "m"))
    for one, other in zip(model.parameters(), checkpoints.ours("llama").parameters(), strict=True):
        assert torch.equal(one, other)


def test_tensors_without_numbers_are_no_weights(checkpoints: Checkpoints) -> None:
    model = build_model(checkpoints.folder("llama"))
    with pytest.raises(NotImplementedError):
        load_weights(model, [(name, torch.empty_like(weight)) for name, weight in model.named_parameters()])


def test_weights_are_mapped_not_copied_and_the_file_is_safe(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed(checkpoints.folder("llama"), tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    model = build_model(folder)
    reader = open_weights(folder, model)
    load_weights(model, reader)
    name = "layers.0.mlp.up_proj.weight"
    assert model.get_parameter(name).data_ptr() == reader.tensor(name).data_ptr()
    with torch.no_grad():
        model.get_parameter(name).zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_loading_a_large_file_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    """The shape of Qwen3-0.6B in bfloat16; 1.2 GB of holes on disk."""
    from causallm.weights.safetensors_writer import header

    config = {**SIZES, "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    config |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "dtype": "bfloat16"}
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_model(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        start = header({f"model.{name}": weight for name, weight in model.named_parameters()}, {})
        file.write(start)
        file.truncate(len(start) + sum(weight.nbytes for weight in model.parameters()))
    before, began = anonymous_bytes(), time.perf_counter()
    load_weights(model, open_weights(tmp_path, model))
    assert sum(weight.nbytes for weight in model.parameters()) > 1.1e9
    assert sum(float(weight.sum()) for weight in model.layers[0].parameters()) == 0.0
    assert anonymous_bytes() - before < 100e6
    assert time.perf_counter() - began < 5


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs Linux's /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_files_of_any_dtype_mix_and_alignment_are_read(tmp_path: Path) -> None:
    tensors = {"odd": torch.arange(3).half(), "wide": torch.arange(5.0), "bytes": torch.arange(7).to(torch.uint8)}
    entries, content = {}, b""
    for name, dtype in (("bytes", "U8"), ("odd", "F16"), ("wide", "F32")):
        data = tensors[name].numpy().tobytes()
        offsets = [len(content), len(content) + len(data)]
        entries[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": offsets}
        content += data
    text = json.dumps({**entries, "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    reader = SafetensorsReader({tmp_path / "x.safetensors": ""})
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.meta(name).dtype == tensor.dtype
    assert reader.tensor("empty").shape == (0, 4)


def test_what_old_checkpoints_and_tied_ones_carry_is_left_out(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        state["lm_head.weight"] = torch.zeros(97, 32)

    folder = changed(checkpoints.folder("qwen2 sliding, tied"), tmp_path / "m", change)
    assert "lm_head.weight" not in dict(loaded(folder).named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), "1 of 39 tensors are missing, the first is layers.1.input_layernorm.weight"),
        (
            lambda state: state.update({NORM: torch.zeros(31)}),
            "tensor layers.1.input_layernorm.weight has shape [31], the model expects [32]",
        ),
        (
            lambda state: state.update({"model.extra": torch.zeros(2)}),
            "unexpected tensor extra [2]: the model has none of that name",
        ),
        (
            lambda state: state.update({NORM: torch.zeros(32, dtype=torch.int32)}),
            "tensor layers.1.input_layernorm.weight has dtype torch.int32, expected a float type",
        ),
        (
            lambda state: state.update({NORM.removeprefix("model."): torch.zeros(32)}),
            "layers.1.input_layernorm.weight appears twice",
        ),
    ],
    ids=["missing", "misshapen", "unexpected", "integer", "duplicate"],
)
def test_a_wrong_tensor_is_named(checkpoints: Checkpoints, tmp_path: Path, change: Change, message: str) -> None:
    assert message in refused(changed(checkpoints.folder("llama"), tmp_path / "m", change))


def test_a_tensor_in_two_shards_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = sharded(checkpoints.folder("llama"), tmp_path / "m")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    state = load_file(second) | {NORM: torch.zeros(32)} | load_file(first)
    save_file(state, second)
    assert "appears twice: in" in refused(folder)


def test_a_missing_shard_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = sharded(checkpoints.folder("llama"), tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refused(folder).endswith("model-00002-of-00003.safetensors is missing")


@pytest.mark.parametrize("cut", [-1, -1000, 100, 5])
def test_a_truncated_shard_is_named(checkpoints: Checkpoints, tmp_path: Path, cut: int) -> None:
    folder = sharded(checkpoints.folder("llama"), tmp_path / "m")
    shard = folder / "model-00003-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:cut])
    message = refused(folder)
    assert "model-00003-of-00003.safetensors: " in message
    if cut < 0:
        assert f"{len(whole) + cut} bytes, its header says {len(whole)}" in message
    else:
        assert "cut off in its header" in message


def test_bytes_too_many_are_noticed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed(checkpoints.folder("llama"), tmp_path / "m")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "truncated or damaged" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "its header cannot be read"),
        ("{nothing", "its header cannot be read"),
        (
            '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "tensor a has 4 bytes, its shape and dtype need 8",
        ),
        ('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 4]}}', "tensor a has dtype F4, known are F64,"),
        ('{"a": {"shape": [1], "data_offsets": [0, 4]}}', "its header cannot be read"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, content: str, message: str) -> None:
    text = content.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
        SafetensorsReader({tmp_path / "x.safetensors": ""})


def test_an_index_that_names_what_its_shard_has_not_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = sharded(checkpoints.folder("llama"), tmp_path / "m")
    places = read_index(folder)
    places[NORM] = next(shard for shard in places.values() if shard != places[NORM])
    write_index(folder, places)
    assert f"tensor {NORM} should be in {places[NORM]}, but is not" in refused(folder)


def test_an_index_that_leaves_its_folder_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = sharded(checkpoints.folder("llama"), tmp_path / "m")
    write_index(folder, {**read_index(folder), NORM: "../other.safetensors"})
    assert "weight_map names '../other.safetensors', expected a file beside the index" in refused(folder)


def test_an_empty_index_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = sharded(checkpoints.folder("llama"), tmp_path / "m")
    write_index(folder, {})
    assert "weight_map is missing or empty" in refused(folder)


def test_a_folder_without_weights_says_what_was_looked_for(checkpoints: Checkpoints, tmp_path: Path) -> None:
    shutil.copy(checkpoints.folder("llama") / "config.json", tmp_path)
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is not read" in refused(tmp_path)
    (tmp_path / "nntr_config.json").write_text('{"model_file_name": "later.bin"}')
    assert "neither later.bin, which nntr_config.json names, nor model.safetensors" in refused(tmp_path)


def test_a_named_file_that_does_not_exist_gives_way_to_others(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed(checkpoints.folder("llama"), tmp_path / "m")
    (folder / "nntr_config.json").write_text('{"model_file_name": "later.bin"}')
    assert torch.equal(loaded(folder).norm.weight, checkpoints.ours("llama").norm.weight)


def test_a_named_safetensors_file_is_read(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed(checkpoints.folder("llama"), tmp_path / "m", lambda state: state[NORM].fill_(3.0))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "nntr_config.json").write_text('{"model_file_name": "other.safetensors"}')
    assert loaded(folder).layers[1].input_layernorm.weight.eq(3.0).all()
    (folder / "other.safetensors").rename(folder / "other.gguf")
    (folder / "nntr_config.json").write_text('{"model_file_name": "other.gguf"}')
    assert "unknown suffix, expected .bin or .safetensors" in refused(folder)
