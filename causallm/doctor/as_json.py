"""The doctor's report as plain values: sizes in bytes, rates in bytes a second."""

from typing import Any

from causallm.doctor.limits import fits, most_rates
from causallm.doctor.machine import Machine
from causallm.doctor.needs import Needs, Weights
from causallm.doctor.software import optional_packages, versions


def machine_json(machine: Machine) -> dict[str, Any]:
    """What was found and measured; None where something is unknown."""
    processor, memory, disk = machine.processor, machine.memory, machine.disk
    return {
        "versions": versions(),
        "packages": optional_packages(),
        "processor": {
            "name": processor.name,
            "architecture": processor.architecture,
            "features": list(processor.features),
            "cores": processor.cores,
            "usable": processor.usable,
            "limit": processor.limit,
            "threads": processor.threads,
        },
        "kernels": {"native": machine.kernels.native, "level": machine.kernels.level},
        "memory": {
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "limit_bytes": memory.limit,
            "bytes_per_second": machine.bandwidth,
        },
        "disk": {
            "path": str(disk.path),
            "total_bytes": disk.total,
            "free_bytes": disk.free,
            "bytes_per_second": disk.pieces,
            "expert_bytes_per_second": disk.experts,
        },
        "accelerators": [
            {"device": one.device, "name": one.name, "total_bytes": one.total, "free_bytes": one.free}
            for one in machine.accelerators
        ],
    }


def model_json(needs: Needs, machine: Machine) -> dict[str, Any]:
    """What a model needs, whether its weights fit in memory, and the most tokens a second."""
    return {
        "architecture": needs.architecture,
        "parameters": needs.parameters,
        "dtypes": needs.dtypes,
        "experts": needs.experts,
        "experts_chosen": needs.chosen,
        "memory": _weights(needs.memory),
        "files": _weights(needs.files) if needs.files else None,
        "context": needs.context,
        "cache_bytes": needs.cache_bytes(needs.context),
        "fits": fits(needs, machine),
        "tokens_per_second": most_rates(needs, machine),
    }


def _weights(weights: Weights) -> dict[str, float | int]:
    return {"bytes": weights.total, "bytes_per_token": weights.per_token, "expert_bytes": weights.experts}
