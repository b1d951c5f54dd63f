"""Telling an exhausted memory from other failures, which torch reports as a RuntimeError with many lines."""

import re

SIGNS = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory", re.IGNORECASE)
"""Of CUDA and MPS; of torch's CPU allocator; of a file that cannot be mapped; of the CPU allocator on Windows."""
AMOUNT = re.compile(r"tried to allocate ([0-9.]+) ?([a-z]+)", re.IGNORECASE)
ADVICE = (
    "less is needed with a shorter context (--max-length), fewer prompts at a time, packed weights (the quantize verb) "
    "or weights that stay on the disk (--memory-budget)"
)


def out_of_memory(error: BaseException) -> str | None:
    """One line about memory that could not be had and what to do; None for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and SIGNS.search(text)):
        return None
    wanted = AMOUNT.search(text)
    return f"out of memory{f', {_amount(wanted)} more could not be had' if wanted else ''}: {ADVICE}"


def _amount(wanted: re.Match[str]) -> str:
    number, unit = wanted.groups()
    return f"{float(number) / 1e6:,.0f} MB" if unit == "bytes" else f"{number} {unit}"
