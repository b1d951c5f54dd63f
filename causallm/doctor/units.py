"""Sizes and rates as a person reads them."""

import math


def size(nbytes: float | int) -> str:
    """Bytes in powers of ten: "16.5 GB", "57 MB", "6.2 MB", "0.5 kB"."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    if nbytes >= 1e6:
        return f"{nbytes / 1e6:.{0 if nbytes >= 1e7 else 1}f} MB"
    return f"{nbytes / 1e3:.1f} kB"


def rate(tokens: float) -> str:
    """Tokens a second with two digits at least; more than 0."""
    return f"{tokens:,.{max(0, 1 - math.floor(math.log10(tokens)))}f} tokens/s"
