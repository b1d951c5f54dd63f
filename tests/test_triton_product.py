"""The Triton kernels: right under Triton's interpreter, and compiled for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from layers.kernels import packed_product
from layers.kernels.packed_product import triton_kernels

TESTS = Path(__file__).resolve().parent
TRITON_FORMATS = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_the_kernels_are_right_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "triton_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d{2} passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout


def compiled(kernel: Any, capability: int, pointers: dict[str, str], options: dict[str, Any], **constants: Any) -> Any:
    """A kernel compiled for NVIDIA GPUs of this compute capability; other arguments are int32."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # What a launch finds out: memory begins at multiples of 16, and all formats have rows of such.
    wide = (*pointers, "in_features", "columns")
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in wide}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from layers.kernels import triton_product

    return triton_product


@needs_triton
@pytest.mark.parametrize("kind", TRITON_FORMATS)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_product_compiles_and_loads_no_word_twice(kind: str, capability: int, kernels: ModuleType) -> None:
    words = {torch.uint16: "*u16", torch.uint32: "*u32"}[kernels.WORDS[kind]]
    pairs = kernels.UNIT_VALUES[kind] // 2
    kernel = compiled(
        kernels.product_kernel,
        capability,
        {"x": "*bf16", "words": words, "out": "*bf16"},
        kernels.OPTIONS,
        kind=kind,
        pairs=pairs,
        x_rows=1,
        some_x=1,
        some_rows=4,
        tile=kernels.TILE,
        step=kernels.TILE * 2,
    )
    assert kernel.asm["cubin"]
    # Per weight row: words of codes, of scales, and of what multiplies those. Per pair: the two activations.
    loads = {
        "Q8_0": 4 + 1,
        "Q4_0": 2 + 1,
        "Q5_0": 2 + 1 + 2,
        "Q4_K": 2 + 3 + 1,
        "Q5_K": 2 + 3 + 1 + 2,
        "Q6_K": 4 + 2 + 4 + 1,
    }[kind]
    assert len(re.findall(r"ld\.global", kernel.asm["ptx"])) == 4 * loads + 2 * pairs
    # Shared memory is for the sums of the warps alone: nothing is moved between threads before.
    assert kernel.metadata.shared <= 4 * 4 * kernels.OPTIONS["num_warps"]


@needs_triton
@pytest.mark.parametrize("kind", TRITON_FORMATS)
def test_the_expansion_compiles_and_rounds_to_the_nearest(kind: str, kernels: ModuleType) -> None:
    words = {torch.uint16: "*u16", torch.uint32: "*u32"}[kernels.WORDS[kind]]
    pairs = kernels.UNIT_VALUES[kind] // 2
    kernel = compiled(
        kernels.expand_kernel,
        90,
        {"words": words, "out": "*bf16"},
        kernels.OPTIONS,
        kind=kind,
        pairs=pairs,
        tile=kernels.TILE,
    )
    assert kernel.asm["cubin"]
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", kernel.asm["ptx"])
    # The two values of a pair are written together.
    assert len(re.findall(r"st\.global\.b32", kernel.asm["ptx"])) == pairs


def test_they_serve_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ModuleType("kernels")
    vars(served)["WORDS"] = {"Q4_0": torch.uint16}
    monkeypatch.setattr(packed_product, "_triton_kernels", lambda: served)
    assert triton_kernels(torch.device("cuda", 1), "Q4_0") is served
    assert triton_kernels(torch.device("cuda", 1), "IQ4_NL") is None
    for device in ("cpu", "mps", "meta"):
        assert triton_kernels(torch.device(device), "Q4_0") is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert triton_kernels(torch.device("cuda"), "Q4_0") is None


def test_without_triton_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_product, "find_spec", lambda name: None)
    packed_product._triton_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install it with causallm"):
            assert triton_kernels(torch.device("cuda"), "Q4_0") is None
        assert triton_kernels(torch.device("cuda"), "Q4_0") is None
    finally:
        packed_product._triton_kernels.cache_clear()
