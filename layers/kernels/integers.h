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

static void NAME(integers_q4_k)(const uint8_t *block, int8_t *values, float *scales, float *minimums) {
    const float d = NAME(half_value)(block), dmin = NAME(half_value)(block + 2);
    uint8_t bits[16];
    unpack_scales(block + 4, bits);
    for (int part = 0; part < 8; part++) {
        scales[2 * part] = scales[2 * part + 1] = d * bits[part];
        minimums[part] = dmin * bits[8 + part];
    }
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
    [Q8_0] = NAME(integers_q8_0), [Q4_0] = NAME(integers_q4_0), [Q4_K] = NAME(integers_q4_k), [Q6_K] = NAME(integers_q6_k)};

#undef U8
#undef I8
