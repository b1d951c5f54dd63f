/* out = x W^T for many rows of x and a packed W: the threads first round the rows to int8, then take panels of W. */

struct many {
    const struct matrix *matrix;
    const void *x;
    void *out;
    int kind; /* of x and out */
    long columns, tokens, panel_bytes;
    struct many_vectors vectors;
    char *scratch;
    struct team team;
    atomic_long next_token, next_panel;
};

#define TOKENS_AT_ONCE 8

/* Values of a row, and its scales or sums: whole steps of the kernels, in whole vectors of the processor. */
static long row_stride(long columns) { return (columns + 511) / 512 * 512; }

static long whole_vectors(long tokens) { return (tokens + processor->vectors - 1) / processor->vectors * processor->vectors; }

/* The most that any format needs: for 16 values 8 vectors of them and 6 of sums, scales and minimums. */
static long panel_bytes(long columns) { return (columns + 15) / 16 * 14 * 64; }

static void round_token(const struct many *job, long token, float *room) {
    const long stride = job->vectors.stride, blocks = stride / 32;
    uint8_t *q = (uint8_t *)job->vectors.q + token * stride;
    float *scales = (float *)job->vectors.scales + token * blocks, *sums = (float *)job->vectors.sums + token * blocks;
    if (token >= job->tokens) {
        memset(q, 0, job->columns);
        memset(scales, 0, sizeof(float) * blocks);
        memset(sums, 0, sizeof(float) * blocks);
        return;
    }
    processor->widen(job->kind, item((void *)job->x, job->kind, token * job->columns), job->columns, room);
    processor->quantize(room, job->columns, (int8_t *)q, scales, sums);
    for (long i = 0; i < job->columns; i++) q[i] ^= 128;
}

static void multiply_many(void *argument) {
    struct many *job = argument;
    const struct matrix *m = job->matrix;
    char *panel = job->scratch + join(&job->team) * job->panel_bytes;
    const long whole = whole_vectors(job->tokens), bytes = row_bytes(m->kind, job->columns);
    const int rows = processor->panel_rows, vectors = processor->vectors;
    for (long begin; (begin = atomic_fetch_add(&job->next_token, TOKENS_AT_ONCE)) < whole;)
        for (long t = begin; t < whole && t < begin + TOKENS_AT_ONCE; t++) round_token(job, t, (float *)panel);
    wait_for_all(&job->team);
    for (long first; (first = atomic_fetch_add(&job->next_panel, rows)) < m->rows;) {
        const int here = (int)(m->rows - first < rows ? m->rows - first : rows);
        processor->panel(m->kind, m->weight + bytes * first, bytes, here, job->columns, panel);
        for (long token = 0; token < job->tokens; token += vectors) {
            float results[VECTORS * PANEL_ROWS];
            processor->by_panel(m->kind, panel, job->columns, &job->vectors, token, results);
            for (long t = token; t < token + vectors && t < job->tokens; t++)
                processor->narrow(job->kind, results + (t - token) * rows, here, item(job->out, job->kind, t * m->rows + first));
        }
    }
}

/* Returns 0, or -1 where memory is short. */
static int many_rows(const struct matrix *matrix, const void *x, int x_kind, long columns, long tokens, void *out, int threads) {
    const long stride = row_stride(columns), whole = whole_vectors(tokens), panel = panel_bytes(columns);
    char *memory = malloc(threads * panel + whole * (stride + 2 * sizeof(float) * (stride / 32)) + 64), *at = memory;
    if (!memory) return -1;
    struct many job = {.matrix = matrix, .x = x, .out = out, .kind = x_kind, .columns = columns, .tokens = tokens, .panel_bytes = panel};
    job.scratch = aligned(&at, threads * panel);
    job.vectors = (struct many_vectors){(uint8_t *)at, (float *)(at + whole * stride), (float *)(at + whole * stride) + whole * (stride / 32), stride};
    run(multiply_many, &job, threads);
    free(memory);
    return 0;
}
