/* Four rows of packed weights times one vector of int8 with AVX2, included by block_rows.h.

   `maddubs` multiplies unsigned codes with signed activations and adds pairs in int16, which holds 32,767: codes up to
   63 times 127 stay far below; Q8_0 gives its signs to the activations, and 2 * 128 * 127 = 32,512 still fits. A load
   of weights lies within one block, so that nothing is read beyond a row's end. */

static inline __m256i NAME(bytes32)(const void *p) { return _mm256_loadu_si256(p); }

/* sum + scale * (pairs times factors, neighbours added). */
static inline __m256 NAME(add_pairs)(__m256 sum, __m256i pairs, __m256i factors, __m256 scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, factors)), scale, sum);
}

static inline __m256i NAME(nibbles)(const uint8_t *p) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
}

/* 32 products in pairs; `zero` are those of the code of the value zero. */
static inline __m256i NAME(pairs_q4_0)(const uint8_t *p, __m256i q, __m256i zero) {
    return _mm256_sub_epi16(_mm256_maddubs_epi16(NAME(nibbles)(p + 2), q), zero);
}

static inline __m256i NAME(pairs_q8_0)(const uint8_t *p, __m256i q, __m256i zero) {
    const __m256i codes = NAME(bytes32)(p + 2);
    (void)zero;
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes));
}

/* 32 bits, each in a byte of its own as 0 or 16. */
static inline __m256i NAME(fifth_of_32)(const uint8_t *p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m256i which = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i places = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), which), places);
    return _mm256_and_si256(_mm256_cmpeq_epi8(spread, places), _mm256_set1_epi8(16));
}

static inline __m256i NAME(pairs_q5_0)(const uint8_t *p, __m256i q, __m256i zero) {
    const __m256i codes = _mm256_or_si256(NAME(nibbles)(p + 6), NAME(fifth_of_32)(p + 2));
    return _mm256_sub_epi16(_mm256_maddubs_epi16(codes, q), zero);
}

static inline __m256i NAME(pairs_of_codebook)(const uint8_t *p, __m256i q) {
    const __m256i book = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)CODEBOOK));
    const __m256i values = _mm256_shuffle_epi8(book, NAME(nibbles)(p));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(values), _mm256_sign_epi8(q, values));
}

static inline __m256i NAME(pairs_iq4_nl)(const uint8_t *p, __m256i q, __m256i zero) {
    (void)zero;
    return NAME(pairs_of_codebook)(p + 2, q);
}

#define SMALL_BLOCKS(KIND, BYTES, ZERO)                                                                     \
    static inline __m256 NAME(add_##KIND)(__m256 sum, const uint8_t *p, __m256i q, __m256i zero, __m256 scale) {       \
        const __m256i pairs = NAME(pairs_##KIND)(p, q, zero);                                               \
        return NAME(add_pairs)(sum, pairs, _mm256_set1_epi16(1), _mm256_mul_ps(NAME(half8)(p), scale));     \
    }                                                                                                       \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                \
        const long blocks = columns / 32, ahead = NAME(distance)(row);                                      \
        for (long first = 0; first < blocks; first += 4) {                                                  \
            NAME(fetch)(row[0] + ahead, 4 * BYTES * first, 4 * BYTES * (first + 4));                        \
            for (long block = first; block < blocks && block < first + 4; block++) {                        \
                const __m256i q = NAME(bytes32)(x->q + 32 * block);                                         \
                const __m256i zero = _mm256_maddubs_epi16(_mm256_set1_epi8(ZERO), q);                       \
                const __m256 scale = _mm256_set1_ps(x->scales[block]);                                      \
                a = NAME(add_##KIND)(a, row[0] + BYTES * block, q, zero, scale);                            \
                b = NAME(add_##KIND)(b, row[1] + BYTES * block, q, zero, scale);                            \
                c = NAME(add_##KIND)(c, row[2] + BYTES * block, q, zero, scale);                            \
                d = NAME(add_##KIND)(d, row[3] + BYTES * block, q, zero, scale);                            \
            }                                                                                               \
        }                                                                                                   \
        out[0] = NAME(sum)((FLOATS)a), out[1] = NAME(sum)((FLOATS)b), out[2] = NAME(sum)((FLOATS)c), out[3] = NAME(sum)((FLOATS)d);     \
    }

SMALL_BLOCKS(q4_0, 18, 8)
SMALL_BLOCKS(q5_0, 22, 16)
SMALL_BLOCKS(q8_0, 34, 0)
SMALL_BLOCKS(iq4_nl, 18, 0)

/* sum + scales[part] * (pairs times word `part` of each lane of `words`). */
static inline __m256 NAME(add_part)(__m256 sum, __m256i pairs, __m256i words, int part, const float *scales) {
    const __m256i which = _mm256_set1_epi16((short)(0x0100 + 0x0202 * part));
    return NAME(add_pairs)(sum, pairs, _mm256_shuffle_epi8(words, which), _mm256_set1_ps(scales[part]));
}

/* What four rows share of a block: its activations, and for Q3_K and Q6_K their products with the code of the value zero. */
struct NAME(activations) {
    const int8_t *q;
    const float *scales, *sums;
    __m256i zeros[8];
};

static inline void NAME(prepare)(struct NAME(activations) *x, int zero) {
    for (int part = 0; zero && part < 8; part++)
        x->zeros[part] = _mm256_maddubs_epi16(_mm256_set1_epi8((char)zero), NAME(bytes32)(x->q + 32 * part));
}

/* Products of 32 codes of four bits, with fifth bits at their place. */
static inline __m256i NAME(pairs_of_k)(__m256i codes, __m256i fifth, const int8_t *q) {
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(15)), top = _mm256_and_si256(fifth, _mm256_set1_epi8(16));
    return _mm256_maddubs_epi16(_mm256_or_si256(low, top), NAME(bytes32)(q));
}

/* Q4_K, and Q5_K with its fifth bits. Minimums come off through the scaled sums of the activations. */
static inline __attribute__((always_inline)) __m256 NAME(add_of_k)(__m256 sum, const uint8_t *p, const struct NAME(activations) *x,
                                                                   int fifth_bits) {
    const __m128i bits = NAME(scales_q4_k)(p + 4);
    const __m256i words = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(bits));
    const __m256 minimums = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bits, 8)));
    const __m256i fifth = fifth_bits ? NAME(bytes32)(p + 16) : _mm256_setzero_si256();
    __m256 even = _mm256_setzero_ps(), odd = even;
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
        const __m256i bytes = NAME(bytes32)(p + (fifth_bits ? 48 : 16) + 32 * pair);
        const __m256i first = pair < 2 ? _mm256_slli_epi16(fifth, 4 - 2 * pair) : _mm256_srli_epi16(fifth, 2 * pair - 4);
        const __m256i second = pair < 2 ? _mm256_slli_epi16(fifth, 3 - 2 * pair) : _mm256_srli_epi16(fifth, 2 * pair - 3);
        const __m256i low = NAME(pairs_of_k)(bytes, first, x->q + 64 * pair);
        const __m256i high = NAME(pairs_of_k)(_mm256_srli_epi16(bytes, 4), second, x->q + 64 * pair + 32);
        even = NAME(add_part)(even, low, words, 2 * pair, x->scales);
        odd = NAME(add_part)(odd, high, words, 2 * pair + 1, x->scales);
    }
    sum = _mm256_fnmadd_ps(_mm256_mul_ps(NAME(half8)(p + 2), minimums), _mm256_loadu_ps(x->sums), sum);
    return _mm256_fmadd_ps(_mm256_add_ps(even, odd), NAME(half8)(p), sum);
}

static inline __m256 NAME(add_q4_k)(__m256 sum, const uint8_t *p, const struct NAME(activations) *x) {
    return NAME(add_of_k)(sum, p, x, 0);
}

static inline __m256 NAME(add_q5_k)(__m256 sum, const uint8_t *p, const struct NAME(activations) *x) {
    return NAME(add_of_k)(sum, p, x, 1);
}

/* `tops` has the two high bits of each code at their place. */
static inline __m256i NAME(pairs_q6_k)(__m256i bytes, __m256i tops, const struct NAME(activations) *x, int part) {
    const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    const __m256i codes = _mm256_or_si256(low, _mm256_and_si256(tops, _mm256_set1_epi8(48)));
    return _mm256_sub_epi16(_mm256_maddubs_epi16(codes, NAME(bytes32)(x->q + 32 * part)), x->zeros[part]);
}

/* A scale goes with sixteen values, so the lanes have different ones: evens first, then odds. */
static inline __m256 NAME(add_q6_k)(__m256 sum, const uint8_t *p, const struct NAME(activations) *x) {
    const __m128i evens_odds = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m128i scales = _mm_loadu_si128((const __m128i *)(p + 192));
    const __m256i words = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, evens_odds));
    __m256 even = _mm256_setzero_ps(), odd = even;
#pragma GCC unroll 2
    for (int part = 0; part < 8; part += 4) {
        const __m256i a = NAME(bytes32)(p + 16 * part), b = NAME(bytes32)(p + 16 * part + 32);
        const __m256i tops = NAME(bytes32)(p + 128 + 8 * part);
        const __m256i first = NAME(pairs_q6_k)(a, _mm256_slli_epi16(tops, 4), x, part);
        const __m256i second = NAME(pairs_q6_k)(b, _mm256_slli_epi16(tops, 2), x, part + 1);
        const __m256i third = NAME(pairs_q6_k)(_mm256_srli_epi16(a, 4), tops, x, part + 2);
        const __m256i fourth = NAME(pairs_q6_k)(_mm256_srli_epi16(b, 4), _mm256_srli_epi16(tops, 2), x, part + 3);
        even = NAME(add_part)(even, first, words, part, x->scales);
        odd = NAME(add_part)(odd, second, words, part + 1, x->scales);
        even = NAME(add_part)(even, third, words, part + 2, x->scales);
        odd = NAME(add_part)(odd, fourth, words, part + 3, x->scales);
    }
    return _mm256_fmadd_ps(_mm256_add_ps(even, odd), NAME(half8)(p + 208), sum);
}

/* Two low bits of 32 values, and third bits that are moved to their place. */
static inline __m256i NAME(pairs_q3_k)(__m256i low, __m256i third, const struct NAME(activations) *x, int part) {
    const __m256i codes = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)), _mm256_and_si256(third, _mm256_set1_epi8(4)));
    return _mm256_sub_epi16(_mm256_maddubs_epi16(codes, NAME(bytes32)(x->q + 32 * part)), x->zeros[part]);
}

static inline __m256 NAME(add_q3_k)(__m256 sum, const uint8_t *p, const struct NAME(activations) *x) {
    const __m128i evens_odds = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m256i words = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(NAME(factors_q3_k)(p + 96), evens_odds));
    const __m256i third = NAME(bytes32)(p);
    __m256 even = _mm256_setzero_ps(), odd = even;
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
        const __m256i bytes = NAME(bytes32)(p + 32 + 32 * (pair / 2)), low = pair % 2 ? _mm256_srli_epi16(bytes, 4) : bytes;
        const __m256i first = pair < 2 ? _mm256_slli_epi16(third, 2 - 2 * pair) : _mm256_srli_epi16(third, 2 * pair - 2);
        const __m256i second = pair < 1 ? _mm256_slli_epi16(third, 1) : _mm256_srli_epi16(third, 2 * pair - 1);
        even = NAME(add_part)(even, NAME(pairs_q3_k)(low, first, x, 2 * pair), words, 2 * pair, x->scales);
        odd = NAME(add_part)(odd, NAME(pairs_q3_k)(_mm256_srli_epi16(low, 2), second, x, 2 * pair + 1), words, 2 * pair + 1, x->scales);
    }
    return _mm256_fmadd_ps(_mm256_add_ps(even, odd), NAME(half8)(p + 108), sum);
}

static inline __m256 NAME(add_iq4_xs)(__m256 sum, const uint8_t *p, const struct NAME(activations) *x) {
    const __m256i factors = NAME(factors_iq4_xs)(p);
    const __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128(factors), _mm256_extracti128_si256(factors, 1));
    const __m256i words = _mm256_broadcastsi128_si256(eight);
    __m256 even = _mm256_setzero_ps(), odd = even;
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
        const __m256i first = NAME(pairs_of_codebook)(p + 8 + 32 * pair, NAME(bytes32)(x->q + 64 * pair));
        const __m256i second = NAME(pairs_of_codebook)(p + 24 + 32 * pair, NAME(bytes32)(x->q + 64 * pair + 32));
        even = NAME(add_part)(even, first, words, 2 * pair, x->scales);
        odd = NAME(add_part)(odd, second, words, 2 * pair + 1, x->scales);
    }
    return _mm256_fmadd_ps(_mm256_add_ps(even, odd), NAME(half8)(p), sum);
}

#define LARGE_BLOCKS(KIND, BYTES, ZERO)                                                                         \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                \
        const long ahead = NAME(distance)(row);                                                             \
        for (long block = 0; block < columns / 256; block++) {                                              \
            const long at = BYTES * block;                                                                  \
            NAME(fetch)(row[0] + ahead, 4 * at, 4 * (at + BYTES));                                          \
            struct NAME(activations) here = {x->q + 256 * block, x->scales + 8 * block, x->sums + 8 * block, {{0}}};   \
            NAME(prepare)(&here, ZERO);                                                                     \
            a = NAME(add_##KIND)(a, row[0] + at, &here), b = NAME(add_##KIND)(b, row[1] + at, &here);   \
            c = NAME(add_##KIND)(c, row[2] + at, &here), d = NAME(add_##KIND)(d, row[3] + at, &here);   \
        }                                                                                                   \
        out[0] = NAME(sum)((FLOATS)a), out[1] = NAME(sum)((FLOATS)b), out[2] = NAME(sum)((FLOATS)c), out[3] = NAME(sum)((FLOATS)d);     \
    }

LARGE_BLOCKS(q3_k, 110, 4)
LARGE_BLOCKS(q4_k, 144, 0)
LARGE_BLOCKS(q5_k, 176, 0)
LARGE_BLOCKS(q6_k, 210, 32)
LARGE_BLOCKS(iq4_xs, 136, 0)

#undef SMALL_BLOCKS
#undef LARGE_BLOCKS
