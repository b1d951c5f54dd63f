"""ggml's K formats, block by block: 256 values in sub-blocks whose scales are integers times a float16.

Q4_K and Q5_K have 8 sub-blocks of 32 values, each `scale * code - minimum`; Q6_K has 16 of 16 values, each `scale *
code`. A sub-block's scale is searched for: several candidates round the values to codes, a weighted least-squares fit
gives each candidate's codes their best scale, and the smallest error wins. Formula and layout: quantize_row_q4_K_ref,
quantize_row_q5_K_ref and quantize_row_q6_K_ref of ggml-quants.c. Ties between candidates hang on the last bit, so the
order of every float32 operation is ggml's. The searches hold the position inside the sub-block in the first dimension.
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

NEGLIGIBLE = 1e-15
"""What is smaller in magnitude is packed as zero; ggml's GROUP_MAX_EPS."""
SEARCHED = {15: (-1.0, 21), 31: (-0.5, 16)}
"""By the largest code: where from it the search begins, and how many candidates there are, a tenth apart."""


def divide(dividend: Tensor, divisor: float) -> Tensor:
    """A correctly rounded quotient: for a plain number, torch on a GPU multiplies by the rounded reciprocal."""
    return dividend / torch.full_like(dividend, divisor)


def inverse_of(span: Tensor, levels: float = 1.0) -> Tensor:
    """`levels / span`, but zero where that overflows: so small a span is zero in float16, and C defines no codes."""
    inverse = torch.full_like(span, levels) / span
    return inverse.masked_fill_(inverse.isinf(), 0)


def _sum(terms: Float32[Tensor, "positions blocks parts"]) -> Float32[Tensor, "blocks parts"]:
    """The sum over positions, added one after the other."""
    total = terms[0].clone()
    for term in terms[1:].unbind():
        total += term
    return total


def _search_scale_and_minimum(
    x: Float32[Tensor, "32 blocks 8"], largest: int
) -> tuple[Float32[Tensor, "blocks 8"], Float32[Tensor, "blocks 8"], Float32[Tensor, "32 blocks 8"]]:
    """Scales, minima (as what is to be added, never positive) and codes 0..largest; ggml's make_qkx2_quants.

    A candidate of the search widens or narrows the step between codes by some hundredths. Larger values weigh more.
    """
    # float32 square roots of torch may be off by one in the last bit; rounded from float64 they are right.
    weight = divide(_sum(x * x), 32.0).double().sqrt().float() + x.abs()
    sum_w, sum_x = _sum(weight), _sum(weight * x)
    top, minimum = x.amax(0), x.amin(0).clamp(max=0)
    origin, inverse = minimum, inverse_of(top - minimum, float(largest))
    scale = torch.where(inverse == 0, top - minimum, inverse.reciprocal())
    best = _sum(weight * _square(_codes(x, origin, inverse, largest) * scale + minimum - x))
    first, candidates = SEARCHED[largest]
    for levels in (torch.arange(candidates, dtype=x.dtype) * 0.1 + first + largest).tolist():
        candidate = inverse_of(top - minimum, levels)
        codes = _codes(x, minimum, candidate, largest)
        weighted = weight * codes
        sum_l, sum_ll, sum_lx = _sum(weighted), _sum(weighted * codes), _sum(weighted * x)
        spread = sum_w * sum_ll - sum_l * sum_l
        fitted_minimum = (sum_ll * sum_x - sum_l * sum_lx) / spread
        fitted_scale = (sum_w * sum_lx - sum_x * sum_l) / spread
        fitted_scale = torch.where(fitted_minimum > 0, sum_lx / sum_ll, fitted_scale)
        fitted_minimum = fitted_minimum.clamp(max=0)
        error = _sum(weight * _square(codes * fitted_scale + fitted_minimum - x))
        better = (spread > 0) & (error < best)
        best = torch.where(better, error, best)
        origin, inverse = torch.where(better, minimum, origin), torch.where(better, candidate, inverse)
        scale, minimum = torch.where(better, fitted_scale, scale), torch.where(better, fitted_minimum, minimum)
    return scale, minimum, _codes(x, origin, inverse, largest)


def _codes(x: Tensor, origin: Tensor, inverse: Tensor, largest: int) -> Float32[Tensor, "32 blocks 8"]:
    return (x - origin).mul_(inverse).round_().clamp_(0, largest)


def _square(x: Float32[Tensor, "positions blocks parts"]) -> Float32[Tensor, "positions blocks parts"]:
    return x * x


def pack_q4_k(blocks: Float32[Tensor, "blocks 256"]) -> UInt8[Tensor, "blocks 144"]:
    """A block: scale and minimum as halves, 8 of each at 6 bits in 12 bytes, then 256 codes at 4 bits."""
    scales, codes = _scales_and_codes(blocks, 15)
    return torch.cat((scales, _nibbles(codes)), 1)


def pack_q5_k(blocks: Float32[Tensor, "blocks 256"]) -> UInt8[Tensor, "blocks 176"]:
    """As `pack_q4_k`, but before the codes their fifth bits in 32 bytes, one of each sub-block in a byte."""
    scales, codes = _scales_and_codes(blocks, 31)
    fifth = (codes >> 4 << torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]).sum(1, dtype=torch.uint8)
    return torch.cat((scales, fifth, _nibbles(codes & 15)), 1)


def _scales_and_codes(
    blocks: Float32[Tensor, "blocks 256"], largest: int
) -> tuple[UInt8[Tensor, "blocks 16"], UInt8[Tensor, "blocks 8 32"]]:
    x = blocks.view(-1, 8, 32).permute(2, 0, 1).contiguous()
    scale, minimum, codes = _search_scale_and_minimum(x, largest)
    step, scale_codes = _six_bits(scale)
    minimum_step, minimum_codes = _six_bits(-minimum)
    scale = step.float() * scale_codes
    codes = torch.where(scale == 0, codes, ((x + minimum_step.float() * minimum_codes) / scale).round_())
    low, high = scale_codes.to(torch.uint8).split(4, 1)
    minimum_low, minimum_high = minimum_codes.to(torch.uint8).split(4, 1)
    steps = (step.view(torch.uint8), minimum_step.view(torch.uint8))
    bits = (low | high >> 4 << 6, minimum_low | minimum_high >> 4 << 6, high & 15 | minimum_high << 4)
    return torch.cat((*steps, *bits), 1), codes.clamp_(0, largest).to(torch.uint8).permute(1, 2, 0)


def _nibbles(codes: UInt8[Tensor, "blocks 8 32"]) -> UInt8[Tensor, "blocks 128"]:
    pairs = codes.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def _six_bits(parts: Float32[Tensor, "blocks 8"]) -> tuple[Tensor, Float32[Tensor, "blocks 8"]]:
    """A block's step as float16 and its parts as multiples 0..63 of the unrounded step."""
    largest = parts.amax(1, keepdim=True).clamp(min=0) + 0.0
    return divide(largest, 63.0).half(), (parts * inverse_of(largest, 63.0)).round().clamp(0, 63)


def unpack_q4_k(blocks: UInt8[Tensor, "blocks 144"]) -> Float32[Tensor, "blocks 256"]:
    """The values of `pack_q4_k`; ggml's dequantize_row_q4_K."""
    return _scaled(blocks[:, :16], _four_bits(blocks[:, 16:]))


def unpack_q5_k(blocks: UInt8[Tensor, "blocks 176"]) -> Float32[Tensor, "blocks 256"]:
    """The values of `pack_q5_k`; ggml's dequantize_row_q5_K."""
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = blocks[:, None, 16:48] >> places & 1
    return _scaled(blocks[:, :16], _four_bits(blocks[:, 48:]) | fifth << 4)


def _four_bits(nibbles: UInt8[Tensor, "blocks 128"]) -> UInt8[Tensor, "blocks 8 32"]:
    pairs = nibbles.reshape(-1, 4, 1, 32)
    return torch.cat((pairs & 15, pairs >> 4), 2).view(-1, 8, 32)


def _scaled(scales: UInt8[Tensor, "blocks 16"], codes: UInt8[Tensor, "blocks 8 32"]) -> Float32[Tensor, "blocks 256"]:
    step, minimum_step = scales[:, :4].clone().view(torch.float16).float().split(1, 1)
    low, minimum_low, high = scales[:, 4:].split(4, 1)
    scale = step * torch.cat((low & 63, high & 15 | low >> 6 << 4), 1)
    minimum = minimum_step * torch.cat((minimum_low & 63, high >> 4 | minimum_low >> 6 << 4), 1)
    return (scale[:, :, None] * codes - minimum[:, :, None]).flatten(1)


def _search_scale(
    x: Float32[Tensor, "16 blocks 16"],
) -> tuple[Float32[Tensor, "blocks 16"], Float32[Tensor, "16 blocks 16"]]:
    """Scales and codes 0..63 of Q6_K, 32 being the value 0; ggml's make_qx_quants with squares as weights.

    The first candidate puts the value of largest magnitude at code 0, that is -32.
    """
    peak = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    negligible = peak.abs() < NEGLIGIBLE
    square = x * x
    cube = square * x
    scale, inverse, best = torch.zeros_like(peak), torch.zeros_like(peak), torch.full_like(peak, -torch.inf)
    offsets = torch.tensor([0, *range(-9, 0), *range(1, 10)], dtype=x.dtype)
    for levels in (offsets * 0.1 + 32).tolist():
        candidate = inverse_of(peak, -levels)
        codes = _signed_codes(x, candidate)
        sum_ll, sum_lx = _sum((square * codes).mul_(codes)), _sum(cube * codes)
        # Not simply greater: what is not a number has to win, so that it reaches the block's scale and is noticed.
        better = ~(sum_lx * sum_lx <= best * sum_ll)
        scale = torch.where(better, sum_lx / sum_ll, scale)
        best = torch.where(better, scale * sum_lx, best)
        inverse = torch.where(better, candidate, inverse)
    codes = _signed_codes(x, inverse) + 32
    return torch.where(negligible, 0.0, scale), torch.where(negligible, 0.0, codes)


def _signed_codes(
    x: Float32[Tensor, "16 blocks 16"], inverse: Float32[Tensor, "blocks 16"]
) -> Float32[Tensor, "16 blocks 16"]:
    return (x * inverse).round_().clamp_(-32, 31)


def pack_q6_k(blocks: Float32[Tensor, "blocks 256"]) -> UInt8[Tensor, "blocks 210"]:
    """A block: the low 4 bits of 256 codes, their high 2 bits, 16 scales as int8, and a half to multiply these."""
    x = blocks.view(-1, 16, 16).permute(2, 0, 1).contiguous()
    scale, codes = _search_scale(x)
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    negligible = peak.abs() < NEGLIGIBLE
    inverse = inverse_of(torch.where(negligible, 1.0, peak), -128.0)
    step = inverse.reciprocal().half()
    scale_codes = (scale * inverse).round().clamp(max=127)
    scale = step.float() * scale_codes
    codes = torch.where(scale == 0, codes, (x / scale).round_().clamp_(-32, 31) + 32)
    rows = codes.to(torch.uint8).permute(1, 2, 0).reshape(-1, 2, 4, 32)
    low, high = rows & 15, rows >> 4
    packed = torch.cat(
        (
            (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1),
            (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1),
            scale_codes.to(torch.int8).view(torch.uint8),
            step.view(torch.uint8),
        ),
        1,
    )
    return packed.masked_fill_(negligible, 0)


def unpack_q6_k(blocks: UInt8[Tensor, "blocks 210"]) -> Float32[Tensor, "blocks 256"]:
    """The values of `pack_q6_k`; ggml's dequantize_row_q6_K."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat((low & 15, low >> 4), 2)
    high = torch.cat((high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6), 2)
    codes = (low | high << 4).view(torch.int8).view(-1, 16, 16) - 32
    scale = blocks[:, 208:].clone().view(torch.float16).float() * blocks[:, 192:208].view(torch.int8)
    return (scale[:, :, None] * codes).flatten(1)
