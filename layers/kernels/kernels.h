/* The kernels proper, included once per kind of processor with NAME, VNNI512 and F16C set for it.

   Vectors are GCC's and clang's own (vector_size), which become AVX-512, AVX2, NEON or plain code as the target allows;
   only the integer products of the block formats, and fp16, are spelled out per processor. */

typedef float NAME(v16) __attribute__((vector_size(64), aligned(4)));
typedef uint16_t NAME(u16) __attribute__((vector_size(32), aligned(2)));
typedef uint32_t NAME(u32) __attribute__((vector_size(64), aligned(4)));
#define V16 NAME(v16)
#define U16 NAME(u16)
#define U32 NAME(u32)

static inline V16 NAME(load_f32)(const void *p) { return *(const V16 *)p; }

static inline V16 NAME(load_bf16)(const void *p) {
    return (V16)(__builtin_convertvector(*(const U16 *)p, U32) << 16);
}

#if F16C
static inline V16 NAME(joined)(__m256 low, __m256 high) {
    V16 v;
    memcpy(&v, &low, 32);
    memcpy((char *)&v + 32, &high, 32);
    return v;
}
#endif

static inline V16 NAME(load_f16)(const void *p) {
#if VNNI512
    return (V16)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif F16C
    return NAME(joined)(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)));
#else
    V16 v;
    for (int i = 0; i < 16; i++) v[i] = half_to_float(((const uint16_t *)p)[i]);
    return v;
#endif
}

static inline U16 NAME(to_bf16)(V16 v) {
    const U32 bits = (U32)v, number = (U32)(v == v);
    return __builtin_convertvector((((bits + 0x7FFF + (bits >> 16 & 1)) & number) | (0x7FC00000 & ~number)) >> 16, U16);
}

static inline void NAME(to_f16)(V16 v, uint16_t *to) {
#if VNNI512
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif F16C
    float values[16];
    memcpy(values, &v, 64);
    for (int i = 0; i < 16; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; i++) to[i] = float_to_half(v[i]);
#endif
}

static inline float NAME(sum)(V16 v) {
#if VNNI512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float halves[16];
    memcpy(halves, &v, 64);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) halves[i] += halves[i + width];
    return halves[0];
#endif
}

#if VNNI512

static inline float NAME(magnitude)(V16 first, V16 second) {
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps((__m512)first), _mm512_abs_ps((__m512)second)));
}

static inline int32_t NAME(rounded)(V16 first, V16 second, float inverse, int8_t *q) {
    const __m512i a = _mm512_cvtps_epi32((__m512)(first * inverse)), b = _mm512_cvtps_epi32((__m512)(second * inverse));
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}

#else

static inline float NAME(magnitude)(V16 first, V16 second) {
    float largest = 0;
    for (int i = 0; i < 16; i++) {
        const float a = fabsf(first[i]), b = fabsf(second[i]);
        largest = largest > a ? largest : a;
        largest = largest > b ? largest : b;
    }
    return largest;
}

/* 32 values times `inverse` as integers, and their sum. */
static inline int32_t NAME(rounded)(V16 first, V16 second, float inverse, int8_t *q) {
    float products[32];
    *(V16 *)products = first * inverse, *(V16 *)(products + 16) = second * inverse;
    __asm__("" : "+m"(products)); /* or compilers fuse product and sum, and halves are rounded as something else */
    int32_t total = 0;
    for (int i = 0; i < 32; i++) {
        /* Adding 1.5 * 2^23 rounds to an integer as the processor rounds: half to even. */
        const float shifted = products[i] + 12582912.0f;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        q[i] = (int8_t)(bits - 0x4B400000u);
        total += q[i];
    }
    return total;
}

#endif

/* Activations to int8, one scale per 32 values: scale = max |x| / 127, q = round(x / scale), half to even; `sums` are
   scale * (sum of q). What follows up to a whole `QUANTIZED` is zero. */
static void NAME(quantize)(const float *x, long columns, int8_t *q, float *scales, float *sums) {
    const long whole = quantized(columns);
    memset(q + columns, 0, whole - columns);
    for (long block = columns / 32; block < whole / 32; block++) scales[block] = sums[block] = 0;
    for (long block = 0; block < columns / 32; block++) {
        const V16 first = NAME(load_f32)(x + 32 * block), second = NAME(load_f32)(x + 32 * block + 16);
        /* Zero, or not a number where a value is none: no rounding may hide that. */
        const float poison = NAME(sum)(first * 0.0f + second * 0.0f);
        const float largest = NAME(magnitude)(first, second), inverse = largest > 0 ? 127.0f / largest : 0.0f;
        scales[block] = largest / 127.0f + poison;
        sums[block] = scales[block] * (float)NAME(rounded)(first, second, inverse, q + 32 * block);
    }
}

/* How far on rows are fetched, some 6 kB: the processor does not foresee it where rows are short. */
static inline long NAME(distance)(const uint8_t *const row[4]) {
    const long four = 4 * (row[1] - row[0]);
    return four ? (6000 + four - 1) / four * four : 0;
}

/* Four rows lie one behind the other, and so do those that are fetched: in that order, not a piece of each in turn, they
   come in a tenth faster. */
static inline void NAME(fetch)(const uint8_t *from, long begin, long end) {
    for (long at = begin; at < end; at += 64) __builtin_prefetch(from + at, 0, 0);
}

/* Four rows of float weights times one vector, one row after the other: a thread that reads one stream of memory gets a
   fourth more of it than one that reads four. */
#define FLOATS_AHEAD 4096
#define FLOAT_ROWS(KIND, BYTES, SCALAR)                                                                     \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        for (int r = 0; r < 4; r++) {                                                                       \
            V16 sums[2] = {{0}};                                                                            \
            long i = 0;                                                                                     \
            for (; i + 32 <= columns; i += 32) {                                                            \
                NAME(fetch)(row[r] + FLOATS_AHEAD, BYTES * i, BYTES * (i + 32));                            \
                for (int half = 0; half < 2; half++) {                                                      \
                    const V16 value = NAME(load_f32)(x->values + i + 16 * half);                            \
                    sums[half] += NAME(load_##KIND)(row[r] + BYTES * (i + 16 * half)) * value;              \
                }                                                                                           \
            }                                                                                               \
            float rest = 0;                                                                                 \
            for (long k = i; k < columns; k++) rest += SCALAR(row[r] + BYTES * k) * x->values[k];           \
            out[r] = NAME(sum)(sums[0] + sums[1]) + rest;                                                   \
        }                                                                                                   \
    }

FLOAT_ROWS(f32, 4, scalar_f32)
FLOAT_ROWS(bf16, 2, scalar_bf16)
FLOAT_ROWS(f16, 2, scalar_f16)

#include "integers.h"
#include "block_rows.h"

#if VNNI512
#include "panels.h"
#elif F16C
#define VNNI256 0
#include "panels_avx2.h"
#endif
#include "expand.h"
#include "elementwise.h"
#include "attend.h"
#if VNNI512
#include "attend_many.h"
#endif

static const struct processor NAME(processor) = {
    LABEL,
    NAME(quantize),
    NAME(widen),
    NAME(narrow),
    NAME(normalise),
    NAME(gated),
    NAME(clamped),
    NAME(expand),
    {[F32] = NAME(rows_f32), [BF16] = NAME(rows_bf16), [F16] = NAME(rows_f16), [Q8_0] = NAME(rows_q8_0),
     [Q4_0] = NAME(rows_q4_0), [Q4_1] = NAME(rows_q4_1), [Q5_0] = NAME(rows_q5_0), [Q5_1] = NAME(rows_q5_1),
     [IQ4_NL] = NAME(rows_iq4_nl), [Q3_K] = NAME(rows_q3_k), [Q4_K] = NAME(rows_q4_k), [Q5_K] = NAME(rows_q5_k),
     [Q6_K] = NAME(rows_q6_k), [IQ4_XS] = NAME(rows_iq4_xs)},
#if VNNI512
    {[Q8_0] = NAME(tile_q8_0), [Q4_0] = NAME(tile_q4_0), [Q5_0] = NAME(tile_q5_0), [IQ4_NL] = NAME(tile_iq4_nl)},
    32, 6,
    NAME(panel),
    NAME(by_panel),
#elif F16C
    {0},
    16, 4,
    NAME(panel),
    NAME(by_panel),
#else
    {0},
    0, 0,
    0,
    0,
#endif
    {NAME(attend_f32), NAME(attend_bf16), NAME(attend_f16)},
#if VNNI512
    NAME(attend_many),
#else
    0,
#endif
};

#undef V16
#undef U16
#undef U32
#undef FLOAT_ROWS
#undef LABEL
#undef NAME
#undef VNNI512
#undef F16C
#undef NEON_DOT
