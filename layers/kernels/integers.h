/* Packed blocks as integers under scales, value = scale * integer - minimum: a scale for sixteen values, a minimum for 32.
   Included by kernels.h once per kind of processor. */

typedef uint8_t NAME(u8) __attribute__((vector_size(16), aligned(1)));
typedef int8_t NAME(i8) __attribute__((vector_size(16), aligned(1)));
#define U8 NAME(u8)
#define I8 NAME(i8)

static inline U8 NAME(bytes)(const uint8_t *p) { return *(const U8 *)p; }
static inline void NAME(keep)(U8 integers, int8_t *to) { *(U8 *)to = integers; }

static inline float NAME(half_value)(const uint8_t *p) {
#if F16C
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
#else
    return half_at(p);
#endif
}

static void NAME(integers_q8_0)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    scales[0] = scales[1] = NAME(half_value)(block);
    memcpy(values, block + 2, 32);
    (void)minimums;
}

static void NAME(integers_q4_0)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const U8 codes = NAME(bytes)(block + 2);
    scales[0] = scales[1] = NAME(half_value)(block);
    NAME(keep)((codes & 15) - 8, values);
    NAME(keep)((codes >> 4) - 8, values + 16);
    (void)minimums;
}

static void NAME(integers_q4_1)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const U8 codes = NAME(bytes)(block + 4);
    scales[0] = scales[1] = NAME(half_value)(block);
    minimums[0] = -NAME(half_value)(block + 2);
    NAME(keep)(codes & 15, values);
    NAME(keep)(codes >> 4, values + 16);
}

/* Sixteen bits as bytes of 0 or 16. */
static inline U8 NAME(fifth_bits)(const uint8_t *bits) {
    const U8 places = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    U8 bytes;
#if F16C
    uint16_t both;
    memcpy(&both, bits, 2);
    bytes = (U8)_mm_shuffle_epi8(_mm_cvtsi32_si128(both), _mm_set_epi64x(0x0101010101010101, 0));
    return (U8)_mm_cmpeq_epi8((__m128i)(bytes & places), (__m128i)places) & 16;
#else
    for (int i = 0; i < 16; i++) bytes[i] = bits[i / 8];
    return (U8)((bytes & places) != 0) & 16;
#endif
}

static void NAME(integers_q5_0)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const U8 codes = NAME(bytes)(block + 6);
    scales[0] = scales[1] = NAME(half_value)(block);
    NAME(keep)(((codes & 15) | NAME(fifth_bits)(block + 2)) - 16, values);
    NAME(keep)(((codes >> 4) | NAME(fifth_bits)(block + 4)) - 16, values + 16);
    (void)minimums;
}

static void NAME(integers_q5_1)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const U8 codes = NAME(bytes)(block + 8);
    scales[0] = scales[1] = NAME(half_value)(block);
    minimums[0] = -NAME(half_value)(block + 2);
    NAME(keep)((codes & 15) | NAME(fifth_bits)(block + 4), values);
    NAME(keep)((codes >> 4) | NAME(fifth_bits)(block + 6), values + 16);
}

/* 32 values of the codebook. */
static inline void NAME(look_up)(const uint8_t *codes, int8_t *values) {
#if F16C
    const __m128i book = _mm_loadu_si128((const __m128i *)CODEBOOK), low = _mm_set1_epi8(15);
    const __m128i both = _mm_loadu_si128((const __m128i *)codes);
    _mm_storeu_si128((__m128i *)values, _mm_shuffle_epi8(book, _mm_and_si128(both, low)));
    _mm_storeu_si128((__m128i *)(values + 16), _mm_shuffle_epi8(book, _mm_and_si128(_mm_srli_epi16(both, 4), low)));
#elif NEON_DOT
    const int8x16_t book = vld1q_s8(CODEBOOK);
    const uint8x16_t both = vld1q_u8(codes);
    vst1q_s8(values, vqtbl1q_s8(book, vandq_u8(both, vdupq_n_u8(15))));
    vst1q_s8(values + 16, vqtbl1q_s8(book, vshrq_n_u8(both, 4)));
#else
    for (int i = 0; i < 16; i++) values[i] = CODEBOOK[codes[i] & 15], values[16 + i] = CODEBOOK[codes[i] >> 4];
#endif
}

static void NAME(integers_iq4_nl)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    scales[0] = scales[1] = NAME(half_value)(block);
    NAME(look_up)(block + 2, values);
    (void)minimums;
}

static void NAME(integers_iq4_xs)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const float d = NAME(half_value)(block);
    for (int part = 0; part < 8; part++) {
        const int low = block[4 + part / 2] >> 4 * (part % 2) & 15, top = block[2 + part / 4] >> 2 * (part % 4) & 3;
        scales[2 * part] = scales[2 * part + 1] = d * ((low | top << 4) - 32);
        NAME(look_up)(block + 8 + 16 * part, values + 32 * part);
    }
    (void)minimums;
}

static void NAME(integers_q3_k)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const float d = NAME(half_value)(block + 108);
    int8_t factors[16];
    unpack_sixteen(block + 96, factors);
    for (int part = 0; part < 16; part++) scales[part] = d * factors[part];
    for (int side = 0; side < 2; side++) {
        U8 third = NAME(bytes)(block + 16 * side);
        for (int half = 0; half < 2; half++) {
            U8 low = NAME(bytes)(block + 32 + 32 * half + 16 * side);
            int8_t *to = values + 128 * half + 16 * side;
            for (int i = 0; i < 4; i++, to += 32, low >>= 2, third >>= 1) NAME(keep)(((low & 3) | (third & 1) << 2) - 4, to);
        }
    }
    (void)minimums;
}

static inline void NAME(scales_and_minimums)(const uint8_t *block, float *scales, float *minimums) {
    const float d = NAME(half_value)(block), dmin = NAME(half_value)(block + 2);
    uint8_t bits[16];
    unpack_scales(block + 4, bits);
    for (int part = 0; part < 8; part++) {
        scales[2 * part] = scales[2 * part + 1] = d * bits[part];
        minimums[part] = dmin * bits[8 + part];
    }
}

static void NAME(integers_q5_k)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    NAME(scales_and_minimums)(block, scales, minimums);
    for (int side = 0; side < 2; side++) {
        U8 fifth = NAME(bytes)(block + 16 + 16 * side);
        int8_t *to = values + 16 * side;
        for (int pair = 0; pair < 4; pair++, to += 64, fifth >>= 2) {
            const U8 codes = NAME(bytes)(block + 48 + 32 * pair + 16 * side);
            NAME(keep)((codes & 15) | (fifth & 1) << 4, to);
            NAME(keep)((codes >> 4) | (fifth & 2) << 3, to + 32);
        }
    }
}

static void NAME(integers_q4_k)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    NAME(scales_and_minimums)(block, scales, minimums);
    for (int i = 0; i < 8; i++) {
        const U8 codes = NAME(bytes)(block + 16 + 16 * i);
        int8_t *to = values + 64 * (i / 2) + 16 * (i % 2);
        NAME(keep)(codes & 15, to);
        NAME(keep)(codes >> 4, to + 32);
    }
}

static void NAME(integers_q6_k)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const float d = NAME(half_value)(block + 208);
    for (int part = 0; part < 16; part++) scales[part] = d * (int8_t)block[192 + part];
    for (int i = 0; i < 8; i++) {
        /* Four bits of values `to` and `to` + 64, and two of each of four values 32 apart. */
        const U8 low = NAME(bytes)(block + 16 * i), top = NAME(bytes)(block + 128 + 32 * (i / 4) + 16 * (i % 2));
        int8_t *to = values + 128 * (i / 4) + 16 * (i % 4);
        const U8 first = i & 2 ? top >> 2 : top, second = i & 2 ? top >> 6 : top >> 4;
        NAME(keep)(((low & 15) | (first & 3) << 4) - 32, to);
        NAME(keep)(((low >> 4) | (second & 3) << 4) - 32, to + 64);
    }
    (void)minimums;
}

static void (*const NAME(integers)[KINDS])(const uint8_t *, int8_t *, float *, float *) = {
    [Q8_0] = NAME(integers_q8_0), [Q4_0] = NAME(integers_q4_0),     [Q4_1] = NAME(integers_q4_1), [Q5_0] = NAME(integers_q5_0),
    [Q5_1] = NAME(integers_q5_1), [IQ4_NL] = NAME(integers_iq4_nl), [Q3_K] = NAME(integers_q3_k), [Q4_K] = NAME(integers_q4_k),
    [Q5_K] = NAME(integers_q5_k), [Q6_K] = NAME(integers_q6_k),     [IQ4_XS] = NAME(integers_iq4_xs)};

#undef U8
#undef I8
