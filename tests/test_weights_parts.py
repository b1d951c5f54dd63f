"""Tensors that a reader computes are had in parts, each at little cost, which together are the tensor."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_models import save_mxfp4, save_shape, tight  # noqa: F401  a fixture among them
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causallm.loading import build_packed, find_source
from causallm.weights import reader as reader_module
from causallm.weights.convert import convert
from causallm.weights.quantize import quantize
from causallm.weights.reader import Index, WeightReader

pytestmark = [pytest.mark.usefixtures("tight"), pytest.mark.filterwarnings("ignore:llama.cpp")]
PART_BYTES = 512


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made while this is entered; views are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not any(value.alias_info for value in func._schema.returns):
            sizes = [leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and not leaf.is_meta]
            self.nbytes = max([self.nbytes, *sizes])
        return made


def gguf_of(name: str, kind: str | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        source = save_shape(folder / "m", name)
        if kind:
            quantize(source, folder / "packed", kind, "Q8_0")
            source = folder / "packed"
        convert(source, folder / "m.gguf")
        return folder / "m.gguf"

    return make


def gguf_mxfp4(folder: Path) -> Path:
    gguf, oracle = pytest.importorskip("gguf"), pytest.importorskip("gguf_oracle")
    kind = gguf.GGMLQuantizationType.MXFP4

    def pack(name: str, values: Any) -> Any:
        return (gguf.quants.quantize(values, kind), kind) if "exps" in name else None

    oracle.write(save_shape(folder / "m", "gpt-oss", hidden_size=64), folder / "m.gguf", "GPT_OSS", pack)
    return folder / "m.gguf"


def packed_bin(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        quantize(save_shape(folder / "m", name), folder / "packed", "Q4_0", output_format="bin")
        return folder / "packed"

    return make


FILES: dict[str, Callable[[Path], Path]] = {
    "mxfp4": lambda folder: save_mxfp4(folder / "m"),
    "llama gguf": gguf_of("llama"),
    "llama gguf Q4_0": gguf_of("llama", "Q4_0"),
    "gpt-oss gguf": gguf_of("gpt-oss"),
    "gpt-oss gguf Q4_0": gguf_of("gpt-oss", "Q4_0"),
    "gpt-oss gguf MXFP4": gguf_mxfp4,
    "llama packed bin": packed_bin("llama"),
    "gpt-oss packed bin": packed_bin("gpt-oss"),
}


@pytest.fixture(params=FILES)
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightReader:
    reader = build_packed(find_source(FILES[request.param](tmp_path)), None)[1]
    monkeypatch.setattr(reader_module, "PART_BYTES", PART_BYTES)
    return reader


def computed(reader: WeightReader) -> list[str]:
    """What is not in the file as in memory, but for vectors."""
    names = [name for name in reader.names() if reader.place(name) is None and reader.meta(name).dim() > 1]
    return [name for name in names if not name.endswith("_bias")]


def put_together(reader: WeightReader, name: str, parts: Iterable[Index]) -> Tensor:
    whole = torch.full_like(reader.meta(name), 77, device="cpu")
    for index in parts:
        whole[index] = reader.part(name, index)
    return whole


def test_parts_together_are_the_tensor(reader: WeightReader) -> None:
    assert computed(reader)
    for name in reader.names():
        tensor = reader.tensor(name)
        assert torch.equal(put_together(reader, name, reader.parts(name)), tensor), name
        if name in computed(reader) and tensor.dim() == 3:
            for expert in range(len(tensor)):
                parts = reader.parts(name, (expert,))
                assert torch.equal(put_together(reader, name, parts)[expert], tensor[expert]), name


def test_any_part_is_that_of_the_tensor(reader: WeightReader) -> None:
    for name in reader.names():
        tensor = reader.tensor(name)
        for index in (
            (), (1,), (slice(3, 8),), (slice(1, 7, 3),), (slice(0, 0),), (1, 2), (1, slice(3, 6)), (0, slice(1, 2), 3),
            (slice(0, 2), slice(5, 9)), (1, slice(None), slice(3, 8)), (1, slice(2, 5), slice(5, 8)), (0, 1, 2),
        ):  # fmt: skip
            if len(index) <= tensor.dim():
                assert torch.equal(reader.part(name, index), tensor[index]), (name, index)


def test_a_part_takes_little_memory(reader: WeightReader) -> None:
    """And no reader makes the whole tensor, nor a whole expert, on the way."""
    sizes = list[int]()
    for name in computed(reader):
        for index in reader.parts(name):
            with Largest() as made:
                reader.part(name, index)
            sizes.append(made.nbytes)
    assert max(sizes) <= 4 * PART_BYTES
