"""causallm.allocator: memory that is freed is written again, in a process of its own."""

import platform
import subprocess
import sys

import pytest

LARGE_TENSORS = """
import resource
from causallm.allocator import keep_freed_memory
assert keep_freed_memory()
import torch
kept, faults = [], []
for number in range(120):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    kept.append(bytearray(300 + number))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# At first glibc finds few freed blocks again that were aligned.
assert sum(faults[60:]) < 60 * 2**27 // resource.getpagesize() // 5, faults
"""


def test_a_large_tensor_is_made_of_memory_that_is_there() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    subprocess.run([sys.executable, "-c", LARGE_TENSORS], check=True)
