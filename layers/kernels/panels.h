/* Packed weights times many vectors of int8: 32 rows of weights at a time are put into a panel, in the order in which the
   processor multiplies them, and stay in its cache for all the vectors. Included by kernels.h for AVX-512 VNNI.

   A panel is a sequence of groups of values under one scale, 32 of them or 16. A group: for each four values
   those of rows 0 to 15, then of rows 16 to 31; minus 128 times their sum, since activations come 128 too large; their
   scales; for formats with minimums what has to be taken off. */

struct NAME(group) {
    const __m512i *values, *sums;
    const __m512 *scales, *minimums;
};

static inline struct NAME(group) NAME(group_at)(const char *panel, long number, int fours) {
    const __m512i *at = (const __m512i *)panel + number * (2 * fours + 6);
    return (struct NAME(group)){at, at + 2 * fours, (const __m512 *)at + 2 * fours + 2, (const __m512 *)at + 2 * fours + 4};
}

/* Sixteen bytes of sixteen rows that lie `step` bytes apart, to four vectors of four bytes of each row. */
static inline void NAME(turn)(const int8_t *rows, long step, __m512i *to) {
    __m512i four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) four[i] = NAME(quarters)((const uint8_t *)rows + i * step, 4 * step);
    const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
    to[0] = _mm512_unpacklo_epi64(a, c), to[2] = _mm512_unpackhi_epi64(a, c);
    to[4] = _mm512_unpacklo_epi64(b, d), to[6] = _mm512_unpackhi_epi64(b, d);
}

/* `count` rows, at most 32, that lie `bytes` apart; those that are missing are zeros. */
static void NAME(panel)(int kind, const uint8_t *weight, long bytes, int count, long columns, char *panel) {
    void (*const integers)(const uint8_t *, int8_t *, float *, float *) = NAME(integers)[kind];
    const int values = FORMATS[kind].values, fours = FORMATS[kind].scaled / 4, groups = values / (4 * fours);
    int8_t codes[32][256] = {{0}};
    float scales[32][16] = {{0}}, minimums[32][8] = {{0}};
    for (long block = 0; block < columns / values; block++) {
        for (int r = 0; r < count; r++) integers(weight + bytes * r + FORMATS[kind].bytes * block, codes[r], scales[r], minimums[r]);
        for (int g = 0; g < groups; g++) {
            const struct NAME(group) group = NAME(group_at)(panel, block * groups + g, fours);
            __m512i *to = (__m512i *)group.values;
            for (int half = 0; half < 2; half++) {
                __m512i sum = _mm512_setzero_si512();
                for (int i = 0; i < fours; i += 4) NAME(turn)(codes[16 * half] + 4 * (g * fours + i), 256, to + 2 * i + half);
                for (int i = 0; i < fours; i++) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)128), to[2 * i + half]);
                ((__m512i *)group.sums)[half] = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
                for (int r = 0; r < 16; r++) {
                    ((float *)(group.scales + half))[r] = scales[16 * half + r][fours == 4 ? g : 2 * g];
                    ((float *)(group.minimums + half))[r] = minimums[16 * half + r][fours == 4 ? 0 : g];
                }
            }
        }
    }
}

/* One panel times VECTORS vectors, out[vector][row]. */
static inline __attribute__((always_inline)) void NAME(multiply_panel)(const char *panel, long columns, int fours, int minimums,
                                                                       const struct many_vectors *x, long first, float *out) {
    __m512 sums[VECTORS][2];
#pragma GCC unroll 8
    for (int t = 0; t < VECTORS; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (long g = 0; g < columns / (4 * fours); g++) {
        const struct NAME(group) group = NAME(group_at)(panel, g, fours);
        const uint8_t *q = x->q + first * x->stride + 4 * fours * g;
        const float *scale = x->scales + (first * x->stride + 4 * fours * g) / 32;
        __m512i dots[VECTORS][2];
#pragma GCC unroll 8
        for (int t = 0; t < VECTORS; t++) dots[t][0] = group.sums[0], dots[t][1] = group.sums[1];
#pragma GCC unroll 8
        for (int i = 0; i < fours; i++) {
            const __m512i a = group.values[2 * i], b = group.values[2 * i + 1];
#pragma GCC unroll 8
            for (int t = 0; t < VECTORS; t++) {
                int32_t bits;
                memcpy(&bits, q + t * x->stride + 4 * i, 4);
                const __m512i four = _mm512_set1_epi32(bits);
                dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], four, a);
                dots[t][1] = _mm512_dpbusd_epi32(dots[t][1], four, b);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < VECTORS; t++) {
            const __m512 factor = _mm512_set1_ps(scale[t * (x->stride / 32)]);
            sums[t][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots[t][0]), group.scales[0]), factor, sums[t][0]);
            sums[t][1] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots[t][1]), group.scales[1]), factor, sums[t][1]);
            if (minimums) {
                const __m512 total = _mm512_set1_ps(x->sums[(first * x->stride + 4 * fours * g) / 32 + t * (x->stride / 32)]);
                sums[t][0] = _mm512_fnmadd_ps(total, group.minimums[0], sums[t][0]);
                sums[t][1] = _mm512_fnmadd_ps(total, group.minimums[1], sums[t][1]);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < VECTORS; t++) {
        _mm512_storeu_ps(out + 32 * t, sums[t][0]);
        _mm512_storeu_ps(out + 32 * t + 16, sums[t][1]);
    }
}

static void NAME(by_panel)(int kind, const char *panel, long columns, const struct many_vectors *x, long first, float *out) {
    if (FORMATS[kind].minimums) NAME(multiply_panel)(panel, columns, 8, 1, x, first, out);
    else if (FORMATS[kind].scaled == 16) NAME(multiply_panel)(panel, columns, 4, 0, x, first, out);
    else NAME(multiply_panel)(panel, columns, 8, 0, x, first, out);
}
