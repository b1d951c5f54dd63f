/* Four rows of packed weights times one vector of int8, or four, with AVX-512 VNNI; included by block_rows.h. */

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

/* Four bits of each of four blocks. */
static inline void NAME(nibbles)(const uint8_t *p, long step, __m512i *first, __m512i *last) {
    const __m512i low = _mm512_set1_epi8(15), bytes = NAME(quarters)(p, step);
    *first = _mm512_and_si512(bytes, low);
    *last = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
}

/* Codes of four blocks as bytes from 0 on: the first sixteen of each, and the last. */
static inline void NAME(codes_q4_0)(const uint8_t *p, __m512i *first, __m512i *last) { NAME(nibbles)(p + 2, 18, first, last); }

static inline void NAME(codes_q8_0)(const uint8_t *p, __m512i *first, __m512i *last) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    *first = _mm512_xor_si512(NAME(quarters)(p + 2, 34), sign);
    *last = _mm512_xor_si512(NAME(quarters)(p + 18, 34), sign);
}

/* 64 bits that go with the codes: of each block the first sixteen, and the last. */
static inline void NAME(add_fifth)(const uint8_t *p, long step, __m512i *first, __m512i *last) {
    const __m512i sixteen = _mm512_set1_epi8(16);
    uint32_t bits[4];
    for (int i = 0; i < 4; i++) memcpy(bits + i, p + i * step, 4);
    const __m128i order = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m128i sides = _mm_shuffle_epi8(_mm_set_epi32((int)bits[3], (int)bits[2], (int)bits[1], (int)bits[0]), order);
    *first = _mm512_mask_add_epi8(*first, (__mmask64)_mm_cvtsi128_si64(sides), *first, sixteen);
    *last = _mm512_mask_add_epi8(*last, (__mmask64)_mm_extract_epi64(sides, 1), *last, sixteen);
}

static inline void NAME(codes_q5_0)(const uint8_t *p, __m512i *first, __m512i *last) {
    NAME(nibbles)(p + 6, 22, first, last);
    NAME(add_fifth)(p + 2, 22, first, last);
}

/* The codebook's values plus 128. */
static inline __m512i NAME(book)(void) {
    const __m128i book = _mm_loadu_si128((const __m128i *)CODEBOOK);
    return _mm512_xor_si512(_mm512_broadcast_i32x4(book), _mm512_set1_epi8((char)0x80));
}

static inline void NAME(codes_iq4_nl)(const uint8_t *p, __m512i *first, __m512i *last) {
    const __m512i book = NAME(book)();
    NAME(codes_q4_0)(p, first, last);
    *first = _mm512_shuffle_epi8(book, *first), *last = _mm512_shuffle_epi8(book, *last);
}

/* Scales of four blocks, each for the four sums of its block: at these words of 16 bits, from 32 on of what lies REST
   bytes further on. */
#define FOUR_SCALES(KIND, FIRST, SECOND, THIRD, FOURTH, REST)                                               \
    static inline __m512 NAME(scales_##KIND)(const uint8_t *p) {                                                  \
        const long long same = 0x0001000100010001;                                                          \
        const __m512i which = _mm512_set_epi64(0, 0, 0, 0, (FOURTH) * same, (THIRD) * same, (SECOND) * same, (FIRST) * same); \
        const __m512i words = _mm512_permutex2var_epi16(_mm512_loadu_si512(p), which, _mm512_loadu_si512(p + REST)); \
        return _mm512_cvtph_ps(_mm512_castsi512_si256(words));                                              \
    }

FOUR_SCALES(q4_0, 0, 9, 18, 27, 0)
FOUR_SCALES(iq4_nl, 0, 9, 18, 27, 0)
FOUR_SCALES(q5_0, 0, 11, 22, 32 + 21, 24)
FOUR_SCALES(q8_0, 0, 17, 32 + 0, 32 + 17, 68)
#undef FOUR_SCALES

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
QUAD_ROWS(q5_0, 22, 16)
QUAD_ROWS(q8_0, 34, 0x80)
QUAD_ROWS(iq4_nl, 18, 0x80)
QUAD_TILE(q4_0, 18, 8)
QUAD_TILE(q5_0, 22, 16)
QUAD_TILE(q8_0, 34, 0x80)
QUAD_TILE(iq4_nl, 18, 0x80)

/* Q4_K, and Q5_K with its fifth bits. */
static inline __attribute__((always_inline)) void NAME(rows_of_k)(const uint8_t *const row[4], long columns, const struct vector *x,
                                                                  float *out, long size, int fifth_bits) {
    const __m512i low = _mm512_set1_epi8(15), sixteen = _mm512_set1_epi8(16), zero = _mm512_setzero_si512();
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    __m256 minimums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    const long ahead = NAME(distance)(row);
    for (long b = 0; b < columns / 256; b++) {
        const __m256 scales = _mm256_loadu_ps(x->scales + 8 * b), totals = _mm256_loadu_ps(x->sums + 8 * b);
        __m512 scale[4];
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + size * b;
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
            const __m512i bits = _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << 4 * half)), _mm256_set1_epi8((char)(4 << 4 * half)), 1);
            NAME(fetch)(row[0] + ahead, 4 * size * b + 2 * size * half, 4 * size * b + 2 * size * (half + 1));
            for (int r = 0; r < 4; r++) {
                const uint8_t *p = row[r] + size * b + 16;
                const __m512i bytes = _mm512_loadu_si512(p + (fifth_bits ? 32 : 0) + 64 * half);
                __m512i first_codes = _mm512_and_si512(bytes, low), second_codes = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
                if (fifth_bits) {
                    const __m512i fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
                    const __mmask64 evens = _mm512_test_epi8_mask(fifth, bits);
                    const __mmask64 odds = _mm512_test_epi8_mask(fifth, _mm512_add_epi8(bits, bits));
                    first_codes = _mm512_mask_add_epi8(first_codes, evens, first_codes, sixteen);
                    second_codes = _mm512_mask_add_epi8(second_codes, odds, second_codes, sixteen);
                }
                const __m512i evens = _mm512_dpbusd_epi32(zero, first_codes, even);
                const __m512i odds = _mm512_dpbusd_epi32(zero, second_codes, odd);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(evens), _mm512_permutexvar_ps(first, scale[r]), sums[r]);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(odds), _mm512_permutexvar_ps(second, scale[r]), sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++)
        out[r] = _mm512_reduce_add_ps(sums[r]) - _mm512_reduce_add_ps(_mm512_zextps256_ps512(minimums[r]));
}

static void NAME(rows_q4_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    NAME(rows_of_k)(row, columns, x, out, 144, 0);
}

static void NAME(rows_q5_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    NAME(rows_of_k)(row, columns, x, out, 176, 1);
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

static void NAME(rows_q3_k)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4), zero = _mm512_setzero_si512();
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const long ahead = NAME(distance)(row);
    for (long b = 0; b < columns / 256; b++) {
        __m512 scale[4];
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + 110 * b;
            const __m512 factors = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(NAME(factors_q3_k)(p + 96)));
            scale[r] = _mm512_mul_ps(NAME(halves)(p + 108, p + 108), factors);
        }
        NAME(fetch)(row[0] + ahead, 440 * b, 440 * (b + 1));
        for (int chunk = 0; chunk < 4; chunk++) {
            /* 64 values: low bits of 32 bytes, shifted by one amount and by another, and third bits in two places. */
            const int low = 4 * (chunk % 2), place = 2 * chunk;
            const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16((short)low), _mm256_set1_epi16((short)(low + 2)), 1);
            const __m512i bits = _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << place)), _mm256_set1_epi8((char)(2 << place)), 1);
            const __m512i a = _mm512_loadu_si512(x->q + 256 * b + 64 * chunk);
            const __m512i offset = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, four, a));
            const __m512i which = _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * chunk));
            const __m512 xs = NAME(both)(x->scales[8 * b + 2 * chunk], x->scales[8 * b + 2 * chunk + 1]);
            for (int r = 0; r < 4; r++) {
                const uint8_t *p = row[r] + 110 * b;
                const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(p + 32 + 32 * (chunk / 2))));
                const __m512i third = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
                __m512i w = _mm512_and_si512(_mm512_srlv_epi16(bytes, by), two);
                w = _mm512_mask_add_epi8(w, _mm512_test_epi8_mask(third, bits), w, four);
                const __m512 factor = _mm512_mul_ps(_mm512_permutexvar_ps(which, scale[r]), xs);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(offset, w, a)), factor, sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

static void NAME(rows_iq4_xs)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512(), middle = _mm512_set1_epi8((char)128);
    const __m512i twice = _mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0), book = NAME(book)();
    const __m512i shift = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
    const __m512i half = _mm512_inserti64x4(zero, _mm256_set1_epi32(1), 1);
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const long ahead = NAME(distance)(row);
    for (long b = 0; b < columns / 256; b++) {
        const __m256 scales = _mm256_loadu_ps(x->scales + 8 * b);
        __m512 scale[4];
        for (int r = 0; r < 4; r++)
            scale[r] = _mm512_castps256_ps512(_mm256_mul_ps(NAME(scales_iq4_xs)(row[r] + 136 * b), scales));
        NAME(fetch)(row[0] + ahead, 544 * b, 544 * (b + 1));
        for (int chunk = 0; chunk < 4; chunk++) {
            const __m512i a = _mm512_loadu_si512(x->q + 256 * b + 64 * chunk);
            const __m512i offset = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, middle, a));
            const __m512i which = _mm512_add_epi32(half, _mm512_set1_epi32(2 * chunk));
            for (int r = 0; r < 4; r++) {
                const __m256i bytes = _mm256_loadu_si256((const __m256i *)(row[r] + 136 * b + 8 + 32 * chunk));
                const __m512i codes = _mm512_srlv_epi16(_mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(bytes)), shift);
                const __m512i w = _mm512_shuffle_epi8(book, _mm512_and_si512(codes, low));
                const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(offset, w, a));
                sums[r] = _mm512_fmadd_ps(dots, _mm512_permutexvar_ps(which, scale[r]), sums[r]);
            }
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

#undef QUAD_ROWS
#undef QUAD_TILE
#undef ONE_ROW
#undef ONE
