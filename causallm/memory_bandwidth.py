"""How fast this machine reads memory: what decoding, which reads all weights for each token, is measured against."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from causallm.available_memory import available_memory

REPEATS = 5
SIZE = 10**9
"""Bytes read: far more than any cache holds; where memory is short, a quarter of what is free."""


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(threads: int, device: str = "cpu", size: int | None = None) -> float:
    """Bytes a second: `size` bytes of float32 summed, the best of a few times. `threads` matters on the CPU alone."""
    place, before = torch.device(device), torch.get_num_threads()
    size = size or min(SIZE, _free(place) // 4)
    numbers = torch.ones(size // 4, device=place)
    torch.set_num_threads(threads)
    try:
        return numbers.nbytes / min(_seconds(numbers) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(before)


def read_bandwidth_apart(threads: int, size: int | None = None) -> float:
    """`read_bandwidth` of the CPU in a process of its own, so that what it reads is not in this one's peak memory."""
    call = f"from causallm.memory_bandwidth import read_bandwidth; print(read_bandwidth({threads}, size={size}))"
    package = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", call], cwd=package, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OSError(f"the memory bandwidth could not be measured: {reason}")
    return float(done.stdout)


def wait_for(device: torch.device) -> None:
    """Return when all work given to a device is done; a CPU's always is."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _seconds(numbers: torch.Tensor) -> float:
    wait_for(numbers.device)
    begin = time.perf_counter()
    numbers.sum()
    wait_for(numbers.device)
    return time.perf_counter() - begin


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory().available
