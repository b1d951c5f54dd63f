/* The kernels proper, included once per kind of processor with NAME, VNNI512 and F16C set for it.

   Vectors are GCC's and clang's own (vector_size), which become AVX-512, AVX2, NEON or plain code as the target allows;
   only the integer products of the block formats, and fp16, are spelled out per processor. */

typedef float NAME(v16) __attribute__((vector_size(64), aligned(4)));
typedef uint16_t NAME(u16) __attribute__((vector_size(32), aligned(2)));
typedef uint32_t NAME(u32) __attribute__((vector_size(64), aligned(4)));
#define V16 NAME(v16)
#define U16 NAME(u16)
#define U32 NAME(u32)

static inline V16 NAME(load_f32)(const void *p) { return *(const V16 *)p; }

static inline V16 NAME(load_bf16)(const void *p) {
    return (V16)(__builtin_convertvector(*(const U16 *)p, U32) << 16);
}

static inline V16 NAME(load_f16)(const void *p) {
#if VNNI512
    return (V16)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif F16C
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(p));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1));
    V16 v;
    memcpy(&v, &low, 32);
    memcpy((char *)&v + 32, &high, 32);
    return v;
#else
    V16 v;
    for (int i = 0; i < 16; i++) v[i] = half_to_float(((const uint16_t *)p)[i]);
    return v;
#endif
}

static inline float NAME(sum)(V16 v) {
    float halves[16];
    memcpy(halves, &v, 64);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) halves[i] += halves[i + width];
    return halves[0];
}

/* Activations to int8, one scale per 32 values: scale = max |x| / 127, q = round(x / scale), half to even. */
static void NAME(quantize)(const float *x, long columns, int8_t *q, float *scales) {
    for (long block = 0; block < columns / 32; block++) {
        const V16 first = NAME(load_f32)(x + 32 * block), second = NAME(load_f32)(x + 32 * block + 16);
        float largest = 0;
        for (int i = 0; i < 16; i++) {
            const float a = fabsf(first[i]), b = fabsf(second[i]);
            largest = largest > a ? largest : a;
            largest = largest > b ? largest : b;
        }
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        scales[block] = largest / 127.0f;
        for (int i = 0; i < 32; i++) {
            /* Adding 1.5 * 2^23 rounds to an integer as the processor rounds: half to even. */
            const float shifted = x[32 * block + i] * inverse + 12582912.0f;
            int32_t bits;
            memcpy(&bits, &shifted, 4);
            q[32 * block + i] = (int8_t)(bits - 0x4B400000);
        }
    }
}

/* Rows some 6 kB on, which the processor does not foresee where rows are short. */
static inline void NAME(fetch_ahead)(const uint8_t *const row[4], long at) {
    const long four = 4 * (row[1] - row[0]), ahead = four ? (6000 + four - 1) / four * four : 0;
    for (int r = 0; r < 4; r++) __builtin_prefetch(row[r] + ahead + at, 0, 3);
}

/* Four rows of float weights times one vector. */
#define FLOAT_ROWS(KIND, BYTES, SCALAR)                                                                     \
    static void NAME(rows_##KIND)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {     \
        V16 sums[4][2] = {{{0}}};                                                                           \
        long i = 0;                                                                                         \
        for (; i + 32 <= columns; i += 32) {                                                                \
            for (long at = BYTES * i; at < BYTES * (i + 32); at += 64) NAME(fetch_ahead)(row, at);          \
            for (int half = 0; half < 2; half++) {                                                          \
                const V16 value = NAME(load_f32)(x->values + i + 16 * half);                                \
                for (int r = 0; r < 4; r++)                                                                 \
                    sums[r][half] += NAME(load_##KIND)(row[r] + BYTES * (i + 16 * half)) * value;           \
            }                                                                                               \
        }                                                                                                   \
        for (int r = 0; r < 4; r++) {                                                                       \
            float rest = 0;                                                                                 \
            for (long k = i; k < columns; k++) rest += SCALAR(row[r] + BYTES * k) * x->values[k];           \
            out[r] = NAME(sum)(sums[r][0] + sums[r][1]) + rest;                                             \
        }                                                                                                   \
    }

FLOAT_ROWS(f32, 4, scalar_f32)
FLOAT_ROWS(bf16, 2, scalar_bf16)
FLOAT_ROWS(f16, 2, scalar_f16)

#include "block_rows.h"

/* One row of weights to fp32 or, rounded half to even, to bf16. */
static void NAME(expand)(const struct format *format, const uint8_t *row, long columns, float *wide, uint16_t *narrow) {
    for (long b = 0; b < columns / format->values; b++) {
        int8_t values[256];
        float scales[16], minimums[8] = {0}, result[256];
        format->integers(row + format->bytes * b, values, scales, minimums);
        for (int part = 0; part < format->values / 16; part++)
            for (int i = 0; i < 16; i++)
                result[16 * part + i] = scales[part] * values[16 * part + i] - minimums[part / 2];
        const long at = b * format->values;
        if (wide) memcpy(wide + at, result, sizeof(float) * format->values);
        else
            for (int i = 0; i < format->values; i++) {
                uint32_t bits;
                memcpy(&bits, result + i, 4);
                narrow[at + i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
            }
    }
}

/* One query head group against one key-value head: softmax(q k^T) v, in two passes over `past` positions. */
#define ATTEND(KIND, BYTES)                                                                                 \
    static void NAME(attend_##KIND)(const struct attention *a, long row, long kv_head, float *scores) {     \
        const int group = a->heads / a->kv_heads, dim = a->head_dim;                                        \
        const uint8_t *keys = (const uint8_t *)a->keys + BYTES * (row * a->key_row + kv_head * a->key_head);           \
        const uint8_t *values = (const uint8_t *)a->values + BYTES * (row * a->value_row + kv_head * a->value_head);   \
        const float *bias = a->bias ? a->bias + row * a->bias_row : 0;                                      \
        const float *query = a->query + (row * a->heads + kv_head * group) * dim;                           \
        float *out = a->out + (row * a->heads + kv_head * group) * dim;                                     \
        for (long t = 0; t < a->past; t++) {                                                                \
            const uint8_t *key = keys + BYTES * t * a->key_step;                                            \
            for (int g = 0; g < group; g++) {                                                               \
                V16 sum = {0};                                                                              \
                for (int i = 0; i < dim; i += 16)                                                           \
                    sum += NAME(load_##KIND)(key + BYTES * i) * NAME(load_f32)(query + g * dim + i);        \
                float score = NAME(sum)(sum) * a->scale;                                                    \
                if (a->softcap > 0) score = a->softcap * tanhf(score / a->softcap);                         \
                scores[g * a->past + t] = bias ? score + bias[t] : score;                                   \
            }                                                                                               \
        }                                                                                                   \
        for (int g = 0; g < group; g++) {                                                                   \
            float *s = scores + g * a->past, largest = a->sinks ? a->sinks[kv_head * group + g] : -INFINITY;           \
            for (long t = 0; t < a->past; t++) largest = s[t] > largest ? s[t] : largest;                   \
            float total = a->sinks ? expf(a->sinks[kv_head * group + g] - largest) : 0;                     \
            for (long t = 0; t < a->past; t++) s[t] = expf(s[t] - largest), total += s[t];                  \
            for (int i = 0; i < dim; i++) out[g * dim + i] = 0;                                             \
            for (long t = 0; t < a->past; t++) {                                                            \
                const float weight = s[t] / total;                                                          \
                const uint8_t *value = values + BYTES * t * a->value_step;                                  \
                for (int i = 0; i < dim; i += 16)                                                           \
                    *(V16 *)(out + g * dim + i) += weight * NAME(load_##KIND)(value + BYTES * i);           \
            }                                                                                               \
        }                                                                                                   \
    }

ATTEND(f32, 4)
ATTEND(bf16, 2)
ATTEND(f16, 2)

static const struct processor NAME(processor) = {
    LABEL,
    NAME(quantize),
    NAME(expand),
    {NAME(rows_f32), NAME(rows_bf16), NAME(rows_f16), NAME(rows_q8_0), NAME(rows_q4_0), NAME(rows_q4_k), NAME(rows_q6_k)},
    {NAME(attend_f32), NAME(attend_bf16), NAME(attend_f16)},
};

#undef V16
#undef U16
#undef U32
#undef FLOAT_ROWS
#undef ATTEND
#undef LABEL
#undef NAME
#undef VNNI512
#undef F16C
