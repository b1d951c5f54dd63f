"""How long OpenMP's threads wait for each other with the processor in hand."""

import os
import sys

SPINS = 10_000
"""Some 0.2 ms. GNU's library spins 300,000 times by itself, several ms."""


def wait_briefly() -> bool:
    """Let threads that wait for work, or for each other, soon give the processor to somebody else.

    Where another program wants one of the processors, a team of threads otherwise waits for the one that was put aside
    by spinning, a turn of the scheduler each time: 17 tokens a second of the tiny-stories model beside one busy process
    on two processors instead of some 300. What the user has said in the environment stands. False where it does, and
    where torch, and OpenMP with it, is loaded already, which reads the environment once.
    """
    if "torch" in sys.modules or os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True
