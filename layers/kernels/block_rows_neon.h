/* Four rows of packed weights times one vector of int8 with ARM's signed dot product, included by block_rows.h. A load
   of weights lies within one block, so that nothing is read beyond a row's end. */

static inline float NAME(half)(const uint8_t *p) {
    __fp16 value;
    memcpy(&value, p, 2);
    return value;
}

static inline int8x16_t NAME(lower)(uint8x16_t bytes) { return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))); }

static inline int8x16_t NAME(upper)(uint8x16_t bytes) { return vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)); }

/* Sums of four products each of 32 codes. */
static inline int32x4_t NAME(dot32)(int8x16_t first, int8x16_t last, const int8_t *q) {
    return NAME(dot)(NAME(dot)(vdupq_n_s32(0), first, vld1q_s8(q)), last, vld1q_s8(q + 16));
}

static inline int32x4_t NAME(dot_q4_0)(const uint8_t *p, const int8_t *q) {
    const uint8x16_t bytes = vld1q_u8(p + 2);
    const int8x16_t zero = vdupq_n_s8(8);
    return NAME(dot32)(vsubq_s8(NAME(lower)(bytes), zero), vsubq_s8(NAME(upper)(bytes), zero), q);
}

static inline int32x4_t NAME(dot_q8_0)(const uint8_t *p, const int8_t *q) {
    return NAME(dot32)(vld1q_s8((const int8_t *)p + 2), vld1q_s8((const int8_t *)p + 18), q);
}

#define SMALL_BLOCK(KIND)                                                                                   \
    static inline float32x4_t NAME(add_##KIND)(float32x4_t sum, const uint8_t *p, const struct vector *x, long b) { \
        const float scale = NAME(half)(p) * x->scales[b];                                                   \
        return vfmaq_n_f32(sum, vcvtq_f32_s32(NAME(dot_##KIND)(p, x->q + 32 * b)), scale);                  \
    }

SMALL_BLOCK(q4_0)
SMALL_BLOCK(q8_0)

static inline float32x4_t NAME(four_floats)(uint32_t four) {
    const uint16x8_t words = vmovl_u8(vcreate_u8(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
}

/* Minimums come off through the scaled sums of the activations. */
static inline float32x4_t NAME(add_q4_k)(float32x4_t sum, const uint8_t *p, const struct vector *x, long block) {
    uint32_t bits[4];
    unpack_scales(p + 4, (uint8_t *)bits);
    float factors[8];
    const float d = NAME(half)(p), dmin = NAME(half)(p + 2);
    const float *scales = x->scales + 8 * block, *sums = x->sums + 8 * block;
    for (int i = 0; i < 2; i++) {
        vst1q_f32(factors + 4 * i, vmulq_f32(vmulq_n_f32(NAME(four_floats)(bits[i]), d), vld1q_f32(scales + 4 * i)));
        sum = vfmsq_f32(sum, vmulq_n_f32(NAME(four_floats)(bits[2 + i]), dmin), vld1q_f32(sums + 4 * i));
    }
    for (int pair = 0; pair < 4; pair++) {
        const uint8x16_t a = vld1q_u8(p + 16 + 32 * pair), b = vld1q_u8(p + 32 + 32 * pair);
        const int8_t *q = x->q + 256 * block + 64 * pair;
        const int32x4_t even = NAME(dot32)(NAME(lower)(a), NAME(lower)(b), q);
        const int32x4_t odd = NAME(dot32)(NAME(upper)(a), NAME(upper)(b), q + 32);
        sum = vfmaq_n_f32(sum, vcvtq_f32_s32(even), factors[2 * pair]);
        sum = vfmaq_n_f32(sum, vcvtq_f32_s32(odd), factors[2 * pair + 1]);
    }
    return sum;
}

/* Sixteen products in fours, times the scale of these sixteen; `top` has the high bits of the codes at their place. */
static inline int32x4_t NAME(dot_q6_k)(int32x4_t sum, int8x16_t low, uint8x16_t top, const int8_t *q, uint8_t scale) {
    const int8x16_t high = vreinterpretq_s8_u8(vandq_u8(top, vdupq_n_u8(48)));
    const int8x16_t codes = vsubq_s8(vorrq_s8(low, high), vdupq_n_s8(32));
    return vmlaq_n_s32(sum, NAME(dot)(vdupq_n_s32(0), codes, vld1q_s8(q)), (int8_t)scale);
}

static inline float32x4_t NAME(add_q6_k)(float32x4_t sum, const uint8_t *p, const struct vector *x, long block) {
    const float *scales = x->scales + 8 * block;
    float32x4_t whole = vdupq_n_f32(0);
    for (int half = 0; half < 2; half++) {
        int32x4_t parts[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        for (int side = 0; side < 2; side++) {
            const uint8x16_t a = vld1q_u8(p + 64 * half + 16 * side), b = vld1q_u8(p + 64 * half + 32 + 16 * side);
            const uint8x16_t tops = vld1q_u8(p + 128 + 32 * half + 16 * side);
            const int8_t *q = x->q + 256 * block + 128 * half + 16 * side;
            const uint8_t *scale = p + 192 + 8 * half + side;
            parts[0] = NAME(dot_q6_k)(parts[0], NAME(lower)(a), vshlq_n_u8(tops, 4), q, scale[0]);
            parts[1] = NAME(dot_q6_k)(parts[1], NAME(lower)(b), vshlq_n_u8(tops, 2), q + 32, scale[2]);
            parts[2] = NAME(dot_q6_k)(parts[2], NAME(upper)(a), tops, q + 64, scale[4]);
            parts[3] = NAME(dot_q6_k)(parts[3], NAME(upper)(b), vshrq_n_u8(tops, 2), q + 96, scale[6]);
        }
        for (int i = 0; i < 4; i++) whole = vfmaq_n_f32(whole, vcvtq_f32_s32(parts[i]), scales[4 * half + i]);
    }
    return vfmaq_n_f32(sum, whole, NAME(half)(p + 208));
}

#define NEON_ROWS(KIND, VALUES, BYTES)                                                                      \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        float32x4_t a = vdupq_n_f32(0), b = a, c = a, d = a;                                                \
        const long ahead = NAME(distance)(row);                                                             \
        for (long block = 0; block < columns / VALUES; block++) {                                           \
            const long at = BYTES * block;                                                                  \
            NAME(fetch)(row[0] + ahead, 4 * at, 4 * (at + BYTES));                                          \
            a = NAME(add_##KIND)(a, row[0] + at, x, block), b = NAME(add_##KIND)(b, row[1] + at, x, block); \
            c = NAME(add_##KIND)(c, row[2] + at, x, block), d = NAME(add_##KIND)(d, row[3] + at, x, block); \
        }                                                                                                   \
        out[0] = vaddvq_f32(a), out[1] = vaddvq_f32(b), out[2] = vaddvq_f32(c), out[3] = vaddvq_f32(d);     \
    }

NEON_ROWS(q4_0, 32, 18)
NEON_ROWS(q8_0, 32, 34)
NEON_ROWS(q4_k, 256, 144)
NEON_ROWS(q6_k, 256, 210)

#undef SMALL_BLOCK
#undef NEON_ROWS
