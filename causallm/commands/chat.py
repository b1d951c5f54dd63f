"""Converse with a model: on a terminal with line editing and commands, or a message a line from a pipe."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tqdm import tqdm

from causallm.commands.chat_commands import Commands, is_command, template_variables
from causallm.commands.chat_display import WAYS, Display, note
from causallm.commands.chat_input import Read, history_path, plain_reader, terminal_reader
from causallm.commands.generation_arguments import add_generation_arguments, drawing_options
from causallm.commands.model_arguments import add_device_arguments, add_model_arguments, moving, open_model
from causallm.commands.prompt_cache_arguments import add_prompt_cache_argument, open_prompt_cache
from causallm.context_window import WAYS as ON_FULL
from causallm.conversation import Conversation
from causallm.embedding_model import EmbeddingModel
from causallm.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `chat`."""
    add_model_arguments(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument(
        "--template-var", action="append", default=[], metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--on-full", choices=ON_FULL, default="refuse",
        help="when the context is full: refuse the message, drop the oldest turns, or slide: hide the oldest half from "
        "the model (default: %(default)s)",
    )  # fmt: skip
    add_prompt_cache_argument(group, "what the conversation begins with is not computed again")
    group.add_argument(
        "--think", choices=WAYS, default="dim", help="how <think>...</think> is shown (default: %(default)s)"
    )
    group.add_argument("--history", metavar="FILE", type=Path, help=f"default: {history_path()}")
    add_generation_arguments(parser)
    add_device_arguments(parser)


def execute(args: argparse.Namespace) -> int:
    """Load the model and converse until the input ends or /exit."""
    options, variables = drawing_options(args), template_variables("--template-var", args.template_var)
    report = Report()
    model = open_model(args, report)
    if isinstance(model, EmbeddingModel):
        raise ValueError(f"{args.model} is an embedding model, expected one that generates text")
    conversation = Conversation(
        model,
        args.system,
        on_full=args.on_full,
        template_variables=variables,
        prompt_cache=open_prompt_cache(args, model, report),
        **options,
    )
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    display = Display(sys.stdout, args.think, colours)
    if args.prompt is not None:
        answer(conversation, display, args.prompt)
        return 0
    commands = Commands(conversation, display, report.load_seconds)
    if not sys.stdin.isatty():
        return converse(commands, conversation, display, plain_reader(on_terminal=False), patient=False)
    note(f"{Path(args.model).name}: /help lists commands, Ctrl-D leaves")
    edited = sys.stdout.isatty()
    reader = terminal_reader(args.history or history_path()) if edited else plain_reader(on_terminal=True)
    return converse(commands, conversation, display, reader, patient=True)


def converse(commands: Commands, conversation: Conversation, display: Display, read: Read, patient: bool) -> int:
    """Answer message after message. patient: a mistake or Ctrl-C is told, and the conversation goes on."""
    while True:
        try:
            text = read()
            if is_command(text):
                if not commands.run(text):
                    return 0
            elif text.strip():
                answer(conversation, display, text, stoppable=patient)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if not patient:
                raise
            note("(Ctrl-D or /exit leaves)")
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            if not patient:
                raise
            note(f"error: {' '.join(str(error).split())}")


def answer(conversation: Conversation, display: Display, text: str, stoppable: bool = False) -> None:
    """Show the answer as it comes. stoppable: Ctrl-C ends it, and what there is of it stays in the conversation."""
    shown, finish = False, None
    with (
        tqdm(desc="prompt", unit=" tokens", disable=None, leave=False, delay=1) as bar,
        _interruptible(stoppable) as stopped,
    ):
        move = moving(bar)

        def prefilled(done: int, total: int) -> None:
            move(done, total)
            if stopped():
                raise KeyboardInterrupt

        try:
            with closing(conversation.say(text, prefilled)) as events:
                for event in events:
                    if not shown:
                        bar.close()
                        _begin(conversation, display)
                        shown = True
                    display.show(event.text)
                    finish = event.finish
                    if stopped():
                        break
        except KeyboardInterrupt:
            if not stoppable:
                raise
        finally:
            if shown:
                display.end()
    if stoppable and finish is None:
        note("(stopped)" if shown else "(stopped before the answer began; the message is not kept)")
    elif stoppable and finish == "length":
        note("(cut off: max_new_tokens or the context is reached)")


def _begin(conversation: Conversation, display: Display) -> None:
    turn = conversation.turn
    assert turn is not None
    if turn.dropped:
        note(f"(the context is full: the {turn.dropped} oldest messages left the conversation)")
    if turn.slid:
        note(f"(the context is full: the model does not see the {turn.slid} oldest tokens any more)")
    display.begin(turn.prompt)


@contextmanager
def _interruptible(active: bool) -> Iterator[Callable[[], bool]]:
    """While active, Ctrl-C is only noted, so that no step is torn; pressed again it interrupts at once."""
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press) if active else None
    try:
        yield lambda: bool(pressed)
    finally:
        if active:
            signal.signal(signal.SIGINT, before)
