"""Dividing a budget of bytes between what a model needs: which weights stay in memory and which are read each time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from causallm.available_memory import available_memory
from causallm.byte_size import show_bytes
from causallm.storage.computing import scratch_bytes
from causallm.storage.inventory import Inventory
from causallm.storage.layout import Piece
from causallm.storage.plan import BudgetError, Line, Plan
from causallm.storage.step_memory import cache_bytes, program_bytes, step_bytes
from causallm.storage.storage import HEAD
from causallm.transformer import Transformer

NNTRAINER_SLOTS = 32
"""Experts a layer that NNTrainer's cached kinds keep."""
MODULE_BYTES = 20_000
"""What the modules of one expert take besides its weights (measured)."""
MOST_EXPERTS = 64
"""Different experts that one step of a few tokens may ask for at once."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes of each unit, and of the largest part in which the head is streamed."""

    units: Mapping[int, int]
    head_part: int
    lookahead: int

    def kinds_of_streaming(self) -> list[tuple[int, ...]]:
        """Sets of units: none, blocks, and the head too."""
        blocks = tuple(unit for unit in sorted(self.units) if unit != HEAD)
        return [(), blocks, (*blocks, HEAD)] if HEAD in self.units else [(), blocks]

    def arena(self, streamed: Sequence[int]) -> int:
        """What these units share: room for the largest as often as they are read ahead, and once more."""
        largest = max((self.head_part if unit == HEAD else self.units[unit] for unit in streamed), default=0)
        return min(self.lookahead + 1, len(streamed)) * largest

    def memory(self, streamed: Sequence[int]) -> int:
        """The arena, and the units that are not in it."""
        return self.arena(streamed) + sum(size for unit, size in self.units.items() if unit not in streamed)


@dataclass(frozen=True)
class _Choice:
    streamed: tuple[int, ...]
    arena: int
    slots: int


def make_plan(model: Transformer, inventory: Inventory) -> Plan:
    """How a model runs as its nntr_config.json says (memory_budget, fsu, fsu_lookahead, its architecture).

    BudgetError where the budget is too small, with the smallest that would do.
    """
    runtime, config = model.runtime_config, model.config
    budget, lookahead = runtime.memory_budget, runtime.fsu_lookahead or 1
    sizes = _Sizes(
        {unit: layout.nbytes for unit, layout in inventory.units.items()},
        max((layout.nbytes for layout in inventory.head_parts.values()), default=0),
        lookahead,
    )
    shapes = inventory.expert_shapes()
    slot = max((shape.nbytes + MODULE_BYTES for shape in shapes.values()), default=0)
    least = min(2 * config.num_experts_per_tok, inventory.expert_count)
    rows = runtime.batch_size or 1
    shape = rows, model.max_length, model.chunk
    note = f"{model.max_length} positions" + (f", {rows} rows" if rows > 1 else "")
    fixed = [
        Line("program and libraries", 0, program_bytes()),
        Line("norms and other small weights", _of_model(inventory.small.pieces), inventory.small.nbytes),
        Line("cache of keys and values", 0, cache_bytes(model, *shape), note),
        Line("activations and logits of a step", 0, step_bytes(model, *shape)),
    ]
    if scratch := scratch_bytes(inventory.pieces.values()):
        fixed.append(Line("converting weights", 0, scratch))
    taken = sum(line.memory for line in fixed)
    smallest = taken + min(map(sizes.memory, sizes.kinds_of_streaming())) + least * slot
    everything = sum(sizes.units.values()) + inventory.expert_count * slot
    room = None if budget is None else budget - taken
    choice = _choose(model, sizes, slot, least, inventory.expert_count, room)
    # An architecture whose name asks for experts that are fetched has them fetched, be it only once.
    whole = room is not None and everything + _loose_embedding(inventory) <= room
    whole = whole and "Slim" not in config.architecture
    lines = (*fixed, *_weight_lines(inventory, choice, whole, slot))
    streamed_bytes = sum(inventory.units[unit].read_bytes for unit in choice.streamed)
    plan = Plan(
        budget,
        lines,
        smallest,
        whole,
        choice.streamed,
        choice.arena,
        lookahead,
        choice.slots,
        max(min(choice.slots // 2, MOST_EXPERTS), config.num_experts_per_tok),
        0 if whole else streamed_bytes,
        sum(piece.nbytes for piece in inventory.expert_pieces(next(iter(shapes)), 0)) if shapes else 0,
        config.num_experts_per_tok * len(shapes),
        inventory.expert_count,
        model.max_length * rows,
        _reads_direct(inventory, choice, slot, budget or 0),
    )
    if budget is not None and budget < smallest:
        raise BudgetError(
            f"a budget of {show_bytes(budget)} is too small for this model, expected at least "
            f"{show_bytes(plan.enough)} for {plan.positions} positions (a shorter --max-length needs less)",
            plan.table(),
        )
    return plan


def _choose(model: Transformer, sizes: _Sizes, slot: int, least: int, experts: int, room: int | None) -> _Choice:
    """What stays in memory of `room` bytes, None where the model's kinds of storage say it.

    A byte of a block or the head that stays saves reading it for every token, one of an expert only when that is
    chosen again: experts get what the others leave.
    """
    kinds = sizes.kinds_of_streaming()
    if room is None:
        streamed = kinds[1] if model.runtime_config.fsu else ()
        slots = _slots(model, experts, least) if "Cached" in model.config.architecture else least
        return _Choice(streamed, sizes.arena(streamed), slots)
    for streamed in kinds:
        if sizes.memory(streamed) + least * slot > room:
            continue
        for unit in _evenly(streamed):
            rest = tuple(other for other in streamed if other != unit)
            if sizes.memory(rest) + least * slot <= room:
                streamed = rest
        slots = min((room - sizes.memory(streamed)) // slot, experts) if slot else 0
        return _Choice(streamed, sizes.arena(streamed), slots)
    streamed = min(kinds, key=sizes.memory)
    return _Choice(streamed, sizes.arena(streamed), least)


def _slots(model: Transformer, experts: int, least: int) -> int:
    return max(min(NNTRAINER_SLOTS * len(model.layers), experts), least)


def _evenly(units: Sequence[int]) -> list[int]:
    """Blocks in an order of which every beginning is spread over all of them; the head last."""
    golden = 0.6180339887498949
    return sorted(units, key=lambda unit: (unit == HEAD, unit * golden % 1))


def _loose_embedding(inventory: Inventory) -> int:
    """Memory of an embedding table that is not the head, where all is loaded: none where it is mapped."""
    if inventory.tied or inventory.embedding.plain:
        return 0
    return inventory.embedding.nbytes


def _weight_lines(inventory: Inventory, choice: _Choice, whole: bool, slot: int) -> list[Line]:
    units = inventory.units
    blocks = [unit for unit in units if unit != HEAD]
    staying = [unit for unit in blocks if whole or unit not in choice.streamed]
    lines = []
    if not inventory.tied:
        lines.append(
            Line(
                "embedding",
                inventory.embedding.nbytes,
                _loose_embedding(inventory) if whole else 0,
                "rows are read",
            )
        )
    if HEAD in units:
        stays = whole or HEAD not in choice.streamed
        lines.append(
            Line("head", _of_model(units[HEAD].pieces), units[HEAD].nbytes if stays else 0, "" if stays else "streamed")
        )
    lines.append(
        Line(
            "blocks" if not inventory.stores else "blocks without experts",
            sum(_of_model(units[unit].pieces) for unit in blocks),
            sum(units[unit].nbytes for unit in staying),
            f"{len(staying)} of {len(blocks)} stay in memory",
        )
    )
    if choice.streamed and not whole:
        lines.append(Line("arena that the streamed ones share", 0, choice.arena))
    if inventory.stores:
        count, slots = inventory.expert_count, inventory.expert_count if whole else choice.slots
        one = sum(piece.nbytes for piece in inventory.expert_pieces(next(iter(inventory.stores)), 0))
        lines.append(Line("experts", count * one, slots * slot, f"{slots} of {count} in memory"))
    return lines


def _of_model(pieces: Sequence[Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)


def _reads_direct(inventory: Inventory, choice: _Choice, slot: int, budget: int) -> bool:
    """Past the system's cache where that could not hold what is read again and again: then it would only cost."""
    again = sum(inventory.units[unit].read_bytes for unit in choice.streamed)
    again += (inventory.expert_count - choice.slots) * slot
    return again > max(available_memory().available - budget, 0)
