"""Compute a prompt once and keep its keys and values in a file, for `--prompt-cache` of run and bench."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from causallm.commands.generation_arguments import add_prompt_arguments, add_text_arguments, read_prompts
from causallm.commands.model_arguments import (
    add_device_arguments,
    add_model_arguments,
    key_values,
    moving,
    open_model,
)
from causallm.embedding_model import EmbeddingModel
from causallm.prompt_cache.make import make_prompt_cache
from causallm.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cache`."""
    add_model_arguments(parser)
    add_text_arguments(parser, "what later prompts will begin with")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--nntrainer", action="store_true", help="write NNTrainer's raw file, which holds no tokens")
    add_prompt_arguments(parser)
    add_device_arguments(parser)


def execute(args: argparse.Namespace) -> int:
    """Load the model, compute, write; tokens, time and size go to stderr."""
    prompts, report = read_prompts(args), Report()
    variables = key_values("--template-var", args.template_var)
    if not prompts:
        raise ValueError("no prompt was given, expected the text that later prompts will begin with")
    if args.truncate:
        raise ValueError("--truncate: without its beginning a prompt has nothing in common with later ones")
    model = open_model(args, report)
    if isinstance(model, EmbeddingModel):
        raise ValueError(f"{args.model} is an embedding model, expected one that generates text")
    chat = True if args.chat else False if args.raw else None
    rows = [model.encode_prompt(prompt, args.system, chat, variables) for prompt in prompts]
    with (
        tqdm(desc="prompt", unit=" tokens", disable=None, leave=False, delay=1) as bar,
        report.timed("prefill"),
    ):
        held = make_prompt_cache(model, rows, moving(bar))
    model.save_kvcache(args.output, cache=held.cache, ids=held.ids, nntrainer=args.nntrainer)
    report.prompt_tokens = sum(map(len, rows))
    report.note_cache(model.cache_dtype, sum(layer.nbytes for layer in held.cache))
    prefill, _, load, *further = report.lines()
    size = Path(args.output).stat().st_size
    print(prefill, load, *further, f"{args.output}: {size / 1e6:.1f} MB", sep="\n", file=sys.stderr)
    return 0
