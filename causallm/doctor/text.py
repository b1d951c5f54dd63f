"""The doctor's report as lines of text."""

from collections.abc import Iterator, Mapping

from causallm.available_memory import Memory
from causallm.doctor.limits import fits, most_rates
from causallm.doctor.machine import Disk, Machine
from causallm.doctor.needs import Needs
from causallm.doctor.processor import Processor
from causallm.doctor.software import OPTIONAL, Accelerator, optional_packages, versions
from causallm.doctor.units import rate, size

CACHED = 64 * 10**6
"""Bytes of weights that a processor's own cache may hold, and then gives faster than memory does."""


def machine_lines(machine: Machine) -> Iterator[str]:
    """What there is, and how fast it is."""
    kernels = machine.kernels
    yield from _table(
        {
            "versions": _versions(versions()),
            "optional": _packages(optional_packages()),
            "processor": _processor(machine.processor),
            "threads": _threads(machine.processor),
            "kernels": f"native, {kernels.level}" if kernels.native else "torch's operators",
            "memory": _memory(machine.memory, machine.bandwidth),
            "disk": _disk(machine.disk),
            "accelerators": ", ".join(map(_accelerator, machine.accelerators)) or "none",
        }
    )


def model_lines(needs: Needs, machine: Machine, name: str) -> Iterator[str]:
    """What a model is, what it needs, and the most that the machine's bandwidths allow."""
    stored = f"{size(needs.files.total)} on the disk" if needs.files else "no weights"
    verdict = "fit" if fits(needs, machine) else "do not fit"
    cache = f", cache {size(needs.cache_bytes(needs.context))} at {needs.context:,} tokens" if needs.generates else ""
    rows = {
        "model": f"{name}: {needs.architecture}, {needs.parameters:,} parameters in {needs.dtypes}, {stored}",
        "in memory": f"weights {size(needs.memory.total)}{cache}; the weights {verdict}",
    }
    if needs.generates:
        experts = f", with {needs.chosen} of {needs.experts} experts a layer" if needs.experts else ""
        rows["a token"] = f"reads {size(needs.memory.per_token)} of weights{experts}"
    yield from _table(rows | dict(_ceilings(needs, machine)))


def _ceilings(needs: Needs, machine: Machine) -> Iterator[tuple[str, str]]:
    at_most = most_rates(needs, machine)
    if at_most["resident"] and at_most["resident_full_cache"]:
        text = f"at most {rate(at_most['resident'])}, {rate(at_most['resident_full_cache'])} with a full cache"
        if not fits(needs, machine):
            text += ", were there enough"
        elif needs.memory.per_token < CACHED:
            text += "; more where the processor's cache holds so small a model"
        yield "from memory", text
    if at_most["streamed_all"] and at_most["streamed"]:
        text = f"at most {rate(at_most['streamed_all'])} with nothing kept in memory"
        if not fits(needs, machine):
            evenly = " and experts chosen evenly" if needs.experts else ""
            text += f", {rate(at_most['streamed'])} with what fits{evenly}"
        yield "from disk", text


def _versions(installed: Mapping[str, str | None]) -> str:
    shown = {"python": "Python ", "os": ""}
    return ", ".join(shown.get(name, f"{name} ") + (number or "(not installed)") for name, number in installed.items())


def _packages(installed: Mapping[str, str | None]) -> str:
    return ", ".join(
        f"{name} {number}" if number else f"no {name} ({OPTIONAL[name].purpose}: extra {OPTIONAL[name].extra})"
        for name, number in installed.items()
    )


def _processor(processor: Processor) -> str:
    return f"{processor.name} ({processor.architecture}): {', '.join(processor.features) or 'features unknown'}"


def _threads(processor: Processor) -> str:
    cores = "" if processor.cores is None else f"{processor.cores} cores, "
    limit = "" if processor.limit is None else f", limited to the time of {processor.limit:g}"
    return f"{cores}{processor.usable} processors usable{limit}; torch uses {processor.threads}"


def _memory(memory: Memory, bandwidth: float | None) -> str:
    limit = f" within a limit of {size(memory.limit)}" if memory.limit else ""
    reads = f"; reads {size(bandwidth)}/s" if bandwidth else ""
    return f"{size(memory.total)}, {size(memory.available)} available{limit}{reads}"


def _disk(disk: Disk) -> str:
    text = f"{size(disk.free)} of {size(disk.total)} free where {disk.path} is"
    if disk.pieces and disk.experts:
        text += f"; reads {size(disk.pieces)}/s in pieces of 4 MiB, {size(disk.experts)}/s of 2.5 MiB (an expert)"
    return text


def _accelerator(accelerator: Accelerator) -> str:
    free = "" if accelerator.free is None else f", {size(accelerator.free)} free"
    return f"{accelerator.device} {accelerator.name}, {size(accelerator.total)}{free}"


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    for name, text in rows.items():
        yield f"{name:<13} {text}"
