"""The machine as one record: what it has, and how fast it was found to read its memory and a disk."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from causallm.available_memory import Memory, available_memory
from causallm.disk_bandwidth import EXPERT, PIECE, disk_bandwidth, large_file
from causallm.doctor.processor import Kernels, Processor, read_kernels, read_processor
from causallm.doctor.software import Accelerator, accelerators
from causallm.memory_bandwidth import processors, read_bandwidth_apart

SECONDS = 0.4
"""For each of the disk's figures."""
LEAST, ENOUGH = 600 * 10**6, 2 * 10**9
"""Bytes of memory below which its bandwidth is not measured, as torch has to be loaded for it; and from which on it is
with the usual amount."""


@dataclass(frozen=True)
class Disk:
    """Where `path` lies. Bytes, and bytes a second of reads of 4 MiB (`pieces`) and of 2.5 MiB (`experts`).

    None where it could not be measured; `failure` says why.
    """

    path: Path
    total: int
    free: int
    pieces: float | None
    experts: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second read from memory by all processors; None where `failure` says why there is none."""

    processor: Processor
    kernels: Kernels
    memory: Memory
    bandwidth: float | None
    failure: str | None
    disk: Disk
    accelerators: tuple[Accelerator, ...]


def examine(path: Path, begin: Callable[[str], None]) -> Machine:
    """Look at this machine and measure it; `begin` is told of each measurement, which takes a second or several.

    path: a folder or file on the disk that matters.
    """
    memory = available_memory()
    begin("memory bandwidth")
    bandwidth, failure = _memory_bandwidth(memory.available)
    begin("disk bandwidth")
    disk = examine_disk(path)
    begin("accelerators")
    return Machine(read_processor(), read_kernels(), memory, bandwidth, failure, disk, tuple(accelerators()))


def _memory_bandwidth(available: int) -> tuple[float | None, str | None]:
    """Bytes a second, or why there is no figure; where memory is little, with less of it: limits kill."""
    if available < LEAST:
        return None, f"too little memory is available, {available / 1e6:.0f} MB"
    try:
        return read_bandwidth_apart(processors(), None if available >= ENOUGH else available // 16 * 4), None
    except OSError as error:
        return None, _reason(error)


def examine_disk(path: Path) -> Disk:
    """The disk of `path`, which must exist."""
    space = shutil.disk_usage(path if path.is_dir() else path.parent)
    try:
        with large_file(path) as file:
            pieces, experts = (disk_bandwidth(file, SECONDS, piece) for piece in (PIECE, EXPERT))
        return Disk(path, space.total, space.free, pieces, experts)
    except OSError as error:
        return Disk(path, space.total, space.free, None, None, _reason(error))


def _reason(error: OSError) -> str:
    """The system's own without number and file."""
    return error.strerror or str(error)
