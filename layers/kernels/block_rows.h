/* Four rows of packed weights times one vector of int8, included by kernels.h once per kind of processor. */

#if F16C

static inline __m256 NAME(half8)(const uint8_t *p) {
    short bits;
    memcpy(&bits, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}

/* `unpack_scales` in registers. */
static inline __m128i NAME(scales_q4_k)(const uint8_t *packed) {
    uint32_t first, second, third;
    memcpy(&first, packed, 4);
    memcpy(&second, packed + 4, 4);
    memcpy(&third, packed + 8, 4);
    const uint32_t six = 0x3F3F3F3F, four = 0x0F0F0F0F, two = 0x03030303;
    return _mm_set_epi32((int)((third >> 4 & four) | (second >> 6 & two) << 4), (int)(second & six),
                         (int)((third & four) | (first >> 6 & two) << 4), (int)(first & six));
}

#endif

#if VNNI512

static inline __m512 NAME(both)(float a, float b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set1_ps(a)), _mm256_set1_ps(b), 1);
}

static inline __m512 NAME(halves)(const uint8_t *a, const uint8_t *b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(NAME(half8)(a)), NAME(half8)(b), 1);
}

/* Sixteen bytes of each of four blocks that lie `step` bytes apart. */
static inline __m512i NAME(quarters)(const uint8_t *p, long step) {
    __m512i all = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(p + step)), 1);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(p + 2 * step)), 2);
    return _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(p + 3 * step)), 3);
}

/* Codes of four blocks as bytes from 0 on: the first sixteen of each, and the last. */
static inline void NAME(codes_q4_0)(const uint8_t *p, __m512i *first, __m512i *last) {
    const __m512i low = _mm512_set1_epi8(15), bytes = NAME(quarters)(p + 2, 18);
    *first = _mm512_and_si512(bytes, low);
    *last = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
}

static inline void NAME(codes_q8_0)(const uint8_t *p, __m512i *first, __m512i *last) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    *first = _mm512_xor_si512(NAME(quarters)(p + 2, 34), sign);
    *last = _mm512_xor_si512(NAME(quarters)(p + 18, 34), sign);
}

/* Scales of four blocks, each for the four sums of its block. */
static inline __m512 NAME(scales_q4_0)(const uint8_t *p) {
    const __m512i which = _mm512_set_epi64(0, 0, 0, 0, 0x001B001B001B001B, 0x0012001200120012, 0x0009000900090009, 0);
    const __m512i words = _mm512_permutexvar_epi16(which, _mm512_loadu_si512(p));
    return _mm512_cvtph_ps(_mm512_castsi512_si256(words));
}

static inline __m512 NAME(scales_q8_0)(const uint8_t *p) {
    const __m512i which = _mm512_set_epi64(0, 0, 0, 0, 0x0031003100310031, 0x0020002000200020, 0x0011001100110011, 0);
    const __m512i words = _mm512_permutex2var_epi16(_mm512_loadu_si512(p), which, _mm512_loadu_si512(p + 68));
    return _mm512_cvtph_ps(_mm512_castsi512_si256(words));
}

/* The part of a row of activations that goes with four blocks. ZERO is the code of the value zero. */
struct NAME(quad) {
    __m512i first, last, offset;
    __m512 scale;
};

static inline struct NAME(quad) NAME(quad_at)(const struct vector *x, long block, __m512i zero_code) {
    const __m512i evens = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0), zero = _mm512_setzero_si512();
    const __m512i odds = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i a = _mm512_loadu_si512(x->q + 32 * block), b = _mm512_loadu_si512(x->q + 32 * block + 64);
    struct NAME(quad) quad = {_mm512_permutex2var_epi64(a, evens, b), _mm512_permutex2var_epi64(a, odds, b), zero,
        _mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(_mm_loadu_ps(x->scales + block)))};
    quad.offset = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, zero_code, quad.first), zero_code, quad.last);
    quad.offset = _mm512_sub_epi32(zero, quad.offset);
    return quad;
}

/* Formats of 32 values under one scale, four blocks at once: each gives four sums. Where the last blocks are fewer,
   blocks of zeros stand in for those missing. Variables have names of their own, not numbers, so that no compiler puts
   them into memory. */
#define QUAD_ROWS(KIND, BYTES, ZERO)                                                                        \
    static inline __m512 NAME(add_##KIND)(__m512 sum, const uint8_t *p, const struct NAME(quad) *x) {       \
        __m512i first, last;                                                                                \
        NAME(codes_##KIND)(p, &first, &last);                                                               \
        return NAME(add_codes)(sum, first, last, NAME(scales_##KIND)(p), x);                                \
    }                                                                                                       \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        const __m512i zero_code = _mm512_set1_epi8((char)ZERO);                                             \
        const uint8_t *p = row[0], *q = row[1], *r = row[2], *s = row[3];                                   \
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;                                                \
        const long blocks = columns / 32, ahead = NAME(distance)(row);                                      \
        long block = 0;                                                                                     \
        for (; block + 4 <= blocks; block += 4, p += 4 * BYTES, q += 4 * BYTES, r += 4 * BYTES, s += 4 * BYTES) {      \
            NAME(fetch)(row[0] + ahead, 4 * BYTES * block, 4 * BYTES * (block + 4));                        \
            const struct NAME(quad) quad = NAME(quad_at)(x, block, zero_code);                              \
            a = NAME(add_##KIND)(a, p, &quad), b = NAME(add_##KIND)(b, q, &quad);                           \
            c = NAME(add_##KIND)(c, r, &quad), d = NAME(add_##KIND)(d, s, &quad);                           \
        }                                                                                                   \
        if (block < blocks) {                                                                               \
            uint8_t rest[4][4 * BYTES] = {{0}};                                                             \
            for (int i = 0; i < 4; i++) memcpy(rest[i], row[i] + BYTES * block, BYTES * (blocks - block));  \
            const struct NAME(quad) quad = NAME(quad_at)(x, block, zero_code);                              \
            a = NAME(add_##KIND)(a, rest[0], &quad), b = NAME(add_##KIND)(b, rest[1], &quad);               \
            c = NAME(add_##KIND)(c, rest[2], &quad), d = NAME(add_##KIND)(d, rest[3], &quad);               \
        }                                                                                                   \
        out[0] = _mm512_reduce_add_ps(a), out[1] = _mm512_reduce_add_ps(b);                                 \
        out[2] = _mm512_reduce_add_ps(c), out[3] = _mm512_reduce_add_ps(d);                                 \
    }

/* The same for four vectors at once: the codes are made once for all. */
#define ONE(KIND, r, t) s##r##t = NAME(add_codes)(s##r##t, first, last, scale, quads + t);
#define ONE_ROW(KIND, BYTES, r)                                                                             \
    {                                                                                                       \
        __m512i first, last;                                                                                \
        NAME(codes_##KIND)(at[r], &first, &last);                                                           \
        const __m512 scale = NAME(scales_##KIND)(at[r]);                                                    \
        ONE(KIND, r, 0) ONE(KIND, r, 1) ONE(KIND, r, 2) ONE(KIND, r, 3)                                     \
    }
#define QUAD_TILE(KIND, BYTES, ZERO)                                                                        \
    static void NAME(tile_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        const __m512i zero_code = _mm512_set1_epi8((char)ZERO);                                             \
        __m512 s00 = _mm512_setzero_ps(), s01 = s00, s02 = s00, s03 = s00, s10 = s00, s11 = s00, s12 = s00, s13 = s00; \
        __m512 s20 = s00, s21 = s00, s22 = s00, s23 = s00, s30 = s00, s31 = s00, s32 = s00, s33 = s00;      \
        const long blocks = columns / 32, ahead = NAME(distance)(row);                                      \
        for (long block = 0; block < blocks; block += 4) {                                                  \
            const uint8_t *at[4];                                                                           \
            uint8_t rest[4][4 * BYTES];                                                                     \
            for (int r = 0; r < 4; r++) at[r] = row[r] + BYTES * block;                                     \
            if (block + 4 > blocks) {                                                                       \
                memset(rest, 0, sizeof rest);                                                               \
                for (int r = 0; r < 4; r++) at[r] = memcpy(rest[r], at[r], BYTES * (blocks - block));       \
            }                                                                                               \
            NAME(fetch)(row[0] + ahead, 4 * BYTES * block, 4 * BYTES * (block + 4));                        \
            struct NAME(quad) quads[4];                                                                     \
            for (int t = 0; t < 4; t++) quads[t] = NAME(quad_at)(x + t, block, zero_code);                  \
            ONE_ROW(KIND, BYTES, 0) ONE_ROW(KIND, BYTES, 1) ONE_ROW(KIND, BYTES, 2) ONE_ROW(KIND, BYTES, 3) \
        }                                                                                                   \
        const __m512 sums[16] = {s00, s10, s20, s30, s01, s11, s21, s31, s02, s12, s22, s32, s03, s13, s23, s33};      \
        for (int i = 0; i < 16; i++) out[i] = _mm512_reduce_add_ps(sums[i]);                                \
    }

static inline __m512 NAME(add_codes)(__m512 sum, __m512i first, __m512i last, __m512 scale, const struct NAME(quad) *x) {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x->offset, first, x->first), last, x->last);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, x->scale), sum);
}

QUAD_ROWS(q4_0, 18, 8)
QUAD_ROWS(q8_0, 34, 0x80)
QUAD_TILE(q4_0, 18, 8)
QUAD_TILE(q8_0, 34, 0x80)

static void NAME(rows_q4_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    __m256 minimums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    const long ahead = NAME(distance)(row);
    for (long b = 0; b < columns / 256; b++) {
        const __m256 scales = _mm256_loadu_ps(x->scales + 8 * b), totals = _mm256_loadu_ps(x->sums + 8 * b);
        __m512 scale[4];
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + 144 * b;
            const __m256i bits = _mm256_cvtepu8_epi16(NAME(scales_q4_k)(p + 4));
            const __m256 factors = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits)));
            const __m256 offsets = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1)));
            scale[r] = _mm512_castps256_ps512(_mm256_mul_ps(_mm256_mul_ps(NAME(half8)(p), factors), scales));
            minimums[r] = _mm256_fmadd_ps(_mm256_mul_ps(NAME(half8)(p + 2), offsets), totals, minimums[r]);
        }
        /* 64 bytes hold the parts 0, 2 in their low and 1, 3 in their high halves. */
        for (int half = 0; half < 2; half++) {
            const __m512i a = _mm512_loadu_si512(x->q + 256 * b + 128 * half);
            const __m512i c = _mm512_loadu_si512(x->q + 256 * b + 128 * half + 64);
            const __m512i even = _mm512_inserti64x4(a, _mm512_castsi512_si256(c), 1);
            const __m512i odd = _mm512_inserti64x4(c, _mm512_extracti64x4_epi64(a, 1), 0);
            const __m512i first = _mm512_inserti64x4(_mm512_set1_epi32(4 * half), _mm256_set1_epi32(4 * half + 2), 1);
            const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
            NAME(fetch)(row[0] + ahead, 4 * (144 * b + 72 * half), 4 * (144 * b + 72 * half + 72));
            for (int r = 0; r < 4; r++) {
                const __m512i bytes = _mm512_loadu_si512(row[r] + 144 * b + 16 + 64 * half);
                const __m512i evens = _mm512_dpbusd_epi32(zero, _mm512_and_si512(bytes, low), even);
                const __m512i odds = _mm512_dpbusd_epi32(zero, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), odd);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(evens), _mm512_permutexvar_ps(first, scale[r]), sums[r]);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(odds), _mm512_permutexvar_ps(second, scale[r]), sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++)
        out[r] = _mm512_reduce_add_ps(sums[r]) - _mm512_reduce_add_ps(_mm512_zextps256_ps512(minimums[r]));
}

static void NAME(rows_q6_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i low = _mm512_set1_epi8(15), two = _mm512_set1_epi8(3), zero = _mm512_setzero_si512();
    const __m512i middle = _mm512_set1_epi8(32);
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi64(0x0002000200020002, 0x0002000200020002, 0x0002000200020002,
                                           0x0002000200020002, 0, 0, 0, 0);
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const long ahead = NAME(distance)(row);
    for (long b = 0; b < columns / 256; b++) {
        __m512 scale[4];
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + 210 * b;
            const __m512 factors = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 192))));
            scale[r] = _mm512_mul_ps(NAME(halves)(p + 208, p + 208), factors);
        }
        for (int chunk = 0; chunk < 4; chunk++) {
            const __m512i which = _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * chunk));
            const __m512i a = _mm512_loadu_si512(x->q + 256 * b + 64 * chunk);
            const __m512i offset = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, middle, a));
            const float *scales = x->scales + 8 * b + 2 * chunk;
            const __m512 xs = NAME(both)(scales[0], scales[1]);
            NAME(fetch)(row[0] + ahead, 4 * (210 * b + 53 * chunk), 4 * (210 * b + 53 * chunk + 53));
            const __m512i by = chunk & 1 ? _mm512_add_epi16(shift, _mm512_set1_epi16(4)) : shift;
            for (int r = 0; r < 4; r++) {
                const uint8_t *p = row[r] + 210 * b;
                __m512i w = _mm512_loadu_si512(p + 64 * (chunk / 2));
                w = _mm512_and_si512(chunk & 1 ? _mm512_srli_epi16(w, 4) : w, low);
                const __m256i top = _mm256_loadu_si256((const __m256i *)(p + 128 + 32 * (chunk / 2)));
                const __m512i tops = _mm512_srlv_epi16(_mm512_inserti64x4(_mm512_castsi256_si512(top), top, 1), by);
                w = _mm512_or_si512(w, _mm512_slli_epi16(_mm512_and_si512(tops, two), 4));
                const __m512i dot = _mm512_dpbusd_epi32(offset, w, a);
                const __m512 factor = _mm512_mul_ps(_mm512_permutexvar_ps(which, scale[r]), xs);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

#elif F16C
#include "block_rows_avx2.h"
#elif NEON_DOT
#include "block_rows_neon.h"
#else

/* Any processor: block by block through integers, in loops that compilers turn into vectors. */
#define BLOCK_ROWS(KIND, VALUES, BYTES)                                                                     \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        for (int r = 0; r < 4; r++) {                                                                       \
            float total = 0;                                                                                \
            for (long b = 0; b < columns / VALUES; b++) {                                                   \
                int8_t values[VALUES];                                                                      \
                float scales[VALUES / 16], minimums[VALUES / 32] = {0};                                     \
                NAME(integers_##KIND)(row[r] + BYTES * b, values, scales, minimums);                              \
                for (int part = 0; part < VALUES / 32; part++) {                                            \
                    const int8_t *q = x->q + VALUES * b + 32 * part;                                        \
                    int32_t dots[2] = {0, 0};                                                      \
                    for (int i = 0; i < 16; i++) dots[0] += values[32 * part + i] * q[i];                   \
                    for (int i = 16; i < 32; i++) dots[1] += values[32 * part + i] * q[i];                  \
                    total += x->scales[VALUES / 32 * b + part]                                              \
                             * (scales[2 * part] * dots[0] + scales[2 * part + 1] * dots[1])                \
                             - minimums[part] * x->sums[VALUES / 32 * b + part];                            \
                }                                                                                           \
            }                                                                                               \
            out[r] = total;                                                                                 \
        }                                                                                                   \
    }

BLOCK_ROWS(q4_0, 32, 18)
BLOCK_ROWS(q8_0, 32, 34)
BLOCK_ROWS(q4_k, 256, 144)
BLOCK_ROWS(q6_k, 256, 210)

#endif

#undef QUAD_ROWS
#undef QUAD_TILE
#undef ONE_ROW
#undef ONE
#undef BLOCK_ROWS
