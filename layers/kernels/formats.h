/* The stored numbers: fp16 and bf16, and the sizes of the blocks of ggml-common.h (block_q8_0 and so on). */

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    float value;
    if (rest < 0x0400) {
        value = (float)rest * 0x1p-24f;
    } else {
        const uint32_t bits = rest < 0x7C00 ? (rest << 13) + 0x38000000 : (rest << 13) + 0x70000000;
        memcpy(&value, &bits, 4);
    }
    return sign ? -value : value;
}

/* Rounded half to even, in fp16's subnormal range too. */
static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits >= 0x47800000) return (uint16_t)(sign | (bits > 0x7F800000 ? 0x7E00 : 0x7C00));
    if (bits < 0x38800000) {
        /* Adding 0.5 leaves the units of fp16's smallest numbers in the last places. */
        float small;
        memcpy(&small, &bits, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return (uint16_t)(sign | (bits - 0x3F000000));
    }
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13));
}

static inline float half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return half_to_float(bits);
}

static inline float scalar_f16(const uint8_t *p) { return half_at(p); }

static inline float scalar_bf16(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float scalar_f32(const uint8_t *p) {
    float value;
    memcpy(&value, p, 4);
    return value;
}

/* Q4_K and Q5_K: eight scales, then eight minimums, of six bits each in twelve bytes. */
static inline void unpack_scales(const uint8_t *packed, uint8_t *unpacked) {
    for (int i = 0; i < 4; i++) {
        unpacked[i] = packed[i] & 63;
        unpacked[8 + i] = packed[4 + i] & 63;
        unpacked[4 + i] = (uint8_t)((packed[8 + i] & 15) | (packed[i] >> 6 << 4));
        unpacked[12 + i] = (uint8_t)((packed[8 + i] >> 4) | (packed[4 + i] >> 6 << 4));
    }
}

/* Q3_K: sixteen scales of six bits in twelve bytes. */
static inline void unpack_sixteen(const uint8_t *packed, int8_t *unpacked) {
    for (int i = 0; i < 8; i++) {
        const int top = packed[8 + i % 4] >> 2 * (i / 4);
        unpacked[i] = (int8_t)(((packed[i] & 15) | (top & 3) << 4) - 32);
        unpacked[8 + i] = (int8_t)(((packed[i] >> 4) | (top >> 4 & 3) << 4) - 32);
    }
}

/* What the codes of IQ4_NL and IQ4_XS stand for. */
static const int8_t CODEBOOK[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static const struct format FORMATS[KINDS] = {
    [Q8_0] = {32, 34, 32, 0},   [Q4_0] = {32, 18, 32, 0},   [Q4_1] = {32, 20, 32, 1},   [Q5_0] = {32, 22, 32, 0},
    [Q5_1] = {32, 24, 32, 1},   [IQ4_NL] = {32, 18, 32, 0}, [Q3_K] = {256, 110, 16, 0}, [Q4_K] = {256, 144, 32, 1},
    [Q5_K] = {256, 176, 32, 1}, [Q6_K] = {256, 210, 16, 0}, [IQ4_XS] = {256, 136, 32, 0},
};
