"""How chat shows an answer: its text as it comes, and thinking dimmed, hidden or plain."""

import sys
from typing import TextIO

OPEN, CLOSE = "<think>", "</think>"
WAYS = ("dim", "hide", "show")
DIM, RESET = "\x1b[2m", "\x1b[0m"


class Thinking:
    """Parts a text that comes in pieces into thinking, tags and all, and the rest.

    Thinking is what begins with the text, or before it where the prompt opened it (`inside`); a tag further on is text
    like any other. What may be part of a tag is held back until it is known.
    """

    def __init__(self, inside: bool = False) -> None:
        self._tag: str | None = CLOSE if inside else OPEN
        self._held = ""

    def push(self, text: str) -> list[tuple[str, bool]]:
        """What can be told of the text now: pieces, and whether each is thinking."""
        parts = []
        text, self._held = self._held + text, ""
        if self._tag == OPEN:
            begin = text.lstrip()
            if OPEN.startswith(begin[: len(OPEN)]) and len(begin) < len(OPEN):
                self._held = text
                return []
            self._tag = CLOSE if begin.startswith(OPEN) else None
        if self._tag == CLOSE:
            before, tag, after = text.partition(CLOSE)
            if not tag:
                tail = next((size for size in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:size])), 0)
                self._held = text[len(text) - tail :]
                return [(text[: len(text) - tail], True)]
            parts.append((before + tag, True))
            self._tag, text = None, after
        return [*parts, (text, False)]

    def flush(self) -> list[tuple[str, bool]]:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return [(held, self._tag == CLOSE)]


class Display:
    """Writes answers to a stream, one after the other. `think` is one of `WAYS` and may change between answers."""

    def __init__(self, stream: TextIO, think: str, colours: bool) -> None:
        self.think = think
        self._stream, self._colours = stream, colours
        self._parts = Thinking()
        self._hidden = False

    def begin(self, prompt: str) -> None:
        """An answer to this prompt is to come."""
        self._parts, self._hidden = Thinking(prompt.rstrip().endswith(OPEN)), False

    def show(self, text: str) -> None:
        """Write what the answer goes on with."""
        self._write(self._parts.push(text))

    def end(self) -> None:
        """Write what is held back, and end the line."""
        self._write(self._parts.flush())
        self._stream.write("\n")
        self._stream.flush()

    def _write(self, parts: list[tuple[str, bool]]) -> None:
        for text, thinking in parts:
            if thinking and self.think == "hide":
                self._hidden = self._hidden or bool(text)
                continue
            if self._hidden:
                # The empty lines between hidden thinking and the answer go with it.
                text = text.lstrip("\n")
                self._hidden = not text
            if text and thinking and self.think == "dim" and self._colours:
                text = f"{DIM}{text}{RESET}"
            self._stream.write(text)
        self._stream.flush()


def note(text: str) -> None:
    """Say something that is not the model's, on stderr."""
    print(text, file=sys.stderr, flush=True)
