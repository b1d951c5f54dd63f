"""causallm.library_pages, in a process of its own: what only the start needed leaves memory, and all still runs."""

import subprocess
import sys

import psutil
import pytest

from causallm.library_pages import give_back_library_code

AFTER_IMPORTING_TORCH = """
from causallm.library_pages import give_back_library_code
from causallm.report import memory_kinds
import torch
expected = torch.arange(10000.0).view(100, 100) @ torch.ones(100, 3)
own, files = memory_kinds()
give_back_library_code()
own_after, files_after = memory_kinds()
assert files_after < files - 20e6, (files, files_after)
assert own_after < own + 2e6, (own, own_after)
assert torch.equal(torch.arange(10000.0).view(100, 100) @ torch.ones(100, 3), expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
def test_code_that_ran_at_the_start_is_not_in_memory_any_more() -> None:
    subprocess.run([sys.executable, "-c", AFTER_IMPORTING_TORCH], check=True)


def test_a_system_that_does_not_tell_what_is_mapped_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil.Process, "memory_maps", raising=False)
    give_back_library_code()
