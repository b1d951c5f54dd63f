/* Attention of one token: softmax(q k^T) v for some query heads of one key-value head, included by kernels.h once per
   kind of processor. `scores` has room for `heads` rows of `padded(past)` floats. */

#define AHEAD 32 /* positions fetched before they are needed */
#define POSITIONS 64 /* of which keys or values stay in the nearest cache while all heads use them */

static inline float NAME(largest)(const float *values, long count) {
    float largest = values[0];
    for (long i = 1; i < count; i++) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

/* Scores to probabilities; what lies between `past` and the next whole vector is overwritten. */
static void NAME(softmax)(float *scores, long past, const float *sink) {
    const long whole = padded(past);
    for (long t = past; t < whole; t++) scores[t] = -INFINITY;
    float largest = NAME(largest)(scores, past);
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

#define ATTEND(KIND, BYTES)                                                                                 \
    static inline void NAME(score_##KIND)(const float *query, const uint8_t *keys, long step, long count, int dim,     \
                                          float *scores) {                                                  \
        for (long t = 0; t < count; t++) {                                                                  \
            FLOATS sums[IN_32] = {{0}};                                                                     \
            const uint8_t *key = keys + BYTES * t * step;                                                   \
            for (int at = 0; at < BYTES * dim; at += 64) __builtin_prefetch(key + BYTES * AHEAD * step + at, 0, 3);    \
            int i = 0;                                                                                      \
            for (; i + 32 <= dim; i += 32)                                                                  \
                _Pragma("GCC unroll 8") for (int k = 0; k < IN_32; k++)                                     \
                    sums[k] += NAME(load_##KIND)(key + BYTES * (i + LANES * k)) * NAME(load_f32)(query + i + LANES * k); \
            for (; i < dim; i += LANES) sums[0] += NAME(load_##KIND)(key + BYTES * i) * NAME(load_f32)(query + i);     \
            scores[t] = NAME(sum_32)(sums);                                                                 \
        }                                                                                                   \
    }                                                                                                       \
    /* out += weights values, `parts` vectors of dimensions held in registers. */                           \
    static inline __attribute__((always_inline)) void NAME(mix_##KIND)(                                     \
        const float *weights, const uint8_t *values, long step, long count, const int parts, float *out) {  \
        FLOATS sums[8];                                                                                        \
        _Pragma("GCC unroll 8") for (int i = 0; i < parts; i++) sums[i] = NAME(load_f32)(out + LANES * i);  \
        for (long t = 0; t < count; t++) {                                                                  \
            const uint8_t *value = values + BYTES * t * step;                                               \
            for (int at = 0; at < BYTES * LANES * parts; at += 64) __builtin_prefetch(value + BYTES * AHEAD * step + at, 0, 3); \
            _Pragma("GCC unroll 8") for (int i = 0; i < parts; i++)                                         \
                sums[i] += weights[t] * NAME(load_##KIND)(value + BYTES * LANES * i);                       \
        }                                                                                                   \
        _Pragma("GCC unroll 8") for (int i = 0; i < parts; i++) *(FLOATS *)(out + LANES * i) = sums[i];     \
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
            for (int g = 0; g < heads; g++)                                                                 \
                NAME(score_##KIND)(query + g * dim, keys + BYTES * t * a->key_step, a->key_step, count, dim,           \
                                   scores + g * stride + t);                                                \
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
            for (int g = 0; g < heads; g++) {                                                               \
                const float *weights = scores + g * stride + t;                                             \
                int i = 0;                                                                                  \
                for (; i + 8 * LANES <= dim; i += 8 * LANES)                                                \
                    NAME(mix_##KIND)(weights, here + BYTES * i, a->value_step, count, 8, out + g * dim + i);           \
                for (; i + 2 * LANES <= dim; i += 2 * LANES)                                                \
                    NAME(mix_##KIND)(weights, here + BYTES * i, a->value_step, count, 2, out + g * dim + i);           \
                for (; i < dim; i += LANES)                                                                 \
                    NAME(mix_##KIND)(weights, here + BYTES * i, a->value_step, count, 1, out + g * dim + i);           \
            }                                                                                               \
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
