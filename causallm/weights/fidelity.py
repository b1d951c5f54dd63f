"""What packing changed: each weight against its source, and the distributions of both models over a text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causallm.causal_lm import CausalLM
from causallm.loading import build_model
from causallm.logit_blocks import Blocks, choose_blocks, logit_blocks
from causallm.weights.convert import find_weights
from causallm.weights.reader import WeightReader
from layers.kernels.packed_product import expanded


@dataclass(frozen=True)
class TensorError:
    """relative: the root mean square of the change over that of the weight."""

    name: str
    kind: str
    relative: float


@dataclass(frozen=True)
class Divergence:
    """KL(source || packed) a token in nats, its largest value, and how often both rank the same token first."""

    mean: float
    largest: float
    agreement: float


def tensor_errors(source: Path, packed: Path) -> list[TensorError]:
    """The change of every packed weight, one matrix in memory at a time."""
    before, after = (_reader(path) for path in (source, packed))
    errors = []
    for name, kind in after.formats().items():
        squares = [
            (float((expanded(rows, kind) - weight).norm() ** 2), float(weight.norm() ** 2))
            for weight, rows in _matrices(before, after, name)
        ]
        change, size = (math.fsum(column) for column in zip(*squares, strict=True))
        errors.append(TensorError(name, kind, math.sqrt(change / max(size, 1e-60))))
        before.release(name)
        after.release(name)
    return errors


def _reader(path: Path) -> WeightReader:
    source, named = find_weights(path)
    return source.weights(build_model(source, None, **named))


def _matrices(before: WeightReader, after: WeightReader, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight's fp32 rows and its packed ones; of fused experts, (experts, in, out) as floats, each one's."""
    if after.meta(name).dim() == 2:
        yield before.tensor(name).float(), after.tensor(name)
        return
    for expert in range(len(after.meta(name))):
        yield before.part(name, (expert,)).float().t(), after.part(name, (expert,))


@torch.inference_mode()
def divergence(before: CausalLM, after: CausalLM, ids: Sequence[int], window: int) -> Divergence:
    """Compare next-token distributions over `ids`, in windows of `window` tokens that know nothing of each other."""
    total, largest, same, count = 0.0, 0.0, 0, 0
    chosen = [choose_blocks(model) for model in (before, after)]
    times = [blocks.time for blocks in chosen if blocks.time]
    # Of both models' logits several copies are held together.
    blocks = Blocks(min(times, default=None), max(min(blocks.rows for blocks in chosen) // 4, 1))
    for begin in range(0, len(ids), window):
        part = torch.tensor(ids[begin : begin + window])
        both = (logit_blocks(model, part, len(part), blocks) for model in (before, after))
        for pair in zip(*both, strict=True):
            first, second = (logits.float().log_softmax(-1) for logits in pair)
            kl = (first.exp() * (first - second)).sum(-1)
            total, largest, count = total + float(kl.sum()), max(largest, float(kl.max())), count + len(kl)
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
    return Divergence(total / count, largest, same / count)
