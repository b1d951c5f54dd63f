"""Score a text: how well the model predicts it, in sliding windows."""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from causallm.commands.model_arguments import add_model_arguments, moving, open_model
from causallm.embedding_model import EmbeddingModel
from causallm.perplexity import perplexity
from causallm.report import Report, peak_memory

WINDOW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `perplexity`."""
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="the text, UTF-8; - for stdin")
    parser.add_argument(
        "--window", type=int, metavar="N",
        help=f"tokens seen at once (default: {WINDOW}, or the context where that is shorter)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="tokens from one window to the next; fewer give each token more context (default: half the window)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def execute(args: argparse.Namespace) -> int:
    """Load the model, score the text, print."""
    text, report = _read(args.text), Report()
    model = open_model(args, report)
    if isinstance(model, EmbeddingModel):
        raise ValueError(f"{args.model} is an embedding model, expected one that predicts text")
    ids = model.tokenizer.encode_prompt(text)
    window = min(WINDOW, model.max_length) if args.window is None else args.window
    stride = max(1, window // 2) if args.stride is None else args.stride
    begin = time.perf_counter()
    with tqdm(desc="scoring", unit=" tokens", disable=None, leave=False) as bar:
        scored = perplexity(model, ids, window, stride, moving(bar))
    seconds = time.perf_counter() - begin
    # Special tokens around the text are no part of it.
    tokens = len(model.tokenizer.encode(text, add_special_tokens=False))
    result = {
        "perplexity": scored.value,
        "nats_per_token": scored.nats_per_token,
        "bits_per_byte": scored.bits_per_byte(tokens, len(text.encode())),
        "tokens": scored.tokens,
        "windows": scored.windows,
        "window": window,
        "stride": stride,
        "tokens_per_second": scored.tokens / seconds,
        "load_ms": round(report.load_seconds * 1e3, 3),
        "peak_memory_bytes": peak_memory(),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"perplexity: {scored.value:.4f}")
    print(f"nats per token: {scored.nats_per_token:.4f}")
    print(f"bits per byte: {result['bits_per_byte']:.4f}")
    print(f"tokens scored: {scored.tokens}, in {scored.windows} windows of {window} tokens, {stride} apart")
    print(f"speed: {result['tokens_per_second']:.1f} tokens/s")
    return 0


def _read(path: str) -> str:
    """The text as it is, less a byte order mark."""
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: {path} is not UTF-8 text at byte {error.start}") from None
