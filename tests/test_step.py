"""Positions, masks and rotary tables of a step against the rules spelled out token by token."""

import itertools

import pytest
import torch

from layers import step as steps
from layers.kv_cache import Columns
from layers.rope import Rope, inverse_frequencies, rotary_block, rotary_tables
from layers.step import Mask, Step

PADDING = torch.tensor([0, 3, 9])


def make_step(
    offset: int, time: int, padded: bool = False, causal: bool = True, rope_length: int | None = None
) -> Step:
    return Step(
        offset,
        time,
        torch.float32,
        torch.device("cpu"),
        padding=PADDING if padded else None,
        causal=causal,
        rope_length=rope_length,
    )


def allowed(query: int, key: int, padding: int, window: int | None, causal: bool) -> bool:
    """May the token in column `query` see the one in column `key`? Padding sees at least itself."""
    if query == key:
        return True
    if key < padding or (causal and key > query):
        return False
    return window is None or abs(query - key) < window


def spelled_out(step: Step, columns: Columns, window: int | None, padded: bool, causal: bool) -> torch.Tensor:
    """(batch, 1, time, past), for tokens that are no padding."""
    keys = list(itertools.chain(*columns))
    return torch.tensor(
        [
            [[[allowed(query, key, padding, window, causal) for key in keys] for query in range(step.offset, step.end)]]
            for padding in (PADDING.tolist() if padded else [0])
        ]
    )


def as_tensor(mask: Mask, step: Step, columns: Columns) -> torch.Tensor:
    """What a mask allows; its short cuts must not say otherwise."""
    past = sum(map(len, columns))
    if mask.bias is None:
        assert (mask.plain, mask.causal_time) == (False, 0)
        return torch.ones(1, 1, step.time, past, dtype=torch.bool)
    visible = mask.bias == 0
    assert (mask.bias[~visible] == -torch.inf).all()
    if mask.plain:
        assert torch.equal(visible, torch.ones_like(visible).tril(past - step.time))
    for queries in range(1, step.time + 1):
        assert not visible[:, :, :queries, past - mask.hidden_keys(queries) :].any()
    return visible


CAUSAL_COLUMNS: list[tuple[int, int, Columns]] = [
    (0, 12, (range(12),)),
    (0, 1, (range(1),)),
    (5, 7, (range(12),)),
    (11, 1, (range(12),)),
    (8, 4, (range(4, 12),)),  # a sliding cache: held and new
    (11, 1, (range(10, 12), range(7, 10))),  # its ring after wrapping
    (11, 1, (range(7, 12),)),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
@pytest.mark.parametrize(("offset", "time", "columns"), CAUSAL_COLUMNS)
def test_causal_masks(offset: int, time: int, columns: Columns, window: int | None, padded: bool) -> None:
    step = make_step(offset, time, padded)
    mask = step.mask(window, columns)
    expected = spelled_out(step, columns, window, padded, causal=True)
    rows = torch.tensor([[[[column >= padding]] for column in range(offset, step.end)] for padding in PADDING])
    is_token = rows.permute(0, 2, 1, 3) if padded else torch.ones(1, 1, 1, 1, dtype=torch.bool)
    found = as_tensor(mask, step, columns)
    assert torch.equal(found & is_token, expected & is_token)
    assert found.any(-1).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 12])
def test_masks_in_both_directions(window: int | None, padded: bool) -> None:
    step = make_step(0, 12, padded, causal=False)
    columns = (range(12),)
    found = as_tensor(step.mask(window, columns), step, columns)
    expected = spelled_out(step, columns, window, padded, causal=False)
    tokens = torch.arange(12) >= (PADDING[:, None] if padded else torch.zeros(1, 1))
    assert torch.equal(found & tokens[:, None, :, None], expected & tokens[:, None, :, None])
    assert found.any(-1).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("block", [1, 50, 100])
def test_masks_are_made_some_rows_at_a_time(
    block: int, window: int | None, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, documents = (range(12),), torch.tensor([[0] * 5 + [1] * 7, [2] * 12, [3] * 2 + [4] * 10])
    packed = Step(0, 12, torch.float32, torch.device("cpu"), documents=documents).mask(window, columns)
    whole = make_step(0, 12, padded).mask(window, columns)
    monkeypatch.setattr(steps, "MASK_BLOCK", block)
    assert whole.bias is not None
    assert packed.bias is not None
    assert torch.equal(whole.bias, make_step(0, 12, padded).mask(window, columns).bias)
    again = Step(0, 12, torch.float32, torch.device("cpu"), documents=documents).mask(window, columns)
    assert torch.equal(packed.bias, again.bias)


@pytest.mark.parametrize(("window", "columns"), [(None, (range(12),)), (5, (range(10, 12), range(7, 10)))])
def test_one_token_that_sees_all_keys_needs_no_mask(window: int | None, columns: Columns) -> None:
    assert make_step(11, 1).mask(window, columns) == Mask()


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("window", [None, 12])
def test_short_cuts_are_taken_where_they_hold(offset: int, window: int | None) -> None:
    mask = make_step(offset, 12 - offset).mask(window, (range(12),))
    assert mask.plain
    assert mask.hidden_keys(3) == 12 - offset - 3
    assert make_step(0, 12).mask(5, (range(12),)).hidden_keys(3) == 9
    assert not make_step(0, 12).mask(5, (range(12),)).plain
    assert not make_step(0, 12, padded=True).mask(None, (range(12),)).plain


def test_masks_and_tables_are_made_once_a_step() -> None:
    step, rope = make_step(5, 7), Rope("default", 8)
    assert step.mask(4, (range(12),)) is step.mask(4, (range(12),))
    assert step.mask(4, (range(12),)) is not step.mask(None, (range(12),))
    assert step.rotary(rope) is step.rotary(Rope("default", 8))
    assert step.rotary(rope) is not step.rotary(Rope("default", 8, theta=1e6))


def test_positions_count_from_the_first_token_of_each_row() -> None:
    assert make_step(5, 3).positions.tolist() == [[5, 6, 7]]
    assert make_step(5, 3, padded=True).positions.tolist() == [[5, 6, 7], [2, 3, 4], [-4, -3, -2]]


LENGTH_DEPENDENT = [
    Rope("dynamic", 8, factor=3.0, max_positions=8),
    Rope("longrope", 8, original_positions=8, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4),
]


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
@pytest.mark.parametrize(("rope_length", "length"), [(None, 15), (40, 40)])
def test_each_row_is_rotated_by_its_own_length(rope: Rope, rope_length: int | None, length: int) -> None:
    cosines, sines = make_step(11, 4, padded=True, rope_length=rope_length).rotary(rope)
    for row, padding in enumerate(PADDING.tolist()):
        alone = rotary_tables(
            inverse_frequencies(rope, length - padding)[None],
            torch.arange(11, 15)[None] - padding,
            rope.attention_factor,
            torch.float32,
        )
        assert torch.equal(cosines[row], alone[0][0])
        assert torch.equal(sines[row], alone[1][0])


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
def test_rope_length_stands_for_the_end_of_the_step(rope: Rope) -> None:
    by_end = make_step(0, 20).rotary(rope)[0]
    assert torch.equal(make_step(0, 20, rope_length=20).rotary(rope)[0], by_end)
    assert not torch.equal(make_step(0, 20, rope_length=60).rotary(rope)[0], by_end) or rope.kind == "longrope"
    assert not torch.equal(make_step(0, 4).rotary(rope)[0], by_end[:, :4])
    assert torch.equal(make_step(0, 4, rope_length=20).rotary(rope)[0], by_end[:, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [Rope("default", 24), Rope("yarn", 16, factor=4.0, attention_factor=1.2)], ids=str)
def test_tables_of_a_token_come_from_a_kept_block_and_are_the_same_bits(rope: Rope, dtype: torch.dtype) -> None:
    rotary_block.cache_clear()
    for offset in (0, 1, 63, 64, 65, 1000, 40000):
        step = Step(offset, 1, dtype, torch.device("cpu"))
        with torch.inference_mode():
            found = step.rotary(rope)
        frequencies = inverse_frequencies(rope, offset + 1)[None]
        expected = rotary_tables(frequencies, step.positions, rope.attention_factor, dtype)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert rotary_block.cache_info().misses == 4
    # A later step of training may take them from the same block.
    x = torch.ones(24 if rope.kind == "default" else 16, dtype=dtype, requires_grad=True)
    (Step(3, 1, dtype, torch.device("cpu")).rotary(rope)[0] * x).sum().backward()
    assert x.grad is not None


def test_other_steps_make_tables_of_their_own() -> None:
    rotary_block.cache_clear()
    plain, dynamic = Rope("default", 24), Rope("dynamic", 24, factor=2.0, max_positions=16)
    make_step(20, 2).rotary(plain)
    make_step(20, 1, padded=True).rotary(plain)
    make_step(20, 1).rotary(dynamic)
    Step(0, 1, torch.float32, torch.device("meta")).rotary(plain)
    assert rotary_block.cache_info().currsize == 0
