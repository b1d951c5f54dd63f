"""The commands of chat: lines that begin with a slash."""

import json
import os
import re
import shlex
from collections.abc import Callable
from typing import Any

from causallm.commands.chat_display import WAYS, Display, note
from causallm.commands.model_arguments import key_values
from causallm.conversation import Conversation
from causallm.options import READERS

HELP = """\
/system [TEXT]      set the system message; without TEXT remove it
/set [KEY VALUE]    change a generation option (temperature 0.7, max_new_tokens 200, ...), think dim|hide|show,
                    on_full refuse|drop|slide, template_var NAME=VALUE; VALUE default takes it back; alone: list them
/stats              tokens, times and memory of the last answer
/undo               take the last message and its answer back
/reset              begin anew, with the same system message
/save FILE [CACHE]  write the conversation, and to CACHE what was computed of it
/load FILE [CACHE]  go on with a conversation that was saved
/help               this list
/exit               leave, as Ctrl-D
A message goes on in the next line after Alt-Enter, after a \\ at the end of a line, and between two lines of \"\"\".
Ctrl-C stops an answer. A message that begins with a slash needs a space before it."""

TEXTS = ("stop", "bad_words")
"""Options whose value is taken as text, but for a JSON list."""


class Commands:
    """Carries commands out on a conversation and what shows it."""

    def __init__(self, conversation: Conversation, display: Display, load_seconds: float = 0.0) -> None:
        self._conversation, self._display, self._load_seconds = conversation, display, load_seconds
        self._actions: dict[str, Callable[[str], None]] = {
            "help": lambda _: note(HELP),
            "system": self._system,
            "set": self._set,
            "stats": lambda _: self._stats(),
            "undo": lambda _: note(f"taken back: {_short(conversation.undo())}"),
            "reset": lambda _: conversation.reset(),
            "save": lambda rest: conversation.save(*_files("/save", rest)),
            "load": self._load,
        }

    def run(self, line: str) -> bool:
        """Whether chat goes on after the command; ValueError or OSError where it cannot be done."""
        name, _, rest = line[1:].partition(" ")
        if name == "exit":
            return False
        if name not in self._actions:
            raise ValueError(f"unknown command /{name}, /help lists them; a message needs a space before the slash")
        self._actions[name](rest.strip())
        return True

    def _system(self, text: str) -> None:
        self._conversation.system = text or None

    def _load(self, rest: str) -> None:
        self._conversation.load(*_files("/load", rest))
        note(f"{sum(message['role'] == 'user' for message in self._conversation.messages)} turns")

    def _set(self, rest: str) -> None:
        conversation = self._conversation
        key, _, value = rest.partition(" ")
        key, value = key.replace("-", "_"), value.strip()
        if not key:
            self._list()
        elif not value:
            raise ValueError(f"/set {key}: expected a value after it")
        elif key == "think":
            if value not in WAYS:
                raise ValueError(f"think: got '{value}', expected {', '.join(WAYS)}")
            self._display.think = value
        elif key == "on_full":
            conversation.on_full = value
        elif key == "template_var":
            conversation.template_variables.update(template_variables("/set template_var", [value]))
        elif key not in READERS:
            raise ValueError(f"unknown option '{key}'; known are: think, on_full, template_var, {', '.join(READERS)}")
        else:
            conversation.configure(**{key: _value(key, value)})

    def _list(self) -> None:
        conversation = self._conversation
        listed = {"think": self._display.think, "on_full": conversation.on_full, **conversation.options}
        for name, value in listed.items():
            note(f"{name} {value if isinstance(value, str) else json.dumps(value)}")
        for name, value in conversation.template_variables.items():
            note(f"template_var {name}={json.dumps(value)}")

    def _stats(self) -> None:
        turn, report = self._conversation.turn, self._conversation.report
        if turn is None:
            raise ValueError("there is no answer yet")
        report.load_seconds = self._load_seconds
        used, context = turn.tokens + report.generated_tokens, self._conversation.model.max_length
        note("\n".join([*report.lines(), f"context: {used} of {context} tokens"]))


def is_command(text: str) -> bool:
    """Whether a message is a command: a slash and a word of letters alone."""
    return re.match(r"/[a-z]+(\s|$)", text) is not None


def template_variables(option: str, texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE texts as variables of the chat template."""
    variables = key_values(option, texts)
    if "messages" in variables:
        raise ValueError(f"{option}: messages is the conversation itself")
    return variables


def _value(key: str, text: str) -> Any:
    if text == "default":
        return None
    if key in TEXTS and not text.startswith("["):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, bool) != (key == "do_sample") and value is not None:
        raise ValueError(f"{key}: got {text}, expected {'true or false' if key == 'do_sample' else 'a value'}")
    return value


def _files(command: str, rest: str) -> list[str]:
    posix = os.name == "posix"  # elsewhere a backslash parts folders, and quotes are left for the caller to take off
    try:
        parts = shlex.split(rest, posix=posix)
    except ValueError as error:
        raise ValueError(f"{command}: {error}") from None
    files = parts if posix else [part.strip("\"'") for part in parts]
    if len(files) not in (1, 2):
        raise ValueError(f"{command}: got {len(files)} file names, expected one or two; quote a name with spaces")
    return files


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
