"""Chat templates: the Jinja source in a model folder, rendered byte for byte as transformers renders it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from causallm.config.json_file import read_json
from causallm.template_environment import ENVIRONMENT

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# A template is a program: besides Jinja's own errors it raises whatever Python raises for what it does.
TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template; `tool_use` is a second source that takes its place when tools are given.

    The environment is that of transformers' `apply_chat_template`: sandboxed, blocks trimmed, loop controls,
    `raise_exception`, `strftime_now`, plain `tojson` and `generation` blocks.

    Raises:
        ValueError: the source is not a Jinja template.
    """

    def __init__(self, source: str, tool_use: str | None = None) -> None:
        self.source, self.tool_use = source, tool_use
        self._plain = _compile(source)
        self._tool_use = None if tool_use is None else _compile(tool_use)

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Returns the conversation as one text for the model.

        `messages` are objects with at least "role" and "content"; a key whose value is None counts as absent.
        `tools` are JSON schemas, `documents` objects with "title" and "text". `variables` are what else the
        template reads, such as `bos_token` or `enable_thinking`. Objects are mappings; all of them may come
        from a user, and are checked.

        Raises:
            ValueError: no messages, values that JSON cannot hold, or a template that refuses them or fails.
        """
        if not messages:
            raise ValueError("chat template: got no messages, expected at least one")
        template = self._plain if tools is None or self._tool_use is None else self._tool_use
        given = {
            **_plain_data(variables, "variables"),
            "messages": [_plain_message(message) for message in messages],
            "tools": None if tools is None else _plain_objects(tools, "tool"),
            "documents": None if documents is None else _plain_objects(documents, "document"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(given)
        except TEMPLATE_FAILURES as error:
            raise _problem(error) from error


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """Returns the chat template of a model folder, or None where it has none.

    Looked for, first found wins: chat_template.jinja (with chat_templates/*.jinja), chat_template.json, and
    the "chat_template" of tokenizer_config.json; each may be one template or several with names, then
    "default" is taken and "tool_use" serves conversations with tools.

    Raises:
        ValueError: broken JSON, a broken template, or several templates and none named "default".
    """
    files = [folder / "chat_template.jinja", *sorted((folder / "chat_templates").glob("*.jinja"))]
    sources = {file.stem: _read_text(file) for file in files if file.is_file()}
    if sources:
        if "chat_template" in sources:
            sources["default"] = sources.pop("chat_template")
        return _choose(sources, str(folder))
    legacy = folder / "chat_template.json"
    for origin, config in (
        (legacy, read_json(legacy) if legacy.is_file() else {}),
        (folder / "tokenizer_config.json", tokenizer_config),
    ):
        declared = config.get("chat_template")
        if isinstance(declared, str):
            return ChatTemplate(declared)
        if declared is not None:
            return _choose(_named_sources(declared, str(origin)), str(origin))
    return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text at byte {error.start}") from None


def _named_sources(declared: Any, origin: str) -> dict[str, str]:
    try:
        sources = {entry["name"]: entry["template"] for entry in declared}
    except (KeyError, TypeError):
        sources = {}
    if not sources or not all(isinstance(source, str) for source in sources.values()):
        raise ValueError(f"{origin}: chat_template is neither a text nor a list of {{name, template}} objects")
    return sources


def _choose(sources: Mapping[str, str], origin: str) -> ChatTemplate:
    if "default" not in sources:
        names = ", ".join(sorted(sources))
        raise ValueError(f"{origin}: no chat template named 'default', found only: {names}")
    return ChatTemplate(sources["default"], sources.get("tool_use"))


def _compile(source: str) -> Template:
    try:
        return ENVIRONMENT.from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {_one_line(error)}") from error
    except (RecursionError, SyntaxError) as error:
        raise ValueError(f"chat template: too deeply nested: {_one_line(error)}") from error


def _problem(error: Exception) -> ValueError:
    """Names the innermost line of the template on the way to `error`."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    place = f"chat template, line {lines[-1]}" if lines else "chat template"
    return ValueError(f"{place}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain_message(message: Any) -> dict[str, Any]:
    """A copy without absent values, in which reasoning is found under each name that templates read it by."""
    if not isinstance(message, Mapping):
        raise ValueError(f"chat template: got a message of type {type(message).__name__}, expected an object")
    plain = _plain_data({key: value for key, value in message.items() if value is not None}, "message")
    reasoning = next((plain[key] for key in REASONING_KEYS if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain_objects(values: Sequence[Any], kind: str) -> list[dict[str, Any]]:
    for value in values:
        if not isinstance(value, Mapping):
            raise ValueError(f"chat template: got a {kind} of type {type(value).__name__}, expected an object")
    return [_plain_data(value, kind) for value in values]


def _plain_data(value: Any, kind: str) -> Any:
    """A copy made of JSON's own types: the sandbox does not know what methods of other objects do."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain_data(key, kind): _plain_data(item, kind) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_data(item, kind) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain_data(item, kind) for item in value)
    raise ValueError(
        f"chat template: cannot render the {type(value).__name__} in {kind}, expected text, numbers, lists and objects"
    )
