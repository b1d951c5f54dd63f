"""causallm.training.loss: the value and gradient of torch's cross-entropy, whatever the blocks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from causallm.training import loss
from causallm.training.loss import cross_entropy_sum
from causallm.training.windows import IGNORED

VOCAB = 11


def case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    targets[::3] = IGNORED
    return (4 * torch.randn(rows, VOCAB, generator=generator)).to(dtype), targets


def torchs(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("block", [1, 3 * VOCAB, 100 * VOCAB])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_value_and_gradient_are_torchs(
    dtype: torch.dtype, tolerance: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CPU_BLOCK", block)
    logits, targets = case(17, dtype)
    logits.requires_grad_()
    expected = torchs(logits, targets)
    (gradient,) = torch.autograd.grad(0.3 * expected, logits)
    found = cross_entropy_sum(logits * 1, targets)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    (own,) = torch.autograd.grad(0.3 * found, logits)
    assert own.dtype == dtype
    torch.testing.assert_close(own, gradient, rtol=0.0, atol=tolerance)
    assert not own[targets == IGNORED].any()


def test_without_a_gradient_logits_are_left_alone() -> None:
    logits, targets = case(9, torch.float32)
    before = logits.clone()
    torch.testing.assert_close(cross_entropy_sum(logits, targets), torchs(logits, targets))
    assert torch.equal(logits, before)


def test_no_counted_target_is_no_loss() -> None:
    logits, targets = case(5, torch.float32)
    assert cross_entropy_sum(logits, torch.full_like(targets, IGNORED)) == 0


def test_a_logit_that_is_not_finite_shows_in_the_loss() -> None:
    logits, targets = case(5, torch.float32)
    logits[1, 2] = torch.nan
    assert cross_entropy_sum(logits, targets).isnan()


def test_a_second_pass_back_is_refused() -> None:
    logits, targets = case(5, torch.float32)
    found = cross_entropy_sum(logits.requires_grad_() * 1, targets)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        found.backward()
