"""Blocks that share the arena: their order, interruptions in the middle of a pass, and what may be seen in between."""

import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_models import assert_same, shapes, smallest, spoken, streamed, tight  # noqa: F401  fixtures among them

from causallm import load_model
from causallm.storage.background import Background, Ticket
from causallm.storage.layout import Layout
from causallm.storage.open_file import OpenFile
from causallm.storage.storage import HEAD
from causallm.storage.streamed import place_in_arena

pytestmark = [pytest.mark.usefixtures("tight"), pytest.mark.filterwarnings("ignore:the budget has room for")]

Shapes = Callable[[str], Path]
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])


class StopHere(Exception):  # noqa: N818
    """Raised by hooks."""


def raising(*_: object) -> None:
    raise StopHere


class Reads:
    """How long reads take: `seconds(path, offset)`, asked when a read begins."""

    def __init__(self) -> None:
        self.seconds: Callable[[Path, int], float] = lambda path, offset: 0.0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Reads can be made to take a while."""
    read, reads = OpenFile.read, Reads()

    def later(file: Any, offset: int, target: memoryview) -> None:
        time.sleep(reads.seconds(file.path, offset))
        read(file, offset, target)

    monkeypatch.setattr(OpenFile, "read", later)
    return reads


def streaming(folder: Path, lookahead: int) -> Any:
    """Blocks, and with a lookahead of one the head too, are read."""
    if lookahead == 1:
        return streamed(folder, memory_budget=smallest(folder))
    return streamed(folder, fsu=True, fsu_lookahead=lookahead)


@pytest.mark.parametrize(("where", "lookahead"), [(0, 1), (1, 1), (2, 1), (HEAD, 1), (1, 2), (2, 2), (0, 3), (2, 3)])
def test_a_pass_that_is_broken_off(where: int, lookahead: int, shapes: Shapes, reads: Reads) -> None:  # noqa: F811
    folder = shapes("llama")
    resident, model = load_model(folder), streaming(folder, lookahead)
    delays = iter([0.01, 0.0, 0.005] * 10**4)
    reads.seconds = lambda *_: next(delays)
    module = model.lm_head if where == HEAD else model.layers[where].mlp
    for _ in range(2):
        hook = module.register_forward_pre_hook(raising)
        with pytest.raises(StopHere):
            model(IDS)
        hook.remove()
        assert all(p.is_meta for p in model.layers.parameters())
        assert torch.equal(model(IDS), resident(IDS))
    model.storage.close()


def test_weights_are_there_only_in_their_turn(shapes: Shapes) -> None:  # noqa: F811
    """And then they are the right ones, also for the last of them."""
    folder = shapes("qwen2")
    resident, model = load_model(folder), streamed(folder, memory_budget=smallest(folder))
    seen = []

    def look(number: int) -> Callable[..., None]:
        def hook(block: Any, *_: object) -> None:
            for name, weight in block.named_parameters():
                assert torch.equal(weight, resident.layers[number].get_parameter(name)), name
            others = [other for other in range(len(model.layers)) if other != number]
            assert all(p.is_meta for other in others for p in model.layers[other].parameters())
            seen.append(number)

        return hook

    for number, block in enumerate(model.layers):
        block.register_forward_pre_hook(look(number))
        block.register_forward_hook(look(number))
    spoken(model)
    assert seen == [0, 0, 1, 1, 2, 2] * 5
    assert all(p.is_meta for p in model.layers.parameters())
    model.storage.close()


def test_a_pass_without_the_head_does_not_read_it(shapes: Shapes) -> None:  # noqa: F811
    folder = shapes("llama")
    model, resident = streamed(folder, memory_budget=smallest(folder)), load_model(folder)
    asked: list[int] = []
    read = model.storage._disk.read
    starts = {layout.spans[0].offset: unit for unit, layout in model.storage._units.items()}

    def noted(spans: Any, *args: Any, **kwargs: Any) -> Ticket:
        asked.append(starts[spans[0].offset])
        return read(spans, *args, **kwargs)

    with torch.inference_mode():
        model(IDS, model.make_cache(), last=0)
        model.storage._disk.read = noted
        for last, heads in ((0, False), (0, False), (1, True), (None, True)):
            asked.clear()
            logits = model(IDS, model.make_cache(), last=last)
            assert torch.equal(logits, resident(IDS, resident.make_cache(), last=last))
            assert any(unit <= HEAD for unit in asked) == heads
    model.storage.close()


def test_two_models_at_once(shapes: Shapes) -> None:  # noqa: F811
    folders = [shapes("llama"), shapes("qwen3-moe"), shapes("llama")]
    models = [streamed(folder, memory_budget=smallest(folder)) for folder in folders]
    residents = [load_model(folder) for folder in folders]
    for _ in range(2):
        for model, resident in zip(models, residents, strict=True):
            assert torch.equal(model(IDS), resident(IDS))
    answers: list[Any] = [None] * len(models)

    def speak(number: int) -> None:
        answers[number] = spoken(models[number])

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer, resident in zip(answers, residents, strict=True):
        assert all(torch.equal(*pair) for pair in zip(answer, spoken(resident), strict=True))
    for model in models:
        model.storage.close()


def test_an_interruption_while_waiting(shapes: Shapes, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Ctrl-C, and again while is cleaned up after it: memory is not used again before all reads into it have ended."""
    folder = shapes("llama")
    model, resident = streamed(folder, memory_budget=smallest(folder)), load_model(folder)
    expected, wait = resident(IDS), Ticket.wait
    first = model.storage._units[0].spans[0].offset
    for interruptions in (1, 2, 3):
        reads.seconds = lambda _, offset: 0.3 * (offset == first)
        model(IDS)
        calls = iter([True] * interruptions)

        def interrupted(ticket: Ticket, calls: Any = calls) -> float:
            if next(calls, False):
                raise KeyboardInterrupt
            return wait(ticket)

        monkeypatch.setattr(Ticket, "wait", interrupted)
        for _ in range(interruptions):
            with suppress(KeyboardInterrupt):
                model(IDS)
        reads.seconds = lambda *_: 0.0
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            assert torch.equal(model(IDS), expected)
    model.storage.close()


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_an_interruption_anywhere(name: str, shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Also in the middle of asking for something."""
    folder = shapes(name)
    model, resident = streamed(folder, memory_budget=smallest(folder)), load_model(folder)
    expected, call = resident(IDS), Background._call
    for number in range(0, 48, 6):
        countdown = iter(range(number, -1, -1))

        def interrupted(*args: Any, countdown: Any = countdown, asks: bool = number % 12 > 0) -> None:
            left = next(countdown, 1)
            if left or asks:
                call(*args)
            if not left:
                raise KeyboardInterrupt

        monkeypatch.setattr(Background, "_call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            [model(IDS) for _ in range(99)]
        monkeypatch.setattr(Background, "_call", call)
        assert torch.equal(model(IDS), expected), number
        assert torch.equal(model(IDS.flip(1)), resident(IDS.flip(1))), number
    model.storage.close()


def test_training_may_go_through_blocks_that_are_read(shapes: Shapes) -> None:  # noqa: F811
    """After a run in inference mode, gradients with respect to the input: nothing here assumes inference."""
    folder = shapes("qwen3-moe")
    model, resident = streamed(folder, memory_budget=smallest(folder)), load_model(folder)
    spoken(model)
    ids = torch.randint(0, 90, (1, 40))
    assert torch.equal(model(ids), resident(ids))
    with torch.no_grad():
        assert torch.equal(model(ids), resident(ids))
    model.storage.close()


def test_closing_ends_the_threads_and_a_closed_model_says_so(shapes: Shapes) -> None:  # noqa: F811
    before = set(threading.enumerate())
    model = streamed(shapes("llama"), fsu=True)
    threads = set(threading.enumerate()) - before
    assert threads
    model(IDS)
    model.storage.close()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(RuntimeError, match="closed"):
        model(IDS)


def test_a_model_that_is_gone_leaves_no_threads(shapes: Shapes) -> None:  # noqa: F811
    before = set(threading.enumerate())
    model = streamed(shapes("qwen3-moe"), memory_budget=smallest(shapes("qwen3-moe")))
    model(IDS)
    threads = set(threading.enumerate()) - before
    assert threads
    del model
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_places_in_the_arena() -> None:
    def layout(nbytes: int) -> Layout:
        return Layout((), (), (), nbytes)

    units = {HEAD: layout(5), 0: layout(3), 1: layout(3), 2: layout(4)}
    assert place_in_arena(units, 8) == {0: 0, 1: 3, 2: 0, HEAD: 0}
    assert place_in_arena(units, 100) == {0: 0, 1: 3, 2: 6, HEAD: 10}
    with pytest.raises(ValueError, match="5 bytes does not fit into 4"):
        place_in_arena(units, 4)
