"""layers.kernels.many_rows: products see numbers of rows that are multiples of eight, callers only their own rows."""

import pytest
import torch
from torch import Tensor

from layers import linear
from layers.kernels import native
from layers.kernels.many_rows import in_eights
from layers.packed import PackedLinear


@pytest.mark.parametrize(("shape", "seen"), [((9, 4), 16), ((2, 3, 4), 8), ((3, 8, 4), 24), ((1, 4), 8)])
def test_rows_are_those_of_the_product(shape: tuple[int, ...], seen: int) -> None:
    rows, weight, numbers = torch.randn(shape), torch.randn(5, 4), []

    def product(many: Tensor) -> Tensor:
        numbers.append(many.numel() // 4)
        return many @ weight.T

    result = in_eights(product, rows)
    assert numbers == [seen]
    assert result.is_contiguous()
    torch.testing.assert_close(result, rows @ weight.T)


def test_gradients_leave_the_added_rows_out() -> None:
    rows, weight = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: in_eights(lambda many: many @ weight.T, x), (rows,))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q8_0"])
def test_layers_ask_for_multiples_of_eight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def counted(rows: Tensor, *rest: Tensor | None) -> Tensor:
        numbers.append(rows.numel() // rows.shape[-1])
        return real(rows, *rest)

    weight = torch.randn(6, 64)
    if kind == "Q8_0":
        monkeypatch.setattr(native, "has_panels", lambda: False)
        layer = PackedLinear.from_float(weight, None, kind)
        dtype = torch.float32
    else:
        dtype = getattr(torch, kind)
        layer = linear.FullyConnected.from_float(weight.to(dtype))
    real = torch.nn.functional.linear
    monkeypatch.setattr(linear, "_onednn", counted)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    if kind == "float32":
        monkeypatch.setattr(linear, "ONEDNN", True)
    with torch.inference_mode():
        assert layer(torch.randn(1, 53, 64, dtype=dtype)).shape == (1, 53, 6)
    assert numbers == [56]
