"""Experts that are read into a few slots when they are chosen give bit for bit what experts in memory give."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_halves import LEVELS, Calls, calls, folders, load, needs_kernels, steps  # noqa: F401  fixtures among them
from torch import Tensor, nn

from causallm.blocks import Mlp, SandwichBlock
from layers.expert_store import Expert, ExpertCache, ExpertStore, Fetch, FetchedExperts, ResidentExperts
from layers.gpt_oss_moe import GptOssExperts
from layers.kernels import native
from layers.kernels.halves import run_halves
from layers.linear import FullyConnected
from layers.moe_routing import mix_experts
from layers.qwen_moe import QwenMoe
from layers.rms_norm import RMSNorm
from layers.step import Step
from layers.swiglu import SwiGLU

SIZES = (40, 1, 3, 8, 1)
FLOATS, PACKED = ("float32", "bfloat16"), ("Q4_0", "Q8_0")
CASES = [*product(["qwen3-moe", "gpt-oss clamping"], [*FLOATS, *PACKED])]
NATIVE = [case for case in CASES if case not in product(["gpt-oss clamping"], FLOATS)]
"""gpt-oss's float experts lie transposed, which no kernel reads."""


def single(store: Any, number: int = 0) -> nn.Module:
    """One of the experts as a module of its own, with memory of its own."""
    if isinstance(store, ResidentExperts | list):
        return copy.deepcopy(store[number])
    alone = copy.deepcopy(store)
    for parameter in alone.parameters():
        parameter.data = parameter.data[number : number + 1].clone()
    return alone


class Reading(Fetch):
    """Reads when it is waited for, and not before."""

    def __init__(self, ready: Mapping[int, Expert], read: Callable[[], Mapping[int, Expert]]):
        self._ready, self._read = ready, read

    @property
    def ready(self) -> Mapping[int, Expert]:
        return self._ready

    def wait(self) -> Mapping[int, Expert]:
        return self._read()


class Slots(ExpertCache):
    """Memory for a few experts of several layers, twice as many as one `begin` may ask for; the one that was asked for
    the longest ago makes room.

    late: one in so many experts is never there at once; 0: none but the missing.
    """

    def __init__(self, stores: Mapping[int, Any], most: int, late: int = 0):
        self.stores, self.late, self._most = stores, late, most
        self.slots = [single(next(iter(stores.values()))) for _ in range(2 * most)]
        self.held: dict[tuple[int, int], int] = {}
        self.asked: list[int] = []

    @property
    def most(self) -> int:
        return self._most

    def begin(self, layer: int, expert_ids: Sequence[int]) -> Fetch:
        assert 0 < len(set(expert_ids)) == len(expert_ids) <= self.most
        self.asked.append(len(expert_ids))
        keys = [(layer, number) for number in expert_ids]
        there = {key: self.held.pop(key) for key in keys if key in self.held}
        self.held |= there
        missing = [key for key in keys if key not in there]
        free = set(range(len(self.slots))) - set(self.held.values())
        for key in missing:
            self.held[key] = slot = free.pop() if free else self.held.pop(next(iter(self.held)))
            for parameter in self.slots[slot].parameters():
                parameter.data.view(torch.uint8).fill_(0xFF)  # not a number, in every format
        late = [*missing, *(key for key in there if self.late and key[1] % self.late == 0)]
        ready = {number: self.slots[self.held[layer, number]] for number in expert_ids if (layer, number) not in late}
        return Reading(ready, lambda: {key[1]: self._read(key) for key in reversed(late)})

    def _read(self, key: tuple[int, int]) -> Expert:
        wanted, slot = single(self.stores[key[0]], key[1]), self.slots[self.held[key]]
        for to, parameter in zip(slot.parameters(), wanted.parameters(), strict=True):
            to.data.copy_(parameter.data)
        return slot


def mixtures(model: Any) -> dict[int, Any]:
    return {number: block.mlp for number, block in enumerate(model.layers) if hasattr(block.mlp, "experts")}


def fetched_experts(store: Any) -> FetchedExperts:
    return FetchedExperts(single(store).to("meta"), len(store))


def fetch_experts(model: Any, slots: int, late: int = 0) -> Slots:
    """Take the experts out of a model and let them be fetched from where they are."""
    mlps = mixtures(model)
    cache = Slots({number: mlp.experts for number, mlp in mlps.items()}, slots, late)
    for number, mlp in mlps.items():
        mlp.experts = fetched_experts(mlp.experts)
        mlp.experts.cache, mlp.experts.layer = cache, number
    return cache


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of mixtures that the kernels did."""
    done: list[int] = []
    step = native.mixture_step

    def counted(number: int, *args: Any) -> None:
        done.append(number)
        step(number, *args)

    monkeypatch.setattr(native, "mixture_step", counted)
    return done


def load_kind(folder: Path, kind: str) -> Any:
    if kind in FLOATS:
        return load(folder, kind)
    return load(folder, fc_layer_dtype=kind, model_tensor_type=f"{kind}-FP32")


def both_ways(model: Any, slots: int, late: int, *args: Any) -> tuple[Tensor, Tensor, Slots]:
    """Logits with experts in memory, and with fetched ones."""
    resident = steps(model, *args)
    cache = fetch_experts(model, slots, late)
    return resident, steps(model, *args), cache


@pytest.mark.parametrize(("slots", "late"), [(2, 0), (3, 2), (12, 0), (12, 2)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_modules_give_the_same(name: str, kind: str, slots: int, late: int, folders: Any, calls: Calls) -> None:  # noqa: F811
    calls.allowed = False
    resident, fetched, cache = both_ways(load_kind(folders(name), kind), slots, late, SIZES)
    assert torch.equal(fetched, resident)
    assert min(cache.asked) >= 1
    assert max(cache.asked) == min(slots, 6 if name == "qwen3-moe" else 5)


@needs_kernels
@pytest.mark.parametrize(("slots", "late"), [(2, 0), (3, 2), (12, 0), (12, 2)])
@pytest.mark.parametrize(("name", "kind"), NATIVE)
def test_kernels_give_the_same(
    name: str,
    kind: str,
    slots: int,
    late: int,
    folders: Any,  # noqa: F811
    calls: Calls,  # noqa: F811
    taken: list[int],
) -> None:
    model = load_kind(folders(name), kind)
    resident, fetched, _ = both_ways(model, slots, late, SIZES)
    assert calls.most == 2 * len(model.layers) + 1
    assert torch.equal(fetched, resident)
    few = [size for size in SIZES if size <= 8]
    assert taken.count(native.ROUTE) == taken.count(native.SUM) == len(few) * len(mixtures(model))
    # Several parts where some were ready and others not, or not all fit.
    assert (taken.count(native.USE) > taken.count(native.ROUTE)) == (late > 0 or slots < 4)


@needs_kernels
def test_experts_of_another_dtype_are_left_to_the_modules(folders: Any, calls: Calls, taken: list[int]) -> None:  # noqa: F811
    model = load_kind(folders("qwen3-moe"), "float32")
    for mlp in mixtures(model).values():
        mlp.experts.bfloat16()
    resident, fetched, _ = both_ways(model, 3, 2, SIZES)
    assert calls.halves
    assert not taken
    assert torch.equal(fetched, resident)


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "kind"), [*NATIVE[1:3], NATIVE[-1]])
def test_any_processor_and_number_of_threads(name: str, kind: str, level: int, folders: Any, taken: list[int]) -> None:  # noqa: F811
    model = load_kind(folders(name), kind)
    before = torch.get_num_threads()
    native.choose(level)
    torch.set_num_threads(3)
    try:
        resident, fetched, _ = both_ways(model, 3, 2, (5, 1, 1, 2), 2, torch.tensor([0, 3]))
    finally:
        torch.set_num_threads(before)
        native.choose(native.AVX512)
    assert taken
    assert torch.equal(fetched, resident)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_after_the_mixture(dtype: torch.dtype, taken: list[int]) -> None:
    block = random_block(dtype)
    exact = copy.deepcopy(block).float()
    x, step = torch.randn(1, 4, 64).to(dtype), Step(0, 4, dtype, torch.device("cpu"))
    half, mixture = block.halves()[1], block.mlp
    assert isinstance(mixture, QwenMoe)
    with torch.inference_mode():
        resident = run_halves(half.body, lambda: [half], x, step, [])
        change = exact.mlp(exact.pre_feedforward_layernorm(x.float()))
        usual = x + exact.post_feedforward_layernorm(change)
        store, mixture.experts = mixture.experts, fetched_experts(mixture.experts)
        mixture.experts.cache = Slots({0: store}, 4)
        fetched = run_halves(half.body, lambda: [half], x, step, [])
    assert taken
    assert resident is not None
    assert fetched is not None
    assert torch.equal(fetched, resident)
    assert (resident - usual).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2) * usual.abs().max()


def random_linear(rows: int, columns: int, dtype: torch.dtype) -> FullyConnected:
    return FullyConnected.from_float((torch.randn(rows, columns) / columns**0.5).to(dtype))


def random_experts(dtype: torch.dtype) -> ResidentExperts:
    shapes = (80, 64), (80, 64), (64, 80)
    parts = [[random_linear(*shape, dtype) for shape in shapes] for _ in range(9)]
    return ResidentExperts(Mlp(gate, up, down, SwiGLU()) for gate, up, down in parts)


def random_block(dtype: torch.dtype) -> SandwichBlock:
    norms = [RMSNorm(64, 1e-5, dtype) for _ in range(4)]
    for norm in norms:
        norm.weight.data = torch.rand(64).to(dtype)
    mixture = QwenMoe(random_linear(9, 64, dtype), random_experts(dtype), 4, True)
    return SandwichBlock(nn.Identity(), mixture, *norms).requires_grad_(False)


@needs_kernels
def test_another_cache_is_asked(folders: Any, taken: list[int]) -> None:  # noqa: F811
    model = load_kind(folders("qwen3-moe"), "float32")
    before = {number: mlp.experts for number, mlp in mixtures(model).items()}
    fetch_experts(model, 6)
    usual = steps(model, (3, 1))
    other = Slots({number: before[2 if number == 0 else number] for number in before}, 6)
    for mlp in mixtures(model).values():
        mlp.experts.cache = other
    assert taken
    assert (steps(model, (3, 1)) - usual).abs().max() > 1e-3
    assert other.asked


@needs_kernels
def test_an_expert_unlike_the_others_is_refused(folders: Any) -> None:  # noqa: F811
    model = load_kind(folders("qwen3-moe"), "Q8_0")
    cache = fetch_experts(model, 6)
    cache.slots = [single(load_kind(folders("qwen3-moe"), "Q4_0").layers[0].mlp.experts) for _ in cache.slots]
    cache.stores = dict.fromkeys(cache.stores, cache.slots)
    with pytest.raises(RuntimeError, match="layer 0 that is not like the others"):
        steps(model, (1,))


@pytest.mark.parametrize("allowed", [False, True])
def test_no_cache_is_an_error(allowed: bool, folders: Any, calls: Calls) -> None:  # noqa: F811
    model = load_kind(folders("qwen3-moe"), "float32")
    calls.allowed = allowed
    fetch_experts(model, 6)
    model.layers[2].mlp.experts.cache = None
    with pytest.raises(RuntimeError, match="layer 2 have no cache"):
        steps(model, (1,))


def test_the_template_is_no_part_of_the_model() -> None:
    template = Mlp(FullyConnected(4, 6), FullyConnected(4, 6), FullyConnected(6, 4), SwiGLU()).to("meta")
    experts = FetchedExperts(template, 5)
    assert isinstance(experts, ExpertStore)
    assert experts.template is template
    assert len(experts) == 5
    assert not list(experts.parameters())
    assert not list(experts.children())
    assert not experts.state_dict()


def test_experts_in_memory_come_first_and_never_more_than_fit() -> None:
    store = random_experts(torch.float32)
    experts = FetchedExperts(single(store), len(store))
    experts.cache = cache = Slots({0: store}, 3)
    assert [number for number, _ in experts.fetch([5, 2])] == [2, 5]
    assert [number for number, _ in experts.fetch([1, 2, 5])] == [2, 5, 1]
    for number, expert in experts.fetch(range(9)):
        x = torch.randn(2, 64)
        assert torch.equal(expert(x), store[number](x))
    assert cache.asked == [2, 3, 3, 3, 3]


class Shuffled(ResidentExperts):
    """Yields experts in an order of its own."""

    def fetch(self, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        for place in torch.randperm(len(expert_ids)).tolist():
            yield expert_ids[place], self[expert_ids[place]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_gradients_do_not_depend_on_the_order_of_experts(dtype: torch.dtype) -> None:
    store = random_experts(dtype).requires_grad_(True)
    chosen = torch.stack([torch.randperm(9)[:4] for _ in range(30)])
    weights, x = torch.rand(30, 4).to(dtype), torch.randn(30, 64).to(dtype).requires_grad_(True)
    results = []
    for experts in (store, *(Shuffled(store) for _ in range(3))):
        mixed = mix_experts(x, chosen, weights, experts)
        results.append((mixed, *torch.autograd.grad(mixed.square().sum(), [*store.parameters(), x])))
    for *result, of_x in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0][:-1], strict=True))
        assert (of_x - results[0][-1]).abs().max() < 0.01 * of_x.abs().max()


def test_an_expert_alone_is_a_module() -> None:
    experts = GptOssExperts(5, 16, 32, alpha=1.702, limit=7.0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 16)
    (_, third), *_ = experts.fetch([3])
    assert torch.equal(single(experts, 3)(x), third(x))
    with pytest.raises(AssertionError):
        experts(x)
