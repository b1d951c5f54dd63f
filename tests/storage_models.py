"""What the tests of storage share: tiny models that stream although they are tiny, budgets, and what they say."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_random_model
from families import SLIDING
from safetensors.torch import load_file, save_file
from torch import Tensor

from causallm import load_model
from causallm.folder_source import FolderSource
from causallm.gguf.source import GgufSource
from causallm.loading import build_packed, find_source
from causallm.storage import budget, inventory
from causallm.storage.inventory import Inventory, take_inventory
from causallm.storage.plan import Plan
from causallm.storage.streamed import StreamedBlocks

VOCABULARY = 96
PROMPTS = [[5, 9, 2, 9, 2, 7], [1, 4, 4, 8, 3, 60, 21, 5, 9, 2, 11, 33], [77]]
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
GPT_OSS = {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**SLIDING, "max_window_layers": 2, "hidden_size": 64}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "mlp_only_layers": [1]}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt-oss": ("GptOssConfig", GPT_OSS),
}
"""Every family: rows of whole blocks of 32 weights, so that each can be packed."""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is too small to be streamed, nothing but weights and the cache takes memory."""
    strip(monkeypatch)


def strip(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `bare` says."""
    monkeypatch.setattr(inventory, "SMALL", 0)
    monkeypatch.setattr(budget, "program_bytes", lambda: 0)
    monkeypatch.setattr(budget, "step_bytes", lambda *_: 0)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bare`, and models need no tokenizer."""
    strip(monkeypatch)
    for source in (FolderSource, GgufSource):
        monkeypatch.setattr(source, "tokenizer", lambda *_: None)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder, in float32, of a model of `SHAPES`."""
    root = tmp_path_factory.mktemp("storage")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            save_shape(path, name)
        return path

    return folder


def save_shape(folder: Path, name: str, **settings: Any) -> Path:
    """A random model of `SHAPES`, some of its settings changed, in `folder`."""
    class_name, own = SHAPES[name]
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "num_hidden_layers": 3, **own, **settings}
    save_random_model(folder, 5, class_name, **sizes)
    return folder


def save_mxfp4(folder: Path, **changes: Any) -> Path:
    """gpt-oss as it is published, in two files: one has nothing but the experts' matrices, in MXFP4."""
    save_shape(folder, "gpt-oss", **changes)
    state, packed = load_file(folder / "model.safetensors"), dict[str, Tensor]()
    for stem in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(stem).shape
        packed[f"{stem}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16)).to(torch.uint8)
        packed[f"{stem}_scales"] = torch.randint(122, 126, (experts, rows, columns // 32)).to(torch.uint8)
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": state, "model-2.safetensors": packed}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return folder


def with_architecture(source: Path, folder: Path, architecture: str) -> Path:
    """A copy of a folder whose config.json names another architecture."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return folder


def planned(path: Path, memory: int | str = "1000TB", dtype: str | None = None, **nntr: Any) -> tuple[Plan, Inventory]:
    """The plan of a model under a budget, by default under one that holds everything."""
    model, reader = build_packed(find_source(path), dtype, memory_budget=memory, **nntr)
    found = take_inventory(model, reader)
    return budget.make_plan(model, found), found


def smallest(path: Path, dtype: str | None = None, **nntr: Any) -> int:
    """The smallest budget under which a model runs."""
    return planned(path, dtype=dtype, **nntr)[0].smallest


def between(path: Path, share: float, dtype: str | None = None, **nntr: Any) -> int:
    """A budget between the smallest (0) and that under which everything is in memory (1)."""
    plan, _ = planned(path, dtype=dtype, **nntr)
    return int(plan.smallest + share * (plan.memory - plan.smallest))


def streamed(path: Path, dtype: str | None = None, **nntr: Any) -> Any:
    """A model some of whose weights are read while it runs."""
    model = load_model(path, dtype=dtype, **nntr)
    assert isinstance(model.storage, StreamedBlocks)
    return model


def closing(model: Any) -> Iterator[Any]:
    """Yield the model; then end its threads."""
    yield model
    model.storage.close()


@torch.inference_mode()
def spoken(model: Any, batch: int = 2) -> list[Tensor]:
    """Logits of a prompt in chunks, of which the first needs none, of single tokens, and of several at once."""
    ids = torch.randint(0, VOCABULARY, (batch, 26), generator=torch.Generator().manual_seed(3))
    cache, found = model.make_cache(batch), []
    for part, last in zip(ids.split([12, 9, 1, 1, 3], 1), (0, 1, 1, None, 3), strict=True):
        found.append(model(part, cache, last=last).clone())
    return found


def generated(model: Any, **options: Any) -> list[tuple[int, int]]:
    """Row and token of a batch of different prompts that is continued."""
    events = model.stream(PROMPTS, max_new_tokens=4, temperature=0.8, seed=1, **options)
    return [(event.row, event.token_id) for event in events]


def assert_same(model: Any, resident: Any) -> None:
    """Both give the same logits, bit for bit, and the same tokens."""
    for number, (ours, theirs) in enumerate(zip(spoken(model), spoken(resident), strict=True)):
        assert torch.equal(ours, theirs), number
    assert generated(model) == generated(resident)
