/* What differs from processor to processor: kernels.h compiled for each kind of it, and the choice at run time. */

enum kind { F32, BF16, F16, Q8_0, Q4_0, Q4_K, Q6_K, Q4_1, Q5_0, Q5_1, IQ4_NL, Q3_K, Q5_K, IQ4_XS, KINDS };

/* Value `index` of an array of floats of some kind. */
static inline void *item(void *array, int kind, long index) { return (char *)array + index * (kind == F32 ? 4 : 2); }

/* A row of activations, as it is and as int8 in blocks of 32. */
struct vector {
    const float *values;
    const int8_t *q;
    const float *scales, *sums;
};

/* Many of them: values as int8 plus 128, `stride` of them in a vector, a scale and a sum for 32. */
struct many_vectors {
    const uint8_t *q;
    const float *scales, *sums;
    long stride;
};

#define PANEL_ROWS 32 /* at most, and VECTORS that are multiplied at once with it */
#define VECTORS 6

#define QUANTIZED 128 /* values that the kernels take at once */
static inline long quantized(long columns) { return (columns + QUANTIZED - 1) / QUANTIZED * QUANTIZED; }

/* Values and bytes of a block, values under one scale, and whether minimums are taken off. */
struct format {
    int values, bytes, scaled, minimums;
};

/* For `time` tokens in each row of a batch, one after the other in query, out and bias; strides are in values. */
struct attention {
    const float *query, *bias, *sinks;
    const void *keys, *values;
    float *out;
    const float *key_scales, *value_scales; /* of a cache of int8: one for a position and head */
    long past, key_row, key_head, key_step, value_row, value_head, value_step, scale_row, scale_head, bias_row, query_row;
    int batch, time, heads, kv_heads, head_dim;
    float scale, softcap;
};

#define MANY_ROWS 96 /* a row is a token and a head */
#define MANY_POSITIONS 64

/* Of many tokens: query (batch, heads, time, head_dim) and out (batch, time, heads, head_dim) of one kind, the cache as
   above, bias (batch or 1, time, past) of another kind. causal_time: how many tokens do not see those after them. */
struct many_attention {
    const void *query, *keys, *values, *bias;
    const float *sinks;
    void *out;
    long past, key_row, key_head, key_step, value_row, value_head, value_step, bias_row, causal_time, time;
    int kind, cache_kind, bias_kind, batch, heads, kv_heads, head_dim;
    float scale, softcap;
};

/* A thread's own memory for MANY_ROWS rows. */
struct many_room {
    float *queries, *keys, *values, *scores, *bias, *out, *query, *largest, *sums, *factor;
};

static inline long padded(long count) { return (count + 15) / 16 * 16; }

enum activation { SILU, GELU_TANH, CLAMPED };

struct processor {
    const char *label;
    void (*quantize)(const float *x, long columns, int8_t *q, float *scales, float *sums);
    void (*widen)(int kind, const void *from, long count, float *to);
    void (*narrow)(int kind, const float *from, long count, void *to);
    void (*normalise)(const float *x, const float *weight, long count, float epsilon, float *to);
    void (*gated)(int activation, const float *gate, const float *up, long count, float *to);
    void (*clamped)(float alpha, float limit, const float *gate_up, long count, float *to);
    void (*expand)(int kind, const uint8_t *row, long columns, float *wide, uint16_t *narrow);
    void (*rows[KINDS])(const uint8_t *const row[4], long columns, const struct vector *x, float *out);
    /* The same for four vectors, out[vector][row]; null where it would be no faster. */
    void (*tiles[KINDS])(const uint8_t *const row[4], long columns, const struct vector *x, float *out);
    /* Rows of packed weights as a panel, and a panel times vectors, out[vector][row]; null where it would be no faster. */
    int panel_rows, vectors;
    void (*panel)(int kind, const uint8_t *weight, long bytes, int count, long columns, char *panel);
    void (*by_panel)(int kind, const char *panel, long columns, const struct many_vectors *x, long first, float *out);
    /* By the cache's kind: floats, or Q8_0 for int8 whose scales, one for all of a head, lie apart. */
    void (*attend[Q8_0 + 1])(const struct attention *, long row, int kv_head, int first, int heads, float *scores);
    void (*round_head)(const float *x, long count, int8_t *q, float *scale);
    /* Of `tokens` tokens with all query heads of a key-value head; null where torch is faster. */
    void (*attend_many)(const struct many_attention *, int batch, int kv_head, long token, int tokens, struct many_room *);
};

#include "formats.h"

#define LABEL "plain C"
#define NAME(name) name##_plain
#define VNNI512 0
#define F16C 0
#include "kernels.h"

#if X86
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define KNOWS_AVX_VNNI 1
#if defined(AVX_VNNI_BY_AVX512) /* the same instruction in AVX-512's encoding, for tests where only that is there */
#define AVX_VNNI "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define DPBUSD _mm256_dpbusd_epi32
#else
#define AVX_VNNI "avx2,fma,f16c,avxvnni"
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif
#define AS_PRAGMA(text) _Pragma(#text)
#define GCC_TARGET(features) AS_PRAGMA(GCC target(features))
#else
#define KNOWS_AVX_VNNI 0
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LABEL "AVX2"
#define NAME(name) name##_avx2
#define VNNI512 0
#define F16C 1
#include "kernels.h"
#if KNOWS_AVX_VNNI
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target(AVX_VNNI))), apply_to = function)
#else
GCC_TARGET(AVX_VNNI)
#endif
#define NAME(name) name##_avxvnni
#define VNNI256 1
#include "panels_avx2.h"
#undef NAME
#endif
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define LABEL "AVX-512 VNNI"
#define NAME(name) name##_avx512
#define VNNI512 1
#define F16C 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define LABEL "NEON dot product"
#define NAME(name) name##_neon
#define VNNI512 0
#define F16C 0
#define NEON_DOT 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int has_dot_product(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & (1 << 20)) != 0; /* HWCAP_ASIMDDP */
#else
    return 0;
#endif
}
#endif

#if X86 && KNOWS_AVX_VNNI
/* AVX2's kernels, with panels of their own for processors that have AVX-VNNI. */
static const struct processor *with_avx_vnni(void) {
    static struct processor chosen;
    chosen = processor_avx2;
    chosen.label = "AVX-VNNI", chosen.panel = panel_avxvnni, chosen.by_panel = by_panel_avxvnni;
    return &chosen;
}

static int has_avx_vnni(void) {
#if defined(AVX_VNNI_BY_AVX512)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#endif
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

static const struct processor *processor = &processor_plain;

/* Choose the kernels: at most level 3 (AVX-512 VNNI), 2 (AVX-VNNI), 1 (AVX2, NEON's dot product) or 0; returns the name of
   those chosen. */
EXPORT const char *causallm_choose(int level) {
    processor = &processor_plain;
#if X86
    __builtin_cpu_init();
    /* All with AVX2 have F16C, for which clang has no such question. */
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) processor = &processor_avx2;
#if KNOWS_AVX_VNNI
    if (level >= 2 && processor == &processor_avx2 && has_avx_vnni()) processor = with_avx_vnni();
#endif
    if (level >= 3 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        processor = &processor_avx512;
#elif defined(__aarch64__)
    if (level >= 1 && has_dot_product()) processor = &processor_neon;
#endif
    return processor->label;
}

/* Whether those chosen have attention of many tokens. */
EXPORT int causallm_attends_many(void) { return processor->attend_many != 0; }

/* Whether those chosen multiply packed weights with many rows as well as with few. */
EXPORT int causallm_has_panels(void) { return processor->panel != 0; }
