"""The option that names a prompt cache; shared by the verbs that use one."""

import argparse
from typing import Any

from causallm.embedding_model import EmbeddingModel
from causallm.prompt_cache import PromptCache
from causallm.report import Report


def add_prompt_cache_argument(parser: argparse._ActionsContainer, text: str) -> None:
    """`--prompt-cache`; `text` says what the verb does with it."""
    parser.add_argument("--prompt-cache", metavar="FILE", help=f"a file of the cache verb: {text}")


def open_prompt_cache(args: argparse.Namespace, model: Any, report: Report) -> PromptCache | None:
    """The cache that `--prompt-cache` names, None where it names none; its time counts as loading."""
    if args.prompt_cache is None:
        return None
    if isinstance(model, EmbeddingModel):
        raise ValueError(f"--prompt-cache: {args.model} is an embedding model, which has no use for one")
    with report.timed("load"):
        held: PromptCache = model.load_kvcache(args.prompt_cache)
    return held
