"""ggml's formats of 32 values, block by block: a float16 scale, in some a float16 minimum, and codes of 4, 5 or 8 bits.

Formulas and layouts: quantize_row_*_ref and dequantize_row_* of ggml-quants.c. Of 4-bit codes those of values 0 to 15
are the low halves of 16 bytes, the others the high halves; fifth bits are 32 bits of their own.
"""

import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from layers.kernels.k_quants import divide, inverse_of

CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL and IQ4_XS stand for; ggml's kvalues_iq4nl."""


def pack_q8_0(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 34"]:
    """A scale, and codes -127 to 127."""
    scale = divide(blocks.abs().amax(1, keepdim=True), 127.0)
    scaled = blocks * inverse_of(scale)
    whole = scaled.trunc()
    # Halves go away from zero, as in C's roundf; torch.round sends them to the even neighbour.
    codes = whole + ((scaled - whole) * 2).trunc()
    return torch.cat((_half(scale), codes.to(torch.int8).view(torch.uint8)), 1)


def unpack_q8_0(blocks: UInt8[Tensor, "blocks 34"]) -> Float32[Tensor, "blocks 32"]:
    """scale * code."""
    return blocks[:, 2:].view(torch.int8) * _float(blocks, 0)


def pack_q4_0(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 18"]:
    """A scale, and codes 0 to 15."""
    scale, codes = _codes_from_peak(blocks, 8)
    return torch.cat((_half(scale), _nibbles(codes)), 1)


def unpack_q4_0(blocks: UInt8[Tensor, "blocks 18"]) -> Float32[Tensor, "blocks 32"]:
    """scale * (code - 8)."""
    return (_four_bits(blocks[:, 2:]).view(torch.int8) - 8) * _float(blocks, 0)


def pack_q4_1(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 20"]:
    """A scale, a minimum, and codes 0 to 15."""
    scale, minimum, codes = _codes_from_minimum(blocks, 15)
    return torch.cat((_half(scale), _half(minimum), _nibbles(codes)), 1)


def unpack_q4_1(blocks: UInt8[Tensor, "blocks 20"]) -> Float32[Tensor, "blocks 32"]:
    """scale * code + minimum."""
    return _four_bits(blocks[:, 4:]) * _float(blocks, 0) + _float(blocks, 2)


def pack_q5_0(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 22"]:
    """A scale, the fifth bits, and the low bits of codes 0 to 31."""
    scale, codes = _codes_from_peak(blocks, 16)
    return torch.cat((_half(scale), _fifth_bits(codes), _nibbles(codes & 15)), 1)


def unpack_q5_0(blocks: UInt8[Tensor, "blocks 22"]) -> Float32[Tensor, "blocks 32"]:
    """scale * (code - 16)."""
    return (_five_bits(blocks[:, 2:]).view(torch.int8) - 16) * _float(blocks, 0)


def pack_q5_1(blocks: Float32[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 24"]:
    """A scale, a minimum, the fifth bits, and the low bits of codes 0 to 31."""
    scale, minimum, codes = _codes_from_minimum(blocks, 31)
    return torch.cat((_half(scale), _half(minimum), _fifth_bits(codes), _nibbles(codes & 15)), 1)


def unpack_q5_1(blocks: UInt8[Tensor, "blocks 24"]) -> Float32[Tensor, "blocks 32"]:
    """scale * code + minimum."""
    return _five_bits(blocks[:, 4:]) * _float(blocks, 0) + _float(blocks, 2)


def unpack_iq4_nl(blocks: UInt8[Tensor, "blocks 18"]) -> Float32[Tensor, "blocks 32"]:
    """scale * what the code stands for."""
    return of_codebook(_four_bits(blocks[:, 2:])) * _float(blocks, 0)


def of_codebook(codes: UInt8[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """What codes 0 to 15 stand for in `CODEBOOK`."""
    return torch.tensor(CODEBOOK, dtype=torch.int8, device=codes.device)[codes.int()]


def _codes_from_peak(blocks: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Scale and codes 0 to 2 * half - 1, `half` being the value 0.

    The value of largest magnitude gets code 0, that is -half, and so no rounding error. Adding zero makes -0 a +0.
    """
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) + 0.0
    scale = divide(peak, -float(half))
    return scale, (blocks * inverse_of(scale) + (half + 0.5)).clamp(0, 2 * half - 1).to(torch.uint8)


def _codes_from_minimum(blocks: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum and codes 0 to `largest`."""
    minimum = blocks.amin(1, keepdim=True)
    scale = divide(blocks.amax(1, keepdim=True) - minimum, float(largest))
    return scale, minimum, ((blocks - minimum) * inverse_of(scale) + 0.5).clamp(0, largest).to(torch.uint8)


def _nibbles(codes: UInt8[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 16"]:
    return codes[:, :16] | codes[:, 16:] << 4


def _four_bits(nibbles: UInt8[Tensor, "blocks 16"]) -> UInt8[Tensor, "blocks 32"]:
    return torch.cat((nibbles & 15, nibbles >> 4), 1)


def _places(device: torch.device) -> UInt8[Tensor, "8"]:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _fifth_bits(codes: UInt8[Tensor, "blocks 32"]) -> UInt8[Tensor, "blocks 4"]:
    return (codes.view(-1, 4, 8) >> 4 << _places(codes.device)).sum(2, dtype=torch.uint8)


def _five_bits(packed: UInt8[Tensor, "blocks 20"]) -> UInt8[Tensor, "blocks 32"]:
    fifth = packed[:, :4, None] >> _places(packed.device) & 1
    return _four_bits(packed[:, 4:]) | fifth.flatten(1) << 4


def _half(scale: Float32[Tensor, "blocks 1"]) -> UInt8[Tensor, "blocks 2"]:
    return scale.half().view(torch.uint8)


def _float(blocks: UInt8[Tensor, "blocks nbytes"], at: int) -> Float32[Tensor, "blocks 1"]:
    return blocks[:, at : at + 2].clone().view(torch.float16).float()
