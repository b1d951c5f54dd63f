"""The cache of experts: which stay, what is counted, and that no expert is used before its bytes are there."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_models import assert_same, between, shapes, smallest, streamed, tight  # noqa: F401  fixtures among them

from causallm import load_model
from causallm.storage import open_file
from causallm.storage.experts import CachedExperts

pytestmark = [pytest.mark.usefixtures("tight"), pytest.mark.filterwarnings("ignore:the budget has room for")]

Shapes = Callable[[str], Path]
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])


@pytest.fixture
def model(shapes: Shapes) -> Any:  # noqa: F811
    """Four slots for the experts of two layers, six in each."""
    folder = shapes("qwen3-moe")
    model = streamed(folder, memory_budget=smallest(folder))
    yield model
    model.storage.close()


def cache_of(model: Any) -> CachedExperts:
    cache: CachedExperts = model.storage._experts
    return cache


def held(cache: CachedExperts) -> list[tuple[int, int]]:
    """From the one that goes first to the one that stays longest."""
    return list(cache._held)


def is_right(expert: Any, layer: int, number: int, resident: Any) -> bool:
    wanted = resident.layers[layer].mlp.experts[number]
    return all(torch.equal(p, wanted.get_parameter(name)) for name, p in expert.named_parameters())


def test_the_one_used_last_stays(model: Any, shapes: Shapes) -> None:  # noqa: F811
    cache, resident = cache_of(model), load_model(shapes("qwen3-moe"))
    steps = [
        (0, [3, 1], [], [(0, 3), (0, 1)]),
        (2, [5, 0], [], [(0, 3), (0, 1), (2, 5), (2, 0)]),
        (0, [1, 4], [1], [(2, 5), (2, 0), (0, 1), (0, 4)]),
        (0, [4], [4], [(2, 5), (2, 0), (0, 1), (0, 4)]),
        (2, [0, 1], [0], [(0, 1), (0, 4), (2, 0), (2, 1)]),
        (2, [2, 3], [], [(2, 0), (2, 1), (2, 2), (2, 3)]),
    ]
    hits = misses = 0
    for layer, asked, ready, after in steps:
        fetch = cache.begin(layer, asked)
        assert sorted(fetch.ready) == sorted(ready)
        found = {**fetch.ready, **fetch.wait()}
        assert sorted(found) == sorted(asked)
        assert all(is_right(expert, layer, number, resident) for number, expert in found.items())
        assert held(cache) == after
        hits, misses = hits + len(ready), misses + len(asked) - len(ready)
        assert (cache.hits, cache.misses) == (hits, misses)


def test_what_one_begin_gave_stays_until_the_second_after_it(model: Any, shapes: Shapes) -> None:  # noqa: F811
    cache, resident = cache_of(model), load_model(shapes("qwen3-moe"))
    assert cache.most == 2
    before = None
    for layer, asked in ((0, [0, 1]), (0, [2, 3]), (2, [0, 1]), (2, [2, 0]), (0, [5, 1]), (0, [0, 5])):
        fetch = cache.begin(layer, asked)
        found = {**fetch.ready, **fetch.wait()}
        if before is not None:
            assert all(is_right(expert, before[0], number, resident) for number, expert in before[1].items())
        before = layer, found


def test_a_slot_is_always_the_same_memory(model: Any) -> None:
    cache, addresses = cache_of(model), set()
    for first in (0, 2, 4, 1, 3):
        for layer in (0, 2):
            fetch = cache.begin(layer, [first, (first + 1) % 6])
            expert: Any
            for expert in {**fetch.ready, **fetch.wait()}.values():
                pointers = tuple(p.data_ptr() for p in expert.parameters())
                assert all(pointer % 64 == 0 for pointer in pointers)
                assert all(not p.requires_grad for p in expert.parameters())
                addresses.add(pointers)
    assert len(addresses) == 4


def test_prefill_with_more_experts_than_slots(model: Any, shapes: Shapes) -> None:  # noqa: F811
    ids = torch.randint(0, 90, (2, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids), load_model(shapes("qwen3-moe"))(ids))
    counts = model.storage.counts()
    assert counts.misses == 12  # Each expert of both layers once: all are chosen by so many tokens.
    assert counts.hits == 0


def test_room_for_all_reads_each_expert_once(shapes: Shapes) -> None:  # noqa: F811
    folder = shapes("qwen3-moe")
    model, resident = streamed(folder, memory_budget=between(folder, 0.999)), load_model(folder)
    slots = len(cache_of(model)._free)
    assert_same(model, resident)
    assert slots == 11
    assert model.storage.counts().misses < 30
    model.storage.close()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads of experts take a while; those whose numbers are put into this list fail."""
    read, lock, count, chosen = open_file.OpenFile.read, threading.Lock(), iter(range(10**9)), list[int]()
    slow = [True]

    def slowly(file: Any, offset: int, target: memoryview) -> None:
        with lock:
            number = next(count)
        time.sleep(0.01 if slow else 0)
        if chosen and number - start[0] in chosen:
            raise OSError(5, "Input/output error", str(file.path))
        read(file, offset, target)

    start = [0]

    def fail(*numbers: int, slowly: bool = True) -> None:
        slow[:] = [True] * slowly
        start[0] = next(count) + 1
        chosen[:] = numbers

    monkeypatch.setattr(open_file.OpenFile, "read", slowly)
    return fail


def test_experts_that_nobody_waited_for_are_not_ready(model: Any, shapes: Shapes, failing: Any) -> None:  # noqa: F811
    """Where what was computed meanwhile failed, or was interrupted, their bytes may come later, or never."""
    cache, resident = cache_of(model), load_model(shapes("qwen3-moe"))
    cache.begin(0, [1, 2])
    fetch = cache.begin(0, [2, 1])
    assert all(is_right(expert, 0, number, resident) for number, expert in {**fetch.ready, **fetch.wait()}.items())
    failing(0, 4)
    cache.begin(2, [1, 2])
    failing()
    fetch = cache.begin(2, [2, 1])
    assert all(is_right(expert, 2, number, resident) for number, expert in {**fetch.ready, **fetch.wait()}.items())


def test_a_read_error_gives_the_slots_back(model: Any, shapes: Shapes, failing: Any) -> None:  # noqa: F811
    cache, resident = cache_of(model), load_model(shapes("qwen3-moe"))
    cache.begin(0, [0]).wait()
    for _ in range(5):
        failing(1)
        fetch = cache.begin(0, [0, 3])
        assert list(fetch.ready) == [0]
        with pytest.raises(OSError, match=r"model\.safetensors"):
            fetch.wait()
        assert held(cache) == [(0, 0)]
        assert len(cache._free) == 3
    failing()
    for asked in ([1, 2], [3, 4], [0, 5]):
        fetch = cache.begin(2, asked)
        found = {**fetch.ready, **fetch.wait()}
        assert all(is_right(expert, 2, number, resident) for number, expert in found.items())


@pytest.mark.parametrize("time_", [1, 40])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_read_errors_anywhere_and_on(name: str, time_: int, shapes: Shapes, failing: Any) -> None:  # noqa: F811
    folder = shapes(name)
    model, resident = streamed(folder, memory_budget=smallest(folder)), load_model(folder)
    ids = torch.randint(0, 90, (1, time_), generator=torch.Generator().manual_seed(1))
    expected, blamed = resident(ids), set()
    for number in range(0, 30, 6):
        failing(number, number + 1, slowly=False)
        try:
            assert torch.equal(model(ids), expected), number
        except OSError as error:
            blamed.add(error.filename)
        other = ids.flip(1)
        failing(slowly=False)
        with suppress(OSError):
            model(other)  # What was read ahead of it may have failed, too.
        assert torch.equal(model(other), resident(other)), number
        assert torch.equal(model(ids), expected), number
    assert blamed == {str(folder / "model.safetensors")}
    model.storage.close()
