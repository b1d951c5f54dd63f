"""Conversations as lists of messages: checked, read from and written to JSON files, and shortened by whole turns."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causallm.config.json_file import read_json
from causallm.weights.atomic_file import atomic_file

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


def save_messages(path: Path, messages: Sequence[Message]) -> None:
    """Write {"messages": [...]}, the form that training data has too; a file that exists is replaced at once."""
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=1) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def load_messages(path: Path) -> list[Message]:
    """Read what `save_messages` wrote; ValueError naming file and message for what is no finished conversation."""
    messages = read_json(path).get("messages")
    if not isinstance(messages, list):
        raise ValueError(f'{path}: expected {{"messages": [...]}} as a conversation is saved')
    return check_messages(messages, str(path))


def check_messages(messages: Sequence[Any], source: str) -> list[Message]:
    """Copies with role and content only; ValueError unless it is system (or not), then user, assistant, user, ..."""
    checked: list[Message] = []
    for number, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            raise ValueError(f"{source}: message {number} is {_short(message)}, expected one with role and content")
        turns = sum(earlier["role"] != "system" for earlier in checked)
        expected = ["assistant"] if turns % 2 else ["user"] if checked else ["system", "user"]
        if message.get("role") not in expected:
            raise ValueError(
                f"{source}: message {number} has role {message.get('role')!r}, expected {' or '.join(expected)}"
            )
        checked.append({"role": message["role"], "content": content})
    if checked and checked[-1]["role"] == "user":
        raise ValueError(f"{source}: the last message is the user's, expected an answer after it")
    return checked


def without_oldest_turn(messages: Sequence[Message]) -> list[Message]:
    """The messages without the first of the user's and what answered it."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return [*messages[: users[0]], *messages[users[1] :]] if len(users) > 1 else list(messages)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
