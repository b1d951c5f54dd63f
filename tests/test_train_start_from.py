"""A run that begins with another's weights goes on from its loss, and refuses a model of other sizes."""

from pathlib import Path

import pytest
import torch
from train_runs import LLAMA, losses, run, settings

from causallm.loading import load_model
from causallm.training.new_model import make_model
from causallm.training.start_from import start_from


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run(settings(folder, train={"steps": 40}))
    return folder / "out"


def test_the_first_loss_is_that_of_the_model_it_begins_with(base: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly nothing the result is that model, too."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    chosen = settings(tmp_path, train={"steps": 1, "start_from": str(base)}, optimizer=still)
    fresh = settings(tmp_path, train={"steps": 1}, optimizer=still, output=str(tmp_path / "fresh"))
    (began,), (anew,) = losses(run(chosen)), losses(run(fresh))
    assert began[1] < anew[1] - 0.5
    ours, theirs = (load_model(folder).state_dict() for folder in (tmp_path / "out", base))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=1e-9)


def test_a_resumed_run_goes_on_from_its_checkpoint_not_from_the_beginning(base: Path, tmp_path: Path) -> None:
    def chosen(name: str) -> object:
        return settings(tmp_path, train={"start_from": str(base)}, output=str(tmp_path / name))

    whole = losses(run(chosen("whole")))
    first = losses(run(chosen("killed"), kill_at=5))
    assert first[:4] + losses(run(chosen("killed"), resume=True)) == whole


def test_a_model_of_other_sizes_is_refused_by_the_first_weight_that_differs(base: Path) -> None:
    config = {**LLAMA, "vocab_size": 257, "max_position_embeddings": 16, "architectures": ["LlamaForCausalLM"]}
    del config["architecture"]
    wider = make_model({**config, "intermediate_size": 32}, seed=1)
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight is \(16, 24\), the run's model needs \(16, 32\)"):
        start_from(wider, base)
    untied = make_model({**config, "tie_word_embeddings": False}, seed=1)
    with pytest.raises(ValueError, match=r"lm_head\.weight is none, the run's model needs \(257, 16\)"):
        start_from(untied, base)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(settings(tmp_path, train={"start_from": str(tmp_path / "nowhere")}))
