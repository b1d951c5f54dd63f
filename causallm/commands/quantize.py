"""Pack a model's weights in ggml's block formats (Q4_0, Q4_K, Q5_K, Q8_0 ...): smaller, and faster on a CPU."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from causallm.causal_lm import CausalLM
from causallm.commands.model_arguments import add_plugin_argument, load_plugins
from causallm.hub import resolve_model
from causallm.loading import load_model
from causallm.perplexity import perplexity
from causallm.weights.convert import Written, find_weights
from causallm.weights.fidelity import divergence, tensor_errors
from causallm.weights.quantize import FILES, TYPES, quantize

WORST = 5
VERIFY_WINDOW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize`."""
    parser.add_argument("model", metavar="MODEL", help="a model folder or .gguf file with float weights, or a hub id")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="a new model folder")
    parser.add_argument(
        "--fc_dtype", default="Q4_0", metavar="TYPE",
        help=f"of the linear layers: one of {', '.join(TYPES)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--embd_dtype", metavar="TYPE", help="of the embedding (default: as the linear layers)")
    parser.add_argument("--lmhead_dtype", metavar="TYPE", help="of the head (default: as the embedding)")
    parser.add_argument(
        "--output_format", default="safetensors", choices=FILES,
        help="bin: NNTrainer's file for x86 (Q4_0, its embedding also Q6_K); default: this project's %(default)s",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="print what packing changed, weight by weight")
    parser.add_argument("--text", metavar="FILE", help="with --verify: perplexity and KL divergence on this text")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_plugin_argument(parser)


def execute(args: argparse.Namespace) -> int:
    """Pack, with a progress bar on a terminal; verify where asked."""
    if args.text and not args.verify:
        raise ValueError("--text belongs to --verify")
    text = Path(args.text).read_text(encoding="utf-8") if args.text else None
    if text is not None and not text.strip():
        raise ValueError(f"--text: {args.text} is empty, expected some text to compare on")
    load_plugins(args)
    source, output = resolve_model(args.model, args.revision), Path(args.output)
    with tqdm(desc=f"writing {output}", unit="B", unit_scale=True, disable=None) as bar:

        def advance(step: Written) -> None:
            bar.total = step.total
            bar.update(step.nbytes)

        formats = quantize(
            source,
            output,
            args.fc_dtype,
            args.embd_dtype,
            args.lmhead_dtype,
            advance,
            args.output_format,
            notice=lambda line: print(line, file=sys.stderr),
        )
    kinds = list(formats.values())
    counts = ", ".join(f"{kinds.count(kind)} in {kind}" for kind in dict.fromkeys(kinds)) or "no weight packed"
    print(f"{output}: {counts}")
    if args.verify:
        _verify(source, output, text)
    return 0


def _verify(source: Path, output: Path, text: str | None) -> None:
    errors = tensor_errors(source, output)
    print("relative error of the weights (root mean square):")
    for kind in dict.fromkeys(error.kind for error in errors):
        own = sorted(error.relative for error in errors if error.kind == kind)
        print(f"  {kind}: {len(own)} weights, {own[0]:.2e} to {own[-1]:.2e}")
    for error in sorted(errors, key=lambda error: -error.relative)[:WORST]:
        print(f"  {error.relative:.2e} {error.kind} {error.name}")
    if text is None:
        return
    found, named = find_weights(source)
    before, after = load_model(found.path, dtype="float32", **named), load_model(output)
    ids = before.tokenizer.encode_prompt(text)
    window = min(VERIFY_WINDOW, before.max_length)
    with tqdm(desc="comparing", total=2 + 1, disable=None, leave=False) as bar:
        first = perplexity(before, ids, window, window)
        bar.update()
        second = perplexity(after, ids, window, window)
        bar.update()
        kl = divergence(before, after, ids, window)
        bar.update()
    print(
        f"perplexity: {first.value:.4f} before (in {_name(before)}), {second.value:.4f} packed (activations in "
        f"{_name(after)}), {second.value / first.value - 1:+.2%}"
    )
    print(f"KL divergence: {kl.mean:.6f} nats a token, at most {kl.largest:.4f}; same first choice: {kl.agreement:.2%}")


def _name(model: CausalLM) -> str:
    """What the model computes in."""
    return str(model.dtype).removeprefix("torch.")
