/* Products of one or a few vectors with quantized or float matrices, and attention for one token, on the CPU.

   No thread is started here: work is given to the OpenMP team that torch already has, through GOMP_parallel, whose
   address the caller passes in (`threads_with`). formats.h says how numbers are stored, kernels.h
   what is computed. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(_WIN32)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#define EXPORT __attribute__((visibility("default")))

#include "processors.h"
#include "team.h"

struct matrix {
    const uint8_t *weight;
    float *out;
    long rows;
    int kind;
    long stride; /* of out, from one token to the next */
    const void *bias;
    int bias_kind;
    const float *add; /* the residual, strided as out */
};

struct product {
    const struct matrix *matrices;
    int count;
    long columns, tokens;
    atomic_long next;
    int threads;
};

static void *aligned(char **at, long bytes) {
    char *start = (char *)(((uintptr_t)*at + 63) & ~(uintptr_t)63);
    *at = start + bytes;
    return start;
}

static long row_bytes(int kind, long columns) {
    if (kind == F32) return 4 * columns;
    if (kind == BF16 || kind == F16) return 2 * columns;
    return columns / FORMATS[kind].values * FORMATS[kind].bytes;
}

static float stored_at(const void *values, int kind, long index) {
    const uint8_t *p = values;
    return kind == F32 ? scalar_f32(p + 4 * index) : kind == BF16 ? scalar_bf16(p + 2 * index) : scalar_f16(p + 2 * index);
}

/* Products of `count` rows from `first` on with one token, with what is to be added. */
static void put_results(const struct matrix *m, long token, long first, int count, const float *results) {
    float *out = m->out + token * m->stride + first;
    const float *add = m->add ? m->add + token * m->stride + first : 0;
    for (int r = 0; r < count; r++) {
        const float bias = m->bias ? stored_at(m->bias, m->bias_kind, first + r) : 0;
        out[r] = results[r] + bias + (add ? add[r] : 0);
    }
}

static void multiply_rows(const struct product *job, const struct matrix *m, const struct vector *vectors, long begin, long end) {
    const long bytes = row_bytes(m->kind, job->columns);
    for (long first = begin; first < end; first += 4) {
        const uint8_t *row[4];
        for (int r = 0; r < 4; r++) row[r] = m->weight + bytes * (first + r < end ? first + r : end - 1);
        const int here = (int)(end - first < 4 ? end - first : 4);
        for (long token = 0; token < job->tokens;) {
            float results[4][4];
            const long together = processor->tiles[m->kind] && token + 4 <= job->tokens ? 4 : 1;
            (together == 4 ? processor->tiles : processor->rows)[m->kind](row, job->columns, vectors + token, results[0]);
            for (long i = 0; i < together; i++, token++) put_results(m, token, first, here, results[i]);
        }
    }
}

/* Rows are multiplied four at a time. */
static long groups_of(long rows) { return (rows + 3) / 4; }

#define LEAST_GROUPS 8 /* of a piece, where all threads find one */

/* The next piece of so many groups for a thread, false where there is none. All take half of what there is, in as many
   pieces as there are threads, then half of the rest, and so on: large ones, for where a piece begins nothing has been
   fetched ahead, and where it ends too much; small ones at last, for memory does not serve all threads alike. */
static int take_piece(atomic_long *next, long groups, int threads, long *begin, long *end) {
    const long share = (groups + threads - 1) / threads, least = share < LEAST_GROUPS ? share : LEAST_GROUPS;
    long piece = atomic_fetch_add(next, 1), from = 0, size;
    for (;; piece -= threads, from += threads * size) {
        size = (groups - from) / (2 * threads);
        if (size < least) size = least;
        if (piece < threads || from >= groups) break;
    }
    *begin = from + piece * size;
    *end = *begin + size < groups ? *begin + size : groups;
    return *begin < groups;
}

/* A thread's share of out[token][row] = sum over columns of weight[row] * x[token], of several matrices one after the
   other. */
static void multiply(struct product *job, const struct vector *vectors) {
    long groups = 0;
    for (int i = 0; i < job->count; i++) groups += groups_of(job->matrices[i].rows);
    for (long begin, end; take_piece(&job->next, groups, job->threads, &begin, &end);)
        for (const struct matrix *m = job->matrices; m < job->matrices + job->count; m++) {
            const long here = groups_of(m->rows), last = end < here ? end : here;
            if (begin < last) multiply_rows(job, m, vectors, begin < 0 ? 0 : 4 * begin, 4 * last < m->rows ? 4 * last : m->rows);
            begin -= here, end -= here;
        }
}

static struct product product_of(const struct matrix *matrices, int count, long columns, long tokens, int threads) {
    return (struct product){matrices, count, columns, tokens, 0, threads};
}

/* Memory that a row takes: its description, int8 values, scales and sums. */
static long vector_bytes(long columns) { return sizeof(struct vector) + quantized(columns) / 32 * (32 + 2 * sizeof(float)); }

/* Rows as the products want them, as int8 too for packed weights; `memory` is for what `vectors` point to. */
static void prepare(struct vector *vectors, char *memory, const float *rows, long tokens, long columns, int packed) {
    const long blocks = quantized(columns) / 32;
    for (long t = 0; t < tokens; t++) {
        float *scales = (float *)memory, *sums = scales + blocks;
        int8_t *q = (int8_t *)(sums + blocks);
        memory = (char *)(q + 32 * blocks);
        vectors[t] = (struct vector){rows + t * columns, q, scales, sums};
        if (packed) processor->quantize(rows + t * columns, columns, q, scales, sums);
    }
}

struct linear {
    struct product product;
    const struct vector *vectors;
};

static void multiply_linear(void *argument) {
    struct linear *job = argument;
    multiply(&job->product, job->vectors);
}

#include "many_vectors.h"

/* Tokens from which on making panels takes less time than it saves: measured, 3072 x 1024 on two cores (Zen 5), for
   the first four formats; the later ones are as Q4_K and Q6_K. More than
   FEW_TOKENS of halves.py, up to which a token gets the same bits as alone. */
static const long MANY[KINDS] = {
    [Q8_0] = 14, [Q4_0] = 14, [Q4_1] = 9, [Q5_0] = 9, [Q5_1] = 9, [IQ4_NL] = 9, [Q3_K] = 9, [Q4_K] = 9, [Q5_K] = 9, [Q6_K] = 9, [IQ4_XS] = 9};

/* fp32 x times a matrix, row by row of it. */
static int few_rows(const struct matrix *matrix, const float *x, long columns, long tokens, int threads) {
    char *memory = malloc(tokens * vector_bytes(columns));
    if (!memory) return -1;
    struct vector *vectors = (struct vector *)memory;
    prepare(vectors, (char *)(vectors + tokens), x, tokens, columns, matrix->kind > F16);
    struct linear job = {product_of(matrix, 1, columns, tokens, threads), vectors};
    run(multiply_linear, &job, threads);
    free(memory);
    return 0;
}

/* out[token][row] = sum over columns of weight[row] * x[token]; x and out are of one kind. Returns 0, or -1 where memory
   is short. */
EXPORT int causallm_linear(int kind, const void *weight, long rows, long columns, const void *x, int x_kind, long tokens,
                           void *out, int threads) {
    const struct matrix matrix = {.weight = weight, .out = out, .rows = rows, .kind = kind, .stride = rows};
    if (kind > F16 && processor->panel && tokens >= MANY[kind]) return many_rows(&matrix, x, x_kind, columns, tokens, out, threads);
    if (x_kind == F32) return few_rows(&matrix, x, columns, tokens, threads);
    float *wide = malloc(sizeof(float) * tokens * (columns + rows));
    if (!wide) return -1;
    struct matrix to_wide = matrix;
    to_wide.out = wide + tokens * columns;
    processor->widen(x_kind, x, tokens * columns, wide);
    const int failed = few_rows(&to_wide, wide, columns, tokens, threads);
    if (!failed) processor->narrow(x_kind, to_wide.out, tokens * rows, out);
    free(wide);
    return failed;
}

struct expansion {
    const uint8_t *packed;
    float *wide;
    uint16_t *narrow;
    long rows, columns;
    int kind;
    atomic_long next;
};

#define EXPANDED 16 /* rows at once */

static void expand_rows(void *argument) {
    struct expansion *job = argument;
    const long bytes = row_bytes(job->kind, job->columns);
    for (long begin; (begin = atomic_fetch_add(&job->next, EXPANDED)) < job->rows;)
        for (long row = begin; row < begin + EXPANDED && row < job->rows; row++)
            processor->expand(job->kind, job->packed + bytes * row, job->columns,
                              job->wide ? job->wide + row * job->columns : 0,
                              job->narrow ? job->narrow + row * job->columns : 0);
}

/* Packed rows to fp32 (wide) or bf16 (narrow), whichever is not null. */
EXPORT void causallm_expand(int kind, const void *packed, long rows, long columns, float *wide, uint16_t *narrow, int threads) {
    struct expansion job = {packed, wide, narrow, rows, columns, kind, 0};
    run(expand_rows, &job, needed(threads, rows, EXPANDED));
}

#include "attention.h"
#include "halves.h"
#include "prompts.h"
