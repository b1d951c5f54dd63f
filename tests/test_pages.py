"""Memory in pages of the process's own: where tensors in it lie, and that they hold what they are given."""

import itertools
import mmap
import sys

import pytest
import torch

from causallm.report import memory_kinds
from layers.kv_cache import KVCache, StaticKVCache
from layers.pages import HUGE_PAGE, LINE, SLAB, Slabs, empty_pair
from layers.sliding_cache import SlidingKVCache

SHAPES = [(1, 8, 577, 128), (2, 3, 1000, 257), (3, 5), (1, 4, 0, 64)]


def _bytes(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def _apart(tensors: list[torch.Tensor]) -> bool:
    ranges = sorted((_bytes(tensor) for tensor in tensors if tensor.nbytes), key=lambda taken: taken.start)
    return all(one.stop <= other.start for one, other in itertools.pairwise(ranges))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
def test_a_pair_is_two_tensors_that_share_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = empty_pair(shape, dtype)
    for tensor, value in ((first, 1), (second, 2)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        tensor.fill_(value)
    assert _apart([first, second])
    assert (first == 1).all()
    assert (second == 2).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has huge pages to ask for")
def test_a_pair_that_fills_a_huge_page_begins_with_one() -> None:
    large, _ = empty_pair((1, 8, 577, 128), torch.float16)
    assert large.data_ptr() % HUGE_PAGE == 0


def test_a_pair_on_another_device_is_made_there() -> None:
    assert all(tensor.is_meta for tensor in empty_pair((1, 8, 577, 128), torch.float16, "meta"))


def test_copies_in_slabs_are_what_casting_gives_and_lie_apart() -> None:
    slabs = Slabs()
    sources = [
        torch.randn(37, 11),
        torch.randn(5, 700).T,
        torch.randn(()),
        torch.empty(0, 3),
        torch.randn(SLAB // 4 + 1),
    ]
    copies = [slabs.copy(source, dtype) for source in sources for dtype in (torch.bfloat16, torch.float32)]
    expected = [source.to(dtype) for source in sources for dtype in (torch.bfloat16, torch.float32)]
    assert all(map(torch.equal, copies, expected))
    assert [copied.stride() for copied in copies] == [tensor.stride() for tensor in expected]
    assert _apart(copies)
    assert all(copied.data_ptr() % LINE == 0 for copied in copies if copied.nbytes)


def test_a_copy_outlives_its_slabs() -> None:
    copies = [Slabs().copy(torch.full((1000, 1000), float(number)), torch.float32) for number in range(5)]
    assert [float(copied.mean()) for copied in copies] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("window", [None, 1500])
def test_a_cache_that_grows_into_huge_pages_holds_what_it_held(window: int | None) -> None:
    shape = 1, 8, 128
    cache = KVCache(*shape, torch.float16) if window is None else SlidingKVCache(*shape, torch.float16, window=window)
    keys, values = torch.randn(2, 1, 8, 2000, 128, dtype=torch.float16)
    for first in range(0, 2000, 400):
        new = slice(first, first + 400)
        cache.update(keys[:, :, new], values[:, :, new])
    held = cache.state()
    last = slice(0 if window is None else 2000 - window, 2000)
    assert torch.equal(held["keys"], keys[:, :, last])
    assert torch.equal(held["values"], values[:, :, last])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in memory")
def test_a_large_static_cache_takes_no_memory_that_few_tokens_do_not_fill() -> None:
    cache, token = StaticKVCache(1, 8, 128, torch.float16, capacity=40_960), torch.randn(1, 8, 1, 128).half()
    before = memory_kinds()[0]
    cache.update(token, token)
    assert cache.nbytes > 160e6
    assert memory_kinds()[0] - before < 20e6


@pytest.mark.parametrize("first", [400, 900])
def test_a_static_cache_holds_what_it_is_given(first: int) -> None:
    cache = StaticKVCache(1, 8, 128, torch.float16, capacity=1000)
    keys, values = torch.randn(2, 1, 8, 1000, 128, dtype=torch.float16)
    cache.update(keys[:, :, :first], values[:, :, :first])
    address = cache.claim(0).keys.data_ptr()
    held, _, _ = cache.update(keys[:, :, first:], values[:, :, first:])
    assert held.data_ptr() == address
    assert torch.equal(cache.state()["keys"], keys)
    assert torch.equal(cache.state()["values"], values)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has huge pages to ask for")
def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # what no kernel knows: "invalid argument", as there
    first, second = empty_pair((1, 8, 577, 128), torch.float16)
    assert torch.equal(first.fill_(1) + second.fill_(2), torch.full_like(first, 3))
