/* The two halves of a decoder block for a few tokens, each as one piece of work for the team: norm, products, what lies
   between them, residual. Between steps the threads wait for each other; short vectors that all need are computed by
   each anew, which is cheaper than another wait. */

#include "half_arguments.h"

enum product_of_half { FIRST, LAST, PRODUCTS };
enum shared_work { HEADS, UNITS, UPS, DOWNS, RESULT, WORKS };
enum step { WHOLE, ROUTE, USE, SUM };

/* What the threads of one half share. */
struct shared {
    const struct half *half;
    struct tokens tokens;
    struct matrix first[3], last[1];
    struct product products[PRODUCTS];
    float *projected, *mixed, *sum;
    atomic_long next[WORKS];
};

/* Halves one after the other, and the memory for any of them. */
struct course {
    struct shared *halves;
    int count;
    enum step step;
    struct team team;
    long scratch_bytes, widest;
    char *scratch;
};

/* A thread's own memory: rows as fp32 and as int8. */
struct own {
    float *x, *rows, *weights;
    struct vector *vectors;
    char *prepared;
    float *scores;
};

static long larger(long a, long b) { return a > b ? a : b; }

#define MORE_VECTORS 64 /* for each token: those of its experts, each rounded up by itself */

static long scratch_bytes(long tokens, long widest, long scores) {
    return tokens * (vector_bytes(widest) + MORE_VECTORS * vector_bytes(1) + 2 * sizeof(float) * widest)
           + sizeof(float) * (widest + scores) + 512;
}

static struct own own_memory(char *at, long tokens, long widest) {
    struct own own;
    own.vectors = aligned(&at, sizeof(struct vector) * tokens * (1 + MORE_VECTORS));
    own.x = aligned(&at, sizeof(float) * tokens * widest);
    own.rows = aligned(&at, sizeof(float) * tokens * widest);
    own.weights = aligned(&at, sizeof(float) * widest);
    own.prepared = aligned(&at, tokens * (vector_bytes(widest) + MORE_VECTORS * vector_bytes(1) - (1 + MORE_VECTORS) * sizeof(struct vector)));
    own.scores = aligned(&at, 0);
    return own;
}

static void normalise(const struct norm *norm, const float *x, long count, float *weights, float *to) {
    processor->widen(norm->weight.kind, norm->weight.values, count, weights);
    if (norm->offset != 0)
        for (long i = 0; i < count; i++) weights[i] += norm->offset;
    processor->normalise(x, weights, count, norm->epsilon, to);
}

/* The step's rows, normalised. */
static void normalise_all(const struct tokens *tokens, const struct norm *norm, const struct own *own) {
    const long count = tokens->batch * tokens->time, dim = tokens->dim;
    processor->widen(tokens->kind, tokens->x, count * dim, own->x);
    for (long t = 0; t < count; t++) normalise(norm, own->x + t * dim, dim, own->weights, own->rows + t * dim);
}

/* The step's rows, normalised and prepared for the products that begin a half. */
static void begin(const struct tokens *tokens, const struct norm *norm, const struct own *own, int packed) {
    normalise_all(tokens, norm, own);
    prepare(own->vectors, own->prepared, own->rows, tokens->batch * tokens->time, tokens->dim, packed);
}

static struct matrix matrix_of(const struct layer *layer, float *out, long stride, const float *add) {
    return (struct matrix){layer->weight, out, layer->rows, layer->kind, stride, layer->bias.values, layer->bias.kind, add};
}

/* Whether the last product can write the result: fp32, and nothing after it but the residual. */
static int writes_result(const struct tokens *tokens, const struct norm *post) {
    return tokens->kind == F32 && !post->weight.values;
}

/* x + [norm](sum) where the last product could not write it. */
static void finish(const struct norm *post, struct shared *shared, const struct own *own, struct team *team) {
    const struct tokens *tokens = &shared->tokens;
    wait_for_all(team);
    const long dim = tokens->dim;
    for (long t; (t = atomic_fetch_add(&shared->next[RESULT], 1)) < tokens->batch * tokens->time;) {
        float *sum = shared->sum + t * dim;
        if (post->weight.values) normalise(post, sum, dim, own->weights, sum);
        for (long i = 0; i < dim; i++) sum[i] += own->x[t * dim + i];
        processor->narrow(tokens->kind, sum, dim, item(tokens->out, tokens->kind, t * dim));
    }
}

/* Rotate dimension i against i + half, as layers/rope.py does; the sines of the first half are negative. */
static void rotate(float *head, int dim, const float *cosines, const float *sines) {
    for (int i = 0; i < dim / 2; i++) {
        const float a = head[i], b = head[i + dim / 2];
        head[i] = a * cosines[i] + b * sines[i];
        head[i + dim / 2] = b * cosines[i + dim / 2] + a * sines[i + dim / 2];
    }
}

static void put(const struct attention_half *half, void *cache, long at, float *scales, long scale, const float *values) {
    if (scales) processor->round_head(values, half->head_dim, (int8_t *)cache + at, scales + scale);
    else processor->narrow(half->cache_kind, values, half->head_dim, item(cache, half->cache_kind, at));
}

static void put_key(const struct attention_half *half, long row, long head, long slot, const float *values) {
    put(half, half->keys, row * half->key_row + head * half->key_head + slot * half->key_step, half->key_scales,
        row * half->scale_row + head * half->scale_head + slot, values);
}

static void put_value(const struct attention_half *half, long row, long head, long slot, const float *values) {
    put(half, half->values, row * half->value_row + head * half->value_head + slot * half->value_step, half->value_scales,
        row * half->scale_row + head * half->scale_head + slot, values);
}

/* Heads of queries and keys normalised and rotated in place; keys and values put into the cache. */
static void prepare_heads(const struct attention_half *half, struct shared *shared, const struct own *own) {
    const long tokens = shared->tokens.batch * shared->tokens.time, heads = half->heads + half->kv_heads, dim = half->head_dim;
    const long row = (half->heads + 2 * half->kv_heads) * dim;
    for (long unit; (unit = atomic_fetch_add(&shared->next[HEADS], 1)) < tokens * heads;) {
        const long t = unit / heads, head = unit % heads, b = t / shared->tokens.time, step = t % shared->tokens.time;
        float *values = shared->projected + t * row + head * dim;
        const struct norm *norm = head < half->heads ? &half->query_norm : &half->key_norm;
        if (norm->weight.values) normalise(norm, values, dim, own->weights, values);
        const long table = b * half->table_row + step * dim;
        rotate(values, (int)dim, half->cosines + table, half->sines + table);
        if (head < half->heads) continue;
        const long kv = head - half->heads, slot = half->slot + step;
        put_key(half, b, kv, slot, values);
        put_value(half, b, kv, slot, values + half->kv_heads * dim);
    }
}

static int any_packed(const struct layer *layers, int count) {
    int packed = 0;
    for (int i = 0; i < count; i++) packed |= layers[i].kind > F16;
    return packed;
}

static void attend_block(struct shared *shared, struct team *team, const struct own *own) {
    const struct attention_half *half = &shared->half->attention;
    const struct tokens *tokens = &shared->tokens;
    const long count = tokens->batch * tokens->time, width = (long)half->heads * half->head_dim;

    begin(tokens, &half->norm, own, any_packed(half->first, 3));
    multiply(&shared->products[FIRST], own->vectors);
    wait_for_all(team);
    prepare_heads(half, shared, own);
    wait_for_all(team);

    const float *sinks = 0;
    if (half->sinks.values) {
        processor->widen(half->sinks.kind, half->sinks.values, half->heads, own->weights);
        sinks = own->weights;
    }
    const struct attention attention = {
        shared->projected, half->bias, sinks, half->keys, half->values, shared->mixed, half->key_scales, half->value_scales,
        half->past, half->key_row, half->key_head, half->key_step, half->value_row, half->value_head, half->value_step,
        half->scale_row, half->scale_head, half->bias_row, width + 2 * half->kv_heads * half->head_dim,
        (int)tokens->batch, (int)tokens->time, half->heads, half->kv_heads, half->head_dim, half->scale, half->softcap,
    };
    attend_units(&attention, half->cache_kind, &shared->next[UNITS], team->size, own->scores);
    wait_for_all(team);

    prepare(own->vectors, own->prepared, shared->mixed, count, width, half->last.kind > F16);
    multiply(&shared->products[LAST], own->vectors);
    if (!writes_result(tokens, &half->post_norm)) finish(&half->post_norm, shared, own, team);
}

static void feed_forward(struct shared *shared, struct team *team, const struct own *own) {
    const struct mlp_half *half = &shared->half->mlp;
    const struct tokens *tokens = &shared->tokens;
    const long count = tokens->batch * tokens->time, hidden = half->first[0].rows;

    begin(tokens, &half->norm, own, any_packed(half->first, 2));
    multiply(&shared->products[FIRST], own->vectors);
    wait_for_all(team);
    for (long t = 0; t < count; t++) {
        const float *gate = shared->projected + 2 * t * hidden;
        processor->gated(half->activation, gate, gate + hidden, hidden, own->rows + t * hidden);
    }
    prepare(own->vectors, own->prepared, own->rows, count, hidden, half->last.kind > F16);
    multiply(&shared->products[LAST], own->vectors);
    if (!writes_result(tokens, &half->post_norm)) finish(&half->post_norm, shared, own, team);
}

#define NARROWED 4096 /* logits at once */

/* Logits of all tokens. Here too what the norm gives is rounded to the tokens' kind: the same head comes after a prompt,
   or from a disk, as a layer by itself, and gives the same logits. */
static void project(struct shared *shared, struct team *team, const struct own *own) {
    const struct head *head = &shared->half->head;
    const struct tokens *tokens = &shared->tokens;
    const long count = tokens->batch * tokens->time, dim = tokens->dim;
    normalise_all(tokens, &head->norm, own);
    if (tokens->kind != F32) {
        processor->narrow(tokens->kind, own->rows, count * dim, own->x);
        processor->widen(tokens->kind, own->x, count * dim, own->rows);
    }
    prepare(own->vectors, own->prepared, own->rows, count, dim, head->layer.kind > F16);
    multiply(&shared->products[FIRST], own->vectors);
    if (tokens->kind == F32) return;
    wait_for_all(team);
    const long all = count * head->layer.rows;
    for (long at; (at = NARROWED * atomic_fetch_add(&shared->next[RESULT], 1)) < all;)
        processor->narrow(tokens->kind, shared->projected + at, all - at < NARROWED ? all - at : NARROWED,
                          item(head->logits, tokens->kind, at));
}

#include "experts.h"

static void take_course(void *argument) {
    struct course *course = argument;
    struct team *team = &course->team;
    const int me = join(team);
    const struct tokens *tokens = &course->halves->tokens;
    const struct own own = own_memory(course->scratch + me * course->scratch_bytes, tokens->batch * tokens->time, course->widest);
    for (int i = 0; i < course->count; i++) {
        struct shared *shared = course->halves + i;
        if (i) wait_for_all(team);
        if (shared->half->kind == ATTENTION) attend_block(shared, team, &own);
        else if (shared->half->kind == MLP) feed_forward(shared, team, &own);
        else if (shared->half->kind == HEAD) project(shared, team, &own);
        else if (course->step == WHOLE) mix_experts(shared, team, &own, me);
        else take_step(course->step, shared, team, &own, me);
    }
}

/* Values between the products of a half for one token of a kind: outputs of the first, and inputs of the last. */
static long first_width(const struct half *half, int kind) {
    const struct attention_half *a = &half->attention;
    if (half->kind == HEAD) return kind == F32 ? 0 : half->head.layer.rows;
    if (half->kind == ATTENTION) return (long)(a->heads + 2 * a->kv_heads) * a->head_dim;
    if (half->kind == MLP) return 2 * half->mlp.first[0].rows;
    return half->moe.count + 2 * half->moe.chosen * half->moe.hidden;
}

static long middle_width(const struct half *half) {
    if (half->kind == HEAD) return 0;
    if (half->kind == ATTENTION) return (long)half->attention.heads * half->attention.head_dim;
    return half->kind == MLP ? half->mlp.first[0].rows : half->moe.chosen * half->moe.hidden;
}

static long score_count(const struct half *half) {
    const struct attention_half *a = &half->attention;
    return half->kind == ATTENTION ? a->heads / a->kv_heads * padded(a->past) : 0;
}

static void lay_out(struct shared *shared, int threads) {
    const struct half *half = shared->half;
    const struct tokens *tokens = &shared->tokens;
    const long count = tokens->batch * tokens->time;
    if (half->kind == HEAD) {
        const struct layer *layer = &half->head.layer;
        shared->first[0] = matrix_of(layer, tokens->kind == F32 ? half->head.logits : shared->projected, layer->rows, 0);
        shared->products[FIRST] = product_of(shared->first, 1, tokens->dim, count, threads);
        return;
    }
    const long width = half->kind == MOE ? half->moe.count : first_width(half, tokens->kind);
    const struct layer *layers = half->kind == ATTENTION ? half->attention.first : half->kind == MLP ? half->mlp.first : &half->moe.router;
    const int matrices = half->kind == ATTENTION ? 3 : half->kind == MLP ? 2 : 1;
    long at = 0;
    for (int i = 0; i < matrices; at += layers[i].rows, i++)
        shared->first[i] = matrix_of(layers + i, shared->projected + at, width, 0);
    shared->products[FIRST] = product_of(shared->first, matrices, tokens->dim, count, threads);
    if (half->kind == MOE) return;
    const struct layer *last = half->kind == ATTENTION ? &half->attention.last : &half->mlp.last;
    const int writes = writes_result(tokens, half->kind == ATTENTION ? &half->attention.post_norm : &half->mlp.post_norm);
    shared->last[0] = matrix_of(last, writes ? tokens->out : shared->sum, tokens->dim, writes ? tokens->x : 0);
    shared->products[LAST] = product_of(shared->last, 1, last->columns, count, threads);
}

static int take(const struct half *halves, int count, enum step step, const struct tokens *tokens, int threads) {
    const long rows = tokens->batch * tokens->time;
    long first = 0, middle = 0, scores = 0;
    for (int i = 0; i < count; i++) {
        first = larger(first, first_width(halves + i, tokens->kind));
        middle = larger(middle, middle_width(halves + i));
        scores = larger(scores, score_count(halves + i));
    }
    struct course course = {.count = count, .step = step, .widest = larger(tokens->dim, middle)};
    course.scratch_bytes = scratch_bytes(rows, course.widest, scores);
    const long floats = rows * (first + middle + tokens->dim);
    char *memory = malloc(count * sizeof(struct shared) + floats * sizeof(float) + threads * course.scratch_bytes);
    if (!memory) return -1;
    float *buffers = (float *)(memory + count * sizeof(struct shared));
    course.halves = (struct shared *)memory;
    course.scratch = (char *)(buffers + floats);
    for (int i = 0; i < count; i++) {
        struct shared *shared = course.halves + i;
        *shared = (struct shared){.half = halves + i, .tokens = *tokens, .projected = buffers,
                                  .mixed = buffers + rows * first, .sum = buffers + rows * (first + middle)};
        if (i) shared->tokens.x = tokens->out;
        lay_out(shared, threads);
    }
    run(take_course, &course, threads);
    free(memory);
    return 0;
}

/* The halves of decoder blocks, each x + [norm](f(norm(x))) of what the one before left, and the head if it is the last;
   keys and values are appended to the caches. Returns 0, or -1 where memory is short. */
EXPORT int causallm_halves(const struct half *halves, int count, const struct tokens *tokens, int threads) {
    return take(halves, count, WHOLE, tokens, threads);
}

/* A mixture of experts in steps: ROUTE once, USE for each part of the experts as they lie in memory, SUM once. Nobody
   works between them, while experts are read. Returns 0, or -1 where memory is short. */
EXPORT int causallm_mixture(int step, const struct half *half, const struct tokens *tokens, int threads) {
    return take(half, 1, (enum step)step, tokens, step == SUM ? 1 : threads);
}
