"""The command line: a table of verbs, imported when used, and one way to report a user's mistakes."""

import argparse
import difflib
import importlib
import os
import platform
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from causallm.allocator import keep_freed_memory
from causallm.library_pages import give_back_library_code
from causallm.out_of_memory import out_of_memory
from causallm.thread_waiting import wait_briefly

VERBS = {
    "run": "answer a prompt (the default: MODEL may stand first)",
    "chat": "converse: line editing, commands, streaming; a message a line from a pipe",
    "cache": "compute a prompt once and keep its keys and values in a file",
    "bench": "measure tokens a second of prompts and generation",
    "perplexity": "measure how well a model predicts a text",
    "train": "train a model from a YAML file",
    "convert": "convert weights between Hugging Face, GGUF, this project's file and NNTrainer's .bin",
    "quantize": "pack weights in block formats: Q4_0, Q4_K, Q5_K, Q8_0 and others",
    "inspect": "show a model's layers, shapes and sizes without loading its weights",
    "plan": "show where a model's bytes would go under a memory budget, and how fast it would be",
    "doctor": "look at this machine, measure it, and say what that means for a model",
    "download": "fetch a model's files from the Hugging Face hub",
}
"""Each verb is causallm/commands/<verb>.py with `add_arguments(parser)` and `execute(args) -> int`."""

USAGE = "\n".join(
    (
        'usage: main.py MODEL ["prompt"] [options]',
        "       main.py VERB ...",
        "       main.py --help | --version",
        "",
        "MODEL is a model folder, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B.",
        "",
        "verbs:",
        *(f"  {verb:<12}{text}" for verb, text in VERBS.items()),
        "",
        "main.py VERB --help lists the options of a verb, main.py run --help those of answering a prompt.",
    )
)
OPTIONS = {"init_seq_len": "--chunk", "max_seq_len": "--max-length", "kv_cache_dtype": "--cache-dtype"}
"""Keys of nntr_config.json that have an option of another name."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake as everything else does, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    if threading.current_thread() is threading.main_thread():
        # So that what is cleaned up after Ctrl-C is so after a kill, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return reporting_errors(lambda: _execute(list(arguments)), arguments)


def console() -> None:
    """The console script `causallm`."""
    sys.exit(main())


def _execute(arguments: list[str]) -> int:
    """Run the command; nothing up to its import needs torch, which takes longer to load than a person waits for."""
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    if arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"causallm {_version('causallm')}, torch {_version('torch')}, Python {platform.python_version()}")
        return 0
    verb = "run"
    if arguments[0] in VERBS:
        verb = arguments.pop(0)
    else:
        _check_verb(arguments[0])
    keep_freed_memory()
    wait_briefly()
    command = importlib.import_module(f"causallm.commands.{verb}")
    give_back_library_code()
    parser = Parser(
        f"main.py {verb}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    # Intermixed: an optional prompt may stand after options, which the ordinary way would not find any more.
    return command.execute(parser.parse_intermixed_args(arguments))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _check_verb(word: str) -> None:
    """ValueError for what can only be a verb mistyped: it is like one and names no model."""
    like = difflib.get_close_matches(word, VERBS, 1)
    if like and "/" not in word and not os.path.exists(word):
        raise ValueError(f"there is neither a verb nor a model '{word}', did you mean {like[0]}?")


def reporting_errors(work: Callable[[], int], arguments: Sequence[str] = ()) -> int:
    """Do `work`; a user's mistake or a failing file becomes one line on stderr and exit code 2.

    arguments: those of the command line; what they set is called by their names, too.
    """

    def tell(kind: str, message: object) -> None:
        print(f"{kind}: {_with_options(_one_line(message), arguments)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tell("warning", message)
        try:
            code = work()
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            _drop_unwritable_output()
            return 1
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            message = out_of_memory(error)
            if message is None and isinstance(error, RuntimeError):
                raise
            for line in getattr(error, "table", ()):
                print(line, file=sys.stderr)
            tell("error", message or _described(error))
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


def _with_options(message: str, arguments: Sequence[str]) -> str:
    """The message, with the option after the last mention of each key that one of the arguments set."""
    for key, option in OPTIONS.items():
        # A comma stands after the keys of a list of all.
        mentions = list(re.finditer(rf"\b{key}\b(?!,)", message))
        if mentions and option not in message and any(argument.partition("=")[0] == option for argument in arguments):
            end = mentions[-1].end()
            message = f"{message[:end]} ({option}){message[end:]}"
    return message
