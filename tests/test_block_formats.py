"""ggml's block formats against the gguf package and against bytes that ggml's own C code packed."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layers.kernels import block_formats
from layers.kernels.block_formats import BLOCK_FORMATS, writable

ROWS, COLUMNS = 8, 1024
WITH_MINIMUM = ("Q4_1", "Q5_1")
"""Formats that hold a block's smallest value as a float16."""


def bell() -> Tensor:
    """Roughly normal values around zero, from integers alone and so the same on every machine."""
    index = torch.arange(ROWS * COLUMNS)
    parts = [(index * index * 40503 + index * 2654435761 + part * 7919 * index) >> 7 & 0xFFFF for part in range(4)]
    return (sum(parts, torch.tensor(-4 * 0x8000)) / 2.0**15).view(ROWS, COLUMNS)


def every_few(values: Tensor) -> Tensor:
    """Mostly zeros, with whole blocks of nothing but zeros."""
    kept = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)
    return torch.where((kept // 48 % 3 == 0) & (kept // 256 % 4 < 3), values, 0.0)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "bell": lambda x: x,
    "weights": lambda x: (x * 0.02).bfloat16().float(),
    "heavy tails": lambda x: x * x * x * x * x,
    "offset": lambda x: x * 0.01 + 10,
    "ties": lambda x: (x * 3).round(),
    "plus or minus": lambda x: x[:, :1] * x.sign(),
    "constant": lambda x: x[:, :1].expand_as(x),
    "sparse": every_few,
    "tiny": lambda x: x * 1e-8,
    "negligible": lambda x: x * 1e-15,
    "large": lambda x: x * 1e5,
    "zero": torch.zeros_like,
}

GGML_PACKED: dict[tuple[str, str], str] = {
    ("Q4_K", "bell"): "aca82c16bd9ba7d1",
    ("Q4_K", "weights"): "de6032df18bba614",
    ("Q4_K", "heavy tails"): "98c81450d609085f",
    ("Q4_K", "offset"): "62760f0802df8cc0",
    ("Q4_K", "ties"): "8f7f6086f452bde1",
    ("Q4_K", "plus or minus"): "d9d3ff91f42ce682",
    ("Q4_K", "constant"): "0e58e7a07365c2ca",
    ("Q4_K", "sparse"): "440cb16460fbac86",
    ("Q4_K", "tiny"): "e9c9b3b70c128e3e",
    ("Q4_K", "negligible"): "249e92824e975266",
    ("Q4_K", "large"): "25a2ccdd3171ddfe",
    ("Q4_K", "zero"): "606f558e014930f9",
    ("Q5_K", "bell"): "bcd5ddcade0e8a02",
    ("Q5_K", "weights"): "762f97521340df50",
    ("Q5_K", "heavy tails"): "7c381432a3cce283",
    ("Q5_K", "offset"): "ff3d77c1e24c4c0d",
    ("Q5_K", "ties"): "9de5e3f1940716fe",
    ("Q5_K", "plus or minus"): "a67e825965e875b9",
    ("Q5_K", "constant"): "0b573ff8759f7466",
    ("Q5_K", "sparse"): "ad68b024e9820d96",
    ("Q5_K", "tiny"): "287c8c9bec419574",
    ("Q5_K", "negligible"): "d607628c897c7f46",
    ("Q5_K", "large"): "606f7d7b7f81607a",
    ("Q5_K", "zero"): "07fa8a94dd06b17c",
    ("Q6_K", "bell"): "319ab8173b18da93",
    ("Q6_K", "weights"): "2aced52aa639e5ae",
    ("Q6_K", "heavy tails"): "2d55b14d016fb247",
    ("Q6_K", "offset"): "e3c7bab26f606562",
    ("Q6_K", "ties"): "fb0e989be0310ce1",
    ("Q6_K", "plus or minus"): "fbe58d0bd699ea54",
    ("Q6_K", "constant"): "36783d03ffe786a6",
    ("Q6_K", "sparse"): "750217ebb7abae5c",
    ("Q6_K", "tiny"): "89fb78927307aa50",
    ("Q6_K", "negligible"): "53192a12b1786877",
    ("Q6_K", "large"): "4a6ec0945601b248",
    ("Q6_K", "zero"): "53192a12b1786877",
}
"""Digests of what quantize_row_q4_K_ref and its like make of each kind of data, compiled by gcc -O3 for x86-64."""


def data(kind: str) -> Tensor:
    return KINDS[kind](bell())


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal down to the sign of zero; every not-a-number is like any other."""
    return bool(((ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())).all())


def oracle(name: str) -> tuple[Any, Any]:
    gguf = pytest.importorskip("gguf")
    return gguf.quants, gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_packed_bytes_are_those_of_the_gguf_package(name: str, kind: str) -> None:
    quants, number = oracle(name)
    if name in WITH_MINIMUM and data(kind).abs().max() > 65520:
        with pytest.raises(ValueError, match=f"{name} .*cannot hold"):
            BLOCK_FORMATS[name].pack(data(kind))
        return
    assert torch.equal(
        BLOCK_FORMATS[name].pack(data(kind)), torch.from_numpy(quants.quantize(data(kind).numpy(), number))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_packed_bytes_are_those_of_the_c_code(name: str, kind: str) -> None:
    packed = BLOCK_FORMATS[name].pack(data(kind))
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == GGML_PACKED[name, kind]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_unpacked_values_are_those_of_the_gguf_package(name: str) -> None:
    quants, number = oracle(name)
    packed = torch.randint(0, 256, (300, 3 * BLOCK_FORMATS[name].nbytes), dtype=torch.uint8)
    assert same_bits(BLOCK_FORMATS[name].unpack(packed), torch.from_numpy(quants.dequantize(packed.numpy(), number)))


@pytest.mark.parametrize("name", writable())
def test_short_types_are_rounded_from_float32(name: str) -> None:
    packed = BLOCK_FORMATS[name].pack(bell())
    unpacked = BLOCK_FORMATS[name].unpack(packed)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(BLOCK_FORMATS[name].unpack(packed, dtype), unpacked.to(dtype))


@pytest.mark.parametrize(("name", "step"), [("Q8_0", 0.5 / 127), ("Q4_0", 1 / 8), ("Q5_0", 1 / 16)])
@pytest.mark.parametrize("kind", ["bell", "heavy tails", "sparse", "offset"])
def test_error_stays_within_a_step(name: str, step: float, kind: str) -> None:
    """Half a step of Q8_0; a whole one of Q4_0 and Q5_0, which have no code for +8 and +16; steps have 11 bits."""
    x = data(kind)
    error = (BLOCK_FORMATS[name].unpack(BLOCK_FORMATS[name].pack(x)) - x).view(-1, 32).abs()
    assert (error <= x.view(-1, 32).abs().amax(1, keepdim=True) * (step + 2**-11)).all()


def test_more_bits_and_finer_scales_err_less() -> None:
    x = bell()
    error = {
        name: ((BLOCK_FORMATS[name].unpack(BLOCK_FORMATS[name].pack(x)) - x).norm() / x.norm()).item()
        for name in writable()
    }
    assert 0 < error["Q8_0"] < error["Q6_K"] / 2 < error["Q5_K"] / 4 < error["Q4_K"] / 6
    assert error["Q4_K"] < 0.9 * error["Q4_0"] < 0.1
    assert error["Q5_0"] < 0.6 * error["Q4_0"]
    assert error["Q5_1"] < 0.6 * error["Q4_1"] < 0.6 * error["Q4_0"]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0"])
def test_packing_again_changes_nothing(name: str) -> None:
    packed = BLOCK_FORMATS[name].pack(bell())
    assert torch.equal(BLOCK_FORMATS[name].pack(BLOCK_FORMATS[name].unpack(packed)), packed)


@pytest.mark.parametrize("name", writable())
def test_powers_of_two_scale_through(name: str) -> None:
    once, scaled = (BLOCK_FORMATS[name].unpack(BLOCK_FORMATS[name].pack(bell() * factor)) for factor in (1, 16))
    assert torch.equal(scaled, once * 16)


@pytest.mark.parametrize("name", writable())
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-20, -1e-42])
def test_nothing_stays_nothing(name: str, value: float) -> None:
    packed = BLOCK_FORMATS[name].pack(torch.full((1, 256), value))
    assert not BLOCK_FORMATS[name].unpack(packed).any()


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_of_either_sign_are_the_same_bytes(value: float) -> None:
    """Those of ggml's C code: its Q4_0 divides +0 by -8. The gguf package keeps the sign of the first value."""
    packed = {name: BLOCK_FORMATS[name].pack(torch.full((1, 256), value)) for name in writable()}
    assert packed["Q4_0"].tolist() == [[0x00, 0x80, *[0x88] * 16] * 8]
    assert not any(packed[name].any() for name in ("Q8_0", "Q4_K", "Q6_K"))


@pytest.mark.parametrize("name", writable())
def test_rows_do_not_depend_on_how_they_lie_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block_format, x = BLOCK_FORMATS[name], bell()
    packed = block_format.pack(x)
    assert packed.shape == (ROWS, block_format.row_bytes(COLUMNS))
    assert torch.equal(block_format.pack(x.T.contiguous().T), packed)
    assert torch.equal(block_format.pack(x[::2]), packed[::2])
    assert torch.equal(block_format.pack(torch.nn.Parameter(x)), packed)
    half = x.bfloat16()
    assert torch.equal(block_format.pack(half), block_format.pack(half.float()))
    shifted = torch.cat((packed.new_zeros(1), packed[0, : block_format.nbytes]))[1:].unsqueeze(0)
    assert torch.equal(block_format.unpack(shifted), block_format.unpack(packed)[:1, : block_format.values])
    assert torch.equal(block_format.unpack(packed.T.contiguous().T), block_format.unpack(packed))
    for slab in (COLUMNS // 2, 3 * COLUMNS):
        monkeypatch.setattr(block_formats, "SLAB_VALUES", slab)
        assert torch.equal(block_format.pack(x), packed)
        assert torch.equal(block_format.unpack(packed[:5]), block_format.unpack(packed)[:5])


@pytest.mark.parametrize("name", writable())
@pytest.mark.parametrize(("rows", "blocks"), [(0, 2), (3, 0), (0, 0)])
def test_empty_tables(name: str, rows: int, blocks: int) -> None:
    block_format = BLOCK_FORMATS[name]
    packed = block_format.pack(torch.zeros(rows, blocks * block_format.values))
    assert packed.shape == (rows, blocks * block_format.nbytes)
    assert block_format.unpack(packed).shape == (rows, blocks * block_format.values)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_rows_are_whole_blocks(name: str) -> None:
    block_format = BLOCK_FORMATS[name]
    columns = block_format.values + 16
    refused: list[Callable[[], object]] = [lambda: block_format.row_bytes(columns)]
    if name in writable():
        refused.append(lambda: block_format.pack(torch.zeros(2, columns)))
    for call in refused:
        with pytest.raises(ValueError, match=f"{name} .*{block_format.values} values.* {columns} columns"):
            call()
    with pytest.raises(ValueError, match=f"{name} .*{block_format.nbytes} bytes.* {block_format.nbytes + 2} bytes"):
        block_format.unpack(torch.zeros(2, block_format.nbytes + 2, dtype=torch.uint8))


@pytest.mark.parametrize("name", writable())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9, -1e20, 1e38])
def test_what_float16_scales_cannot_hold_is_refused(name: str, value: float) -> None:
    x = bell()
    x[5, 300] = value
    with pytest.raises(ValueError, match=f"{name} .*cannot hold"):
        BLOCK_FORMATS[name].pack(x)


@pytest.mark.parametrize("name", sorted({*BLOCK_FORMATS} - {*writable()}))
def test_what_is_only_read_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} can be read but not written; Q8_0, Q4_0, .* can be"):
        BLOCK_FORMATS[name].pack(bell())
