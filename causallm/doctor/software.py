"""Which versions are installed, which optional packages, and which accelerators torch can use."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

REQUIRED = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "psutil")


class OptionalPackage(NamedTuple):
    """The distributions that a package comes in, the extra that installs it, and what it is for."""

    distributions: tuple[str, ...]
    extra: str
    purpose: str


OPTIONAL = {
    "prompt_toolkit": OptionalPackage(("prompt_toolkit",), "chat", "line editing in chat"),
    "matplotlib": OptionalPackage(("matplotlib",), "train", "pictures of the loss"),
    "tensorboard": OptionalPackage(("tensorboard",), "tensorboard", "training logs"),
    "mlflow": OptionalPackage(("mlflow", "mlflow-skinny"), "mlflow", "training logs"),
}


@dataclass(frozen=True)
class Accelerator:
    """device: what --device takes. free is None where the driver does not tell."""

    device: str
    name: str
    total: int
    free: int | None


def versions() -> dict[str, str | None]:
    """causallm, Python, the operating system and the packages that matter; None for what is not installed."""
    return {
        "causallm": installed("causallm"),
        "python": platform.python_version(),
        "os": platform.platform(),
        **{name: installed(name) for name in REQUIRED},
    }


def optional_packages() -> dict[str, str | None]:
    """The version of each package in `OPTIONAL`, None for what is not installed."""
    return {name: installed(*package.distributions) for name, package in OPTIONAL.items()}


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def accelerators() -> list[Accelerator]:
    """The GPUs that torch can use here."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        free = _told(lambda number=number: torch.cuda.mem_get_info(number)[0])  # type: ignore[misc]
        found.append(Accelerator(f"cuda:{number}", about.name, int(about.total_memory), free))
    if torch.backends.mps.is_available():
        total = _told(torch.mps.recommended_max_memory) or 0
        used = _told(torch.mps.driver_allocated_memory)
        found.append(Accelerator("mps", "Apple GPU", total, None if used is None else total - used))
    return found


def _told(ask: Callable[[], int]) -> int | None:
    """What a driver says of its memory, None where it fails to, as when that is full."""
    try:
        return int(ask())
    except RuntimeError:
        return None
