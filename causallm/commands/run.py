"""Answer a prompt: the text goes to stdout as it comes, everything else to stderr."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from causallm.causal_lm import CausalLM
from causallm.commands.generation_arguments import (
    add_generation_arguments,
    add_prompt_arguments,
    add_text_arguments,
    read_prompts,
    stream_options,
)
from causallm.commands.model_arguments import add_device_arguments, add_model_arguments, moving, open_model
from causallm.commands.prompt_cache_arguments import add_prompt_cache_argument, open_prompt_cache
from causallm.embedding_model import EmbeddingModel
from causallm.generation import Event
from causallm.report import Report, peak_memory

EMBEDDING_KEYS = ("prompt_tokens", "load_ms", "prefill_ms", "prefill_tps", "peak_memory_bytes")
HEADER_WIDTH = 72
"""Characters of a prompt in the line above its answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    add_model_arguments(parser)
    add_text_arguments(parser, "default: sample_input of nntr_config.json")
    add_prompt_cache_argument(parser, "what the prompts begin with is not computed again; without a prompt, its own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and report")
    add_prompt_arguments(parser)
    add_generation_arguments(parser)
    add_device_arguments(parser)


def execute(args: argparse.Namespace) -> int:
    """Load the model and answer; 130 when interrupted, with what there is until then."""
    options, prompts, report = stream_options(args), read_prompts(args), Report()
    model = open_model(args, report)
    options["prompt_cache"] = open_prompt_cache(args, model, report)
    if options["prompt_cache"] and not prompts:
        return _answer(model, [list(row) for row in options["prompt_cache"].ids], options, report, args.json)
    if not prompts:
        if model.runtime_config.sample_input is None:
            raise ValueError("no prompt was given, and nntr_config.json has no sample_input")
        prompts = [model.runtime_config.sample_input]
        options["chat"] = bool(args.chat)
    if isinstance(model, EmbeddingModel):
        return _embed(model, prompts, report, args.json)
    return _answer(model, prompts, options, report, args.json)


def _embed(model: EmbeddingModel, prompts: list[str], report: Report, as_json: bool) -> int:
    """One vector a line; of the report, what an embedding has."""
    with report.timed("prefill"):
        vectors = model.encode(prompts, report).float().tolist()
    if as_json:
        content = report.as_json()
        print(json.dumps({"vectors": vectors, **{key: content[key] for key in EMBEDDING_KEYS}}))
        return 0
    for vector in vectors:
        print(" ".join(f"{value:.6g}" for value in vector))
    prefill, *_ = report.lines()
    rest = f"load: {report.load_seconds * 1e3:.0f} ms, peak memory: {peak_memory() / 1e6:.0f} MB"
    print(prefill, rest, sep="\n", file=sys.stderr)
    return 0


def _answer(model: CausalLM, prompts: Sequence[Any], options: dict[str, Any], report: Report, as_json: bool) -> int:
    answers, code = _Answers(_headers(model, prompts)), 0
    with tqdm(desc="prompt", unit=" tokens", disable=None, leave=False, delay=1) as bar:
        try:
            for event in model.stream(prompts, report=report, on_prefill=moving(bar), **options):
                bar.close()
                answers.take(event)
                if not as_json:
                    answers.show()
        except KeyboardInterrupt:
            code = 130
    answers.end()
    if as_json:
        print(json.dumps({**answers.as_json(), **report.as_json()}, ensure_ascii=False))
        return code
    answers.show()
    print(*report.lines(), sep="\n", file=sys.stderr)
    return code


def _headers(model: CausalLM, prompts: Sequence[Any]) -> list[str]:
    """What stands above each answer: of several its prompt, in one line, as head and tail do."""
    if len(prompts) == 1:
        return [""]
    assert model.tokenizer is not None
    texts = [prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt) for prompt in prompts]
    lines = [" ".join(text.split()) for text in texts]
    cut = [line if len(line) <= HEADER_WIDTH else line[: HEADER_WIDTH - 3] + "..." for line in lines]
    return [("\n" if number else "") + f"==> {line} <==\n" for number, line in enumerate(cut)]


class _Answers:
    """The answers as they grow, shown on stdout one after the other, the one whose turn it is as it comes."""

    def __init__(self, headers: Sequence[str]):
        count, self._headers = len(headers), headers
        self._texts = [""] * count
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._finish: list[str | None] = [None] * count
        self._turn = self._shown = 0

    def take(self, event: Event) -> None:
        """Record one more token."""
        self._texts[event.row] += event.text
        self._tokens[event.row].append(event.token_id)
        self._finish[event.row] = event.finish

    def end(self) -> None:
        """No more tokens come."""
        self._finish = [finish or "interrupted" for finish in self._finish]

    def show(self) -> None:
        """Write what has not been written of the answers whose turn has come."""
        while self._turn < len(self._texts):
            text, finished = self._headers[self._turn] + self._texts[self._turn], self._finish[self._turn]
            sys.stdout.write(text[self._shown :] + ("\n" if finished else ""))
            sys.stdout.flush()
            self._shown = len(text)
            if not finished:
                break
            self._turn, self._shown = self._turn + 1, 0

    def as_json(self) -> dict[str, list[Any]]:
        """Text, token ids and why it ended ("eos", "stop", "length", "interrupted"), an entry for each prompt."""
        return {"text": self._texts, "tokens": self._tokens, "finish": self._finish}
