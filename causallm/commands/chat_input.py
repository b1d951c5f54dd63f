"""Where chat takes messages from: an edited line on a terminal, or lines of a pipe or file."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from causallm.commands.chat_display import note

PROMPT, CONTINUATION = "> ", "... "
BLOCK = '"""'

Read = Callable[[], str]
"""Gives the next message; EOFError when there are no more, KeyboardInterrupt where Ctrl-C gave one up."""


def is_open(text: str) -> bool:
    """Whether a message goes on in the next line: after a backslash at the end, or inside a block of three quotes."""
    begun = text.lstrip()
    if begun.startswith(BLOCK):
        return not begun[len(BLOCK) :].rstrip().endswith(BLOCK)
    return text.endswith("\\")


def finished(text: str) -> str:
    """The message without what made it go on from line to line."""
    begun = text.strip()
    if begun.startswith(BLOCK):
        return begun[len(BLOCK) :].removesuffix(BLOCK).strip("\n")
    return text.replace("\\\n", "\n")


def plain_reader(on_terminal: bool) -> Read:
    """Lines of stdin; on a terminal with a prompt, which goes to stderr unless stdout is a terminal too."""

    def line(prompt: str) -> str:
        if on_terminal and sys.stdout.isatty():
            return input(prompt)
        if on_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.removesuffix("\n")

    def read() -> str:
        text = line(PROMPT).removeprefix("\ufeff")
        try:
            while is_open(text):
                text += "\n" + line(CONTINUATION)
        except EOFError:
            pass
        return finished(text)

    return read


def terminal_reader(history: Path) -> Read:
    """An editor with history and several lines, by prompt_toolkit; a plain one, and one line that says so, without."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ImportError:
        note("chat: no line editor, for prompt_toolkit is not installed (pip install prompt_toolkit)")
        return plain_reader(on_terminal=True)
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        multiline=True, key_bindings=keys, prompt_continuation=CONTINUATION, history=_history(history)
    )
    return lambda: finished(session.prompt(PROMPT))


def _history(path: Path) -> Any:  # its type is of a package that may not be there
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Conversations are private: the file is for its owner's eyes.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        note(f"chat: the history is not kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))


def history_path() -> Path:
    """Where the history of chat is kept: the folder for state of the XDG specification, or Windows' own."""
    home = Path.home()
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        folder = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    return folder / "causallm" / "chat_history"
