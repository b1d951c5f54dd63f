"""The command line: a table of verbs, imported when used, and one way to report a user's mistakes."""

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from causallm.allocator import keep_freed_memory

VERBS = {
    "run": "answer a prompt (the default: MODEL may stand first)",
    "chat": "converse: line editing, commands, streaming; a message a line from a pipe",
    "cache": "compute a prompt once and keep its keys and values in a file",
    "bench": "measure tokens a second of prompts and generation",
    "perplexity": "measure how well a model predicts a text",
    "train": "train a model from a YAML file",
    "convert": "convert weights between Hugging Face, GGUF, this project's file and NNTrainer's .bin",
    "quantize": "pack weights in block formats: Q4_0, Q4_K, Q6_K, Q8_0",
    "inspect": "show a model's layers, shapes and sizes without loading its weights",
    "download": "fetch a model's files from the Hugging Face hub",
}
"""Each verb is causallm/commands/<verb>.py with `add_arguments(parser)` and `execute(args) -> int`."""

EPILOG = "verbs:\n" + "\n".join(f"  {verb:<12}{text}" for verb, text in VERBS.items())


class Parser(argparse.ArgumentParser):
    """Reports a mistake as everything else does, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        # So that what is cleaned up after Ctrl-C is so after a kill, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return reporting_errors(lambda: _execute(arguments))


def console() -> None:
    """The console script `causallm`."""
    sys.exit(main())


def _execute(arguments: list[str]) -> int:
    verb = "run"
    if arguments and arguments[0] in VERBS:
        verb = arguments.pop(0)
    elif arguments:
        _check_verb(arguments[0])
    command = importlib.import_module(f"causallm.commands.{verb}")
    parser = Parser(
        "main.py" if verb == "run" else f"main.py {verb}",
        description=command.__doc__,
        epilog=EPILOG if verb == "run" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    # Intermixed: an optional prompt may stand after options, which the ordinary way would not find any more.
    return command.execute(parser.parse_intermixed_args(arguments))


def _check_verb(word: str) -> None:
    """ValueError for what can only be a verb mistyped: it is like one and names no model."""
    like = difflib.get_close_matches(word, VERBS, 1)
    if like and "/" not in word and not os.path.exists(word):
        raise ValueError(f"there is neither a verb nor a model '{word}', did you mean {like[0]}?")


def reporting_errors(work: Callable[[], int]) -> int:
    """Do `work`; a user's mistake or a failing file becomes one line on stderr and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            code = work()
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            _drop_unwritable_output()
            return 1
        except (ValueError, OSError) as error:
            print(f"error: {_one_line(_described(error))}", file=sys.stderr)
            _drop_unwritable_output()
            return 2


def _drop_unwritable_output() -> None:
    """Keep the interpreter's last flush from failing again, on a pipe without a reader or a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _described(error: Exception) -> object:
    """The system's own errors as file and reason, without a number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return error


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__


def _show_warning(message: object, *_: object) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr)
