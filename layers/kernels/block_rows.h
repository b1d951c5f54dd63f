/* Four rows of packed weights times one vector of int8, included by kernels.h once per kind of processor. */

#if VNNI512

static inline __m512 NAME(both)(float a, float b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set1_ps(a)), _mm256_set1_ps(b), 1);
}

static inline __m256 NAME(half8)(const uint8_t *p) {
    short bits;
    memcpy(&bits, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}

static inline __m512 NAME(halves)(const uint8_t *a, const uint8_t *b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(NAME(half8)(a)), NAME(half8)(b), 1);
}

/* Codes of two blocks as bytes from 0 on, one block in each half, in the order of their values. */
static inline __m512i NAME(pair_q4_0)(const uint8_t *first, const uint8_t *second) {
    const __m512i shift = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                           0x0004000400040004, 0, 0);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)first));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)second));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_and_si512(_mm512_srlv_epi16(both, shift), _mm512_set1_epi8(15));
}

static inline __m512i NAME(pair_q8_0)(const uint8_t *first, const uint8_t *second) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)first);
    const __m256i high = _mm256_loadu_si256((const __m256i *)second);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_xor_si512(both, _mm512_set1_epi8((char)0x80));
}

/* Formats of 32 values under one scale, two blocks at once; where the last has no partner its scale is zero. ZERO is
   the code of the value zero. */
#define PAIR_ROWS(KIND, BYTES, ZERO)                                                                        \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        const __m512i zero_code = _mm512_set1_epi8((char)ZERO), zero = _mm512_setzero_si512();              \
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};         \
        const long blocks = columns / 32;                                                                   \
        for (long b = 0; b < blocks; b += 2) {                                                              \
            const int next = b + 1 < blocks ? BYTES : 0;                                                    \
            NAME(fetch_ahead)(row, BYTES * b);                                                              \
            const __m512i a = _mm512_loadu_si512(x->q + 32 * b);                                            \
            const __m512i offset = _mm512_dpbusd_epi32(zero, zero_code, a);                                 \
            const __m512 scale = NAME(both)(x->scales[b], x->scales[b + 1]);                                \
            for (int r = 0; r < 4; r++) {                                                                   \
                const uint8_t *p = row[r] + BYTES * b, *n = p + next;                                       \
                const __m512i w = NAME(pair_##KIND)(p + 2, n + 2);                                          \
                const __m512i dot = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, w, a), offset);              \
                const __m512 factor = _mm512_mul_ps(NAME(halves)(p, n), scale);                             \
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[r]);                        \
            }                                                                                               \
        }                                                                                                   \
        for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);                                 \
    }

PAIR_ROWS(q4_0, 18, 8)
PAIR_ROWS(q8_0, 34, 0x80)

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

static void NAME(rows_q4_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long b = 0; b < columns / 256; b++) {
        __m512 scale[4], minimum[4];
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + 144 * b;
            const __m256i bits = _mm256_cvtepu8_epi16(NAME(scales_q4_k)(p + 4));
            const __m256i factors = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits));
            const __m256i offsets = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1));
            scale[r] = _mm512_castps256_ps512(_mm256_mul_ps(NAME(half8)(p), _mm256_cvtepi32_ps(factors)));
            minimum[r] = _mm512_castps256_ps512(_mm256_mul_ps(NAME(half8)(p + 2), _mm256_cvtepi32_ps(offsets)));
        }
        for (int chunk = 0; chunk < 4; chunk++) {
            const __m512i which = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(2 * chunk)),
                                                     _mm256_set1_epi32(2 * chunk + 1), 1);
            const __m512i a = _mm512_loadu_si512(x->q + 256 * b + 64 * chunk);
            const float *scales = x->scales + 8 * b + 2 * chunk;
            const __m512 xs = NAME(both)(scales[0], scales[1]);
            NAME(fetch_ahead)(row, 144 * b + 36 * chunk);
            const __m512 total = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, ones, a)), xs);
            for (int r = 0; r < 4; r++) {
                const __m256i bytes = _mm256_loadu_si256((const __m256i *)(row[r] + 144 * b + 16 + 32 * chunk));
                const __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, low)),
                    _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), 1);
                const __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, w, a)), xs);
                sums[r] = _mm512_fmadd_ps(dot, _mm512_permutexvar_ps(which, scale[r]), sums[r]);
                sums[r] = _mm512_fnmadd_ps(total, _mm512_permutexvar_ps(which, minimum[r]), sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

static void NAME(rows_q6_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i low = _mm512_set1_epi8(15), two = _mm512_set1_epi8(3), zero = _mm512_setzero_si512();
    const __m512i middle = _mm512_set1_epi8(32);
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi64(0x0002000200020002, 0x0002000200020002, 0x0002000200020002,
                                           0x0002000200020002, 0, 0, 0, 0);
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
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
            const __m512i offset = _mm512_dpbusd_epi32(zero, middle, a);
            const float *scales = x->scales + 8 * b + 2 * chunk;
            const __m512 xs = NAME(both)(scales[0], scales[1]);
            NAME(fetch_ahead)(row, 210 * b + 53 * chunk);
            const __m512i by = chunk & 1 ? _mm512_add_epi16(shift, _mm512_set1_epi16(4)) : shift;
            for (int r = 0; r < 4; r++) {
                const uint8_t *p = row[r] + 210 * b;
                __m512i w = _mm512_loadu_si512(p + 64 * (chunk / 2));
                w = _mm512_and_si512(chunk & 1 ? _mm512_srli_epi16(w, 4) : w, low);
                const __m256i top = _mm256_loadu_si256((const __m256i *)(p + 128 + 32 * (chunk / 2)));
                const __m512i tops = _mm512_srlv_epi16(_mm512_inserti64x4(_mm512_castsi256_si512(top), top, 1), by);
                w = _mm512_or_si512(w, _mm512_slli_epi16(_mm512_and_si512(tops, two), 4));
                const __m512i dot = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, w, a), offset);
                const __m512 factor = _mm512_mul_ps(_mm512_permutexvar_ps(which, scale[r]), xs);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

#else

/* Any processor: block by block through integers, in loops that compilers turn into vectors. */
#define BLOCK_ROWS(KIND, VALUES, BYTES)                                                                     \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        for (int r = 0; r < 4; r++) {                                                                       \
            float total = 0;                                                                                \
            for (long b = 0; b < columns / VALUES; b++) {                                                   \
                int8_t values[VALUES];                                                                      \
                float scales[VALUES / 16], minimums[VALUES / 32] = {0};                                     \
                integers_##KIND(row[r] + BYTES * b, values, scales, minimums);                              \
                for (int part = 0; part < VALUES / 32; part++) {                                            \
                    const int8_t *q = x->q + VALUES * b + 32 * part;                                        \
                    int32_t dots[2] = {0, 0}, all = 0;                                                      \
                    for (int i = 0; i < 16; i++) dots[0] += values[32 * part + i] * q[i];                   \
                    for (int i = 16; i < 32; i++) dots[1] += values[32 * part + i] * q[i];                  \
                    for (int i = 0; i < 32; i++) all += q[i];                                               \
                    total += x->scales[VALUES / 32 * b + part]                                              \
                             * (scales[2 * part] * dots[0] + scales[2 * part + 1] * dots[1] - minimums[part] * all);   \
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

#undef PAIR_ROWS
#undef BLOCK_ROWS
