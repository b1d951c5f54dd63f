/* Products of one or a few vectors with quantized or float matrices, and attention for one token, on the CPU.

   No thread is started here: work is given to the OpenMP team that torch already has, through GOMP_parallel, whose
   address the caller passes in (`threads_with`). formats.h says how numbers are stored, kernels.h
   what is computed. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

#define EXPORT __attribute__((visibility("default")))

enum kind { F32, BF16, F16, Q8_0, Q4_0, Q4_K, Q6_K, KINDS };

struct vector {
    const float *values;
    const int8_t *q;
    const float *scales;
};

struct format {
    int values, bytes;
    void (*integers)(const uint8_t *block, int8_t *values, float *scales_of_16, float *minimums_of_32);
};

struct attention {
    const float *query, *bias, *sinks;
    const void *keys, *values;
    float *out;
    long past, key_row, key_head, key_step, value_row, value_head, value_step, bias_row;
    int batch, heads, kv_heads, head_dim;
    float scale, softcap;
};

struct processor {
    const char *label;
    void (*quantize)(const float *x, long columns, int8_t *q, float *scales);
    void (*expand)(const struct format *, const uint8_t *row, long columns, float *wide, uint16_t *narrow);
    void (*rows[KINDS])(const uint8_t *const row[4], long columns, const struct vector *x, float *out);
    void (*attend[3])(const struct attention *, long row, long kv_head, float *scores);
};

#include "formats.h"

#define LABEL "plain C"
#define NAME(name) name##_plain
#define VNNI512 0
#define F16C 0
#include "kernels.h"

#if X86
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

static const struct processor *processor = &processor_plain;

/* Choose the kernels: at most level 2 (AVX-512 VNNI), 1 (AVX2) or 0; returns the name of those chosen. */
EXPORT const char *causallm_choose(int level) {
    processor = &processor_plain;
#if X86
    __builtin_cpu_init();
    if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        processor = &processor_avx2;
    if (level >= 2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        processor = &processor_avx512;
#endif
    return processor->label;
}

typedef void (*parallel)(void (*work)(void *), void *job, unsigned threads, unsigned flags);
static parallel team = 0;

EXPORT void causallm_threads_with(parallel gomp_parallel) { team = gomp_parallel; }

static void run(void (*work)(void *), void *job, int threads) {
    if (team && threads > 1) team(work, job, (unsigned)threads, 0);
    else work(job);
}

struct matrix {
    const uint8_t *weight;
    float *out;
    long rows;
    int kind;
};

struct product {
    const struct matrix *matrices;
    int count;
    long columns, tokens;
    const struct vector *vectors;
    atomic_long next;
    long grain;
};

static long row_bytes(int kind, long columns) {
    if (kind == F32) return 4 * columns;
    if (kind == BF16 || kind == F16) return 2 * columns;
    return columns / FORMATS[kind].values * FORMATS[kind].bytes;
}

static void multiply_rows(const struct product *job, const struct matrix *m, long begin, long end) {
    const long bytes = row_bytes(m->kind, job->columns);
    for (long first = begin; first < end; first += 4) {
        const uint8_t *row[4];
        for (int r = 0; r < 4; r++) row[r] = m->weight + bytes * (first + r < end ? first + r : end - 1);
        const long here = end - first < 4 ? end - first : 4;
        for (long token = 0; token < job->tokens; token++) {
            float result[4];
            processor->rows[m->kind](row, job->columns, job->vectors + token, result);
            memcpy(m->out + token * m->rows + first, result, sizeof(float) * here);
        }
    }
}

static void multiply(void *argument) {
    struct product *job = argument;
    for (;;) {
        long at = atomic_fetch_add(&job->next, job->grain);
        int which = 0;
        while (which < job->count && at >= (job->matrices[which].rows + job->grain - 1) / job->grain * job->grain)
            at -= (job->matrices[which].rows + job->grain - 1) / job->grain * job->grain, which++;
        if (which == job->count) return;
        const long rows = job->matrices[which].rows, end = at + job->grain;
        multiply_rows(job, job->matrices + which, at, end < rows ? end : rows);
    }
}

/* out[token][row] = sum over columns of weight[row] * x[token], for several matrices that read the same x.
   Returns 0, or -1 where memory is short. */
static int causallm_multiply(const struct matrix *matrices, int count, const float *x, long tokens, long columns,
                             int threads) {
    int quantized = 0;
    long rows = 0;
    for (int i = 0; i < count; i++) quantized |= matrices[i].kind > F16, rows += matrices[i].rows;
    const long padded = (columns + 63) / 64 * 64, scales = padded / 32 + 1;
    char *memory = calloc(1, tokens * (sizeof(struct vector) + (quantized ? padded + sizeof(float) * scales : 0)) + 64);
    if (!memory) return -1;
    struct vector *vectors = (struct vector *)memory;
    float *all_scales = (float *)(vectors + tokens);
    int8_t *all_q = (int8_t *)(all_scales + tokens * scales);
    for (long token = 0; token < tokens; token++) {
        vectors[token] = (struct vector){x + token * columns, all_q + token * padded, all_scales + token * scales};
        if (quantized) processor->quantize(x + token * columns, columns, all_q + token * padded, all_scales + token * scales);
    }
    struct product job = {matrices, count, columns, tokens, vectors, 0, 0};
    /* Enough pieces that a slow thread leaves little behind, each a multiple of four rows. */
    job.grain = rows / (8 * threads) / 4 * 4;
    job.grain = job.grain < 8 ? 8 : job.grain > 256 ? 256 : job.grain;
    run(multiply, &job, threads);
    free(memory);
    return 0;
}

/* The same for one matrix. */
EXPORT int causallm_linear(int kind, const void *weight, long rows, long columns, const float *x, long tokens, float *out,
                           int threads) {
    const struct matrix matrix = {weight, out, rows, kind};
    return causallm_multiply(&matrix, 1, x, tokens, columns, threads);
}

struct expansion {
    const uint8_t *packed;
    float *wide;
    uint16_t *narrow;
    long rows, columns;
    int kind;
    atomic_long next;
};

static void expand_rows(void *argument) {
    struct expansion *job = argument;
    const long bytes = row_bytes(job->kind, job->columns);
    for (long begin; (begin = atomic_fetch_add(&job->next, 16)) < job->rows;)
        for (long row = begin; row < begin + 16 && row < job->rows; row++)
            processor->expand(FORMATS + job->kind, job->packed + bytes * row, job->columns,
                              job->wide ? job->wide + row * job->columns : 0,
                              job->narrow ? job->narrow + row * job->columns : 0);
}

/* Packed rows to fp32 (wide) or bf16 (narrow), whichever is not null. */
EXPORT void causallm_expand(int kind, const void *packed, long rows, long columns, float *wide, uint16_t *narrow, int threads) {
    struct expansion job = {packed, wide, narrow, rows, columns, kind, 0};
    run(expand_rows, &job, threads);
}

struct heads {
    const struct attention *attention;
    float *scores;
    int kind;
    atomic_long next, buffer;
};

static void attend_heads(void *argument) {
    struct heads *job = argument;
    const struct attention *a = job->attention;
    const long mine = atomic_fetch_add(&job->buffer, 1), units = (long)a->batch * a->kv_heads;
    float *scores = job->scores + mine * (a->heads / a->kv_heads) * a->past;
    for (long unit; (unit = atomic_fetch_add(&job->next, 1)) < units;)
        processor->attend[job->kind](a, unit / a->kv_heads, unit % a->kv_heads, scores);
}

/* Attention of one token in each row of the batch; strides are in values. Returns 0, or -1 where memory is short. */
EXPORT int causallm_attend(const struct attention *attention, int kind, int threads) {
    const long group = attention->heads / attention->kv_heads;
    float *scores = malloc(sizeof(float) * threads * group * attention->past);
    if (!scores) return -1;
    struct heads job = {attention, scores, kind, 0, 0};
    run(attend_heads, &job, threads);
    free(scores);
    return 0;
}
