"""NNTrainer's raw cache file against a description of its bytes that is written here once more, with struct."""

import copy
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from torch import Tensor

from causallm.config import GenerationConfig
from causallm.generation import generate
from causallm.steps import prefill

TIME = 21
ROW = torch.randint(97, (TIME,), generator=torch.Generator().manual_seed(3)).tolist()


def expected_bytes(keys_and_values: list[tuple[Tensor, Tensor]]) -> bytes:
    """Layers of keys and values (tokens, heads, head_dim): two bytes of 0, fp16 numbers one by one, eight bytes."""
    content = b""
    for pair in keys_and_values:
        for tensor in pair:
            content += b"\0\0"
            for token in tensor.tolist():
                for head in token:
                    content += b"".join(struct.pack("<e", number) for number in head)
            content += b"\0" * 8
    return content


def filled(model: Any, columns: int = TIME, **options: Any) -> list[Any]:
    cache = model.make_cache(1, **options)
    prefill(model, torch.tensor([ROW[:columns]]), cache, None, 64)
    return cache


def rotated(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What attention is given of each layer, keys after rotation, as (tokens, heads, head_dim)."""
    return [tuple(part[0].transpose(0, 1) for part in layer.state().values()) for layer in filled(model)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "llama MQA, head_dim 12"])
def test_the_bytes_are_those_of_the_format(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    model = checkpoints.ours(name)
    model.save_kvcache(tmp_path / "raw", cache=filled(model), nntrainer=True)
    assert (tmp_path / "raw").read_bytes() == expected_bytes(rotated(model))
    model.save_kvcache(tmp_path / "raw", 5, cache=filled(model), nntrainer=True)
    assert (tmp_path / "raw").read_bytes() == expected_bytes([(k[:5], v[:5]) for k, v in rotated(model)])


@pytest.mark.parametrize("dtype", [None, "float16", "int8"])
def test_what_was_written_here_is_read(checkpoints: Checkpoints, tmp_path: Path, dtype: str | None) -> None:
    """Sliding layers take what they have room for."""
    for name in ("llama", "gemma3"):
        model = checkpoints.ours(name, **({"kv_cache_dtype": dtype} if dtype else {}))
        numbers = torch.randn(4, 2, TIME, 2, 16 if name == "gemma3" else 8)
        (tmp_path / "raw").write_bytes(expected_bytes([(keys, values) for keys, values in numbers]))
        for to in (None, 13):
            held = model.load_kvcache(tmp_path / "raw", to, ids=ROW)
            length = to or TIME
            assert held.ids == [ROW[:length]]
            for layer, (keys, values) in zip(held.cache, numbers, strict=True):
                same = model.make_cache()[0 if name == "llama" else held.cache.index(layer)]
                same.update(*(x[:length].half().float().transpose(0, 1)[None] for x in (keys, values)))
                assert layer.offset == length
                assert all(torch.equal(part, same.state()[key]) for key, part in layer.state().items())


def test_a_cache_of_halves_survives_unchanged(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = copy.copy(checkpoints.ours("llama", "float16"))
    row = ROW[: TIME - 4]
    model.save_kvcache(tmp_path / "raw", cache=filled(model, len(row)), nntrainer=True)
    held = model.load_kvcache(tmp_path / "raw", ids=row)
    for ours, theirs in zip(held.cache, filled(model, len(row)), strict=True):
        assert all(torch.equal(part, theirs.state()[name]) for name, part in ours.state().items())
    config = GenerationConfig(max_new_tokens=10)
    events = [event.token_id for event in generate(model, [ROW], config, prompt_cache=held)]
    assert events == [event.token_id for event in generate(model, [ROW], config, cache=filled(model, len(row)))]


def test_what_the_format_cannot_hold_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "raw"
    llama, gemma = checkpoints.ours("llama"), checkpoints.ours("gemma3")
    two = llama.make_cache(2)
    prefill(llama, torch.tensor([ROW, ROW]), two, None, 64)
    packed = checkpoints.ours("llama", kv_cache_dtype="int8")
    large = filled(llama)
    with torch.inference_mode():
        large[1]._keys[0, 0, 0, 0] = 70000.0
    for model, cache, message in (
        (llama, two, "holds one row, this cache has 2"),
        (gemma, filled(gemma), "layers.0.keys slides: 8 of 21 are left"),
        (packed, filled(packed), "holds floats of 16 bits, this cache is torch.int8"),
        (llama, large, "layers.1.keys has a value of magnitude 70000, float16 ends at 65504"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_kvcache(path, cache=cache, nntrainer=True)
        assert not list(tmp_path.iterdir())
    gemma.save_kvcache(path, cache=filled(gemma, rollback=20), nntrainer=True)
    assert path.stat().st_size == 4 * 2 * (10 + TIME * 2 * 16 * 2)
    with pytest.raises(ValueError, match="cannot save 22 positions of a cache that holds 21"):
        llama.save_kvcache(path, 22, cache=filled(llama), nntrainer=True)


def test_a_file_of_another_shape_or_text_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, model = tmp_path / "raw", checkpoints.ours("llama")
    model.save_kvcache(path, cache=filled(model), nntrainer=True)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-8], b"", whole + bytes(16)):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^{path}: {len(content)} bytes are no NNTrainer cache of this model: 8 t"
        ):
            model.load_kvcache(path, ids=ROW)
    path.write_bytes(whole[:683] + b"\1" + whole[684:])
    with pytest.raises(ValueError, match=f"^{path}: byte 682 should begin a tensor .* but is not 0"):
        model.load_kvcache(path, ids=ROW)
    path.write_bytes(whole)
    for ids, to, message in (
        (ROW, 22, "holds 21 positions, 22 were asked for"),
        (ROW, 0, "holds 21 positions, 0 were asked for"),
        (ROW[:20], None, "stands for 21 tokens, but there are ids of 20"),
        (None, None, "is no prompt cache of this program; one of NNTrainer's is read with the ids of its tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_kvcache(path, to, ids=ids)
