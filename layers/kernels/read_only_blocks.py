"""Formats of ggml that are read but not written: blocks of 256 values, sub-blocks under integer scales times a float16.

Formulas and layouts: dequantize_row_q3_K and dequantize_row_iq4_xs of ggml-quants.c.
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from layers.kernels.small_blocks import of_codebook


def unpack_q3_k(blocks: UInt8[Tensor, "blocks 110"]) -> Float32[Tensor, "blocks 256"]:
    """Third bits (absent: minus 4) of 256 codes, their low two, 16 scales at 6 bits in 12 bytes, and a half."""
    third, low = blocks[:, None, :32], blocks[:, 32:96].reshape(-1, 2, 1, 32)
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    low = low >> 2 * places[:4, None] & 3
    codes = low.view(-1, 8, 32) | (third >> places[:, None] & 1) << 2
    nibbles, top = blocks[:, 96:104], blocks[:, None, 104:108] >> 2 * places[:4, None] & 3
    scales = torch.cat((nibbles & 15, nibbles >> 4), 1) | top.flatten(1) << 4
    step = blocks[:, 108:].clone().view(torch.float16).float()
    scale = step * (scales.view(torch.int8) - 32)
    return (scale[:, :, None] * (codes.view(torch.int8).view(-1, 16, 16) - 4)).flatten(1)


def unpack_iq4_xs(blocks: UInt8[Tensor, "blocks 136"]) -> Float32[Tensor, "blocks 256"]:
    """A half, 8 scales at 6 bits, their high bits in 2 bytes and the low ones in 4, and 256 codes of the codebook."""
    places = torch.arange(4, dtype=torch.uint8, device=blocks.device)
    top = (blocks[:, 2:4, None] >> 2 * places & 3).flatten(1)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).flatten(1)
    scale = blocks[:, :2].clone().view(torch.float16).float() * ((low | top << 4).view(torch.int8) - 32)
    nibbles = blocks[:, 8:].reshape(-1, 8, 16)
    codes = torch.cat((nibbles & 15, nibbles >> 4), 2)
    return (scale[:, :, None] * of_codebook(codes)).flatten(1)
