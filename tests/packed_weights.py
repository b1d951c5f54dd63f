"""Random weights in any of ggml's block formats."""

import torch
from torch import Tensor

from layers.kernels.block_formats import BLOCK_FORMATS


def packed_weight(kind: str, rows: int, columns: int) -> Tensor:
    """(rows, row_bytes): packed from rows of unlike magnitude, or where the format is only read blocks of any codes."""
    block_format = BLOCK_FORMATS[kind]
    if block_format.pack_blocks:
        return block_format.pack(torch.randn(rows, columns) * torch.rand(rows, 1))
    blocks = torch.randint(0, 256, (rows * columns // block_format.values, block_format.nbytes), dtype=torch.uint8)
    blocks[:, block_format.halves] = (torch.randn(len(blocks), 1) / 64).half().view(torch.uint8)
    return blocks.view(rows, -1)
