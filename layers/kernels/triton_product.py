"""Products with packed weights, and their expansion, on a GPU: Triton kernels that read ggml's blocks as they lie.

A weight is read in words of 16 bits, or of 32 in Q4_K and Q5_K, whose blocks are whole ones; halves lie on even bytes
in all formats. A unit is what one thread takes at a time, pairs of values in neighbouring columns that share what they
need of the block. A pair is two codes in the bytes of a 16-bit number, and each value is
scale * (code - offset) - minimum.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from layers.kernels.block_formats import BLOCK_FORMATS

WORDS = {
    "Q8_0": torch.uint16,
    "Q4_0": torch.uint16,
    "Q5_0": torch.uint16,
    "Q4_K": torch.uint32,
    "Q5_K": torch.uint32,
    "Q6_K": torch.uint16,
}
"""Of the formats that there are kernels for."""
UNIT_VALUES = {"Q8_0": 8, "Q4_0": 8, "Q5_0": 8, "Q4_K": 16, "Q5_K": 16, "Q6_K": 16}
"""Values in a unit."""
TILE = 64
"""Units of a row that a program reads at once, one for each of its threads."""
OPTIONS = {"num_warps": TILE // 32, "enable_fp_fusion": True}
"""Fused, a product and a difference round once. No value changes: scale * code is exact where one is subtracted."""
MANY = 4096
"""Weight rows from which a program takes four of them, to load x less often; of fewer two, so that all of a large
card's processors get some."""


@triton.jit
@no_type_check
def _half(word):
    """The float16 in the low 16 bits of a word."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
@no_type_check
def _column(unit, pair: tl.constexpr, kind: tl.constexpr):
    """The first column of a unit's pair."""
    if kind == "Q8_0":
        return unit * 8 + pair * 2
    if kind == "Q4_0" or kind == "Q5_0":
        return unit // 4 * 32 + unit % 4 * 4 + pair % 2 * 2 + pair // 2 * 16
    if kind == "Q4_K" or kind == "Q5_K":
        return unit // 4 * 64 + unit % 4 * 8 + pair % 4 * 2 + pair // 4 * 32
    return unit // 8 * 128 + unit % 8 * 4 + pair % 2 * 2 + pair // 2 * 32


@triton.jit
@no_type_check
def _pair(row, start, unit, live, pair: tl.constexpr, kind: tl.constexpr):
    """Codes, scale and minimum of a unit's pair; `row` points to the beginning of weight rows, `live` masks units."""
    if kind == "Q8_0":
        block = row + (start + unit // 4 * 17)
        codes = tl.load(block + 1 + unit % 4 * 4 + pair, live, 0).to(tl.int32) ^ 0x8080
        scale = _half(tl.load(block, live, 0))
        minimum = 0.0
    elif kind == "Q4_0":
        block = row + (start + unit // 4 * 9)
        codes = tl.load(block + 1 + unit % 4 * 2 + pair % 2, live, 0).to(tl.int32) >> pair // 2 * 4 & 0x0F0F
        scale = _half(tl.load(block, live, 0))
        minimum = 0.0
    elif kind == "Q5_0":
        block = row + (start + unit // 4 * 11)
        codes = tl.load(block + 3 + unit % 4 * 2 + pair % 2, live, 0).to(tl.int32) >> pair // 2 * 4 & 0x0F0F
        fifth = tl.load(block + 1 + pair // 2, live, 0).to(tl.int32) >> (unit % 4 * 4 + pair % 2 * 2)
        codes |= (fifth & 1) << 4 | (fifth & 2) << 11
        scale = _half(tl.load(block, live, 0))
        minimum = 0.0
    elif kind == "Q4_K" or kind == "Q5_K":
        block = row + (start + unit // 16 * (44 if kind == "Q5_K" else 36))
        first: tl.constexpr = 12 if kind == "Q5_K" else 4
        codes = tl.load(block + first + unit % 16 * 2 + pair % 4 // 2, live, 0)
        codes = codes >> (pair % 2 * 16 + pair // 4 * 4) & 0x0F0F
        # Sub-block 0..7 of the block; its 6-bit scale and minimum, the upper 2 bits of 4..7 being above those of 0..3.
        part = unit % 16 // 4 * 2 + pair // 4
        if kind == "Q5_K":
            fifth = tl.load(block + 4 + unit % 4 * 2 + pair % 4 // 2, live, 0) >> pair % 2 * 16
            codes |= (fifth >> part & 0x0101) << 4
        low = tl.load(block + 1, live, 0) >> part % 4 * 8
        low_minimum = tl.load(block + 2, live, 0) >> part % 4 * 8
        high = tl.load(block + 3, live, 0) >> part % 4 * 8
        scale_code = tl.where(part < 4, low & 63, high & 15 | low >> 2 & 48)
        minimum_code = tl.where(part < 4, low_minimum & 63, high >> 4 & 15 | low_minimum >> 2 & 48)
        steps = tl.load(block, live, 0)
        scale = _half(steps) * scale_code.to(tl.float32)
        minimum = _half(steps >> 16) * minimum_code.to(tl.float32)
    else:
        block = row + (start + unit // 16 * 105)
        half, place, quarter = unit % 16 // 8, unit % 8 * 2 + pair % 2, pair // 2
        low = tl.load(block + half * 32 + quarter % 2 * 16 + place, live, 0).to(tl.int32) >> quarter // 2 * 4 & 0x0F0F
        high = tl.load(block + 64 + half * 16 + place, live, 0).to(tl.int32) >> quarter * 2 & 0x0303
        codes = low | high << 4
        scale_code = tl.load(block + 96 + half * 4 + quarter, live, 0) >> unit % 8 // 4 * 8
        scale = _half(tl.load(block + 104, live, 0)) * scale_code.to(tl.int8).to(tl.float32)
        minimum = 0.0
    return codes, scale, minimum


@triton.jit
@no_type_check
def _code(codes, byte: tl.constexpr, kind: tl.constexpr):
    """Code minus offset of one byte of a pair, for the upper one times 256, as a float.

    2^23 plus a whole number below it is the float that has that number as its last bits, so no conversion is needed.
    """
    offset: tl.constexpr = (
        128 if kind == "Q8_0" else 8 if kind == "Q4_0" else 16 if kind == "Q5_0" else 32 if kind == "Q6_K" else 0
    )
    number = (codes & (0xFF << 8 * byte) | 0x4B000000).to(tl.float32, bitcast=True)
    return number - (8388608.0 + (offset << 8 * byte))


@triton.jit
@no_type_check
def product_kernel(
    x,
    words,
    out,
    x_rows,
    out_features,
    in_features,
    row_words,
    kind: tl.constexpr,
    pairs: tl.constexpr,
    some_x: tl.constexpr,
    some_rows: tl.constexpr,
    tile: tl.constexpr,
    step: tl.constexpr,
):
    """out = x W^T: a program makes `some_x` rows by `some_rows` columns of it."""
    parts = tl.cdiv(x_rows, some_x)
    token = tl.program_id(0) % parts * some_x + tl.arange(0, some_x)
    number = tl.program_id(0) // parts * some_rows + tl.arange(0, some_rows)
    row = words + (tl.minimum(number, out_features - 1).to(tl.int64) * row_words)[:, None]
    x_row = x + (tl.minimum(token, x_rows - 1) * in_features)[:, None]
    total = tl.zeros((some_x, some_rows, tile), tl.float32)
    unit = tl.arange(0, tile)[None, :]
    units = in_features // (2 * pairs)
    for turn in range(tl.cdiv(units, tile)):
        live = unit < units - turn * tile
        for pair in tl.static_range(pairs):
            codes, scale, minimum = _pair(row, turn * step, unit, live, pair, kind)
            column = turn * (tile * pairs * 2) + _column(unit, pair, kind)
            even = tl.load(x_row + column, live, 0.0).to(tl.float32)
            odd = tl.load(x_row + column + 1, live, 0.0).to(tl.float32)
            change = _code(codes, 0, kind)[None] * even[:, None] + _code(codes, 1, kind)[None] * (odd / 256)[:, None]
            total += scale[None] * change
            if kind == "Q4_K" or kind == "Q5_K":
                total -= minimum[None] * (even + odd)[:, None]
    place = token[:, None].to(tl.int64) * out_features + number[None, :]
    tl.store(out + place, tl.sum(total, 2), (token < x_rows)[:, None] & (number < out_features)[None, :])


@triton.jit
@no_type_check
def expand_kernel(
    words,
    out,
    columns,
    row_words,
    kind: tl.constexpr,
    pairs: tl.constexpr,
    tile: tl.constexpr,
):
    """A program writes the values of `tile` units of a row."""
    units = columns // (2 * pairs)
    parts = tl.cdiv(units, tile)
    number = (tl.program_id(0) // parts).to(tl.int64)
    start = tl.program_id(0) % parts * tile
    unit = start + tl.arange(0, tile)
    live = unit < units
    # Of a pair's two columns each has a place of its own, side by side, so that they are written together.
    side = tl.arange(0, 2 * tile)
    for pair in tl.static_range(pairs):
        codes, scale, minimum = _pair(words + number * row_words, 0, unit, live, pair, kind)
        even = scale * _code(codes, 0, kind) - minimum
        odd = scale * (_code(codes, 1, kind) / 256) - minimum
        column = _column(start + side // 2, pair, kind) + side % 2
        tl.store(out + number * columns + column, tl.interleave(even, odd), start + side // 2 < units)


def triton_product(
    x: Float[Tensor, "rows in_features"], weight: UInt8[Tensor, "out_features row_bytes"], kind: str
) -> Float[Tensor, "rows out_features"]:
    """x W^T for a weight in a format of `WORDS`, exact but for the order of fp32 sums, rounded to x's dtype."""
    words, x = _words(weight, kind), x.contiguous()
    out = x.new_empty(len(x), len(weight))
    some_x = min(triton.next_power_of_2(max(len(x), 1)), 8)
    some_rows = 4 if len(weight) >= MANY else 2
    grid = (triton.cdiv(len(x), some_x) * triton.cdiv(len(weight), some_rows),)
    step = BLOCK_FORMATS[kind].row_bytes(TILE * UNIT_VALUES[kind]) // words.itemsize
    if out.numel():
        with torch.cuda.device_of(x):
            product_kernel[grid](
                x, words, out, len(x), len(weight), x.shape[1], words.shape[1],
                kind=kind, pairs=UNIT_VALUES[kind] // 2, some_x=some_x, some_rows=some_rows, tile=TILE, step=step,
                **OPTIONS,
            )  # fmt: skip
    return out


def triton_expand(
    weight: UInt8[Tensor, "rows row_bytes"], kind: str, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows columns"]:
    """The values of a packed weight, in fp32 bit for bit those of `BlockFormat.unpack`, or rounded to `dtype`."""
    words, columns = _words(weight, kind), BLOCK_FORMATS[kind].row_values(weight.shape[1])
    out = torch.empty(len(weight), columns, dtype=dtype, device=weight.device)
    grid = (len(weight) * triton.cdiv(columns // UNIT_VALUES[kind], TILE),)
    if out.numel():
        with torch.cuda.device_of(weight):
            expand_kernel[grid](
                words, out, columns, words.shape[1],
                kind=kind, pairs=UNIT_VALUES[kind] // 2, tile=TILE,
                **OPTIONS,
            )  # fmt: skip
    return out


def _words(weight: Tensor, kind: str) -> Tensor:
    """The bytes as words; copied where they do not lie in a row and on whole words."""
    aligned = weight.storage_offset() % WORDS[kind].itemsize == 0
    return (weight.contiguous() if aligned else weight.clone(memory_format=torch.contiguous_format)).view(WORDS[kind])
