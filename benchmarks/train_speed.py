"""Training speed beside transformers: the same architecture, optimizer, precision and batch, in turns.

    python benchmarks/train_speed.py --precision bf16

Each measurement is a process of its own. Ours trains as `train` does, with documents packed into windows and masked
from each other; transformers sees plain windows, which is less work. Its loss is its own (`labels=`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tiny-stories-base.yaml"
SYSTEMS = ("causallm", "transformers")


def main() -> None:
    """Compare, or with --system measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, help="measure this one here and print JSON")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.system:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.system, args.precision, args.steps)))
        return
    best = dict.fromkeys(SYSTEMS, 0.0)
    for _ in tqdm(range(args.rounds), disable=None):
        for system in SYSTEMS:
            command = [sys.executable, __file__, "--system", system, "--precision", args.precision]
            command += ["--steps", str(args.steps), "--threads", str(args.threads)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            best[system] = max(best[system], json.loads(output.splitlines()[-1]))
    print(f"| {args.precision} training, tokens/s | causallm | transformers | ratio |")
    print("| --- | --- | --- | --- |")
    ours, theirs = (best[system] for system in SYSTEMS)
    print(f"| tiny-stories, {args.threads} threads | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")


def measure(system: str, precision: str, steps: int) -> float:
    """Median tokens a second over `steps` steps after two that warm up."""
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    batch, length = settings["train"]["batch_size"], settings["data"]["context_length"]
    shipped = json.loads((ROOT / "res" / "tiny-stories" / "config.json").read_text(encoding="utf-8"))
    config = {**settings["model"], "vocab_size": shipped["vocab_size"]}
    config["architectures"] = [config.pop("architecture")]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config["vocab_size"], (batch, length + 1), generator=generator)
    model, loss_of = {"causallm": ours, "transformers": transformers_model}[system](config, ids)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    rates = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.append(batch * length / (time.perf_counter() - begin))
    return statistics.median(rates[2:])


def ours(config: dict, ids: torch.Tensor) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Our model and its loss on windows of three documents each."""
    from causallm.allocator import keep_freed_memory
    from causallm.training.loop import loss_sum
    from causallm.training.new_model import make_model
    from causallm.training.windows import Batch

    keep_freed_memory()
    model = make_model(config, seed=1).train()
    documents = (torch.arange(ids.shape[1] - 1) * 3 // (ids.shape[1] - 1)).expand(len(ids), -1)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents.contiguous())
    return model, lambda: loss_sum(model, batch) / batch.ids.numel()


def transformers_model(config: dict, ids: torch.Tensor) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """transformers' model of the same configuration and its loss."""
    import transformers

    settings = {key: value for key, value in config.items() if key != "architectures"}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**settings)).train()
    ids = ids[:, :-1].contiguous()
    return model, lambda: model(ids, labels=ids, use_cache=False).loss


if __name__ == "__main__":
    main()
