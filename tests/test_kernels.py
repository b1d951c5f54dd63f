"""The native kernels against their torch twins, for every kind of processor that this one can act as."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from packed_weights import packed_weight
from text_models import save_text_model
from torch import Tensor
from torch.nn import functional

from causallm import load_model
from layers.kernels import native, native_attention
from layers.kernels.block_formats import BLOCK_FORMATS, writable
from layers.kernels.packed_product import FEW_ROWS, expanded, packed_product, packed_product_twin, rounded
from layers.linear import FullyConnected, project
from layers.mha_core import attend, attends_natively
from layers.packed import PackedEmbedding, PackedLinear
from layers.step import Mask, Step

HAS_AVX_VNNI = native.choose(native.AVX_VNNI) == "AVX-VNNI"
"""Where not, `emulated` runs what is its own."""
LEVELS = (native.PLAIN, native.AVX2, *([native.AVX_VNNI] if HAS_AVX_VNNI else []), native.AVX512)
native.choose(native.AVX512)
COMPILER = (sysconfig.get_config_var("CC") or "none").split()[0]
needs_kernels = pytest.mark.skipif(native.library() is None, reason="no native kernels were built")


@pytest.fixture(params=LEVELS)
def _level(request: pytest.FixtureRequest):
    # The second level of an ARM processor is another than that of an x86 one.
    wanted = {
        native.PLAIN: ["plain C"],
        native.AVX2: ["AVX2", "NEON dot product"],
        native.AVX_VNNI: ["AVX-VNNI"],
        native.AVX512: ["AVX-512 VNNI"],
    }
    names = wanted[request.param]
    if native.choose(request.param) not in names:
        native.choose(native.AVX512)
        pytest.skip(f"not {' or '.join(names)}")
    yield
    native.choose(native.AVX512)


@pytest.mark.skipif(not shutil.which(COMPILER), reason="there is no C compiler")
def test_they_are_there_where_there_is_a_compiler() -> None:
    """Without them all other tests here are skipped, and the package installs although its C does not compile."""
    assert native.library() is not None


@pytest.mark.skipif(not shutil.which("clang"), reason="there is no clang")
def test_clang_compiles_them() -> None:
    """It knows fewer of the processor's features by name than gcc does."""
    source = Path(native.__file__).with_name("native.c")
    options = ["-fsyntax-only", "-std=gnu11", "-Wno-psabi", "-Werror"]
    subprocess.run(["clang", *options, str(source)], check=True)


@needs_kernels
def test_which_processors_have_kernels_for_many_rows_and_tokens() -> None:
    """Without them the tests of both would be of torch's operators, or skipped."""
    levels = {
        level: (native.choose(level), native.has_panels(), native_attention.has_attend_many()) for level in LEVELS
    }
    native.choose(native.AVX512)
    assert all(("AVX" in name) == panels == many for name, panels, many in levels.values())


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 4, 37, 1030])
@pytest.mark.parametrize("blocks", [1, 2, 4, 7])
def test_packed_product_is_its_twin(kind: str, rows: int, blocks: int) -> None:
    columns = blocks * BLOCK_FORMATS[kind].values
    weight = packed_weight(kind, rows, columns)
    for tokens in (1, 3, 9, 24, 29):
        x = torch.randn(tokens, columns)
        x[0, :32] = 0
        error = (native.linear(x, weight, kind) - packed_product_twin(x, weight, kind)).abs()
        # Against the terms, of which little may be left in a sum.
        assert (error <= 1e-6 * rounded(x).abs() @ BLOCK_FORMATS[kind].unpack(weight).abs().T).all()


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("code", [0x00, 0x0F, 0x70, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("copies", [1, 7])
def test_extreme_codes_and_activations_do_not_saturate(kind: str, code: int, copies: int) -> None:
    block = BLOCK_FORMATS[kind]
    packed = torch.full((5, 7, block.nbytes), code, dtype=torch.uint8)
    packed[..., block.halves] = torch.rand(5, 7, packed[..., block.halves].shape[-1] // 2).half().view(torch.uint8)
    weight = packed.flatten(1)
    # Rounded, these are 127 and -127 alone: all of one sign, then mixed.
    x = torch.stack([torch.ones(7 * block.values), -torch.ones(7 * block.values), torch.randn(7 * block.values).sign()])
    x = x.repeat(copies, 1)
    wide = block.unpack(weight).double()
    expected, magnitude = rounded(x).double() @ wide.T, x.abs().double() @ wide.abs().T
    assert ((native.linear(x, weight, kind) - expected).abs() <= 2e-6 * magnitude).all()


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-VNNI's kernels, built to run on a processor that has the same instruction as part of AVX-512 alone."""
    if not shutil.which(COMPILER) or native.choose(native.AVX512) != "AVX-512 VNNI":
        pytest.skip("no compiler, or no AVX-512 VNNI")
    source, built = Path(native.__file__).with_name("native.c"), tmp_path / "native.so"
    options = ["-O1", "-std=gnu11", "-shared", "-fPIC", "-DAVX_VNNI_BY_AVX512", "-w"]
    subprocess.run([COMPILER, *options, str(source), "-o", str(built), "-lm"], check=True)
    loaded = native.loaded_from(built)
    monkeypatch.setattr(native, "library", lambda: loaded)
    assert native.choose(native.AVX_VNNI) == "AVX-VNNI"


@needs_kernels
@pytest.mark.usefixtures("emulated")
def test_avx_vnni_multiplies_many_rows_as_its_twin() -> None:
    for kind, block in BLOCK_FORMATS.items():
        for blocks, code in ((1, None), (4, None), (7, None), (7, 0x00), (7, 0x80), (7, 0x7F), (7, 0xFF)):
            weight = packed_weight(kind, 37, blocks * block.values)
            if code is not None:
                filled = torch.full((37, blocks, block.nbytes), code, dtype=torch.uint8)
                filled[..., block.halves] = weight.view(37, blocks, -1)[..., block.halves]
                weight = filled.flatten(1)
            x = torch.randn(29, blocks * block.values)
            x = x if code is None else x.sign()
            error = (native.linear(x, weight, kind) - packed_product_twin(x, weight, kind)).abs()
            assert (error <= 1e-6 * rounded(x).abs() @ block.unpack(weight).abs().T).all(), (kind, blocks, code)


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 31), (37, 64), (130, 100)])
def test_float_product_is_torchs(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(3, columns)
    expected = functional.linear(x.double(), weight.double()).float()
    close(native.linear(x, weight, native.FLOATS[dtype]), expected, 2e-6)


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_expanding_is_exact(kind: str) -> None:
    columns = 3 * BLOCK_FORMATS[kind].values
    weight = packed_weight(kind, 19, columns)
    expected = BLOCK_FORMATS[kind].unpack(weight)
    assert torch.equal(native.expand(weight, kind, columns, torch.float32), expected)
    assert torch.equal(native.expand(weight, kind, columns, torch.bfloat16), expected.bfloat16())


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize("options", [(None, False, False), (2.0, True, True)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "past"),
    [(4, 4, 16, 33), (6, 2, 64, 131), (8, 1, 128, 33), (14, 2, 80, 66), (2, 1, 272, 1)],
)
def test_attention_of_one_token_is_its_definition(
    heads: int, kv_heads: int, head_dim: int, past: int, options: tuple[float | None, bool, bool], dtype: torch.dtype
) -> None:
    softcap, with_sinks, masked = options
    held = torch.randn(2, 2, kv_heads, past + 7, head_dim).to(dtype)
    held[:, :, :, past:] = torch.nan
    key, value = held[0, :, :, :past], held[1, :, :, :past]
    query = torch.randn(2, heads, 1, head_dim)
    sinks = torch.randn(heads) if with_sinks else None
    bias = torch.zeros(2, past).masked_fill_(torch.rand(2, past) < 0.3, -torch.inf) if masked and past > 1 else None
    found = native_attention.attend(query, key, value, bias, sinks, 0.2, softcap)
    expected = defined(query, key, value, None if bias is None else bias[:, None, None], sinks, 0.2, softcap)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_of_a_head_is_that_of_the_head_alone(dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 1, 1, 77, 48).to(dtype)
    query = torch.randn(1, 7, 1, 48)
    alone = [native_attention.attend(query[:, head : head + 1], key, value, None, None, 0.2, None) for head in range(7)]
    assert torch.equal(native_attention.attend(query, key, value, None, None, 0.2, None), torch.cat(alone, 1))


def defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention in float64, each head by itself."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


needs_many = pytest.mark.skipif(
    not native_attention.has_attend_many(), reason="no kernel for the attention of many tokens"
)


@pytest.fixture(params=[native.AVX2, native.AVX512])
def _level_for_many(request: pytest.FixtureRequest):
    native.choose(request.param)
    yield
    native.choose(native.AVX512)


@needs_many
@pytest.mark.usefixtures("_level_for_many")
@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)],
)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("padding", [None, [0, 30]])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 80), (32, 1, 64)])
@pytest.mark.parametrize(("time", "past"), [(2, 2), (33, 33), (50, 131), (100, 128)])
def test_attention_of_many_tokens_is_its_definition(
    dtype: torch.dtype,
    cache: torch.dtype,
    window: int | None,
    padding: list[int] | None,
    extras: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    time: int,
    past: int,
) -> None:
    held = torch.randn(2, 2, kv_heads, past + 7, head_dim).to(cache)
    held[:, :, :, past:] = torch.nan
    key, value = held[0, :, :, :past], held[1, :, :, :past]
    query = torch.randn(2, heads, time, head_dim).to(dtype)
    softcap, sinks = (2.0, torch.randn(heads)) if extras else (None, None)
    rows = None if padding is None else torch.tensor(padding)
    mask = Step(past - time, time, dtype, torch.device("cpu"), padding=rows).mask(window, (range(past),))
    assert attends_natively(query, key, value)
    found = attend(query, key, value, mask, 0.2, softcap, sinks)
    expected = defined(query, key, value, mask.bias, sinks, 0.2, softcap)
    assert found.dtype == dtype
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@needs_many
def test_a_token_gets_the_same_bits_whatever_is_computed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = torch.randn(2, 3, 2, 200, 32)
    query = torch.randn(3, 8, 150, 32)

    def part(begin: int, end: int, rows: slice = slice(None)) -> Tensor:
        past = 50 + end
        of_rows = query[rows, :, begin:end], key[rows, :, :past], value[rows, :, :past]
        return native_attention.attend_many(*of_rows, None, end - begin, None, 0.2, None)

    whole = part(0, 150)
    assert torch.equal(torch.cat([part(0, 2), part(2, 67), part(67, 150)], 2), whole)
    assert torch.equal(torch.cat([part(0, 150, slice(row, row + 1)) for row in range(3)]), whole)
    for threads in (1, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(part(0, 150), whole)


@needs_many
def test_torch_attends_where_the_kernel_for_many_tokens_does_not() -> None:
    sizes = {"kernel": (8, 2, 32), "width": (8, 2, 24), "heads": (97, 1, 16)}
    served = {
        name: attends_natively(torch.randn(1, h, 5, d), *torch.randn(2, 1, kv, 9, d))
        for name, (h, kv, d) in sizes.items()
    }
    assert served == {"kernel": True, "width": False, "heads": False}
    query, held = torch.randn(1, 8, 5, 32), torch.randn(1, 2, 9, 32)
    assert not attends_natively(query.double(), held.double(), held.double())
    assert not attends_natively(query, held, held[..., :16])
    assert not attends_natively(query.expand(2, -1, -1, -1), held, held)


@needs_many
@pytest.mark.parametrize("learned", range(4))
@pytest.mark.parametrize("time", [1, 5])
def test_torch_attends_where_a_gradient_is_wanted(learned: int, time: int) -> None:
    query, key, value, sinks = torch.randn(1, 4, time, 32), *torch.randn(2, 1, 2, time, 32), torch.randn(4)
    parts = [query, key, value, sinks]
    parts[learned].requires_grad_()
    assert not attends_natively(*parts)
    attend(query, key, value, Mask(), 0.2, None, sinks).sum().backward()
    assert parts[learned].grad is not None
    with torch.no_grad():
        assert attends_natively(*parts)


@needs_many
def test_no_tokens_are_no_tokens() -> None:
    assert attend(torch.randn(1, 4, 0, 32), *torch.randn(2, 1, 2, 9, 32), Mask(), 0.2).shape == (1, 4, 0, 32)


@needs_kernels
@pytest.mark.parametrize("time", [1, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_attention_hides_nothing_that_is_no_number(
    where: str, with_sinks: bool, softcap: float | None, time: int
) -> None:
    parts = {name: torch.randn(1, 2, 6, 32) for name in ("query", "key", "value")}
    parts[where][:, :, 2 if where != "query" else time // 2] = torch.nan
    query, sinks = parts["query"][:, :, :time], torch.randn(2) if with_sinks else None
    if where == "query" and time == 1:
        query = torch.full_like(query, torch.nan)
    mask = Step(6 - time, time, torch.float32, torch.device("cpu")).mask(None, (range(6),))
    found = attend(query, parts["key"], parts["value"], mask, 0.2, softcap, sinks)
    seen = torch.arange(6 - time, 6) >= 2 if where != "query" else torch.arange(time) == time // 2
    assert torch.equal(found.isnan().any(-1), found.isnan().all(-1))
    # A weight of zero times a value that is no number is none, so more tokens than those that see it may get it.
    assert found.isnan().all(-1)[:, :, seen].all()
    assert where == "value" or not found.isnan()[:, :, ~seen].any()


@needs_kernels
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_weight_may_lie_in_any_order(tokens: int) -> None:
    weight, x = packed_weight("Q8_0", 50, 256), torch.randn(tokens, 256)
    assert torch.equal(packed_product(x, weight[::2], "Q8_0"), packed_product(x, weight[::2].clone(), "Q8_0"))


@needs_kernels
def test_any_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed_weight("Q4_0", 1030, 256), torch.randn(2, 256)
    results = []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(native.linear(x, weight, "Q4_0"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_rounded_is_int8() -> None:
    x = torch.randn(3, 64)
    steps = rounded(x).unflatten(-1, (-1, 32)) / (x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=1e-4)
    assert steps.abs().max() < 127.5
    assert torch.equal(rounded(torch.zeros(1, 32)), torch.zeros(1, 32))


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_and_many_rows_agree(kind: str, dtype: torch.dtype) -> None:
    weight, x = packed_weight(kind, 50, 512), torch.randn(FEW_ROWS[kind] + 1, 512).to(dtype)
    many, few = packed_product(x, weight, kind), packed_product(x[:3], weight, kind)
    assert many.dtype == few.dtype == dtype
    exact = x.float() @ BLOCK_FORMATS[kind].unpack(weight).T
    close(many.float(), exact, 0.02)
    close(few.float(), exact[:3], 0.02)


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize("tokens", [5, 40])
def test_a_product_is_rounded_once_to_the_dtype_of_the_rows(kind: str, dtype: torch.dtype, tokens: int) -> None:
    weight, x = packed_weight(kind, 50, 512), torch.randn(tokens, 512).to(dtype)
    found = native.linear(x, weight, kind)
    assert found.dtype == dtype
    assert torch.equal(found, native.linear(x.float(), weight, kind).to(dtype))


@needs_kernels
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_up_to_eight_rows_get_the_bits_of_one(kind: str) -> None:
    weight, x = packed_weight(kind, 50, 512), torch.randn(8, 512)
    alone = torch.cat([native.linear(row[None], weight, kind) for row in x])
    assert torch.equal(native.linear(x, weight, kind), alone)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_without_kernels_torch_serves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed_weight(kind, 50, 512), torch.randn(2, 3, 512)
    found, wide = packed_product(x, weight, kind), expanded(weight, kind)
    monkeypatch.setattr(native, "library", lambda: None)
    close(packed_product(x, weight, kind), found, 2e-6)
    assert torch.equal(expanded(weight, kind), wide)


def test_the_operator_is_seen_by_export() -> None:
    layer = PackedLinear.from_float(torch.randn(40, 256), torch.randn(40), "Q4_0")
    x = torch.randn(2, 3, 256)
    program = torch.export.export(layer, (x,))
    assert any("packed_product" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("kind", writable())
def test_layers(kind: str) -> None:
    weight, bias = torch.randn(40, 512), torch.randn(40)
    layer = PackedLinear.from_float(weight, bias, kind)
    assert (layer.in_features, layer.out_features) == (512, 40)
    table = BLOCK_FORMATS[kind].unpack(BLOCK_FORMATS[kind].pack(weight))
    assert torch.equal(layer.dequantize(), table)
    x = torch.randn(2, 3, 512)
    close(layer(x), functional.linear(x, table, bias), 0.02)
    embedding = PackedEmbedding(40, 512, 2.5, kind, torch.float32)
    embedding.weight = layer.weight
    ids = torch.tensor([[1, 39, 0]])
    assert torch.equal(embedding(ids), 2.5 * table[ids])
    assert torch.equal(embedding.dequantize(), table)
    close(embedding.project(x), x @ table.T, 0.02)


@needs_kernels
@pytest.mark.parametrize("dtype", native.FLOATS)
def test_a_few_rows_of_floats_go_to_the_kernels(dtype: torch.dtype) -> None:
    layer = FullyConnected.from_float(torch.randn(40, 96).to(dtype), torch.randn(40).to(dtype))
    x = torch.randn(2, 3, 96).to(dtype)
    exact = functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        assert torch.equal(layer(x), native_linear(x, layer))
        close(layer(x).double(), exact, 2e-6 if dtype == torch.float32 else 2**-8)
        assert layer(x[:, :0]).shape == (2, 0, 40)


def native_linear(x: Tensor, layer: FullyConnected) -> Tensor:
    product = native.linear(x.flatten(0, 1).float(), layer.weight, native.FLOATS[x.dtype])
    return (product + layer.bias).to(x.dtype).view(*x.shape[:-1], -1)


@needs_kernels
def test_packed_models_keep_their_cache_in_fp16(tmp_path: Path) -> None:
    save_text_model(tmp_path, "Qwen3Config", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    packed, floats = (load_model(tmp_path, model_tensor_type=f"{kind}-FP32") for kind in ("Q8_0", "FP32"))
    assert packed.make_cache()[0].state()["keys"].dtype == torch.float16
    assert floats.make_cache()[0].state()["keys"].dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 96 values do not fit a Q8_0 weight of 64 columns"):
        packed_product(torch.randn(1, 96), packed_weight("Q8_0", 4, 64), "Q8_0")


@pytest.mark.usefixtures("untyped")
def test_a_float_weight_of_another_width_is_torchs_error() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        project(torch.randn(1, 32), torch.randn(4, 64))


@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_no_number_stays_none(kind: str, value: float, rows: int) -> None:
    x = torch.randn(rows, 512)
    x[1, 300] = value
    product = packed_product(x, packed_weight(kind, 5, 512), kind)
    assert not product[1].isfinite().any()
    product[1] = 0
    assert product.isfinite().all()
