"""causallm.garbage: collection pauses while a model is made, and goes on afterwards, whatever happens."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from text_models import save_text_model

from causallm import load_model
from causallm.garbage import uncollected


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_a_pause_ends_with_what_it_is_for() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()


def test_who_collects_by_hand_goes_on_doing_so() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_loading_is_such_a_pause(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    states: list[bool] = []
    load_model(tmp_path, progress=lambda *_: states.append(gc.isenabled()))
    assert states
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
    assert gc.isenabled()
