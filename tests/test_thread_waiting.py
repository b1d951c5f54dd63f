"""causallm.thread_waiting: the environment is set before torch reads it, and what a user has set stands."""

import os
import subprocess
import sys

import pytest

from causallm.thread_waiting import SPINS, wait_briefly

PROGRAM = """
import os, sys
from causallm.thread_waiting import wait_briefly
print(wait_briefly(), os.environ.get("GOMP_SPINCOUNT"))
import torch
print(wait_briefly(), torch.ones(2, 3).sum().item())
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, f"True {SPINS}"),
        ({"GOMP_SPINCOUNT": "7"}, "False 7"),
        ({"OMP_WAIT_POLICY": "passive"}, "False None"),
    ],
)
def test_it_is_said_before_torch_is_loaded(given: dict[str, str], expected: str) -> None:
    known = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**known, **given}, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [expected, "False 6.0"]


def test_too_late_is_told() -> None:
    assert "torch" in sys.modules
    assert wait_briefly() is False


def test_the_command_line_says_it() -> None:
    """Before it loads what a verb needs."""
    program = (
        "import sys, os, causallm.cli as cli\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv = ['causallm', 'doctor', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print('spins', os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    known = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run([sys.executable, "-c", program], env=known, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == f"spins {SPINS}"
