"""The chat verb on a pseudo-terminal, as a person uses it: line editing, history, Ctrl-C and Ctrl-D, commands."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from causallm import load_model
from causallm.conversation import Conversation

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX's", allow_module_level=True)

import pty
import select
import termios

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "res" / "tiny-stories"
OPTIONS = ("--dtype", "float32", "--threads", "1", "--greedy", "-n", "20")
# The new process makes the terminal its own, so that Ctrl-C there is a signal to it.
CHILD = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
READY = "\x1b[?2004h"
"""What the line editor sends when it begins to read a message."""
ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"
pytestmark = pytest.mark.usefixtures("untyped")


class Session:
    """A chat process and the terminal it runs on."""

    def __init__(self, terminal: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._terminal, self._shown = terminal, ""

    def until(self, text: str, seconds: float = 60.0) -> str:
        """Wait for a text; returns what came before it."""
        end = time.monotonic() + seconds
        while text not in self._shown:
            readable, _, _ = select.select([self._terminal], [], [], max(end - time.monotonic(), 0))
            chunk = _read(self._terminal) if readable else b""
            assert chunk, f"{text!r} never came, but {self._shown!r}"
            self._shown += chunk.decode(errors="replace").replace("\r\n", "\n")
        before, _, self._shown = self._shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def say(self, text: str) -> str:
        """Type a message and wait for the next prompt; returns what was shown after the message."""
        self.type(text + ENTER)
        # The editor switches its modes off before the message is worked on.
        self.until("\x1b[?2004l")
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.until(READY)).lstrip("\r\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that nobody holds the other end any more
        return b""


@contextmanager
def started(*arguments: str, **variables: str) -> Iterator[Session]:
    terminal, end = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 200))
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", CHILD, sys.executable, str(ROOT / "main.py"), "chat", str(MODEL)]
    process = subprocess.Popen(
        [*command, *OPTIONS, *arguments], stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True
    )
    os.close(end)
    try:
        yield Session(terminal, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(terminal)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL, dtype="float32")


@pytest.fixture
def talk(model: Any) -> Conversation:
    return Conversation(model, do_sample=False, max_new_tokens=20)


def saved(session: Session, path: Path) -> list[dict[str, str]]:
    assert session.say(f"/save {path}") == ""
    messages: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return messages


def test_a_conversation_on_a_terminal(talk: Conversation, tmp_path: Path) -> None:
    history, path = tmp_path / "state" / "history", tmp_path / "talk.json"
    with started("--history", str(history)) as session:
        assert "/help lists commands" in session.until(READY)
        asked = ["Tell me a story.", "one\ntwo", "three\nfour", "five\n\nsix"]
        typed = [asked[0], f"one{ALT_ENTER}two", f"three\\{ENTER}four", f'"""{ENTER}five{ENTER}{ENTER}six{ENTER}"""']
        for text, keys in zip(asked, typed, strict=True):
            expected = talk.answer(text)
            shown = session.say(keys)
            assert shown.startswith(expected + "\n")
            assert ("(cut off: " in shown) == (talk.report.generated_tokens == 20)
        assert saved(session, path) == talk.messages
        assert "reused: " in session.say("/stats")
        assert session.say("/set temperature -1").startswith("error: temperature: got -1.0")
        assert session.say("/nonsense").startswith("error: unknown command /nonsense")
        assert session.say("/undo").startswith("taken back: five six")
        talk.undo()
        assert saved(session, path) == talk.messages
        assert session.say("/reset") == ""
        talk.reset()
        assert session.say(f"/load {path}").startswith("3 turns")
        talk.load(path)
        assert session.say("And then?").startswith(talk.answer("And then?") + "\n")
        session.type("never said" + CTRL_C)
        assert "(Ctrl-D or /exit leaves)" in session.until(READY)
        # The line before the last from the history, which what was given up is not in: /load.
        assert session.say(UP + UP).startswith("3 turns")
        assert saved(session, path) == talk.messages[:-2]
        session.type(CTRL_D)
        assert session.process.wait(60) == 0
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+Tell me a story." in history.read_text(encoding="utf-8")


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with started("--history", str(tmp_path / "history")) as session:
        session.until(READY)
        assert session.say("Hi!").startswith(talk.answer("Hi!") + "\n")
        # An answer that would never end.
        assert session.say("/set logit_bias [[0, -100], [2, -100]]") == ""
        assert session.say("/set max_new_tokens 900") == ""
        session.type("Tell me a long story." + ENTER)
        session.until("\x1b[?2004l")
        session.until("Lily")
        session.type(CTRL_C)
        session.until("(stopped)")
        session.until(READY)
        messages = saved(session, path)
        talk.configure(max_new_tokens=900, logit_bias=[[0, -100], [2, -100]])
        events, whole = talk.say("Tell me a long story."), ""
        while len(whole) < len(messages[-1]["content"]):
            whole += next(events).text
        events.close()
        assert messages == talk.messages
        assert len(whole) < 2000
        assert session.say("/set max_new_tokens 8") == ""
        talk.configure(max_new_tokens=8)
        assert session.say("Why?").startswith(talk.answer("Why?") + "\n")
        session.type("/exit" + ENTER)
        assert session.process.wait(60) == 0
