"""Amounts of bytes as people write them."""

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str | int) -> int:
    """ "2GB" is two thousand million, "2GiB" 2 x 2^30, a plain number bytes; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?i?)B?\s*", str(text), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    amount = float(match[1]) * UNITS[unit] if match and unit in UNITS else 0.0
    if not 1 <= amount < float("inf"):
        raise ValueError(f"'{text}' is no amount of memory, expected a number of bytes such as 2GB, 1.5GB or 700MiB")
    return int(amount)


def show_bytes(nbytes: int | float) -> str:
    """In MB or GB, with three digits."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
