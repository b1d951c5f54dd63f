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

/* `unpack_sixteen` in registers. */
static inline __m128i NAME(factors_q3_k)(const uint8_t *p) {
    int32_t top;
    memcpy(&top, p + 8, 4);
    const __m128i eight = _mm_loadl_epi64((const __m128i *)p);
    const __m128i low = _mm_and_si128(_mm_unpacklo_epi64(eight, _mm_srli_epi16(eight, 4)), _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srlv_epi32(_mm_set1_epi32(top), _mm_set_epi32(6, 4, 2, 0)), _mm_set1_epi8(3));
    return _mm_sub_epi8(_mm_or_si128(low, _mm_slli_epi16(high, 4)), _mm_set1_epi8(32));
}

/* Eight scales of IQ4_XS as integers. */
static inline __m256i NAME(factors_iq4_xs)(const uint8_t *p) {
    uint16_t top;
    int32_t low;
    memcpy(&top, p + 2, 2);
    memcpy(&low, p + 4, 4);
    const __m256i lows = _mm256_srlv_epi32(_mm256_set1_epi32(low), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
    const __m256i tops = _mm256_srlv_epi32(_mm256_set1_epi32(top), _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0));
    const __m256i high = _mm256_slli_epi32(_mm256_and_si256(tops, _mm256_set1_epi32(3)), 4);
    const __m256i all = _mm256_or_si256(_mm256_and_si256(lows, _mm256_set1_epi32(15)), high);
    return _mm256_sub_epi32(all, _mm256_set1_epi32(32));
}

static inline __m256 NAME(scales_iq4_xs)(const uint8_t *p) {
    return _mm256_mul_ps(NAME(half8)(p), _mm256_cvtepi32_ps(NAME(factors_iq4_xs)(p)));
}

#endif

#if VNNI512
#include "block_rows_avx512.h"
#elif F16C
#include "block_rows_avx2.h"
#elif NEON_DOT
#include "block_rows_neon.h"
#endif

#include "integer_rows.h"
