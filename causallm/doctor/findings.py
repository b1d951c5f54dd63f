"""What is wrong or could be better on a machine, and with a model on it; each with what to do about it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from causallm.doctor.limits import (
    COMMON_LENGTH,
    fits,
    longest_context,
    most_rates,
    resident_rate,
    room_for_weights,
)
from causallm.doctor.machine import Machine
from causallm.doctor.needs import Needs
from causallm.doctor.processor import Processor
from causallm.doctor.units import rate, size
from layers.kernels import native
from layers.kernels.block_formats import BLOCK_FORMATS

LITTLE = 10**9
"""Bytes of memory or disk that are little for any model of use."""
LARGE = 10**9
"""Bytes of float weights from which on packing them is worth a word."""


@dataclass(frozen=True)
class Finding:
    """kind: "problem" or "advice". remedy: what to do, a command where there is one."""

    kind: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}; {self.remedy}"


def machine_findings(machine: Machine) -> list[Finding]:
    """Of the machine alone."""
    return [*_kernels(machine), *_threads(machine.processor), *_space(machine)]


def _kernels(machine: Machine) -> Iterator[Finding]:
    kernels = machine.kernels
    if not kernels.native:
        text = "cannot be loaded" if kernels.built else "are not built"
        compiler = "" if kernels.built else "install a C compiler (gcc or clang; macOS: xcode-select --install), then "
        yield Finding(
            "problem",
            f"the native kernels {text}, so torch's operators serve, which generate several times slower",
            f"{compiler}install causallm again: pip install --force-reinstall --no-deps {_project()}",
        )
    elif kernels.level == "plain C":
        yield Finding(
            "problem",
            f"the processor has none of the instructions that the fast kernels need ({_wanted(machine.processor)})",
            "expect a fraction of what the bandwidth of the memory allows",
        )


def _wanted(processor: Processor) -> str:
    arm = processor.architecture.lower() in ("aarch64", "arm64")
    return "dot product" if arm else "AVX2, FMA and F16C"


def _project() -> str:
    """What to install: the folder this runs from where that is the project's, else its name."""
    folder = Path(native.__file__).parents[2]
    return f'-e "{folder}"' if (folder / "pyproject.toml").is_file() else "causallm"


def _threads(processor: Processor) -> Iterator[Finding]:
    most = processor.usable if processor.limit is None else min(processor.usable, math.ceil(processor.limit))
    threads = f"torch uses {processor.threads} thread{'s' * (processor.threads > 1)}"
    if processor.threads > most:
        allowed = "its control group allows" if most < processor.usable else "this process may run on"
        yield Finding(
            "problem", f"{threads}, but {allowed} {most} processors, so they wait for each other", f"--threads {most}"
        )
    elif 2 * processor.threads < min(most, processor.cores or most):
        cause = f" (OMP_NUM_THREADS={processor.openmp})" if processor.openmp else ""
        most = min(most, processor.cores or most)
        yield Finding("problem", f"{threads} of {most} processors{cause}", f"--threads {most}")


def _space(machine: Machine) -> Iterator[Finding]:
    memory, disk = machine.memory, machine.disk
    if memory.available < LITTLE:
        limited = f" within the {size(memory.limit)} that the control group allows" if memory.limit else ""
        yield Finding(
            "problem",
            f"only {size(memory.available)} of memory are available{limited}",
            "raise the limit" if memory.limit else "end what else takes memory",
        )
    if disk.free < LITTLE:
        yield Finding(
            "problem", f"only {size(disk.free)} are free on the disk of {disk.path}", "make room before converting"
        )
    if machine.failure:
        yield Finding("problem", f"the memory's bandwidth was not measured: {machine.failure}", "try again")
    if disk.failure:
        yield Finding(
            "problem",
            f"the disk's bandwidth was not measured: {disk.failure}",
            "a file of 64 MiB, or the right to write one there, is needed",
        )


def model_findings(needs: Needs, machine: Machine, name: str, folder: bool) -> list[Finding]:
    """Of a model, which the command line calls `name`, on the machine. folder: it is one, which `quantize` takes."""
    return [
        *_weights(needs, machine),
        *_context(needs, machine),
        *(_packing(needs, machine, name) if folder else ()),
        *_accelerator(needs, machine),
    ]


def _weights(needs: Needs, machine: Machine) -> Iterator[Finding]:
    if needs.missing is not None:
        yield Finding("problem", needs.missing, "fetch them with the download verb, or convert others")
    if fits(needs, machine):
        return
    available, length = machine.memory.available, min(needs.context, COMMON_LENGTH)
    needed = size(needs.memory.total + available - room_for_weights(needs, machine))
    cache = f", a cache of {length:,} tokens" if needs.generates else ""
    budget = max(0.1, math.floor(available / 1e8 * 0.95) / 10)
    at_most = most_rates(needs, machine)["streamed"]
    speed = f", at most {rate(at_most)}" if at_most else ""
    yield Finding(
        "problem",
        f"the weights{cache} and working space take {needed}, but {size(available)} of memory are available",
        f"--memory-budget {budget:g}GB keeps what fits and reads the rest from the disk{speed}",
    )


def _context(needs: Needs, machine: Machine) -> Iterator[Finding]:
    longest = longest_context(needs, machine)
    if not fits(needs, machine) or longest >= needs.context:
        return
    yield Finding(
        "problem",
        f"the cache of {needs.context:,} tokens takes {size(needs.cache_bytes(needs.context))} and does not fit "
        f"beside the weights, that of {longest:,} does",
        f"--max-length {longest}, or --cache-dtype int8 for smaller ones",
    )


def _packing(needs: Needs, machine: Machine, name: str) -> Iterator[Finding]:
    """Where weights are floats and many: what Q4_0 would make of them."""
    block = BLOCK_FORMATS["Q4_0"]
    packed = needs.parameters * block.nbytes / block.values
    smaller = packed / needs.memory.total
    if needs.memory.total < LARGE or smaller > 0.5:
        return
    text = f"packed in Q4_0 the weights would take {size(packed)}"
    if not fits(needs, machine) and packed <= room_for_weights(needs, machine):
        text += " and fit in memory"
    if machine.bandwidth and needs.generates:
        text += f", at most {rate(resident_rate(needs, machine.bandwidth) / smaller)} from there"
    if packed > machine.disk.free:
        text += f", but only {size(machine.disk.free)} are free on this disk"
    yield Finding("advice", text, f"python main.py quantize {name} -o OUT")


def _accelerator(needs: Needs, machine: Machine) -> Iterator[Finding]:
    needed = needs.memory.total + machine.memory.available - room_for_weights(needs, machine)
    for accelerator in machine.accelerators:
        if (accelerator.free or accelerator.total) >= needed:
            yield Finding("advice", f"{accelerator.name} has room for it", f"--device {accelerator.device}")
            return
