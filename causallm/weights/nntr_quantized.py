"""What NNTrainer's quantized `.bin` can hold, as its nntr_quantize writes it on x86.

Linear weights and an untied head in Q4_0, from (out, in), interleaved (`q4_0x8`); the embedding in plain ggml rows of
Q4_0 or Q6_K; vectors and the router in floats; no tied head; else the order of the float file (`nntr_layout`).

Sources: Q4_0 and the Q6_K embedding as checked byte for byte against the application; the Q4_0 embedding, what a head
may be and the multiples of 32 as nntrainer/nntrainer's layer_devel.h (commit 0b79e48), tie_word_embedding.cpp and
lm_head.cpp (commit 0385bfa).
"""

from collections.abc import Sequence

from causallm.weights.nntr_layout import FLOATS, Entry, Storage
from layers.kernels.block_formats import BLOCK_FORMATS

PACKED = {"linear": ("Q4_0",), "lm_head": ("Q4_0",), "embedding": ("Q4_0", "Q6_K")}
"""The block formats of each kind of weight."""
INTERLEAVED = ("linear", "lm_head")
"""The kinds whose Q4_0 rows are interleaved."""
MULTIPLE = 32
"""What rows and columns of an interleaved weight are multiples of."""


def is_packed(dtypes: Storage) -> bool:
    """Whether anything is in a block format."""
    return any(isinstance(stored, str) for stored in dtypes.values())


def packing_problem(entries: Sequence[Entry], dtypes: Storage) -> str | None:
    """Why the format cannot hold `entries` so, naming the first weight concerned; None where it can."""
    for entry in entries:
        stored = dtypes[entry.kind]
        if not isinstance(stored, str):
            continue
        rows, columns = entry.matrix
        if stored not in PACKED[entry.kind]:
            known = ", ".join((*PACKED[entry.kind], *FLOATS.values()))
            return f"NNTrainer's .bin has no {stored} for {entry.name} ({entry.kind}), only {known}"
        if entry.kind in INTERLEAVED and (rows % MULTIPLE or columns % MULTIPLE):
            return f"NNTrainer's Q4_0 needs multiples of {MULTIPLE}, and {entry.name} is {rows} x {columns}"
        if columns % BLOCK_FORMATS[stored].values:
            needed = BLOCK_FORMATS[stored].values
            return f"{stored} needs rows of a multiple of {needed}, and {entry.name} is {rows} x {columns}"
    return None
