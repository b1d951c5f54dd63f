"""How much memory this process may still take: the machine's, or what a container or control group leaves of it."""

from pathlib import Path
from typing import NamedTuple

import psutil

from causallm.control_groups import ControlGroup, control_groups

CACHED = {"inactive_file", "active_file"}, {"total_inactive_file", "total_active_file"}
"""Pages of files, which are given up when memory is short: in version 2 of control groups, in version 1."""


class Memory(NamedTuple):
    """Bytes. total: the machine's; limit: the tightest of this process's control groups, None without one.

    available: what can be taken without swapping, within the limits.
    """

    total: int
    available: int
    limit: int | None


def available_memory(root: Path = Path("/")) -> Memory:
    """The machine's memory as psutil has it, and the limits of control groups under `root`; pages of files count as
    available.
    """
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    limits = []
    for group in control_groups("memory", root):
        limit = group.number("memory.max" if group.unified else "memory.limit_in_bytes")
        if limit is None or limit >= total:  # version 1 writes a huge number for no limit
            continue
        limits.append(limit)
        available = min(available, max(0, limit - _used(group)))
    return Memory(total, available, min(limits, default=None))


def _used(group: ControlGroup) -> int:
    used = group.number("memory.current" if group.unified else "memory.usage_in_bytes") or 0
    cached = CACHED[0 if group.unified else 1]
    pairs = (line.split() for line in group.text("memory.stat").splitlines())
    return used - sum(int(count) for name, count in pairs if name in cached)
