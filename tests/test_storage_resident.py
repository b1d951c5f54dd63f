"""Weights that are read instead of mapped, and gradients where weights come and go."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from storage_models import SHAPES, assert_same, shapes, smallest, streamed, tight  # noqa: F401

from causallm import load_model
from causallm.storage import resident as module

Shapes = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("tight")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_weights_that_are_read_are_those_that_are_mapped(
    name: str,
    dtype: str | None,
    shapes: Shapes,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    read = module.read_weights
    monkeypatch.setattr("causallm.loading.read_weights", lambda *given: calls.append(read(*given)))
    done: list[tuple[int, int]] = []
    model = load_model(shapes(name), dtype=dtype, mmap=False, progress=lambda *given: done.append(given))
    assert len(calls) == 1
    assert done[-1][0] == done[-1][1] == len(done)
    assert_same(model, load_model(shapes(name), dtype=dtype))


def test_what_is_packed_while_loading_is_not_read_as_it_is(shapes: Shapes) -> None:  # noqa: F811
    packing = {"fc_layer_dtype": "Q8_0", "model_tensor_type": "Q8_0-FP32"}
    model = load_model(shapes("llama"), mmap=False, **packing)
    assert_same(model, load_model(shapes("llama"), **packing))


def test_a_missing_weight_is_named_as_ever(shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((shapes("llama") / "config.json").read_text())
    weights = load_file(shapes("llama") / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing, the first is norm.weight"):
        load_model(tmp_path, mmap=False)


@pytest.mark.parametrize(
    "place", ["embed_tokens", "layers.0.input_layernorm", "layers.2.post_attention_layernorm", "norm"]
)
def test_no_gradient_flows_through_weights_that_are_gone(place: str, shapes: Shapes) -> None:  # noqa: F811
    model = streamed(shapes("llama"), memory_budget=smallest(shapes("llama")))
    model.get_submodule(place).register_forward_hook(lambda _, inputs, vectors: vectors.requires_grad_())
    with pytest.raises(RuntimeError, match="load the model without memory_budget and fsu to train it"):
        model(torch.tensor([[1, 2, 3]]))
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    model.storage.close()
