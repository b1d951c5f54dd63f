/* What lies between the products of a half of a decoder block for many tokens, whose products are left to torch: each
   row by row, given to the team in pieces. */

struct rows_job {
    void (*work)(const struct rows_job *, long row, float *room);
    long rows, grain;
    long room; /* floats that a thread needs of its own */
    atomic_long next;
    atomic_int failed;
    const void *x, *second, *third;
    void *out;
    long width;
    int kind, out_kind, activation;
    const struct norm *norm;
    const struct attention_half *half;
    long time;
};

static void take_rows(void *argument) {
    struct rows_job *job = argument;
    float *room = malloc(sizeof(float) * job->room);
    if (!room) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (long begin; (begin = atomic_fetch_add(&job->next, job->grain)) < job->rows;)
        for (long row = begin; row < begin + job->grain && row < job->rows; row++) job->work(job, row, room);
    free(room);
}

/* Returns 0, or -1 where memory is short. */
static int give_rows(struct rows_job *job, int threads) {
    run(take_rows, job, needed(threads, job->rows, job->grain));
    return atomic_load(&job->failed) ? -1 : 0;
}

static void normalise_row(const struct rows_job *job, long row, float *room) {
    float *x = room, *weights = room + job->width;
    processor->widen(job->kind, item((void *)job->x, job->kind, row * job->width), job->width, x);
    normalise(job->norm, x, job->width, weights, x);
    processor->narrow(job->out_kind, x, job->width, item(job->out, job->out_kind, row * job->width));
}

/* norm(x), row by row. Returns 0, or -1 where memory is short. */
EXPORT int causallm_normalise(const struct norm *norm, const void *x, int kind, long rows, long width, void *out,
                              int out_kind, int threads) {
    struct rows_job job = {.work = normalise_row, .rows = rows, .grain = 8, .room = 2 * width, .x = x, .out = out, .width = width,
                           .kind = kind, .out_kind = out_kind, .norm = norm};
    return give_rows(&job, threads);
}

#define PIECE 1024 /* values of which the activation is worked out at once */

static void gate_piece(const struct rows_job *job, long row, float *room) {
    float *gate = room, *up = room + PIECE;
    const long begin = row * PIECE, count = job->width - begin < PIECE ? job->width - begin : PIECE;
    processor->widen(job->kind, item((void *)job->x, job->kind, begin), count, gate);
    processor->widen(job->kind, item((void *)job->second, job->kind, begin), count, up);
    processor->gated(job->activation, gate, up, count, gate);
    processor->narrow(job->kind, gate, count, item(job->out, job->kind, begin));
}

/* activation(gate) * up for `count` values. Returns 0, or -1 where memory is short. */
EXPORT int causallm_gate(int activation, const void *gate, const void *up, long count, void *out, int kind, int threads) {
    struct rows_job job = {.work = gate_piece, .rows = (count + PIECE - 1) / PIECE, .grain = 16, .room = 2 * PIECE,
                           .x = gate, .second = up, .out = out, .width = count, .kind = kind, .activation = activation};
    return give_rows(&job, threads);
}

/* The heads of one token: queries to `out` (batch, heads, time, head_dim), keys and values to the cache. */
static void turn_token(const struct rows_job *job, long row, float *room) {
    const struct attention_half *half = job->half;
    const long dim = half->head_dim, b = row / job->time, step = row % job->time, slot = half->slot + step;
    const float *cosines = half->cosines + b * half->table_row + step * dim;
    const float *sines = half->sines + b * half->table_row + step * dim;
    float *head = room, *weights = room + dim;
    for (int h = 0; h < half->heads + half->kv_heads; h++) {
        const int key = h - half->heads, is_key = key >= 0;
        const void *from = is_key ? job->second : job->x;
        const long index = is_key ? row * half->kv_heads + key : row * half->heads + h;
        const struct norm *norm = is_key ? &half->key_norm : &half->query_norm;
        processor->widen(job->kind, item((void *)from, job->kind, index * dim), dim, head);
        if (norm->weight.values) normalise(norm, head, dim, weights, head);
        rotate(head, (int)dim, cosines, sines);
        if (is_key) {
            put_key(half, b, key, slot, head);
            processor->widen(job->kind, item((void *)job->third, job->kind, index * dim), dim, head);
            put_value(half, b, key, slot, head);
        } else {
            const long at = ((b * half->heads + h) * job->time + step) * dim;
            processor->narrow(job->kind, head, dim, item(job->out, job->kind, at));
        }
    }
}

/* Queries, keys and values (batch, time, heads * head_dim) of one kind, normalised and rotated. Returns 0, or -1 where
   memory is short. */
EXPORT int causallm_turn(const struct attention_half *half, const void *queries, const void *keys, const void *values,
                         int kind, long batch, long time, void *out, int threads) {
    struct rows_job job = {.work = turn_token, .rows = batch * time, .grain = 4, .room = 2 * half->head_dim, .x = queries, .second = keys,
                           .third = values, .out = out, .kind = kind, .half = half, .time = time};
    return give_rows(&job, threads);
}
