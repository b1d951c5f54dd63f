"""The divergence of two models' distributions against the formula, spelled out over all logits at once."""

import pytest
import torch
from conftest import Checkpoints
from families import prompt
from torch.nn import functional

from causallm import logit_blocks
from causallm.weights.fidelity import divergence


@pytest.mark.parametrize("rows", [10**6, 12, 1])
@torch.inference_mode()
def test_divergence_is_that_of_whole_windows(
    rows: int, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, ids = checkpoints.ours("llama"), checkpoints.ours("mistral"), prompt(1, 35)
    monkeypatch.setattr(logit_blocks, "LOGITS_AT_ONCE", rows * before.config.vocab_size)
    sizes: list[int] = []
    hook = before.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(len(logits)))
    try:
        found = divergence(before, after, ids[0].tolist(), 20)
    finally:
        hook.remove()
    pairs = [[model(part)[0].log_softmax(-1) for model in (before, after)] for part in ids.split(20, 1)]
    first, second = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    each = functional.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    assert found.mean == pytest.approx(each.mean().item(), rel=1e-5)
    assert found.largest == pytest.approx(each.max().item(), rel=1e-5)
    assert found.agreement == (first.argmax(-1) == second.argmax(-1)).double().mean().item()
    assert max(sizes) <= max(rows // 4, 1)
    assert sum(sizes) == 35
