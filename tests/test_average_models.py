"""tools/average_models.py: each weight is the mean of the models', and the rest is of the first."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from text_models import save_text_model

from causallm import load_model

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("average_models")


def test_weights_are_the_mean(tool: ModuleType, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for seed, folder in enumerate(folders):
        save_text_model(folder, seed=seed)
    assert tool.write_mean(folders, tmp_path / "mean") == 0
    mean, *models = (load_model(folder).state_dict() for folder in (tmp_path / "mean", *folders))
    for name, weight in mean.items():
        torch.testing.assert_close(weight, torch.stack([model[name] for model in models]).mean(0))
    assert not torch.equal(mean["embed_tokens.weight"], models[0]["embed_tokens.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "mean"]


def test_models_of_other_shapes_are_named(tool: ModuleType, tmp_path: Path) -> None:
    save_text_model(tmp_path / "a")
    save_text_model(tmp_path / "b", intermediate_size=40)
    with pytest.raises(ValueError, match=r"b: the shape of model.layers.0.mlp.down_proj.weight is \(\d+, 40\)"):
        tool.write_mean([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    with pytest.raises(ValueError, match="exists, expected the name of a new folder"):
        tool.write_mean([tmp_path / "a"], tmp_path / "b")
