"""The chat verb: pipes, commands, what it shows of thinking, and mistakes."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_models import TEMPLATE, save_text_model

from causallm import load_model
from causallm.cli import main
from causallm.commands.chat import answer
from causallm.commands.chat_display import DIM, RESET, Display, Thinking
from causallm.commands.chat_input import finished, history_path, is_open, plain_reader, terminal_reader
from causallm.conversation import Conversation

MAIN = Path(__file__).resolve().parents[1] / "main.py"
Captured = pytest.CaptureFixture[str]
SHORT = ("-n", "6")
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_text_model(folder, template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


class Terminal(io.StringIO):
    """A text file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Chat with these lines on stdin; returns the exit code, stdout and stderr."""

    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", str(folder), *SHORT, *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def answers(model: Any, *texts: str, **options: Any) -> list[str]:
    conversation = Conversation(model, **{"max_new_tokens": 6, **options})
    return [conversation.answer(text) for text in texts]


def test_a_pipe_gets_the_answers_and_nothing_else(folder: Path, model: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(MAIN), "chat", str(folder), *SHORT], input=b"hi\n\nWhy?", capture_output=True
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.decode() == "".join(f"{text}\n" for text in answers(model, "hi", "Why?"))


def test_one_question(chat: Any, model: Any) -> None:
    assert chat("not read", "--prompt", "Hi!") == (0, answers(model, "Hi!")[0] + "\n", "")
    for arguments, options in (
        (["--system", "Be kind."], {"system": "Be kind."}),
        (["--template-var", "thinking=false"], {"template_variables": {"thinking": False}}),
        (["--temperature", "2", "--seed", "3"], {"temperature": 2.0, "seed": 3}),
        (["--static-cache"], {}),
        (["--prompt-lookup", "3"], {}),
    ):
        expected = answers(model, "Hi!", "Why?", **options)
        assert chat("Hi!\nWhy?\n", *arguments) == (0, "".join(text + "\n" for text in expected), "")


def test_messages_of_several_lines(chat: Any, model: Any) -> None:
    text = 'one\\\ntwo\n"""\n  three\n\n/exit\n"""\n"""four"""\n /help\n/etc/hosts?\nlast\\\n'
    expected = answers(model, "one\ntwo", "  three\n\n/exit", "four", " /help", "/etc/hosts?", "last\\")
    assert chat(text) == (0, "".join(text + "\n" for text in expected), "")


@pytest.mark.parametrize(
    ("text", "opened", "message"),
    [
        ("x", False, "x"),
        ("x\\", True, "x\\"),
        ("x\\\ny", False, "x\ny"),
        ('"""', True, ""),
        ('"""x', True, "x"),
        ('"""x\n\ny"""  ', False, "x\n\ny"),
        ('"""\nx\n"""', False, "x"),
        ('x """y', False, 'x """y'),
    ],
)
def test_what_goes_on_in_the_next_line(text: str, opened: bool, message: str) -> None:
    assert (is_open(text), finished(text)) == (opened, message)


def test_commands(chat: Any, model: Any, tmp_path: Path) -> None:
    path, cache = tmp_path / "a talk.json", tmp_path / "talk.cache"
    lines = f"""
        Hi!|/stats|Why?|/undo|/save "{path}" {cache}|Why not?|/reset|/system Be kind.|/set max-new-tokens 3|Hi!|/system
        /load '{path}' {cache}|/set max_new_tokens default|/set max_new_tokens 6
        /set temperature 2|/set seed 4|/set stop ["q"]|/set seed null
        /set temperature default|/set do_sample false|/set think hide|/set on_full drop|/set template_var thinking=false
        /set|/help|And then?|/exit|never read
    """
    code, out, err = chat("\n".join(line.strip() for line in lines.strip().replace("|", "\n").split("\n")))
    assert code == 0
    talk = Conversation(model, max_new_tokens=6)
    expected = [talk.answer("Hi!"), talk.answer("Why?")]
    talk.undo()
    saved = list(talk.messages)
    expected += [talk.answer("Why not?"), *answers(model, "Hi!", system="Be kind.", max_new_tokens=3)]
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": saved}
    assert cache.is_file()
    talk.undo()
    talk.template_variables["thinking"] = False
    expected.append(talk.answer("And then?"))
    assert out == "".join(text + "\n" for text in expected)
    for shown in (
        "generation: 6 tokens", "context: ", "taken back: Why?", "1 turns", "think hide", "on_full drop",
        'stop ["q"]', "do_sample false", "template_var thinking=false", "/undo  ", "max_new_tokens 6",
    ):  # fmt: skip
        assert shown in err
    assert "seed" not in err.split("think hide")[1].split("/system")[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "unknown command /nonsense, /help lists them"),
        ("/set temperature -1", "temperature: got -1.0, expected"),
        ("/set temperature", "/set temperature: expected a value after it"),
        ("/set temperature hot", "temperature: got 'hot', which is not of the right kind"),
        ("/set do_sample maybe", "do_sample: got maybe, expected true or false"),
        ("/set top_k true", "top_k: got true, expected a value"),
        ("/set heat 3", "unknown option 'heat'; known are: think, on_full, template_var, do_sample"),
        ("/set think loud", "think: got 'loud', expected dim, hide, show"),
        ("/set on_full explode", "on_full: got 'explode'"),
        ("/set template_var thinking", "/set template_var: got 'thinking', expected NAME=VALUE"),
        ("/set template_var messages=1", "messages is the conversation itself"),
        ("/save", "/save: got 0 file names"),
        ("/save a b c", "/save: got 3 file names"),
        ("/save 'a", "/save: No closing quotation"),
        ("/save no/such/folder", "cannot write no/such/folder"),
        ("/save x.json x.cache", "there is no cache to save"),
        ("/load missing.json", "missing.json does not exist"),
        ("/undo", "there is no turn to undo"),
        ("/stats", "there is no answer yet"),
        ("word " * 600, "but the context is 512 tokens"),
        ("\ud800", "the text is not valid Unicode"),
    ],
)
def test_a_mistake_in_a_pipe_is_one_line(chat: Any, line: str, message: str) -> None:
    code, out, err = chat(f"{line}\nnever read\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--temperature -1", "temperature: got -1.0"),
        ("--on-full explode", "invalid choice: 'explode'"),
        ("--think loud", "invalid choice: 'loud'"),
        ("--prompt=", "the message is empty"),
        ("--template-var messages=1", "--template-var: messages is the conversation itself"),
        ("--template-var x", "--template-var: got 'x', expected NAME=VALUE"),
        ("--prompt-cache missing.cache", "missing.cache"),
        ("--raw", "unrecognized arguments: --raw"),
    ],
)
def test_a_mistake_in_an_argument_is_one_line(chat: Any, arguments: str, message: str) -> None:
    code, out, err = chat("Hi!\n", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_model_without_a_template_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    save_text_model(tmp_path)
    assert main(["chat", str(tmp_path), "--prompt", "Hi!"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "no chat template beside" in output.err


def test_a_prompt_cache_is_used(chat: Any, model: Any, tmp_path: Path) -> None:
    talk = Conversation(model, "Be kind.", max_new_tokens=6)
    talk.answer("Hi!")
    talk.save(tmp_path / "talk.json", tmp_path / "talk.cache")
    arguments = ("--system", "Be kind.", "--prompt-cache", str(tmp_path / "talk.cache"))
    code, out, err = chat("Hi!\n/stats\n", *arguments)
    assert (code, out) == (0, answers(model, "Hi!", system="Be kind.")[0] + "\n")
    assert int(err.split("reused: ")[1].split(" of ")[0]) > 10


def test_a_full_conversation_says_what_left_it(chat: Any) -> None:
    for way, shown in (("drop", "oldest messages left"), ("slide", "oldest tokens any more")):
        code, _, err = chat("\n".join([f"{'word ' * 25}"] * 4), "--max-length", "256", "--on-full", way)
        assert code == 0
        assert shown in err
    code, _, err = chat("\n".join([f"{'word ' * 25}"] * 4), "--max-length", "256")
    assert (code, err.count("\n")) == (2, 1)
    assert "but the context is 256 tokens" in err


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_before_the_answer_begins(model: Any, capsys: Captured, presses: int) -> None:
    """Once waits for the end of the step, twice does not; before and after the answer Ctrl-C is what it always was."""
    conversation, handler = Conversation(model, max_new_tokens=6), signal.getsignal(signal.SIGINT)
    conversation.answer("Hi!")
    before = list(conversation.messages)

    def press(*_: Any) -> None:
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)

    hook = model.norm.register_forward_pre_hook(press)
    try:
        answer(conversation, Display(sys.stdout, "dim", False), "Why?", stoppable=True)
    finally:
        hook.remove()
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "(stopped before the answer began; the message is not kept)\n"
    assert conversation.messages == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert answers(model, "Hi!", "Why?")[1] == conversation.answer("Why?")


def display(text: str, size: int, think: str, colours: bool, prompt: str = "") -> str:
    stream = io.StringIO()
    shown = Display(stream, think, colours)
    for _ in range(2):
        shown.begin(prompt)
        for start in range(0, len(text), size):
            shown.show(text[start : start + size])
        shown.end()
    first, second = stream.getvalue()[: len(stream.getvalue()) // 2], stream.getvalue()[len(stream.getvalue()) // 2 :]
    assert first == second
    assert first.endswith("\n")
    return first[:-1].replace(RESET + DIM, "")


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_thinking_is_shown_as_asked_however_it_is_cut(size: int) -> None:
    thought, said = "<think>\nWell </thin, hm.\n</think>", "\n\nYes: <think> is a tag.\n"
    whole = thought + said
    assert display(whole, size, "show", True) == whole
    assert display(whole, size, "dim", False) == whole
    assert display(whole, size, "dim", True) == f"{DIM}{thought}{RESET}{said}"
    assert display(whole, size, "hide", True) == said.lstrip("\n")
    assert display("\n " + whole, size, "dim", True) == f"{DIM}\n {thought}{RESET}{said}"
    # The prompt opened it.
    assert display("Well.</think>\n\nYes.", size, "hide", True, "assistant\n<think>\n") == "Yes."
    assert display("Well.</think>Yes.", size, "dim", True, "<think>\n") == f"{DIM}Well.</think>{RESET}Yes."
    # It never ends, or never was one.
    assert display("<think>Well. </thi", size, "hide", True) == ""
    assert display("<think>Well. </thi", size, "dim", True) == f"{DIM}<think>Well. </thi{RESET}"
    for plain in ("", "Yes.", "<thin", "<b>", "  \n", "A <think>x</think>"):
        assert display(plain, size, "hide", True) == plain


def test_text_is_not_held_back_longer_than_a_tag_could_be() -> None:
    thinking = Thinking()
    assert thinking.push("Y") == [("Y", False)]
    assert thinking.push("<think>") == [("<think>", False)]
    thinking = Thinking(inside=True)
    assert thinking.push("Hm </") == [("Hm ", True)]
    assert thinking.push("b") == [("</b", True)]


@pytest.mark.parametrize(
    ("environment", "terminal", "dimmed"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, True, False), ({}, False, False)],
    ids=str,
)
def test_colours_are_for_terminals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, dimmed: bool
) -> None:
    save_text_model(tmp_path, template=TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["chat", str(tmp_path), "--prompt", "Hi!", *SHORT]) == 0
    assert (DIM in output.getvalue()) == dimmed


def test_without_the_line_editor_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi!\\\nYou!\n"))
    read = terminal_reader(tmp_path / "history")
    assert read() == "Hi!\nYou!"
    with pytest.raises(EOFError):
        read()
    output = capsys.readouterr()
    assert output.err.startswith(
        "chat: no line editor, for prompt_toolkit is not installed (pip install prompt_toolkit)\n"
    )
    assert output.out == ""


def test_on_a_terminal_whose_output_is_piped_the_prompt_is_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffHi!\n"))
    assert plain_reader(on_terminal=True)() == "Hi!"
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "> ")


def test_the_history_is_where_such_files_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "causallm" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert history_path() == tmp_path / ".local" / "state" / "causallm" / "chat_history"
