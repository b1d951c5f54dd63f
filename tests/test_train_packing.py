"""Whole documents in windows: none is cut that fits, every target counts once, and epochs mix them anew."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_windows import document, token_file
from train_runs import losses, run, settings

from causallm.training.packing import WholePacking, best_fit
from causallm.training.settings import Settings
from causallm.training.windows import IGNORED, Windows


def targets_of(windows: Windows, epoch: int = 0) -> list[tuple[int, int]]:
    """All (token, target) that count, in no order."""
    batch = windows.batch(range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch))
    counted = batch.targets != IGNORED
    return sorted(zip(batch.ids[counted].tolist(), batch.targets[counted].tolist(), strict=True))


@pytest.mark.parametrize("length", [2, 8, 16, 39, 94, 120])
def test_every_target_of_every_document_counts_once_an_epoch(tmp_path: Path, length: int) -> None:
    data = token_file(tmp_path)
    expected = sorted(
        (int(data.ids[at]), int(data.ids[at + 1]))
        for number in range(data.documents)
        for at in range(document(data, number).start, document(data, number).stop - 1)
        if data.counts[at + 1]
    )
    windows = Windows(data, length, seed=3, packing="whole")
    assert targets_of(windows) == expected
    assert targets_of(windows, epoch=1) == expected


@pytest.mark.parametrize("length", [16, 39, 95])
def test_no_document_that_fits_is_cut(tmp_path: Path, length: int) -> None:
    data = token_file(tmp_path)
    packing = WholePacking(data.starts, length, seed=3, shuffle=True)
    pieces = [piece for place in range(packing.per_epoch) for piece in packing.pieces(0, place)]
    for number in range(data.documents):
        own = document(data, number)
        if own.stop - own.start <= length + 1:
            assert (own.start, own.stop) in pieces
    assert len(pieces) == len(set(pieces))


def test_a_long_document_goes_on_where_its_last_window_ended() -> None:
    packing = WholePacking(np.array([0, 20]), 8, seed=0, shuffle=False)
    pieces = sorted(piece for place in range(packing.per_epoch) for piece in packing.pieces(0, place))
    assert pieces == [(0, 9), (8, 17), (16, 20)]
    exact = WholePacking(np.array([0, 17]), 8, seed=0, shuffle=False)
    assert sorted(exact.pieces(0, place)[0] for place in range(exact.per_epoch)) == [(0, 9), (8, 17)]


def test_room_at_the_end_of_a_window_does_not_count_and_meets_no_document(tmp_path: Path) -> None:
    batch = Windows(token_file(tmp_path, (5, 5)), 7, seed=0, packing="whole").batch(range(2))
    assert (batch.targets[:, 4:] == IGNORED).all()
    assert batch.documents.tolist() == [[0] * 5 + [1] * 2] * 2


def test_epochs_have_as_many_windows_and_are_the_same_whoever_asks(tmp_path: Path) -> None:
    data = token_file(tmp_path, (5, 9, 5, 7, 5, 9, 7, 5, 3))
    windows, again = (Windows(data, 16, seed=3, packing="whole") for _ in range(2))
    count = windows.per_epoch
    first, second = (windows.batch(range(epoch * count, (epoch + 1) * count)).ids for epoch in (0, 1))
    assert not torch.equal(first, second)
    for number in (count, 0, 2 * count - 1, 1):
        alone = again.batch(range(number, number + 1)).ids[0]
        assert torch.equal(alone, (first if number < count else second)[number % count])
    assert not torch.equal(Windows(data, 16, seed=4, packing="whole").batch(range(count)).ids, first)


def test_best_fit_fills_the_fullest_bin_that_has_room() -> None:
    assert best_fit([9, 6, 4, 3, 1], 10) == [[0, 4], [1, 2], [3]]
    draw = np.random.default_rng(0)
    lengths = sorted(draw.integers(1, 41, 300).tolist(), reverse=True)
    bins = best_fit(lengths, 40)
    assert sorted(itertools.chain(*bins)) == list(range(300))
    assert max(sum(lengths[index] for index in chosen) for chosen in bins) <= 40
    # Best fit, longest first, needs at most 11/9 of the fewest bins and 6/9 (Johnson 1973, Dosa 2007).
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 40) + 6 / 9


def test_packing_wastes_little_where_lengths_are_mixed(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(20, 200, 400).tolist()
    windows = Windows(token_file(tmp_path, lengths), 256, seed=0, packing="whole")
    assert windows.per_epoch * 256 < 1.05 * sum(lengths)


def test_a_run_packs_as_its_file_says_and_is_continued_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def chosen(name: str, packing: str) -> Settings:
        data = {"packing": packing, "separator": ".", "context_length": 32}
        return settings(tmp_path, data=data, output=str(tmp_path / name))

    whole = losses(run(chosen("whole", "whole")))
    assert whole != losses(run(chosen("cut", "cut")))
    first = losses(run(chosen("killed", "whole"), kill_at=5))
    rest = losses(run(chosen("killed", "whole"), resume=True))
    assert first[:4] + rest == whole


def test_an_unknown_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.packing is 'best', expected one of cut, whole"):
        settings(tmp_path, data={"packing": "best"})
