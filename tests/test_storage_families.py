"""Weights that are read while a model runs give bit for bit what they give in memory, for every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_folders import save_embedding_model
from storage_models import (  # noqa: F401  fixtures among them
    SHAPES,
    assert_same,
    between,
    generated,
    save_shape,
    shapes,
    smallest,
    spoken,
    streamed,
    tight,
    with_architecture,
)

from causallm import load_model
from causallm.config.fields import DTYPES
from causallm.storage.rows import RowsOfFile
from causallm.storage.storage import HEAD
from causallm.weights.convert import convert
from causallm.weights.quantize import quantize

pytestmark = [pytest.mark.usefixtures("tight"), pytest.mark.filterwarnings("ignore:the budget has room for")]

Shapes = Callable[[str], Path]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_smallest_budget(name: str, dtype: str, shapes: Shapes) -> None:  # noqa: F811
    folder = shapes(name)
    model = streamed(folder, dtype, memory_budget=smallest(folder, dtype))
    assert_same(model, load_model(folder, dtype=dtype))
    counts = model.storage.counts()
    assert counts.read_bytes > counts.passes > 0
    assert (counts.misses > 0) == ("experts" in str(model))
    model.storage.close()


@pytest.mark.parametrize(
    ("name", "lookahead"), [*((name, 1 + number % 3) for number, name in enumerate(SHAPES)), ("qwen3-moe", 3)]
)
def test_blocks_that_are_read_ahead(name: str, lookahead: int, shapes: Shapes) -> None:  # noqa: F811
    """Without a budget: experts are a part of their block, the head stays."""
    folder = shapes(name)
    model = streamed(folder, fsu=True, fsu_lookahead=lookahead)
    assert all(parameter.is_meta for parameter in model.layers.parameters())
    assert_same(model, load_model(folder))
    model.storage.close()


@pytest.mark.parametrize("share", [0.15, 0.8])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-moe", "gpt-oss"])
def test_a_budget_that_keeps_a_part(name: str, share: float, shapes: Shapes) -> None:  # noqa: F811
    folder = shapes(name)
    model = streamed(folder, memory_budget=between(folder, share, fsu_lookahead=2), fsu_lookahead=2)
    assert_same(model, load_model(folder))
    model.storage.close()


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe", "gpt-oss"])
def test_files_of_narrow_floats(name: str, stored: str, dtype: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    convert(shapes(name), tmp_path / "narrow", None, DTYPES[stored])
    model = streamed(tmp_path / "narrow", dtype, memory_budget=between(tmp_path / "narrow", 0.3, dtype))
    assert_same(model, load_model(tmp_path / "narrow", dtype=dtype))
    model.storage.close()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen3-moe", "Qwen3SlimMoeForCausalLM"),
        ("qwen3-moe", "Qwen3CachedSlimMoeForCausalLM"),
        ("gpt-oss", "GptOssCachedSlimCausalLM"),
    ],
)
@pytest.mark.parametrize("fsu", [False, True])
def test_nntrainers_kinds(name: str, architecture: str, fsu: bool, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    folder = with_architecture(shapes(name), tmp_path / "m", architecture)
    model, resident = streamed(folder, fsu=fsu), load_model(shapes(name))
    assert_same(model, resident)
    first = model.storage.counts()
    assert first.misses > 0
    assert_same(model, resident)
    # The kinds that cache have room for all experts of such a model, the others forget.
    assert (model.storage.counts().misses == first.misses) == ("Cached" in architecture)
    model.storage.close()


@pytest.mark.parametrize("architecture", ["Qwen3SlimMoeForCausalLM", "Qwen3CachedSlimMoeForCausalLM"])
def test_a_budget_rules_nntrainers_kinds(architecture: str, shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    folder = with_architecture(shapes("qwen3-moe"), tmp_path / "m", architecture)
    model, resident = load_model(folder, memory_budget="1GB"), load_model(shapes("qwen3-moe"))
    assert_same(model, resident)
    counts = model.storage.counts()
    assert counts is None or counts.misses == model.storage.counts().misses <= 12


@pytest.mark.parametrize("name", ["mistral", "llama", "qwen3-moe"])
def test_prompt_lookup(name: str, shapes: Shapes) -> None:  # noqa: F811
    folder = shapes(name)
    model, resident = streamed(folder, memory_budget=smallest(folder)), load_model(folder)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    assert generated(model, **lookup) == generated(resident, **lookup)
    model.storage.close()


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False}])
def test_an_embedding_model(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no head: of a table that a language model would have as its head, rows are read, too."""
    save_embedding_model(tmp_path, sliding_window=8, num_hidden_layers=3, **settings)
    ids, padding = torch.randint(0, 97, (2, 20)), torch.tensor([0, 7])
    resident = load_model(tmp_path)
    model = streamed(tmp_path, memory_budget=smallest(tmp_path))
    for _ in range(2):
        assert torch.equal(model(ids, padding=padding), resident(ids, padding=padding))
    assert isinstance(model.embed_tokens, RowsOfFile)
    assert min(model.storage._units) > HEAD
    model.storage.close()


def test_a_head_that_stays_and_one_that_is_read(shapes: Shapes) -> None:  # noqa: F811
    kept, read = streamed(shapes("qwen3"), fsu=True), streamed(shapes("qwen3"), memory_budget=smallest(shapes("qwen3")))
    assert min(kept.storage._units) > HEAD
    assert min(read.storage._units) <= HEAD
    assert not kept.embed_tokens.weight.is_meta
    assert isinstance(read.embed_tokens, RowsOfFile)
    for one, other in zip(spoken(kept), spoken(read), strict=True):
        assert torch.equal(one, other)
    kept.storage.close()
    read.storage.close()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_head_in_parts(name: str, kind: str, tmp_path: Path) -> None:
    """Tied or of its own; its last part is a smaller one."""
    folder = save_shape(tmp_path / "m", name, vocab_size=8010)
    if kind.startswith("Q"):
        quantize(folder, tmp_path / "packed", kind)
        folder = tmp_path / "packed"
    dtype = None if kind.startswith("Q") else kind
    model, resident = streamed(folder, dtype, memory_budget=smallest(folder, dtype)), load_model(folder, dtype=dtype)
    assert sum(unit <= HEAD for unit in model.storage._units) > 2
    assert_same(model, resident)
    ids = torch.randint(0, 8010, (3, 17))
    with torch.inference_mode():
        for last in (None, 1, 5):
            assert torch.equal(model(ids, last=last), resident(ids, last=last))
    model.storage.close()
