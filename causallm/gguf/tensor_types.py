"""ggml's tensor types: their numbers and names, and how many bytes a row takes in those that can be read."""

import torch

from layers.kernels.block_formats import BLOCK_FORMATS

# Numbers as in ggml.h's ggml_type; those without an entry were removed from the format.
TYPE_NAMES: dict[int, str] = dict(
    enumerate("F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS".split())
) | {
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
TYPE_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}

FLOATS: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}

MXFP4 = "MXFP4"
MXFP4_BLOCK = 32
MXFP4_BYTES = 17
PACKED = {**{kind: kind for kind in BLOCK_FORMATS}, MXFP4: "Q8_0"}
"""The block format in which tensors of each packed type are given."""
READABLE = (*FLOATS, *BLOCK_FORMATS, MXFP4)


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` values; ValueError where they are no whole blocks, or the type cannot be read."""
    if kind in FLOATS:
        return columns * FLOATS[kind].itemsize
    if kind in BLOCK_FORMATS:
        return BLOCK_FORMATS[kind].row_bytes(columns)
    if kind != MXFP4:
        raise ValueError(f"type {kind} cannot be read; those that can are {', '.join(READABLE)}")
    if columns % MXFP4_BLOCK:
        raise ValueError(f"{kind} packs blocks of {MXFP4_BLOCK} values, and {columns} columns are no multiple")
    return columns // MXFP4_BLOCK * MXFP4_BYTES
