"""The caches against a plain list of everything ever seen: what they return, hold, save and take back."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layers.int8_cache import Int8KVCache
from layers.kv_cache import Columns, KVCache, StaticKVCache
from layers.sliding_cache import SlidingKVCache

SHAPE = (2, 3, 4)  # batch, kv_heads, head_dim
WINDOW = 7


def in_8_bits(make: Callable[[int, torch.dtype], KVCache]) -> KVCache:
    return Int8KVCache(make(SHAPE[2], torch.int8), make(1, torch.float32))


KINDS: dict[str, Callable[[], KVCache]] = {
    "growing": lambda: KVCache(*SHAPE, torch.float32),
    "static": lambda: StaticKVCache(*SHAPE, torch.float32, capacity=64),
    "sliding": lambda: SlidingKVCache(*SHAPE, torch.float32, window=WINDOW),
    "sliding by one": lambda: SlidingKVCache(*SHAPE, torch.float32, window=1),
    "sliding, rolls back": lambda: SlidingKVCache(*SHAPE, torch.float32, window=WINDOW, rollback=4),
    "8 bits, growing": lambda: in_8_bits(lambda dim, dtype: KVCache(*SHAPE[:2], dim, dtype)),
    "8 bits, static": lambda: in_8_bits(lambda dim, dtype: StaticKVCache(*SHAPE[:2], dim, dtype, capacity=64)),
    "8 bits, sliding": lambda: in_8_bits(lambda dim, dtype: SlidingKVCache(*SHAPE[:2], dim, dtype, window=WINDOW)),
    "8 bits, rolls back": lambda: in_8_bits(
        lambda dim, dtype: SlidingKVCache(*SHAPE[:2], dim, dtype, window=WINDOW, rollback=4)
    ),
}


@pytest.fixture(params=list(KINDS))
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KVCache:
    """One of each kind, growing by small steps so that short sequences cross several."""
    monkeypatch.setattr(KVCache, "step", 3)
    return KINDS[request.param]()


def fresh_like(cache: KVCache) -> KVCache:
    return next(make() for make in KINDS.values() if same_kind(make(), cache))


def same_kind(a: KVCache, b: KVCache) -> bool:
    a, b = (getattr(cache, "_codes", cache) for cache in (a, b))
    return (
        type(a) is type(b)
        and a.dtype == b.dtype
        and all(getattr(a, name, None) == getattr(b, name, None) for name in ("window", "rollback"))
    )


def tokens(time: int) -> tuple[Tensor, Tensor]:
    """Numbers that 8 bits and a scale hold exactly: whole 64ths up to 127 of them, which one in each key reaches."""
    keys, values = torch.randint(-127, 128, (2, *SHAPE[:2], time, SHAPE[2])) / 64
    keys[..., 0] = values[..., 1] = 127 / 64
    return keys, values


def floats(state: dict[str, Tensor], name: str) -> Tensor:
    """The keys or values of a state."""
    scales = state.get(f"{name[:-1]}_scales")
    return state[name] if scales is None else state[name] * scales


class Everything:
    """The model of a cache: keys and values of all columns."""

    def __init__(self) -> None:
        self.keys, self.values = tokens(0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)

    def truncate(self, columns: int) -> None:
        self.keys, self.values = self.keys[:, :, :columns], self.values[:, :, :columns]


def check(returned: tuple[Tensor, Tensor, Columns], truth: Everything, needed: range) -> None:
    """Each key is that of the column it is said to be of, none twice, and all `needed` ones are there."""
    keys, values, columns = returned
    numbers = [column for part in columns for column in part]
    assert torch.equal(keys, truth.keys[:, :, numbers])
    assert torch.equal(values, truth.values[:, :, numbers])
    assert len(set(numbers)) == len(numbers)
    assert set(needed) <= set(numbers)


def needed_by(cache: KVCache, first_new: int, end: int) -> range:
    """The columns that tokens from `first_new` on may attend to."""
    return range(max(0, first_new - window_of(cache) + 1), end)


def window_of(cache: KVCache) -> int:
    """How many columns the cache holds at most; a million where it does not slide."""
    return getattr(getattr(cache, "_codes", cache), "window", 10**6)


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(cache: KVCache, seed: int) -> None:
    """Updates of all lengths, reservations, truncations, saves and restores in random order."""
    rng, truth = random.Random(seed), Everything()
    saved: list[tuple[dict[str, Tensor], int, Everything, int]] = []
    oldest = 0
    for _ in range(60):
        action = rng.choice(["update"] * 6 + ["reserve", "truncate", "save", "restore"])
        if action == "update":
            time = rng.choice([1, 1, 1, 2, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
            if cache.limit is not None and cache.offset + time > cache.limit:
                continue
            keys, values = tokens(time)
            truth.append(keys, values)
            before = cache.offset
            check(cache.update(keys, values), truth, needed_by(cache, before, before + time))
            aside = (cache.rollback or 0) if time > 1 else 0
            oldest = max(0, min(oldest, before), cache.offset - window_of(cache) - aside)
        elif action == "reserve":
            cache.reserve(min(cache.offset + rng.randint(0, 20), cache.limit or 10**6))
        elif action == "truncate":
            target = rng.choice([rng.randint(0, cache.offset), max(0, cache.offset - rng.randint(1, 4))])
            assert cache.reaches(target) == (target == cache.offset or max(0, target - window_of(cache)) >= oldest)
            if not cache.reaches(target):
                with pytest.raises(ValueError, match=f"at {cache.offset} .*back to {target}"):
                    cache.truncate(target)
            else:
                cache.truncate(target)
                truth.truncate(target)
        elif action == "save":
            copy = Everything()
            copy.append(truth.keys, truth.values)
            back = rng.random() < 0.5
            saved_oldest = oldest if back else max(0, cache.offset - window_of(cache))
            saved.append((cache.state(back), cache.offset, copy, saved_oldest))
        elif saved:
            state, offset, truth_then, oldest = rng.choice(saved)
            truth = Everything()
            truth.append(truth_then.keys, truth_then.values)
            if rng.random() < 0.5:
                cache = fresh_like(cache)
            cache.restore(state, offset)
        assert cache.offset == truth.keys.shape[2]


@pytest.mark.parametrize("seen", range(3 * WINDOW + 1))
def test_the_state_is_the_newest_columns_in_order_at_every_phase(cache: KVCache, seen: int) -> None:
    truth = Everything()
    for _ in range(seen):
        new = tokens(1)
        truth.append(*new)
        cache.update(*new)
    state = cache.state()
    held = min(seen, window_of(cache))
    assert torch.equal(floats(state, "keys"), truth.keys[:, :, seen - held :])
    assert torch.equal(floats(state, "values"), truth.values[:, :, seen - held :])
    restored = fresh_like(cache)
    restored.restore(state, seen)
    new = tokens(1)
    truth.append(*new)
    check(restored.update(*new), truth, needed_by(cache, seen, seen + 1))


def test_a_saved_state_is_not_touched_by_what_comes_after(cache: KVCache) -> None:
    cache.update(*tokens(WINDOW))
    state = cache.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    for _ in range(WINDOW):
        cache.update(*tokens(1))
    if cache.reaches(0):
        cache.truncate(0)
        cache.update(*tokens(WINDOW))
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("time", [1, 3, WINDOW, 4 * WINDOW])
def test_a_sliding_cache_never_holds_more_than_its_window(time: int) -> None:
    cache = SlidingKVCache(*SHAPE, torch.float32, window=WINDOW)
    batch, kv_heads, head_dim = SHAPE
    for _ in range(30):
        cache.update(*tokens(time))
        assert cache.nbytes <= 2 * batch * kv_heads * head_dim * WINDOW * 4


@pytest.mark.parametrize("window", [1, 3, WINDOW, 50])
@pytest.mark.parametrize("taken", range(5))
def test_what_is_taken_back_leaves_no_trace(window: int, taken: int) -> None:
    """Drafts of five of which some are taken back, a single token now and then: as if only the rest had come."""
    cache, plain = (SlidingKVCache(*SHAPE, torch.float32, window=window, rollback=rollback) for rollback in (4, 0))
    for step in range(30):
        if step % 3 == 0:
            new = tokens(1)
            cache.update(*new)
        else:
            new = tokens(5)
            cache.update(*new)
            cache.truncate(cache.offset - taken)
            new = (new[0][:, :, : 5 - taken], new[1][:, :, : 5 - taken])
        for column in range(new[0].shape[2]):
            plain.update(new[0][:, :, column : column + 1], new[1][:, :, column : column + 1])
        assert cache.offset == plain.offset
        assert all(torch.equal(part, plain.state()[name]) for name, part in cache.state().items())
    assert cache.nbytes - plain.nbytes <= 2 * 24 * 4 * 4


def test_a_sliding_cache_takes_back_no_more_than_it_was_made_for() -> None:
    cache = SlidingKVCache(*SHAPE, torch.float32, window=WINDOW, rollback=4)
    cache.update(*tokens(30))
    cache.truncate(28)
    with pytest.raises(ValueError, match="window 7 at 28 positions cannot go back to 25"):
        cache.truncate(25)
    cache.truncate(26)
    cache.update(*tokens(1))
    with pytest.raises(ValueError, match="window 7 at 27 positions cannot go back to 26"):
        cache.truncate(26)


def test_an_update_that_was_broken_off_is_not_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is aside then is not what lies before the window."""
    for broken in ("_store", "_keep_aside"):
        cache = SlidingKVCache(*SHAPE, torch.float32, window=WINDOW, rollback=9)
        cache.update(*tokens(30))
        with monkeypatch.context() as patch:
            patch.setattr(cache, broken, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                cache.update(*tokens(5))
        assert not any(cache.reaches(columns) for columns in range(cache.offset))


def test_a_wide_window_is_not_allocated_before_it_is_needed() -> None:
    cache = SlidingKVCache(*SHAPE, torch.float32, window=100_000)
    cache.update(*tokens(5))
    cache.update(*tokens(1))
    assert cache.nbytes <= 2 * 24 * 4 * KVCache.step


def test_one_token_moves_nothing_in_a_ring_that_is_full() -> None:
    cache = SlidingKVCache(*SHAPE, torch.float32, window=WINDOW)
    cache.update(*tokens(2 * WINDOW))
    places = {cache.update(*tokens(1))[0].data_ptr() for _ in range(2 * WINDOW)}
    assert len(places) == 1


def test_a_static_cache_never_moves_and_says_when_it_is_full() -> None:
    cache = StaticKVCache(*SHAPE, torch.float32, capacity=10)
    bytes_held = cache.nbytes
    places = {cache.update(*tokens(time))[0].data_ptr() for time in (3, 1, 6)}
    assert len(places) == 1
    assert cache.nbytes == bytes_held == 2 * 24 * 10 * 4
    with pytest.raises(ValueError, match="holds 10 positions, but 11 are needed"):
        cache.update(*tokens(1))
    assert cache.offset == 10


@pytest.mark.parametrize("name", [name for name in KINDS if "rolls back" not in name])
def test_what_is_reserved_takes_no_more_memory_as_it_fills(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "step", 3)
    cache = KINDS[name]()
    cache.reserve(20)
    held = cache.nbytes
    assert held >= 2 * 24 * min(20, window_of(cache))
    for time in (3, 1, 6, 10):
        cache.update(*tokens(time))
        assert cache.nbytes == held


def test_more_than_a_static_cache_holds_is_not_reserved() -> None:
    cache = StaticKVCache(*SHAPE, torch.float32, capacity=10)
    with pytest.raises(ValueError, match="holds 10 positions, but 11 are needed"):
        cache.reserve(11)


def test_a_growing_cache_grows_seldom_and_wastes_little() -> None:
    cache = KVCache(*SHAPE, torch.float32)
    sizes = []
    for _ in range(3000):
        cache.update(*tokens(1))
        sizes.append(cache.nbytes)
    assert len(set(sizes)) <= 12
    assert sizes[-1] <= 1.25 * 2 * 24 * 4 * (3000 + KVCache.step)


@pytest.mark.parametrize("target", [-1, 6])
def test_truncation_to_where_the_cache_has_not_been(cache: KVCache, target: int) -> None:
    cache.update(*tokens(5))
    with pytest.raises(ValueError, match=rf"5 positions .*to {target}"):
        cache.truncate(target)
    assert cache.offset == 5


def test_a_state_that_does_not_fit_is_refused(cache: KVCache) -> None:
    cache.update(*tokens(5))
    state = cache.state()
    one_row = {name: tensor[:1] for name, tensor in state.items()}
    for broken, offset in ((state, 0), (one_row, 5)):
        with pytest.raises(ValueError, match=rf"the state has shape \[.*at {offset} needs \["):
            cache.restore(broken, offset)
        assert cache.offset == 5
    with pytest.raises(ValueError, match="at 6 needs"):
        KVCache(*SHAPE, torch.float32).restore(state, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_keeps_its_own_dtype(dtype: torch.dtype) -> None:
    for cache in (KVCache(*SHAPE, dtype), SlidingKVCache(*SHAPE, dtype, window=WINDOW)):
        for time in (3, 1, 10, 1):
            keys, values, _ = cache.update(*tokens(time))
            assert keys.dtype == values.dtype == dtype
        state = {name: tensor.float() for name, tensor in cache.state().items()}
        cache.restore(state, cache.offset)
        assert all(torch.equal(tensor.float(), state[name]) for name, tensor in cache.state().items())
        assert cache.state()["keys"].dtype == dtype
