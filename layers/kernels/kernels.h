/* The kernels proper, included once per kind of processor with NAME, VNNI512 and F16C set for it.

   Vectors are GCC's and clang's own (vector_size), as wide as the processor's registers, for gcc keeps wider ones in
   memory; only the integer products of the block formats, and fp16, are spelled out per processor. */

#if VNNI512
#define LANES 16
#elif F16C
#define LANES 8
#else
#define LANES 4
#endif

typedef float NAME(floats) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t NAME(shorts) __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES), aligned(4)));
#define FLOATS NAME(floats)
#define SHORTS NAME(shorts)
#define WORDS NAME(words)

static inline FLOATS NAME(load_f32)(const void *p) { return *(const FLOATS *)p; }

static inline FLOATS NAME(load_bf16)(const void *p) {
    return (FLOATS)(__builtin_convertvector(*(const SHORTS *)p, WORDS) << 16);
}

static inline FLOATS NAME(load_f16)(const void *p) {
#if VNNI512
    return (FLOATS)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif F16C
    return (FLOATS)_mm256_cvtph_ps(_mm_loadu_si128(p));
#elif defined(__aarch64__)
    return (FLOATS)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    FLOATS v;
    for (int i = 0; i < LANES; i++) v[i] = half_to_float(((const uint16_t *)p)[i]);
    return v;
#endif
}

/* int8; compilers make scalar code of __builtin_convertvector here. */
static inline FLOATS NAME(load_i8)(const void *p) {
#if VNNI512
    return (FLOATS)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
#elif F16C
    return (FLOATS)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
#elif defined(__aarch64__)
    int32_t four;
    memcpy(&four, p, 4);
    return (FLOATS)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
    FLOATS v;
    for (int i = 0; i < LANES; i++) v[i] = ((const int8_t *)p)[i];
    return v;
#endif
}

static inline SHORTS NAME(to_bf16)(FLOATS v) {
    const WORDS bits = (WORDS)v, number = (WORDS)(v == v);
    return __builtin_convertvector((((bits + 0x7FFF + (bits >> 16 & 1)) & number) | (0x7FC00000 & ~number)) >> 16, SHORTS);
}

static inline void NAME(to_f16)(FLOATS v, uint16_t *to) {
#if VNNI512
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif F16C
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    for (int i = 0; i < LANES; i++) to[i] = float_to_half(v[i]);
#endif
}

static inline float NAME(sum)(FLOATS v) {
#if VNNI512
    return _mm512_reduce_add_ps((__m512)v);
#elif F16C
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#elif defined(__aarch64__)
    return vaddvq_f32((float32x4_t)v);
#else
    return v[0] + v[1] + (v[2] + v[3]);
#endif
}

/* Sum of the vectors of 32 products. */
#define IN_32 (32 / LANES)
static inline float NAME(sum_32)(const FLOATS *sums) {
    FLOATS all = sums[0] + sums[1];
    for (int i = 2; i < IN_32; i++) all += sums[i];
    return NAME(sum)(all);
}

/* The largest magnitude of 32 values. */
static inline float NAME(magnitude)(const float *x) {
#if VNNI512
    const FLOATS first = NAME(load_f32)(x), second = NAME(load_f32)(x + 16);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps((__m512)first), _mm512_abs_ps((__m512)second)));
#else
    FLOATS largest = {0};
    for (int i = 0; i < 32; i += LANES) {
        const FLOATS a = (FLOATS)((WORDS)NAME(load_f32)(x + i) & 0x7FFFFFFF);
        const WORDS more = (WORDS)(a > largest);
        largest = (FLOATS)(((WORDS)a & more) | ((WORDS)largest & ~more));
    }
    float found = 0;
    for (int i = 0; i < LANES; i++) found = largest[i] > found ? largest[i] : found;
    return found;
#endif
}

/* 32 values times `inverse` as integers, half to even, and their sum. */
static inline int32_t NAME(rounded)(const float *x, float inverse, int8_t *q) {
#if VNNI512
    const __m512i a = _mm512_cvtps_epi32((__m512)(NAME(load_f32)(x) * inverse));
    const __m512i b = _mm512_cvtps_epi32((__m512)(NAME(load_f32)(x + 16) * inverse));
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
#elif F16C
    __m256i four[4];
    for (int i = 0; i < 4; i++) four[i] = _mm256_cvtps_epi32((__m256)(NAME(load_f32)(x + 8 * i) * inverse));
    const __m256i low = _mm256_packs_epi32(four[0], four[1]), high = _mm256_packs_epi32(four[2], four[3]);
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    _mm256_storeu_si256((__m256i *)q, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
    const __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 1);
#else
    float products[32];
    for (int i = 0; i < 32; i++) products[i] = x[i] * inverse;
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
#endif
}

/* Activations to int8, one scale per 32 values: scale = max |x| / 127, q = round(x / scale), half to even; `sums` are
   scale * (sum of q). What follows up to a whole `QUANTIZED` is zero. */
static void NAME(quantize)(const float *x, long columns, int8_t *q, float *scales, float *sums) {
    const long whole = quantized(columns);
    memset(q + columns, 0, whole - columns);
    for (long block = columns / 32; block < whole / 32; block++) scales[block] = sums[block] = 0;
    for (long block = 0; block < columns / 32; block++) {
        const float *here = x + 32 * block;
        FLOATS zero = {0};
        for (int i = 0; i < 32; i += LANES) zero += NAME(load_f32)(here + i) * 0.0f;
        /* Zero, or not a number where a value is none: no rounding may hide that. */
        const float poison = NAME(sum)(zero);
        const float largest = NAME(magnitude)(here), inverse = largest > 0 ? 127.0f / largest : 0.0f;
        scales[block] = largest / 127.0f + poison;
        sums[block] = scales[block] * (float)NAME(rounded)(here, inverse, q + 32 * block);
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
            FLOATS sums[IN_32] = {{0}};                                                                     \
            long i = 0;                                                                                     \
            for (; i + 32 <= columns; i += 32) {                                                            \
                NAME(fetch)(row[r] + FLOATS_AHEAD, BYTES * i, BYTES * (i + 32));                            \
                _Pragma("GCC unroll 8") for (int k = 0; k < IN_32; k++) {                                   \
                    const FLOATS value = NAME(load_f32)(x->values + i + LANES * k);                         \
                    sums[k] += NAME(load_##KIND)(row[r] + BYTES * (i + LANES * k)) * value;                 \
                }                                                                                           \
            }                                                                                               \
            float rest = 0;                                                                                 \
            for (long k = i; k < columns; k++) rest += SCALAR(row[r] + BYTES * k) * x->values[k];           \
            out[r] = NAME(sum_32)(sums) + rest;                                                           \
        }                                                                                                   \
    }

FLOAT_ROWS(f32, 4, scalar_f32)
FLOAT_ROWS(bf16, 2, scalar_bf16)
FLOAT_ROWS(f16, 2, scalar_f16)

#if NEON_DOT
/* clang declares the intrinsic only where all code is compiled for processors that have it. */
static inline int32x4_t NAME(dot)(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
    return sum;
#else
    return vdotq_s32(sum, a, b);
#endif
}
#endif

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
#if F16C
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
    PANEL_ROWS, VECTORS,
    NAME(panel),
    NAME(by_panel),
#elif F16C
    {0},
    PANEL_ROWS_AVX2, VECTORS_AVX2,
    NAME(panel),
    NAME(by_panel),
#else
    {0},
    0, 0,
    0,
    0,
#endif
    {[F32] = NAME(attend_f32), [BF16] = NAME(attend_bf16), [F16] = NAME(attend_f16), [Q8_0] = NAME(attend_i8)},
    NAME(round_head),
#if F16C
    NAME(attend_many),
#else
    0,
#endif
};

#undef FLOATS
#undef SHORTS
#undef WORDS
#undef LANES
#undef IN_32
#undef FLOAT_ROWS
#undef LABEL
#undef NAME
#undef VNNI512
#undef F16C
#undef NEON_DOT
