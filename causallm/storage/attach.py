"""Giving a model its weights as a plan says: what stays in memory is read at once, the rest when it is needed."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from causallm.packing import packed_tensors
from causallm.steps import Progress
from causallm.storage.budget import make_plan
from causallm.storage.computing import Computing
from causallm.storage.disk import Disk
from causallm.storage.experts import CachedExperts
from causallm.storage.head import HeadInParts
from causallm.storage.inventory import Inventory, take_inventory
from causallm.storage.layout import Layout
from causallm.storage.plan import Plan
from causallm.storage.rows import RowsOfFile, row_reader
from causallm.storage.storage import HEAD
from causallm.storage.streamed import Binding, StreamedBlocks, parameters_in, place_in_arena
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.loader import check_weights
from causallm.weights.reader import WeightReader
from layers.pages import Pages


def plan_storage(model: Transformer, reader: WeightReader, device: torch.device) -> tuple[Plan, Inventory] | None:
    """How a model, built on meta and packed as the reader's files, is to be stored; None: in memory, as a whole.

    ValueError where a weight does not fit the model, or the device cannot stream; BudgetError for too small a budget.
    A warning where the experts of one token do not fit.
    """
    runtime = model.runtime_config
    if runtime.memory_budget is None and not runtime.fsu and not model.fetches_experts:
        return None
    if device.type != "cpu":
        raise ValueError(f"weights are brought in from the disk on the CPU alone, got the device '{device}'")
    check_weights(model, reader)
    inventory = take_inventory(model, reader)
    plan = make_plan(model, inventory)
    if plan.tight:
        warnings.warn(plan.tight, stacklevel=3)
    return plan, inventory


def attach_storage(
    model: Transformer, reader: WeightReader, plan: Plan, inventory: Inventory, progress: Progress | None = None
) -> None:
    """Bring in what the plan keeps in memory and set `model.storage` for the rest; the model must be on meta.

    progress is called with the units read and those to be read. An OSError names a file that cannot be read.
    """
    expected, packed = expected_parameters(model), packed_tensors(model)
    disk = Disk(reader.paths(), plan.direct)
    computing = Computing(reader, disk)
    staying = {unit: layout for unit, layout in inventory.units.items() if unit not in plan.streamed}
    load_layouts(model, [inventory.small, *staying.values()], disk, computing, progress)
    streamed = {unit: inventory.units[unit] for unit in plan.streamed if unit != HEAD}
    parts = _part_head(model, inventory) if HEAD in plan.streamed else None
    streamed |= inventory.head_parts if HEAD in plan.streamed else {}
    arena = Pages(plan.arena_bytes)
    starts = place_in_arena(streamed, plan.arena_bytes)
    bindings = {unit: _bindings(model, layout, arena, starts[unit], parts, unit) for unit, layout in streamed.items()}
    if HEAD in plan.streamed or not inventory.tied:
        # After the bindings: they hold the table's own dictionary of parameters.
        model.embed_tokens = RowsOfFile(model.embed_tokens, row_reader(inventory.embedding, reader), parts)
    if parts is not None and not inventory.tied:
        model.lm_head = parts
    experts = None
    if inventory.stores:
        experts = CachedExperts(
            disk, computing, inventory.expert_shapes(), inventory.expert_pieces, plan.slots, plan.most_experts
        )
        for layer, store in inventory.stores.items():
            store.cache, store.layer = experts, layer
    storage = model.storage = StreamedBlocks(
        reader, disk, computing, streamed, bindings, arena, starts, plan.lookahead, experts, plan.positions
    )
    if parts is not None:
        parts.storage = storage
    storage.expected, storage.packed, storage.planned_bytes = expected, packed, plan.memory


def load_layouts(
    model: nn.Module, layouts: Sequence[Layout], disk: Disk, computing: Computing, progress: Progress | None
) -> None:
    """Read units into one piece of memory that stays."""
    memory, end = Pages(sum(layout.nbytes for layout in layouts)), 0
    waiting = []
    for layout in layouts:
        work = [computing.work(piece, piece.view(memory, end + place)) for piece, place in layout.computed]
        waiting.append(disk.read(layout.spans, memory, end, computing=work))
        for piece, parameter in zip(layout.pieces, parameters_in(memory, end, layout), strict=True):
            owner, name = _owner(model, piece.name)
            owner[name] = parameter
        end += layout.nbytes
    for number, ticket in enumerate(waiting, 1):
        ticket.wait()
        if progress:
            progress(number, len(waiting))


def _part_head(model: Transformer, inventory: Inventory) -> HeadInParts | None:
    """What stands for a head that is read in parts; None where it is read as one."""
    if HEAD in inventory.head_parts:
        return None
    head = model.embed_tokens if inventory.tied else model.lm_head
    return HeadInParts(head, list(inventory.head_parts), list(inventory.head_parts.values()))


def _bindings(
    model: nn.Module, layout: Layout, arena: Pages, start: int, parts: HeadInParts | None, unit: int
) -> list[Binding]:
    bindings = []
    for piece, parameter in zip(layout.pieces, parameters_in(arena, start, layout), strict=True):
        if parts is not None and unit in parts.units:
            owner, name = parts.owner(unit), "weight"
        else:
            owner, name = _owner(model, piece.name)
        empty = owner[name]
        assert empty is not None
        bindings.append(Binding(owner, name, parameter, empty))
    return bindings


def _owner(model: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    """The dictionary that holds a parameter."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path)._parameters, attribute
