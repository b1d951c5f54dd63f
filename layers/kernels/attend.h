/* Attention of one token: softmax(q k^T) v for some query heads of one key-value head, included by kernels.h once per
   kind of processor. `scores` has room for `heads` rows of `padded(past)` floats. */

#define AHEAD 32 /* positions fetched before they are needed */
#define POSITIONS 64 /* of which keys or values stay in the nearest cache while all heads use them */
#define TILE 4 /* positions whose keys are multiplied at once */
#if VNNI512
#define MOST_HEADS 4 /* whose queries meet a key, or a value, while it is in registers as fp32 */
#define SUMS 16 /* vectors of their outputs in registers */
#else
#define MOST_HEADS 2
#define SUMS 8
#endif
#define EACH(INDEX, COUNT) _Pragma("GCC unroll 8") for (int INDEX = 0; INDEX < (COUNT); INDEX++)

/* Of so many whole vectors' values. */
static inline float NAME(largest)(const float *values, long count) {
    float most[LANES];
    memcpy(most, values, sizeof most);
    for (long t = LANES; t < count; t += LANES)
        for (int i = 0; i < LANES; i++) most[i] = values[t + i] > most[i] ? values[t + i] : most[i];
    float largest = most[0];
    for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

/* Scores to probabilities; what lies between `past` and the next whole vector is overwritten. */
static void NAME(softmax)(float *scores, long past, const float *sink) {
    const long whole = padded(past);
    for (long t = past; t < whole; t++) scores[t] = -INFINITY;
    float largest = NAME(largest)(scores, whole);
    if (sink && *sink > largest) largest = *sink;
    FLOATS sum = {0};
    for (long t = 0; t < whole; t += LANES) {
        const FLOATS e = NAME(exponential)(NAME(load_f32)(scores + t) - largest);
        *(FLOATS *)(scores + t) = e;
        sum += e;
    }
    const float inverse = 1.0f / (NAME(sum)(sum) + (sink ? expf(*sink - largest) : 0.0f));
    for (long t = 0; t < whole; t += LANES) *(FLOATS *)(scores + t) = NAME(load_f32)(scores + t) * inverse;
}

/* The sum of each of TILE vectors. */
static inline void NAME(sum_each)(const FLOATS *of, float *sums) {
#if VNNI512
    const __m512 a = (__m512)of[0], b = (__m512)of[1], c = (__m512)of[2], d = (__m512)of[3];
    const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif F16C
    const __m256 ab = _mm256_hadd_ps((__m256)of[0], (__m256)of[1]), cd = _mm256_hadd_ps((__m256)of[2], (__m256)of[3]);
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#elif defined(__aarch64__)
    const float32x4_t ab = vpaddq_f32((float32x4_t)of[0], (float32x4_t)of[1]);
    vst1q_f32(sums, vpaddq_f32(ab, vpaddq_f32((float32x4_t)of[2], (float32x4_t)of[3])));
#else
    for (int i = 0; i < TILE; i++) sums[i] = NAME(sum)(of[i]);
#endif
}

/* How many of `heads` heads are computed at once; what is computed for one does not depend on the others. */
static inline int NAME(at_once)(int heads) { return heads >= MOST_HEADS ? MOST_HEADS : heads >= 2 ? 2 : 1; }

/* For keys and values of a kind, `step` of them from one position to the next; queries and outputs of heads are `dim`
   apart, their rows of scores `stride`. */
#define ATTEND(KIND, BYTES)                                                                                 \
    static inline __attribute__((always_inline)) void NAME(score_##KIND)(                                   \
        const float *query, const uint8_t *keys, long step, long count, int dim, const int heads,           \
        float *scores, long stride) {                                                                       \
        for (long t = 0; t < count; t += TILE) {                                                            \
            const uint8_t *key[TILE];                                                                       \
            FLOATS sums[MOST_HEADS * TILE] = {{0}};                                                         \
            EACH(p, TILE) {                                                                                 \
                key[p] = keys + BYTES * step * (t + p < count ? t + p : count - 1);                         \
                const uint8_t *ahead = key[p] + BYTES * AHEAD * step;                                       \
                for (int at = 0; at < BYTES * dim; at += 64) __builtin_prefetch(ahead + at, 0, 3);          \
            }                                                                                               \
            for (int i = 0; i < dim; i += LANES) {                                                          \
                FLOATS here[TILE];                                                                          \
                EACH(p, TILE) here[p] = NAME(load_##KIND)(key[p] + BYTES * i);                              \
                EACH(h, heads) {                                                                            \
                    const FLOATS q = NAME(load_f32)(query + h * dim + i);                                   \
                    EACH(p, TILE) sums[TILE * h + p] += here[p] * q;                                        \
                }                                                                                           \
            }                                                                                               \
            /* `scores` has room for whole tiles. */                                                        \
            EACH(h, heads) NAME(sum_each)(sums + TILE * h, scores + h * stride + t);                        \
        }                                                                                                   \
    }                                                                                                       \
    static void NAME(score_all_##KIND)(const float *query, const uint8_t *keys, long step, long count,      \
                                       int dim, int heads, float *scores, long stride) {                    \
        for (int few; heads; heads -= few, query += few * dim, scores += few * stride) {                    \
            few = NAME(at_once)(heads);                                                                     \
            if (few == MOST_HEADS) NAME(score_##KIND)(query, keys, step, count, dim, MOST_HEADS, scores, stride); \
            else if (few == 2) NAME(score_##KIND)(query, keys, step, count, dim, 2, scores, stride);        \
            else NAME(score_##KIND)(query, keys, step, count, dim, 1, scores, stride);                      \
        }                                                                                                   \
    }                                                                                                       \
    /* out += weights values, `parts` vectors of dimensions of each head held in registers. */              \
    static inline __attribute__((always_inline)) void NAME(mix_##KIND)(                                     \
        const float *weights, long stride, const uint8_t *values, long step, long count, const int heads,   \
        const int parts, float *out, int dim) {                                                             \
        FLOATS sums[SUMS];                                                                                  \
        EACH(h, heads) EACH(i, parts) sums[parts * h + i] = NAME(load_f32)(out + h * dim + LANES * i);      \
        for (long t = 0; t < count; t++) {                                                                  \
            const uint8_t *value = values + BYTES * step * t, *ahead = value + BYTES * AHEAD * step;        \
            for (int at = 0; at < BYTES * LANES * parts; at += 64) __builtin_prefetch(ahead + at, 0, 3);    \
            FLOATS here[SUMS];                                                                              \
            EACH(i, parts) here[i] = NAME(load_##KIND)(value + BYTES * LANES * i);                          \
            EACH(h, heads) EACH(i, parts) sums[parts * h + i] += weights[h * stride + t] * here[i];         \
        }                                                                                                   \
        EACH(h, heads) EACH(i, parts) *(FLOATS *)(out + h * dim + LANES * i) = sums[parts * h + i];         \
    }                                                                                                       \
    static inline __attribute__((always_inline)) void NAME(mix_few_##KIND)(                                 \
        const float *weights, long stride, const uint8_t *values, long step, long count, const int heads,   \
        const int parts, float *out, int dim) {                                                             \
        int i = 0;                                                                                          \
        for (; i + parts * LANES <= dim; i += parts * LANES)                                                \
            NAME(mix_##KIND)(weights, stride, values + BYTES * i, step, count, heads, parts, out + i, dim); \
        for (; i < dim; i += LANES)                                                                         \
            NAME(mix_##KIND)(weights, stride, values + BYTES * i, step, count, heads, 1, out + i, dim);     \
    }                                                                                                       \
    static void NAME(mix_all_##KIND)(const float *weights, long stride, const uint8_t *values, long step,   \
                                     long count, int heads, float *out, int dim) {                          \
        for (int few; heads; heads -= few, weights += few * stride, out += few * dim) {                     \
            few = NAME(at_once)(heads);                                                                     \
            if (few == MOST_HEADS)                                                                          \
                NAME(mix_few_##KIND)(weights, stride, values, step, count, MOST_HEADS, SUMS / MOST_HEADS, out, dim); \
            else if (few == 2) NAME(mix_few_##KIND)(weights, stride, values, step, count, 2, SUMS / 2, out, dim); \
            else NAME(mix_few_##KIND)(weights, stride, values, step, count, 1, SUMS / 2, out, dim);         \
        }                                                                                                   \
    }                                                                                                       \
    static void NAME(attend_##KIND)(const struct attention *a, long row, int kv_head, int first, int heads, \
                                    float *scores) {                                                        \
        const int group = a->heads / a->kv_heads, dim = a->head_dim, batch = (int)(row / a->time);          \
        const long past = a->past, stride = padded(past), head = (long)kv_head * group + first;             \
        const uint8_t *keys = (const uint8_t *)a->keys + BYTES * (batch * a->key_row + kv_head * a->key_head);         \
        const uint8_t *values = (const uint8_t *)a->values + BYTES * (batch * a->value_row + kv_head * a->value_head); \
        const float *bias = a->bias ? a->bias + batch * a->bias_row + row % a->time * past : 0;             \
        const float *query = a->query + row * a->query_row + head * dim;                                    \
        float *out = a->out + row * a->heads * dim + head * dim;                                            \
        const long scales = batch * a->scale_row + kv_head * a->scale_head;                                 \
        for (long t = 0; t < past; t += POSITIONS) {                                                        \
            const long count = past - t < POSITIONS ? past - t : POSITIONS;                                 \
            const uint8_t *here = keys + BYTES * t * a->key_step;                                           \
            NAME(score_all_##KIND)(query, here, a->key_step, count, dim, heads, scores + t, stride);        \
        }                                                                                                   \
        for (int g = 0; g < heads; g++) {                                                                   \
            float *s = scores + g * stride;                                                                 \
            for (long t = 0; t < past; t++) s[t] *= a->scale;                                               \
            if (a->key_scales)                                                                              \
                for (long t = 0; t < past; t++) s[t] *= a->key_scales[scales + t];                          \
            if (a->softcap > 0)                                                                             \
                for (long t = 0; t < past; t++) s[t] = a->softcap * tanhf(s[t] / a->softcap);               \
            if (bias)                                                                                       \
                for (long t = 0; t < past; t++) s[t] += bias[t];                                            \
            NAME(softmax)(s, past, a->sinks ? a->sinks + head + g : 0);                                     \
            if (a->value_scales)                                                                            \
                for (long t = 0; t < past; t++) s[t] *= a->value_scales[scales + t];                        \
        }                                                                                                   \
        memset(out, 0, sizeof(float) * heads * dim);                                                        \
        for (long t = 0; t < past; t += POSITIONS) {                                                        \
            const long count = past - t < POSITIONS ? past - t : POSITIONS;                                 \
            const uint8_t *here = values + BYTES * t * a->value_step;                                       \
            NAME(mix_all_##KIND)(scores + t, stride, here, a->value_step, count, heads, out, dim);          \
        }                                                                                                   \
    }

ATTEND(f32, 4)
ATTEND(bf16, 2)
ATTEND(f16, 2)
ATTEND(i8, 1)

/* A head as int8 times one scale: layers/int8_cache.py. */
static void NAME(round_head)(const float *x, long count, int8_t *q, float *scale) {
    float largest = 0, poison = 0;
    for (long i = 0; i < count; i++) {
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        poison += x[i] * 0.0f;
    }
    *scale = largest / 127.0f + poison;
    const float divisor = largest > 0 ? largest / 127.0f : 1.0f;
    for (long i = 0; i < count; i++) {
        const float shifted = x[i] / divisor + 12582912.0f; /* rounds to an integer, half to even */
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        q[i] = (int8_t)(bits - 0x4B400000u);
    }
}

#undef AHEAD
#undef POSITIONS
#undef ATTEND
#undef TILE
#undef MOST_HEADS
#undef SUMS
#undef EACH
