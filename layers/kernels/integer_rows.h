/* Four rows of packed weights times one vector of int8 by way of `integers`, for the formats that have no faster way of
   their own: 256 values at a time. Included by block_rows.h. */

struct NAME(run) {
    int8_t values[256];
    float scales[16], minimums[8];
};

/* What the four rows share of 256 activations, `count` of them there, and the product of a row's integers with them. */
#if VNNI512

struct NAME(shared) {
    __m512i q[4], offset[4];
    __m512 scales[4];
    __m256 sums;
};

typedef struct {
    __m512 products;
    __m256 minimums;
} NAME(total);

static inline void NAME(share)(const struct vector *x, long at, int count, struct NAME(shared) *shared) {
    const __m512i zero = _mm512_setzero_si512(), middle = _mm512_set1_epi8((char)128);
    for (int part = 0; 64 * part < count; part++) {
        shared->q[part] = _mm512_loadu_si512(x->q + at + 64 * part);
        shared->offset[part] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, middle, shared->q[part]));
        shared->scales[part] = NAME(both)(x->scales[at / 32 + 2 * part], x->scales[at / 32 + 2 * part + 1]);
    }
    shared->sums = _mm256_maskz_loadu_ps((__mmask8)((1u << count / 32) - 1), x->sums + at / 32);
}

static inline void NAME(add_run)(NAME(total) *total, const struct NAME(run) *run, int count, int minimums,
                                 const struct NAME(shared) *x) {
    const __m512 scales = _mm512_loadu_ps(run->scales);
    const __m512i sign = _mm512_set1_epi8((char)128);
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
        if (64 * part >= count) break;
        const __m512i values = _mm512_xor_si512(_mm512_loadu_si512(run->values + 64 * part), sign);
        const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x->offset[part], values, x->q[part]));
        const __m512 own = _mm512_permutexvar_ps(_mm512_add_epi32(quarter, _mm512_set1_epi32(4 * part)), scales);
        total->products = _mm512_fmadd_ps(dots, _mm512_mul_ps(own, x->scales[part]), total->products);
    }
    if (minimums) total->minimums = _mm256_fmadd_ps(_mm256_loadu_ps(run->minimums), x->sums, total->minimums);
}

static inline float NAME(whole)(const NAME(total) *total) {
    return _mm512_reduce_add_ps(total->products) - _mm512_reduce_add_ps(_mm512_zextps256_ps512(total->minimums));
}

#else

struct NAME(shared) {
    const int8_t *q;
    const float *scales, *sums;
};

static inline void NAME(share)(const struct vector *x, long at, int count, struct NAME(shared) *shared) {
    *shared = (struct NAME(shared)){x->q + at, x->scales + at / 32, x->sums + at / 32};
    (void)count;
}

#if F16C

typedef struct {
    __m256 products;
    float minimums;
} NAME(total);

/* `maddubs` takes magnitudes, and activations with the signs of both. */
static inline void NAME(add_32)(NAME(total) *total, const int8_t *values, const float *scales, const int8_t *q, float scale) {
    const __m256i w = NAME(bytes32)(values);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(NAME(bytes32)(q), w));
    const __m256 own = _mm256_insertf128_ps(_mm256_set1_ps(scales[0]), _mm_set1_ps(scales[1]), 1);
    total->products = NAME(add_pairs)(total->products, pairs, _mm256_set1_epi16(1), _mm256_mul_ps(own, _mm256_set1_ps(scale)));
}

static inline float NAME(whole)(const NAME(total) *total) { return NAME(sum)((FLOATS)total->products) - total->minimums; }

#elif NEON_DOT

typedef struct {
    float32x4_t products;
    float minimums;
} NAME(total);

static inline void NAME(add_32)(NAME(total) *total, const int8_t *values, const float *scales, const int8_t *q, float scale) {
    const int32x4_t zero = vdupq_n_s32(0);
    for (int side = 0; side < 2; side++) {
        const int32x4_t dots = NAME(dot)(zero, vld1q_s8(values + 16 * side), vld1q_s8(q + 16 * side));
        total->products = vfmaq_n_f32(total->products, vcvtq_f32_s32(dots), scales[side] * scale);
    }
}

static inline float NAME(whole)(const NAME(total) *total) { return vaddvq_f32(total->products) - total->minimums; }

#else

typedef struct {
    float products, minimums;
} NAME(total);

/* In loops that compilers turn into vectors. */
static inline void NAME(add_32)(NAME(total) *total, const int8_t *values, const float *scales, const int8_t *q, float scale) {
    int32_t dots[2] = {0, 0};
    for (int i = 0; i < 16; i++) dots[0] += values[i] * q[i];
    for (int i = 16; i < 32; i++) dots[1] += values[i] * q[i];
    total->products += scale * (scales[0] * dots[0] + scales[1] * dots[1]);
}

static inline float NAME(whole)(const NAME(total) *total) { return total->products - total->minimums; }

#endif

static inline void NAME(add_run)(NAME(total) *total, const struct NAME(run) *run, int count, int minimums,
                                 const struct NAME(shared) *x) {
    for (int part = 0; 32 * part < count; part++) {
        NAME(add_32)(total, run->values + 32 * part, run->scales + 2 * part, x->q + 32 * part, x->scales[part]);
        if (minimums) total->minimums += run->minimums[part] * x->sums[part];
    }
}

#endif

#define INTEGER_ROWS(KIND, VALUES, BYTES, MINIMUMS)                                                         \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        NAME(total) totals[4];                                                                              \
        memset(totals, 0, sizeof totals);                                                                   \
        const long ahead = NAME(distance)(row);                                                             \
        for (long at = 0; at < columns; at += 256) {                                                        \
            const int count = columns - at < 256 ? (int)(columns - at) : 256;                               \
            const long begin = at / VALUES * BYTES, end = begin + count / VALUES * BYTES;                   \
            struct NAME(shared) shared;                                                                     \
            NAME(fetch)(row[0] + ahead, 4 * begin, 4 * end);                                                \
            NAME(share)(x, at, count, &shared);                                                             \
            for (int r = 0; r < 4; r++) {                                                                   \
                struct NAME(run) run;                                                                       \
                if (VALUES < 256 && count < 256) memset(&run, 0, sizeof run);                               \
                for (int block = 0; VALUES * block < count; block++)                                        \
                    NAME(integers_##KIND)(row[r] + begin + BYTES * block, run.values + VALUES * block,      \
                                          run.scales + VALUES / 16 * block, run.minimums + VALUES / 32 * block);       \
                NAME(add_run)(totals + r, &run, count, MINIMUMS, &shared);                                  \
            }                                                                                               \
        }                                                                                                   \
        for (int r = 0; r < 4; r++) out[r] = NAME(whole)(totals + r);                                       \
    }

INTEGER_ROWS(q4_1, 32, 20, 1)
INTEGER_ROWS(q5_1, 32, 24, 1)
#if !F16C
INTEGER_ROWS(q5_0, 32, 22, 0)
INTEGER_ROWS(iq4_nl, 32, 18, 0)
INTEGER_ROWS(q3_k, 256, 110, 0)
INTEGER_ROWS(q5_k, 256, 176, 1)
INTEGER_ROWS(iq4_xs, 256, 136, 0)
#endif
#if !F16C && !NEON_DOT
INTEGER_ROWS(q4_0, 32, 18, 0)
INTEGER_ROWS(q8_0, 32, 34, 0)
INTEGER_ROWS(q4_k, 256, 144, 1)
INTEGER_ROWS(q6_k, 256, 210, 0)
#endif

#undef INTEGER_ROWS
