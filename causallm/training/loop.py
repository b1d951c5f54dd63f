"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from causallm.training.checkpoint import Checkpoints
from causallm.training.loss import cross_entropy_sum
from causallm.training.optimizer import learning_rate, make_optimizer
from causallm.training.processes import Processes
from causallm.training.progress import Progress
from causallm.training.settings import Settings
from causallm.training.windows import IGNORED, Batch, Windows


def train(
    model: nn.Module,
    train_windows: Windows,
    validation_windows: Windows | None,
    settings: Settings,
    steps: int,
    checkpoints: Checkpoints,
    processes: Processes,
    report: Callable[[Progress], None],
    resume: bool = False,
) -> None:
    """Run steps 1 to `steps`, or on from the last checkpoint; ends with a checkpoint of the end.

    model is as `processes.wrap` made it. A loss or gradient that is not finite is a ValueError naming the step; it is
    not applied, and the last checkpoint stays.
    """
    run, log = settings.train, settings.log
    optimizer = make_optimizer(model, settings.optimizer)
    start = checkpoints.load(model, optimizer) if resume else 0
    forward = cast(nn.Module, torch.compile(model)) if run.compile else model
    for done in range(start, steps):
        began = time.perf_counter()
        torch.manual_seed(dropout_seed(run.seed, done, processes))
        rate = learning_rate(done, steps, settings.optimizer.learning_rate, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        batches = list(parts(train_windows, done, settings, processes))
        loss, tokens = backward_step(forward, batches, settings, processes)
        norm = _number(nn.utils.clip_grad_norm_(model.parameters(), run.clip_norm or math.inf))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(_not_finite(done + 1, loss, norm, checkpoints))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        speed = tokens / (time.perf_counter() - began)
        step = done + 1
        validation = None
        if validation_windows and _due(step, steps, log.evaluate_every):
            validation = evaluate(model, validation_windows, settings, processes)
        report(Progress(step, steps, loss, rate, norm, speed, validation))
        if _due(step, steps, log.checkpoint_every):
            checkpoints.save(step, model, optimizer, processes.is_first)


def dropout_seed(seed: int, done: int, processes: Processes) -> int:
    """One for each step and process, which a resumed run gets again."""
    return (seed * 1_000_003 + done) * processes.count + processes.rank


def parts(windows: Windows, done: int, settings: Settings, processes: Processes) -> Iterator[Batch]:
    """This process's share of the windows of the step after `done` steps, in gradient_accumulation parts."""
    run = settings.train
    size = run.batch_size // run.gradient_accumulation
    share = size // processes.count
    for part in range(run.gradient_accumulation):
        first = done * run.batch_size + part * size + processes.rank * share
        yield windows.batch(range(first, first + share)).to(processes.device)


def backward_step(
    model: nn.Module, batches: list[Batch], settings: Settings, processes: Processes
) -> tuple[float, int]:
    """Add up the gradients of all batches; returns the mean loss over all processes, and tokens seen by all.

    The mean is over the counted tokens of the whole step, however they are spread over parts and processes.
    """
    counted = torch.stack([(batch.targets != IGNORED).sum() for batch in batches]).sum()
    everywhere = max(1, int(processes.sum(counted)))
    total = torch.zeros((), device=processes.device)
    for number, batch in enumerate(batches):
        with processes.synchronised(model, last=number == len(batches) - 1):
            with precision(settings, processes.device):
                loss = loss_sum(model, batch)
            # Gradients are averaged over processes, and this is a sum's share of one mean.
            (loss * (processes.count / everywhere)).backward()
        total += loss.detach()
    seen = sum(batch.ids.numel() for batch in batches) * processes.count
    return float(processes.sum(total)) / everywhere, seen


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the tokens that count."""
    logits = model(batch.ids, documents=batch.documents)
    return cross_entropy_sum(logits.flatten(0, 1), batch.targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, settings: Settings, processes: Processes) -> float:
    """Mean loss over the first evaluate_windows windows; every process computes all of it."""
    model.eval()
    count = min(settings.log.evaluate_windows, windows.per_epoch)
    size = settings.train.batch_size // settings.train.gradient_accumulation
    loss, counted = 0.0, 0
    for first in range(0, count, size):
        batch = windows.batch(range(first, min(first + size, count))).to(processes.device)
        with precision(settings, processes.device):
            loss += float(loss_sum(model, batch))
        counted += int((batch.targets != IGNORED).sum())
    return loss / max(1, counted)


def precision(settings: Settings, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the run asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if settings.train.precision == "bf16" else nullcontext()


def _due(step: int, steps: int, every: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _number(norm: Tensor) -> float:
    # A sharded model's norm is a distributed tensor.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _not_finite(step: int, loss: float, norm: float, checkpoints: Checkpoints) -> str:
    saved = checkpoints.steps()
    left = f"the last good checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
    return (
        f"at step {step} the loss is {loss} and the length of the gradient {norm}: lower the learning rate or look at "
        f"the data; {left}"
    )
