"""Work done in the background by a few threads, urgent work first; an interruption leaves nothing half asked for."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

URGENT, AHEAD = 0, 1
"""Somebody waits for it; it will be needed soon."""
Work = Callable[[], None]


class Ticket:
    """Works that belong together; each is done once, however many threads `work_on` them."""

    def __init__(self, works: Sequence[Work], priority: int = AHEAD):
        self.priority, self._works, self._left = priority, deque(works), len(works)
        self._error: BaseException | None = None
        self._lock, self._under_way = threading.Lock(), threading.Lock()
        if works:
            self._under_way.acquire()

    def work_on(self) -> None:
        """Do one of the works that nobody does, if there is one."""
        try:
            work = self._works.popleft()
        except IndexError:
            return
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:
            error = raised
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if not self._left:
                self._under_way.release()

    @property
    def waiting(self) -> int:
        """Works that nobody does yet."""
        return len(self._works)

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return not self._left

    @property
    def failed(self) -> bool:
        """Whether one of those that have ended did so with an error."""
        return self._error is not None

    def settle(self) -> None:
        """Wait until all have ended, however they did."""
        with self._under_way:
            pass

    def wait(self) -> float:
        """Wait until all have ended; returns the seconds that took. Raises what went wrong in one of them."""
        seconds = 0.0
        if not self.done:
            begin = time.perf_counter()
            self.settle()
            seconds = time.perf_counter() - begin
        if self._error is not None:
            raise self._error
        return seconds


class Background:
    """What `threads` threads do, until `end`.

    Asking takes no lock: Ctrl-C may come between any two steps of it, and the collector may call `end` of something
    forgotten in any thread at any time.
    """

    def __init__(self, threads: int):
        self._open = list[Ticket](), list[Ticket]()
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._ended = False
        self._threads = [threading.Thread(target=self._labour, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def ask(self, works: Sequence[Work], priority: int) -> Ticket:
        """Have these done."""
        ticket = Ticket(works, priority)
        if works:
            self._open[priority].append(ticket)
            self._call(ticket)
        return ticket

    def settle(self) -> None:
        """Wait until all that was asked for has ended."""
        for ticket in [*self._open[URGENT], *self._open[AHEAD]]:
            self._call(ticket)
            ticket.settle()

    def end(self) -> None:
        """End the threads, after what each is at, and wait for them."""
        self._ended = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _call(self, ticket: Ticket) -> None:
        """Wake threads. One that wakes does all there is: so what an interruption kept from being called is done with
        what is called next."""
        for _ in range(ticket.waiting):
            self._calls.put(None)

    def _next(self) -> Ticket | None:
        return next((ticket for tickets in self._open for ticket in tuple(tickets) if ticket.waiting), None)

    def _labour(self) -> None:
        while not self._ended:
            self._calls.get()
            while not self._ended and (ticket := self._next()):
                ticket.work_on()
                if ticket.done:
                    self._forget(ticket)
                del ticket  # which would keep alive whom it serves

    def _forget(self, ticket: Ticket) -> None:
        # Two threads may have found it done.
        with suppress(ValueError):
            self._open[ticket.priority].remove(ticket)
