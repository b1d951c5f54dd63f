"""What of a model fits in memory, and the most tokens a second: no step is faster than what it must read."""

from bisect import bisect_right

from causallm.doctor.machine import Disk, Machine
from causallm.doctor.needs import Needs

WORKSPACE = 256 * 10**6
"""Bytes left for activations and logits."""
COMMON_LENGTH = 4096
"""Tokens whose cache is counted where it matters whether weights fit; the whole context is seldom used."""


def room_for_weights(needs: Needs, machine: Machine) -> int:
    """Bytes of available memory beside the cache, of at most `COMMON_LENGTH` tokens, and the workspace."""
    return machine.memory.available - needs.cache_bytes(min(needs.context, COMMON_LENGTH)) - WORKSPACE


def fits(needs: Needs, machine: Machine) -> bool:
    """Whether the weights can all be in memory."""
    return needs.memory.total <= room_for_weights(needs, machine)


def longest_context(needs: Needs, machine: Machine) -> int:
    """Tokens whose cache fits beside the weights, at most the model's context."""
    room = machine.memory.available - WORKSPACE - needs.memory.total
    return bisect_right(range(1, needs.context + 1), room, key=needs.cache_bytes)


def resident_rate(needs: Needs, bandwidth: float, length: int = 0) -> float:
    """With everything in memory and `length` tokens in the cache: a step reads the weights and the cache once."""
    return bandwidth / (needs.memory.per_token + needs.cache_bytes(length))


def streamed_rate(needs: Needs, bandwidth: float, disk: Disk, room: int) -> float | None:
    """With `room` bytes of memory for weights, and the others read from the disk when they are needed.

    What every token needs comes first into memory; of the experts the rest of the room holds a share, and a token finds
    that share of its own there, as if all were chosen equally often. None where the disk was not measured, or there is
    no file.
    """
    files, memory = needs.files, needs.memory
    if files is None or disk.pieces is None or disk.experts is None:
        return None
    always = min(max(0, room), memory.always)
    experts = min(max(0, room) - always, memory.experts)
    seconds = files.always * (1 - _share(always, memory.always)) / disk.pieces
    seconds += files.experts * files.share * (1 - _share(experts, memory.experts)) / disk.experts
    return 1 / max(seconds, memory.per_token / bandwidth)


def most_rates(needs: Needs, machine: Machine) -> dict[str, float | None]:
    """The most tokens a second: "resident", all in memory, and "resident_full_cache"; "streamed", with what fits there
    and the rest from the disk, and "streamed_all", with nothing kept. None where a bandwidth is unknown or nothing is
    generated.
    """
    if not needs.generates or not machine.bandwidth:
        return dict.fromkeys(("resident", "resident_full_cache", "streamed", "streamed_all"))
    return {
        "resident": resident_rate(needs, machine.bandwidth),
        "resident_full_cache": resident_rate(needs, machine.bandwidth, needs.context),
        "streamed": streamed_rate(needs, machine.bandwidth, machine.disk, room_for_weights(needs, machine)),
        "streamed_all": streamed_rate(needs, machine.bandwidth, machine.disk, 0),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
