/* Packed weights times many vectors of int8 with AVX2: what panels.h is for AVX-512, for sixteen rows of weights at a time.
   Included twice: by kernels.h for AVX2, and by processors.h with VNNI256 for processors that have AVX-VNNI's `dpbusd`
   too.

   Without it `maddubs` multiplies activations, from 0 to 255, with weights and adds pairs in int16, and so are these
   added for as many steps as 32,767 has room for: a step adds at most 2 * 255 * 2^(bits - 1). Weights of eight bits
   are taken apart, 16 * high + low, both from -8 to 8.

   A panel is a sequence of groups of values under one scale, 32 of them or 16. A group: for each four values (in two
   planes where they are taken apart) those of rows 0 to 7, then of rows 8 to 15; their scales; what the 128 that
   activations come too large add to the products; for formats with minimums what has to be taken off. */

#define PANEL_ROWS_AVX2 16
#define VECTORS_AVX2 4

struct NAME(layout) {
    int fours, planes, together; /* steps that int16 has room for */
    int middle;                  /* of codes that are not signed */
};

static inline struct NAME(layout) NAME(layout_of)(int kind) {
    const int fours = FORMATS[kind].scaled / 4, wide = kind == Q8_0 || kind == IQ4_NL || kind == IQ4_XS;
    const int five = kind == Q5_0 || kind == Q5_1 || kind == Q5_K, six = kind == Q6_K;
    return (struct NAME(layout)){fours, wide && !VNNI256 ? 2 : 1, VNNI256 ? 8 : six ? 2 : five ? 4 : 8, FORMATS[kind].minimums ? five ? 16 : 8 : 0};
}

struct NAME(group) {
    __m256i *values;
    __m256 *scales, *extra, *minimums;
};

static inline struct NAME(group) NAME(group_at)(const char *panel, long number, int fours, int planes) {
    __m256i *at = (__m256i *)panel + number * (2 * fours * planes + 6);
    __m256 *behind = (__m256 *)(at + 2 * fours * planes);
    return (struct NAME(group)){at, behind, behind + 2, behind + 4};
}

/* 32 bytes of eight rows that lie 256 bytes apart, to eight vectors of four bytes of each row. */
static inline void NAME(turn)(const int8_t *rows, __m256i *to) {
    __m256i pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(rows + 512 * i)), b = _mm256_loadu_si256((const __m256i *)(rows + 512 * i + 256));
        pairs[2 * i] = _mm256_unpacklo_epi32(a, b), pairs[2 * i + 1] = _mm256_unpackhi_epi32(a, b);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++) {
            fours[i + 2 * side] = _mm256_unpacklo_epi64(pairs[i + side], pairs[i + 2 + side]);
            fours[i + 2 * side + 1] = _mm256_unpackhi_epi64(pairs[i + side], pairs[i + 2 + side]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        to[i] = _mm256_permute2x128_si256(fours[i], fours[4 + i], 0x20);
        to[4 + i] = _mm256_permute2x128_si256(fours[i], fours[4 + i], 0x31);
    }
}

static inline __m256i NAME(sum_of_fours)(__m256i values) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), values), _mm256_set1_epi16(1));
}

/* value = 16 * high + low, low from -8 to 7. */
static inline __m256i NAME(high_of)(__m256i values) {
    const __m256i eight = _mm256_set1_epi8(8), sign = _mm256_set1_epi8((char)0xF0);
    const __m256i floors = _mm256_and_si256(_mm256_srli_epi16(values, 4), _mm256_set1_epi8(15));
    const __m256i high = _mm256_or_si256(floors, _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), values), sign));
    return _mm256_sub_epi8(high, _mm256_cmpeq_epi8(_mm256_and_si256(values, eight), eight));
}

/* `count` rows, at most 16, that lie `bytes` apart; those that are missing are zeros. */
static void NAME(panel)(int kind, const uint8_t *weight, long bytes, int count, long columns, char *panel) {
    void (*const integers)(const uint8_t *, int8_t *, float *, float *) = integers_avx2[kind];
    const struct NAME(layout) layout = NAME(layout_of)(kind);
    const int values = FORMATS[kind].values, groups = values / (4 * layout.fours), plane = 2 * layout.fours;
    int8_t codes[16][256] = {{0}};
    float scales[16][16] = {{0}}, minimums[16][8] = {{0}};
    for (long block = 0; block < columns / values; block++) {
        for (int r = 0; r < count; r++) integers(weight + bytes * r + FORMATS[kind].bytes * block, codes[r], scales[r], minimums[r]);
        for (int half = 0; half < 2; half++)
            for (int part = 0; part < values / 32; part++) {
                __m256i turned[8];
                NAME(turn)(codes[8 * half] + 32 * part, turned);
                for (int side = 0; side < 8 / layout.fours; side++) {
                    const int g = 8 / layout.fours * part + side;
                    const struct NAME(group) group = NAME(group_at)(panel, block * groups + g, layout.fours, layout.planes);
                    __m256i sum = _mm256_setzero_si256();
                    for (int i = 0; i < layout.fours; i++) {
                        const __m256i four = _mm256_sub_epi8(turned[layout.fours * side + i], _mm256_set1_epi8((char)layout.middle));
                        const __m256i high = NAME(high_of)(four);
                        sum = _mm256_add_epi32(sum, NAME(sum_of_fours)(four));
                        if (layout.planes == 2) group.values[plane + 2 * i + half] = high;
                        group.values[2 * i + half] =
                            layout.planes == 2 ? _mm256_sub_epi8(four, _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(15)), 4)) : four;
                    }
                    float scale[8], off[8];
                    for (int r = 0; r < 8; r++) {
                        scale[r] = scales[8 * half + r][layout.fours == 4 ? g : 2 * g];
                        off[r] = FORMATS[kind].minimums ? minimums[8 * half + r][g] - (float)layout.middle * scale[r] : 0;
                    }
                    group.scales[half] = _mm256_loadu_ps(scale);
                    group.minimums[half] = _mm256_loadu_ps(off);
                    group.extra[half] = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(-128)), group.scales[half]);
                }
            }
    }
}

/* Products of a group's values with VECTORS_AVX2 vectors, in int32. */
static inline __attribute__((always_inline)) void NAME(dots)(const __m256i *values, int fours, int together, int factor, const uint8_t *q,
                                                             long stride, __m256i dots[VECTORS_AVX2][2]) {
#pragma GCC unroll 8
    for (int begin = 0; begin < fours; begin += together) {
        __m256i sums[VECTORS_AVX2][2];
#pragma GCC unroll 8
        for (int i = begin; i < begin + together; i++) {
            const __m256i a = values[2 * i], b = values[2 * i + 1];
#pragma GCC unroll 8
            for (int t = 0; t < VECTORS_AVX2; t++) {
                int32_t bits;
                memcpy(&bits, q + t * stride + 4 * i, 4);
                const __m256i four = _mm256_set1_epi32(bits);
#if VNNI256
                if (i == begin) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
                sums[t][0] = DPBUSD(sums[t][0], four, a), sums[t][1] = DPBUSD(sums[t][1], four, b);
#else
                const __m256i first = _mm256_maddubs_epi16(four, a), second = _mm256_maddubs_epi16(four, b);
                sums[t][0] = i == begin ? first : _mm256_add_epi16(sums[t][0], first);
                sums[t][1] = i == begin ? second : _mm256_add_epi16(sums[t][1], second);
                __asm__("" : "+x"(sums[t][0]), "+x"(sums[t][1])); /* or gcc adds them up as a tree, which takes more registers */
#endif
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < VECTORS_AVX2; t++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
#if VNNI256
                dots[t][half] = sums[t][half];
                (void)factor;
#else
                const __m256i here = _mm256_madd_epi16(sums[t][half], _mm256_set1_epi16((short)factor));
                dots[t][half] = begin || factor == 16 ? _mm256_add_epi32(dots[t][half], here) : here;
#endif
            }
    }
}

/* One panel times VECTORS_AVX2 vectors, out[vector][row]. */
static inline __attribute__((always_inline)) void NAME(multiply_panel)(const char *panel, long columns, int fours, int planes, int together,
                                                                       int minimums, const struct many_vectors *x, long first, float *out) {
    __m256 sums[VECTORS_AVX2][2];
#pragma GCC unroll 8
    for (int t = 0; t < VECTORS_AVX2; t++) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
    for (long g = 0; g < columns / (4 * fours); g++) {
        const struct NAME(group) group = NAME(group_at)(panel, g, fours, planes);
        const uint8_t *q = x->q + first * x->stride + 4 * fours * g;
        const long block = (first * x->stride + 4 * fours * g) / 32;
        __m256i dots[VECTORS_AVX2][2];
        NAME(dots)(group.values, fours, together, 1, q, x->stride, dots);
        if (planes == 2) NAME(dots)(group.values + 2 * fours, fours, together, 16, q, x->stride, dots);
#pragma GCC unroll 8
        for (int t = 0; t < VECTORS_AVX2; t++) {
            const __m256 factor = _mm256_set1_ps(x->scales[block + t * (x->stride / 32)]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const __m256 product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][half]), group.scales[half], group.extra[half]);
                sums[t][half] = _mm256_fmadd_ps(product, factor, sums[t][half]);
                if (minimums) {
                    const __m256 total = _mm256_set1_ps(x->sums[block + t * (x->stride / 32)]);
                    sums[t][half] = _mm256_fnmadd_ps(total, group.minimums[half], sums[t][half]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < VECTORS_AVX2; t++) {
        _mm256_storeu_ps(out + PANEL_ROWS_AVX2 * t, sums[t][0]);
        _mm256_storeu_ps(out + PANEL_ROWS_AVX2 * t + 8, sums[t][1]);
    }
}

static void NAME(by_panel)(int kind, const char *panel, long columns, const struct many_vectors *x, long first, float *out) {
    const struct NAME(layout) layout = NAME(layout_of)(kind);
    if (layout.planes == 2) NAME(multiply_panel)(panel, columns, 8, 2, 8, 0, x, first, out);
    else if (layout.together == 4 && FORMATS[kind].minimums) NAME(multiply_panel)(panel, columns, 8, 1, 4, 1, x, first, out);
    else if (layout.together == 4) NAME(multiply_panel)(panel, columns, 8, 1, 4, 0, x, first, out);
    else if (FORMATS[kind].minimums) NAME(multiply_panel)(panel, columns, 8, 1, 8, 1, x, first, out);
    else if (layout.together == 2) NAME(multiply_panel)(panel, columns, 4, 1, 2, 0, x, first, out);
    else if (layout.fours == 4) NAME(multiply_panel)(panel, columns, 4, 1, 4, 0, x, first, out);
    else NAME(multiply_panel)(panel, columns, 8, 1, 8, 0, x, first, out);
}

#undef VNNI256
