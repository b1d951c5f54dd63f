"""What the processor can do and how much of it this process may use."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from causallm.control_groups import control_groups
from causallm.memory_bandwidth import processors
from layers.kernels import native

FEATURES = {
    "avx2": "AVX2",
    "fma3": "FMA",
    "f16c": "F16C",
    "avx512_f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "neon": "NEON",
    "dot": "dot product",
    "i8mm": "int8 matrix product",
    "bf16": "bf16",
    "fp16_arith": "fp16",
    "sve": "SVE",
    "sve2": "SVE2",
    "sme": "SME",
}
"""What products of matrices gain from, by torch's name (`torch.cpu.get_capabilities`)."""


@dataclass(frozen=True)
class Processor:
    """name: what it calls itself. features: those of `FEATURES` that it has.

    cores: physical ones of the machine, None where unknown. usable: processors, of which a core may be two, that this
    process may run on. limit: how many of them its control group lets it use at a time, None without a limit.
    threads: torch's. openmp: OMP_NUM_THREADS as the user set it.
    """

    name: str
    architecture: str
    features: tuple[str, ...]
    cores: int | None
    usable: int
    limit: float | None
    threads: int
    openmp: str | None


@dataclass(frozen=True)
class Kernels:
    """level: which of the native kernels is in use, "torch" without any. built: whether there is a library of them."""

    level: str
    built: bool

    @property
    def native(self) -> bool:
        """Whether the native kernels are in use."""
        return self.level != "torch"


def read_processor() -> Processor:
    """The processor of this machine; what cannot be found out is left out."""
    capable = _capabilities()
    return Processor(
        name=str(capable.get("cpu_name") or platform.processor() or platform.machine()),
        architecture=platform.machine(),
        features=tuple(name for key, name in FEATURES.items() if capable.get(key)),
        cores=psutil.cpu_count(logical=False),
        usable=processors(),
        limit=processor_limit(),
        threads=torch.get_num_threads(),
        openmp=os.environ.get("OMP_NUM_THREADS"),
    )


def processor_limit(root: Path = Path("/")) -> float | None:
    """How many processors this process may use at a time, by the tightest of its control groups; None: all."""
    limits = []
    for group in control_groups("cpu", root):
        if group.unified:
            quota, _, period = group.text("cpu.max").partition(" ")
        else:
            quota, period = group.text("cpu.cfs_quota_us"), group.text("cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # "max" and -1 mean no limit
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def read_kernels() -> Kernels:
    """Which kernels serve here, the best for this processor."""
    folder = Path(native.__file__).parent
    return Kernels(native.choose(native.AVX512), built=any(folder.glob("_native*")))


def _capabilities() -> dict[str, Any]:
    """What torch knows of the processor, of which older versions say nothing."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    try:
        return dict(ask())
    except RuntimeError:
        return {}
