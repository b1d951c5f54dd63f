"""One budget of bytes: what it is divided into, the smallest that does, and what is refused."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_models import (  # noqa: F401  fixtures among them
    SHAPES,
    between,
    planned,
    save_shape,
    shapes,
    smallest,
    spoken,
    streamed,
    tight,
    with_architecture,
)
from text_models import save_text_model

from causallm import load_model
from causallm.byte_size import parse_bytes, show_bytes
from causallm.loading import build_packed, find_source
from causallm.packing import packed_tensors
from causallm.storage import budget
from causallm.storage.plan import PROGRAMS_DIFFER, BudgetError, Plan
from causallm.storage.step_memory import cache_bytes, planned_bytes, rows_that_fit, step_bytes, step_tokens
from causallm.storage.storage import HEAD, Storage
from causallm.weights.convert import convert
from causallm.weights.quantize import quantize
from layers.kernels import halves

tiny = pytest.mark.usefixtures("tight")
pytestmark = pytest.mark.filterwarnings("ignore:the budget has room for")

Shapes = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (17, 17), ("17", 17), ("2GB", 2 * 10**9), ("2gb", 2 * 10**9), ("2G", 2 * 10**9), ("1.5 GB", 15 * 10**8),
        ("2GiB", 2**31), ("2Gi", 2**31), ("700MiB", 700 * 2**20), ("700 kb", 700_000), (".5TB", 5 * 10**11),
        ("1TiB", 2**40), ("3B", 3), ("2.", 2), (" 4KiB ", 4096), (2e9, 2 * 10**9),
    ],
)  # fmt: skip
def test_amounts_of_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(str(text) if isinstance(text, float) else text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1", "0", "0.4", "2XB", "2GBB", "two", "1e9", "2 G B", "1,5GB", "2iB", "nan", "inf", "2GB 3MB", "."],
)
def test_what_is_no_amount_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{text}' is no amount of memory, expected a number of bytes")):
        parse_bytes(text)


@tiny
@pytest.mark.parametrize("given", ["plenty", True, -5])
def test_a_budget_that_is_none_is_named(given: Any, shapes: Shapes) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"nntr_config\.json.*: memory_budget"):
        load_model(shapes("llama"), memory_budget=given)


def bytes_in_memory(model: Any) -> int:
    """Of all that the storage of a model has taken for weights."""
    storage, staying = model.storage, sum(p.nbytes for p in model.parameters() if not p.is_meta)
    experts = storage._experts._memory.nbytes if storage._experts else 0
    return storage._arena.nbytes + experts + staying


@tiny
@pytest.mark.parametrize("share", [0, 0.4, 0.95])
@pytest.mark.parametrize("name", SHAPES)
def test_numbers_add_up(name: str, share: float, shapes: Shapes) -> None:  # noqa: F811
    folder = shapes(name)
    memory = between(folder, share)
    plan, inventory = planned(folder, memory)
    assert plan.smallest <= plan.memory <= memory
    assert sum(line.memory for line in plan.lines) == plan.memory
    weights = sum(p.nbytes for p in load_model(folder).parameters())
    assert sum(line.model for line in plan.lines) == weights
    assert plan.arena_bytes >= max((inventory.units[unit].nbytes for unit in plan.streamed), default=0)
    model = streamed(folder, memory_budget=memory)
    cache = sum(layer.nbytes for layer in model.make_cache(1, model.max_length))
    assert bytes_in_memory(model) + cache <= memory
    assert model.storage.planned_bytes == plan.memory
    spoken(model)
    model.storage.close()


@tiny
@pytest.mark.parametrize("name", SHAPES)
def test_more_memory_reads_less(name: str, shapes: Shapes) -> None:  # noqa: F811
    plans = [planned(shapes(name), between(shapes(name), share))[0] for share in (0, 0.3, 0.6, 1)]
    reads = [plan.read_per_token for plan in plans]
    assert reads == sorted(reads, reverse=True)
    assert reads[0] > reads[-1] == 0
    assert plans[-1].whole


@tiny
@pytest.mark.parametrize("nntr", [{}, {"fsu_lookahead": 3}, {"max_seq_len": 16}, {"batch_size": 4}])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-moe", "gpt-oss"])
def test_a_byte_less_than_the_smallest_is_refused(name: str, nntr: dict[str, Any], shapes: Shapes) -> None:  # noqa: F811
    folder = shapes(name)
    enough = smallest(folder, **nntr)
    model = load_model(folder, memory_budget=enough, **nntr)
    if name != "llama":
        assert torch.equal(model(torch.arange(12)[None]), load_model(folder)(torch.arange(12)[None]))
    with pytest.raises(BudgetError, match="is too small for this model, expected at least") as caught:
        load_model(folder, memory_budget=enough - 1, **nntr)
    assert any(line.startswith("cache of keys and values") for line in caught.value.table)
    assert caught.value.table[-1].startswith("together")
    assert "budget" in caught.value.table[-1]


@tiny
@pytest.mark.parametrize("program", [0, 123_456_789, 999_800_000, 999_999_000, 1_204_000_001, 15_123_400_000])
def test_the_budget_that_the_error_names_does(
    program: int,
    shapes: Shapes,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "program_bytes", lambda: program)
    with pytest.raises(BudgetError) as caught:
        planned(shapes("llama"), 1000)
    named = re.search(r"at least ([\d.]+ [MG]B) for 64 positions", str(caught.value))
    assert named
    plan, _ = planned(shapes("llama"), named[1])
    assert plan.smallest + PROGRAMS_DIFFER <= parse_bytes(named[1]) <= plan.smallest + PROGRAMS_DIFFER + 10**7
    assert show_bytes(parse_bytes(named[1])) == named[1]


@tiny
def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    """One block with an MLP among blocks whose experts are cached: two of the largest would be more than all."""
    folder = save_shape(tmp_path / "m", "qwen3-moe", intermediate_size=4096)
    model = load_model(folder, memory_budget=between(folder, 1))
    assert type(model.storage) is Storage
    plan, _ = planned(folder)
    assert plan.smallest <= plan.memory


@tiny
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_budget_for_everything_is_a_plain_model(
    name: str,
    shapes: Shapes,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, resident = shapes(name), load_model(shapes(name))
    enough = between(folder, 1)
    model = load_model(folder, memory_budget=enough)
    assert type(model.storage) is Storage
    assert all(not p.is_meta for p in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(spoken(model), spoken(resident), strict=True))
    if halves.native.library() is not None:
        most, run = [0], halves.native.run_halves

        def counted(part: Any, count: int, tokens: Any) -> None:
            most.append(count)
            run(part, count, tokens)

        monkeypatch.setattr(halves.native, "run_halves", counted)
        model(torch.tensor([[1]]), model.make_cache())
        assert max(most) == 2 * len(model.layers) + 1
    less = streamed(folder, memory_budget=enough - 1)
    assert less.storage.counts() is not None
    less.storage.close()


@tiny
def test_blocks_that_stay_are_spread_and_the_head_is_the_last_to_be_read(tmp_path: Path) -> None:
    folder = save_shape(tmp_path / "m", "llama", num_hidden_layers=12)
    plans = [planned(folder, between(folder, share / 20))[0] for share in range(20)]
    for plan in plans:
        blocks = [unit for unit in plan.streamed if unit != HEAD]
        assert HEAD not in plan.streamed or len(blocks) == 12
        gaps = [after - before for before, after in pairwise(blocks)]
        assert not gaps or max(gaps) <= 2 * min(gaps) + 1
    assert [len(plan.streamed) for plan in plans] == sorted((len(plan.streamed) for plan in plans), reverse=True)
    assert len(plans[10].streamed) in range(3, 10)


@tiny
def test_the_cache_of_all_rows_is_planned(shapes: Shapes) -> None:  # noqa: F811
    def line(**nntr: Any) -> int:
        plan, _ = planned(shapes("llama"), **nntr)
        (found,) = [line for line in plan.lines if line.purpose == "cache of keys and values"]
        assert plan.positions == nntr.get("max_seq_len", 64) * nntr.get("batch_size", 1)
        return found.memory

    assert line() == 3 * 64 * 2 * 2 * 16 * 4
    assert line(max_seq_len=16) == line() // 4
    assert line(batch_size=3) == 3 * line()
    assert line(kv_cache_dtype="float16") == line() // 2


@tiny
def test_rows_that_do_not_fit_together_run_one_after_the_other(shapes: Shapes) -> None:  # noqa: F811
    folder = shapes("llama")
    model, sizes = streamed(folder, memory_budget=smallest(folder)), []
    make = model.make_cache

    def make_noted(batch: int, *args: Any) -> Any:
        sizes.append((batch, args[0]))
        return make(batch, *args)

    model.make_cache = make_noted
    prompts = [[1] * 20, [2] * 21, [3] * 20, [4] * 5]
    expected = load_model(folder)
    list(model.stream(prompts, max_new_tokens=2))
    assert all(batch * columns <= model.storage.positions for batch, columns in sizes)
    assert sum(batch for batch, _ in sizes) == 4
    assert len(sizes) == 2
    single = [[e.token_id for e in expected.stream([prompt], max_new_tokens=2)] for prompt in prompts]
    rows: dict[int, list[int]] = {}
    for event in model.stream(prompts, max_new_tokens=2):
        rows.setdefault(event.row, []).append(event.token_id)
    assert [rows[number] for number in range(4)] == single
    model.storage.close()


@tiny
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_rows_together_need_no_more_than_was_planned(name: str, batch_size: int | None, shapes: Shapes) -> None:  # noqa: F811
    """Neither caches of windows, nor activations of a step, nor logits."""
    settings = {} if batch_size is None else {"batch_size": batch_size}
    model, _ = build_packed(find_source(shapes(name)), None, init_seq_len=16, **settings)
    planned_rows = batch_size or 1
    assert rows_that_fit(model, 999, 8) == 999
    assert step_tokens(model, 999) == 16
    model.storage.positions = model.max_length * planned_rows
    room = sum(planned_bytes(model, planned_rows))
    for columns in (2, 8, 20, 33, model.max_length):
        rows = rows_that_fit(model, 999, columns)
        shape = rows, columns, step_tokens(model, rows)
        assert planned_rows <= rows <= model.storage.positions // columns
        assert cache_bytes(model, *shape) + step_bytes(model, *shape) <= room
        assert shape[2] == max(min(planned_rows * 16 // rows, 16), 1)
        assert rows_that_fit(model, planned_rows, columns) == planned_rows
    assert step_tokens(model, planned_rows) == 16
    assert rows_that_fit(model, 999, 8) > planned_rows
    model.config = replace(model.config, vocab_size=10**6)
    assert rows_that_fit(model, 999, 2) < planned_rows + 2


@tiny
def test_a_step_of_many_rows_has_room_for_them_as_int8(
    shapes: Shapes,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(shapes("qwen3-moe"), tmp_path / "packed", "Q8_0")
    model = load_model(tmp_path / "packed")
    width = max(packed.shape[-1] for name, packed in packed_tensors(model).items() if "embed" not in name)
    with_products = step_bytes(model, 64, 40, 40)
    monkeypatch.setattr("causallm.storage.step_memory.packed_tensors", lambda _: {})
    # Of 32 values each has a byte, and all together two floats.
    assert with_products - step_bytes(model, 64, 40, 40) >= 64 * 40 * width // 32 * (32 + 2 * 4)


@tiny
def test_a_device_of_its_own_memory_is_refused(shapes: Shapes) -> None:  # noqa: F811
    settings: list[dict[str, Any]] = [{"memory_budget": "1GB"}, {"fsu": True}]
    for nntr in settings:
        with pytest.raises(ValueError, match="brought in from the disk on the CPU alone, got the device 'cuda'"):
            load_model(shapes("llama"), device="cuda", **nntr)


@tiny
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packing_each_time_is_refused(kind: str, shapes: Shapes) -> None:  # noqa: F811
    settings: dict[str, Any] = {"fc_layer_dtype": kind, "model_tensor_type": f"{kind}-FP32"}
    with pytest.raises(ValueError, match=r"is stored as floats and would be packed each time .* `main.py quantize`"):
        load_model(shapes("qwen3-moe"), memory_budget="1GB", **settings)


@tiny
def test_too_few_slots_for_a_token_are_warned_about(shapes: Shapes) -> None:  # noqa: F811
    folder = shapes("gpt-oss")
    with pytest.warns(UserWarning, match="has room for 4 experts, one token uses 6: .* MB more would hold them"):
        load_model(folder, memory_budget=smallest(folder)).storage.close()


def test_what_is_small_stays_and_the_program_counts(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    plan, inventory = planned(tmp_path, "4GB")
    assert plan.whole
    assert not any(unit for unit in inventory.units if unit != HEAD)
    assert all(piece.nbytes > 2**16 for unit in inventory.units.values() for piece in unit.pieces)
    program = next(line.memory for line in plan.lines if line.purpose == "program and libraries")
    assert 10**8 < program < 3 * 10**9
    with pytest.raises(BudgetError):
        planned(tmp_path, "50MB")


@tiny
def test_converting_asks_for_no_budget(shapes: Shapes, tmp_path: Path) -> None:  # noqa: F811
    """A folder whose configuration has its experts fetched is converted and packed as any."""
    folder = with_architecture(shapes("qwen3-moe"), tmp_path / "slim", "Qwen3SlimMoeForCausalLM")
    (folder / "nntr_config.json").write_text('{"memory_budget": "400MB", "fsu": true}')
    convert(folder, tmp_path / "plain", "huggingface")
    quantize(folder, tmp_path / "packed", "Q8_0")
    convert(folder, tmp_path / "x.bin")
    resident = load_model(shapes("qwen3-moe"))
    again = load_model(tmp_path / "plain", memory_budget="400MB", fsu=False)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids), resident(ids))
    with_blocks = load_model(tmp_path / "packed", memory_budget=None, fsu=True)
    assert torch.isfinite(with_blocks(ids)).all()


def test_the_table() -> None:
    plan = Plan(2 * 10**9, (budget.Line("one", 5 * 10**6, 0), budget.Line("another", 0, 3 * 10**9, "a note")), 1, False)
    assert plan.table() == [
        "          of the model   in memory",
        "one             5.0 MB           -",
        "another              -     3.00 GB  a note",
        "together        5.0 MB     3.00 GB  budget 2.00 GB",
    ]
