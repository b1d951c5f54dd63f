"""Work in the background, asked for by somebody who is interrupted anywhere or gone before it is done."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from causallm.storage import background
from causallm.storage.background import AHEAD, URGENT, Background
from causallm.storage.disk import Disk


def interrupted_at(step: int, ask: Any) -> bool:
    """Call `ask`, with Ctrl-C where `background` begins its step of that number; whether it had so many."""
    steps = iter(range(step, -1, -1))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != background.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(steps, 1) == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        ask()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interruption_at_every_step_of_asking() -> None:
    """Nothing is done twice, nobody waits for ever, and no thread is lost."""
    work, step, done = Background(2), 0, list[object]()

    def ask() -> None:
        first, second = object(), object()
        work.ask([lambda: done.append(first), lambda: done.append(second)], AHEAD)

    def wait(settle: Callable[[], None]) -> None:
        waiting = threading.Thread(target=settle, daemon=True)
        waiting.start()
        waiting.join(10)
        assert not waiting.is_alive(), step

    while interrupted_at(step, ask):
        if step % 2:
            wait(work.settle)
            assert len(done) == len(set(done)) in (0, 2), step
        wait(work.ask([lambda: done.append("after")], AHEAD).settle)
        wait(work.settle)
        assert len(done) == len(set(done)) in (1, 3), step
        assert all(thread.is_alive() for thread in work._threads)
        done.clear()
        step += 1
    wait(work.settle)
    assert step > 50
    work.end()
    assert not any(thread.is_alive() for thread in work._threads)


def test_every_thread_may_be_the_one_that_finds_another_forgotten(tmp_path: Path) -> None:
    """The collector runs in whichever thread, also in one that asks or works."""
    (tmp_path / "weights").write_bytes(bytes(10))
    disk = Disk([tmp_path / "weights"], False, threads=2)

    def forget() -> None:
        other = Disk([tmp_path / "weights"], False, threads=2)
        threads.extend(other._background._threads)
        gone.append(weakref.ref(other))
        other.itself = other  # type: ignore[attr-defined]
        del other
        gc.collect()

    threads, gone = list[threading.Thread](), list[weakref.ref[Disk]]()
    disk._ask([forget] * 8, URGENT).wait()
    gc.collect()
    assert len(gone) == 8
    assert not any(reference() for reference in gone)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    disk.close()
