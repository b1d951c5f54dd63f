"""The options of prompts, drawing and stopping; shared by the verbs that generate."""

import argparse
import sys
from pathlib import Path
from typing import Any

from causallm.commands.model_arguments import key_values


def add_text_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Where prompts come from; `default` says what stands for none."""
    parser.add_argument("prompt", nargs="?", help=default)
    parser.add_argument(
        "--prompt", action="append", default=[], dest="more", metavar="TEXT",
        help="a further prompt; several run together, batch_size of nntr_config.json at a time",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-file", metavar="FILE",
        help="take the prompt from a file, less a line break at its end; - for stdin",
    )  # fmt: skip


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts that the arguments give, none of them empty."""
    prompts = [args.prompt] if args.prompt is not None else []
    if args.prompt_file is not None:
        prompts.append(_read(args.prompt_file))
    prompts += args.more
    if "" in prompts:
        raise ValueError("the prompt is empty, expected some text")
    return prompts


def _read(path: str) -> str:
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file: {path} is not UTF-8 text at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """How a prompt's text becomes tokens."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--system", metavar="TEXT", help="system message for the chat template")
    wrapping = group.add_mutually_exclusive_group()
    wrapping.add_argument("--raw", action="store_true", help="take the prompt as it is")
    wrapping.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    group.add_argument(
        "--template-var", action="append", default=[], metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; repeatable",
    )  # fmt: skip
    group.add_argument("--truncate", action="store_true", help="drop the beginning of a prompt that is too long")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn and when to stop; what is not given comes from generation_config.json."""
    group = parser.add_argument_group("generation (default: generation_config.json)")
    group.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="most tokens to generate")
    group.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    group.add_argument("--temperature", type=float, metavar="T", help="over 1 bolder, under 1 safer, 0 greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that sum to P")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens under P times the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="over 1: seen tokens become unlikely")
    group.add_argument("--presence-penalty", type=float, metavar="A", help="subtracted once from generated tokens")
    group.add_argument("--frequency-penalty", type=float, metavar="A", help="subtracted for each occurrence")
    group.add_argument("--bad-word", action="append", metavar="TEXT", help="never generate this; repeatable")
    group.add_argument(
        "--bad-word-ids", action="append", metavar="ID,ID,..", help="never generate this sequence; repeatable"
    )
    group.add_argument("--logit-bias", action="append", metavar="ID=BIAS", help="add to a token's logit; repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--seed", type=int, help="of the first prompt; the next use the next numbers")
    group.add_argument("--static-cache", action="store_true", help="allocate the key-value cache at once")
    group.add_argument(
        "--prompt-lookup", type=int, metavar="N",
        help="draft up to N tokens a step from earlier text: faster where it repeats; 0 is off",
    )  # fmt: skip


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as keyword arguments of `CausalLM.stream`."""
    variables = key_values("--template-var", args.template_var)
    if "messages" in variables:
        raise ValueError("--template-var: messages is the conversation, which the prompt and --system make")
    return {
        "system": args.system,
        "chat": True if args.chat else False if args.raw else None,
        "template_variables": variables,
        "truncate": args.truncate,
        **drawing_options(args),
    }


def drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that `add_generation_arguments` adds."""
    return {
        "static_cache": args.static_cache,
        "do_sample": False if args.greedy else None,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "bad_words": args.bad_word,
        "bad_words_ids": _sequences(args.bad_word_ids),
        "logit_bias": _biases(args.logit_bias),
        "stop": args.stop,
        "seed": args.seed,
        "prompt_lookup_num_tokens": args.prompt_lookup,
    }


def _sequences(texts: list[str] | None) -> list[tuple[int, ...]] | None:
    try:
        return None if texts is None else [tuple(int(token) for token in text.split(",")) for text in texts]
    except ValueError:
        raise ValueError(f"--bad-word-ids: got {texts}, expected token ids with commas between") from None


def _biases(texts: list[str] | None) -> dict[int, float] | None:
    if texts is None:
        return None
    try:
        return {int(token): float(bias) for token, _, bias in (text.partition("=") for text in texts)}
    except ValueError:
        raise ValueError(f"--logit-bias: got {texts}, expected ID=BIAS") from None
