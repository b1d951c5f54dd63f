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

/* Two blocks at once, one in each half; where the last has no partner its scale is zero. */
static void NAME(rows_q4_0)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), zero = _mm512_setzero_si512();
    const __m512i shift = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                           0x0004000400040004, 0, 0);
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const long blocks = columns / 32;
    for (long b = 0; b < blocks; b += 2) {
        const int next = b + 1 < blocks ? 18 : 0;
        NAME(fetch_ahead)(row, 18 * b);
        const __m512i a = _mm512_loadu_si512(x->q + 32 * b);
        const __m512i offset = _mm512_dpbusd_epi32(zero, eight, a);
        const __m512 scale = NAME(both)(x->scales[b], x->scales[b + 1]);
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + 18 * b, *n = p + next;
            const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p + 2)));
            const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(n + 2)));
            __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            w = _mm512_and_si512(_mm512_srlv_epi16(w, shift), low);
            const __m512i dot = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, w, a), offset);
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(NAME(halves)(p, n), scale), sums[r]);
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

static void NAME(rows_q8_0)(const uint8_t *const row[4], long columns, const struct vector *x, float *out) {
    const __m512i flip = _mm512_set1_epi8((char)0x80), zero = _mm512_setzero_si512();
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const long blocks = columns / 32;
    for (long b = 0; b < blocks; b += 2) {
        const int next = b + 1 < blocks ? 34 : 0;
        NAME(fetch_ahead)(row, 34 * b);
        const __m512i a = _mm512_loadu_si512(x->q + 32 * b);
        const __m512i offset = _mm512_dpbusd_epi32(zero, flip, a);
        const __m512 scale = NAME(both)(x->scales[b], x->scales[b + 1]);
        for (int r = 0; r < 4; r++) {
            const uint8_t *p = row[r] + 34 * b, *n = p + next;
            const __m256i first = _mm256_loadu_si256((const __m256i *)(p + 2));
            const __m256i second = _mm256_loadu_si256((const __m256i *)(n + 2));
            __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            w = _mm512_xor_si512(w, flip);
            const __m512i dot = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, w, a), offset);
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(NAME(halves)(p, n), scale), sums[r]);
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
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
#undef BLOCK_ROWS
#undef ATTEND
