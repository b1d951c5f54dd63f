/* Packed rows to fp32 or bf16, sixteen values at a time; included by kernels.h once per kind of processor. */

typedef uint8_t NAME(u8) __attribute__((vector_size(16), aligned(1)));
typedef int8_t NAME(i8) __attribute__((vector_size(16), aligned(1)));
#define U8 NAME(u8)
#define I8 NAME(i8)

static inline U8 NAME(bytes)(const uint8_t *p) { return *(const U8 *)p; }

/* Sixteen values, fp32 or rounded half to even to bf16. */
static inline void NAME(put)(V16 values, long at, float *wide, uint16_t *narrow) {
    if (wide) *(V16 *)(wide + at) = values;
    else *(U16 *)(narrow + at) = NAME(to_bf16)(values);
}

/* Spelled out: compilers make scalar code of __builtin_convertvector here. */
static inline V16 NAME(signed16)(I8 codes) {
#if VNNI512
    return (V16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#elif F16C
    const __m128i last = _mm_srli_si128((__m128i)codes, 8);
    return NAME(joined)(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)codes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(last)));
#else
    V16 v;
    for (int i = 0; i < 16; i++) v[i] = codes[i];
    return v;
#endif
}

static void NAME(expand_q8_0)(const uint8_t *block, long at, float *wide, uint16_t *narrow) {
    const float scale = half_at(block);
    NAME(put)(NAME(signed16)((I8)NAME(bytes)(block + 2)) * scale, at, wide, narrow);
    NAME(put)(NAME(signed16)((I8)NAME(bytes)(block + 18)) * scale, at + 16, wide, narrow);
}

static void NAME(expand_q4_0)(const uint8_t *block, long at, float *wide, uint16_t *narrow) {
    const float scale = half_at(block);
    const U8 codes = NAME(bytes)(block + 2);
    NAME(put)(NAME(signed16)((I8)(codes & 15) - 8) * scale, at, wide, narrow);
    NAME(put)(NAME(signed16)((I8)(codes >> 4) - 8) * scale, at + 16, wide, narrow);
}

static void NAME(expand_q4_k)(const uint8_t *block, long at, float *wide, uint16_t *narrow) {
    const float d = half_at(block), dmin = half_at(block + 2);
    uint8_t bits[16];
    unpack_scales(block + 4, bits);
    for (int pair = 0; pair < 4; pair++) {
        const float low = d * bits[2 * pair], high = d * bits[2 * pair + 1];
        const float under_low = dmin * bits[8 + 2 * pair], under_high = dmin * bits[9 + 2 * pair];
        for (int i = 0; i < 32; i += 16) {
            const U8 both = NAME(bytes)(block + 16 + 32 * pair + i);
            NAME(put)(NAME(signed16)((I8)(both & 15)) * low - under_low, at + 64 * pair + i, wide, narrow);
            NAME(put)(NAME(signed16)((I8)(both >> 4)) * high - under_high, at + 64 * pair + 32 + i, wide, narrow);
        }
    }
}

static void NAME(expand_q6_k)(const uint8_t *block, long at, float *wide, uint16_t *narrow) {
    const float d = half_at(block + 208);
    for (int part = 0; part < 16; part++) {
        const int chunk = part / 4, i = part % 4 * 16;
        const U8 low = NAME(bytes)(block + 64 * (chunk / 2) + i), top = NAME(bytes)(block + 128 + 32 * (chunk / 2) + i % 32);
        const U8 nibble = chunk & 1 ? low >> 4 : low & 15, two = top >> (uint8_t)(4 * (chunk & 1) + 2 * (i / 32)) & 3;
        const float scale = d * (int8_t)block[192 + part];
        NAME(put)(NAME(signed16)((I8)(nibble | two << 4) - 32) * scale, at + 16 * part, wide, narrow);
    }
}

/* One row of weights. */
static void NAME(expand)(int kind, const uint8_t *row, long columns, float *wide, uint16_t *narrow) {
    void (*const expand_block[KINDS])(const uint8_t *, long, float *, uint16_t *) = {
        [Q8_0] = NAME(expand_q8_0), [Q4_0] = NAME(expand_q4_0), [Q4_K] = NAME(expand_q4_k), [Q6_K] = NAME(expand_q6_k)};
    const int values = FORMATS[kind].values, bytes = FORMATS[kind].bytes;
    for (long b = 0; b < columns / values; b++) expand_block[kind](row + bytes * b, values * b, wide, narrow);
}

#undef U8
#undef I8
