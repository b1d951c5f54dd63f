/* Attention of many tokens: softmax(q k^T) v for some tokens and all query heads of one key-value head, POSITIONS keys at
   a time, with the softmax so far (Milakov and Gimelshein 2018, arXiv:1805.02867). Included by kernels.h for
   AVX-512.

   A row is a token and a head. Scores lie as (position, row): a vector holds sixteen rows, whose maxima and sums need no
   sums within vectors. No row's result depends on what others are computed with it. */

#define POSITION_TILE 8
#define ROW_VECTORS 2
#define ROW_TILE 4
#define DIM_VECTORS 4

/* scores[position][row] = keys[position] . queries[.][row] for a tile of positions and of vectors of rows. */
static inline void NAME(score_tile)(const float *keys, const float *queries, int dim, float *scores) {
    V16 sums[POSITION_TILE][ROW_VECTORS] = {{{0}}};
    for (int d = 0; d < dim; d++) {
        V16 rows[ROW_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < ROW_VECTORS; v++) rows[v] = NAME(load_f32)(queries + d * MANY_ROWS + 16 * v);
#pragma GCC unroll 8
        for (int t = 0; t < POSITION_TILE; t++)
#pragma GCC unroll 2
            for (int v = 0; v < ROW_VECTORS; v++) sums[t][v] += rows[v] * keys[t * dim + d];
    }
#pragma GCC unroll 8
    for (int t = 0; t < POSITION_TILE; t++)
#pragma GCC unroll 2
        for (int v = 0; v < ROW_VECTORS; v++) *(V16 *)(scores + t * MANY_ROWS + 16 * v) = sums[t][v];
}

/* out[row] = out[row] * factor[row] + sum of weights[position][row] * values[position] for ROW_TILE rows and `vectors`
   vectors of dimensions. */
static inline __attribute__((always_inline)) void NAME(mix_tile)(const float *weights, const float *values, const float *factor,
                                                                 int dim, const int vectors, float *out) {
    V16 sums[ROW_TILE][DIM_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROW_TILE; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = NAME(load_f32)(out + r * dim + 16 * v) * factor[r];
    for (int t = 0; t < MANY_POSITIONS; t++) {
        V16 value[DIM_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) value[v] = NAME(load_f32)(values + t * dim + 16 * v);
#pragma GCC unroll 4
        for (int r = 0; r < ROW_TILE; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += value[v] * weights[t * MANY_ROWS + r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROW_TILE; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(V16 *)(out + r * dim + 16 * v) = sums[r][v];
}

/* 1 - 2 / (1 + e^2x), which is inexact about zero: there its series. */
static inline V16 NAME(tanh16)(V16 x) {
    const V16 square = x * x;
    const V16 near = x + x * square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835))));
    const V16 far = 1.0f - 2.0f / (1.0f + NAME(exp16)(NAME(at_most)(2 * x, 88.0f)));
    const U32 small = (U32)(square < 0.09f);
    return (V16)(((U32)near & small) | ((U32)far & ~small));
}

static inline V16 NAME(larger_of)(V16 a, V16 b) {
    const U32 less = (U32)(a < b);
    return (V16)(((U32)a & ~less) | ((U32)b & less));
}

/* Scores of a block, masked, to weights; the rows' maxima and sums so far are brought up to date, and `factor` is what
   was summed before has to be multiplied with. */
static void NAME(soften)(const struct many_attention *a, long first, const long *limits, int vectors, struct many_room *room) {
    for (int v = 0; v < vectors; v++) {
        float *scores = room->scores + 16 * v;
        V16 limit, largest = NAME(load_f32)(room->largest + 16 * v);
        const V16 before = largest;
        for (int r = 0; r < 16; r++) limit[r] = (float)(limits[16 * v + r] - first);
        for (int t = 0; t < MANY_POSITIONS; t++) {
            V16 score = NAME(load_f32)(scores + t * MANY_ROWS);
            if (a->softcap > 0) score = a->softcap * NAME(tanh16)(score / a->softcap);
            if (a->bias) score += NAME(load_f32)(room->bias + t * MANY_ROWS + 16 * v);
            const U32 hidden = (U32)(limit <= (float)t);
            score = (V16)(((U32)score & ~hidden) | ((U32)NAME(splat)(-INFINITY) & hidden));
            *(V16 *)(scores + t * MANY_ROWS) = score;
            largest = NAME(larger_of)(largest, score);
        }
        /* Where nothing has been seen yet the largest is -inf, and anything finite serves. */
        const V16 base = NAME(larger_of)(largest, NAME(splat)(-3.0e38f)), factor = NAME(exp16)(before - base);
        V16 sum = NAME(load_f32)(room->sums + 16 * v) * factor;
        for (int t = 0; t < MANY_POSITIONS; t++) {
            const V16 weight = NAME(exp16)(NAME(load_f32)(scores + t * MANY_ROWS) - base);
            *(V16 *)(scores + t * MANY_ROWS) = weight;
            sum += weight;
        }
        *(V16 *)(room->largest + 16 * v) = largest;
        *(V16 *)(room->sums + 16 * v) = sum;
        *(V16 *)(room->factor + 16 * v) = factor;
    }
}

/* Rows of `kind` as fp32, those after `count` up to a whole block as zeros. */
static void NAME(take_block)(int kind, const char *from, long step, long count, int dim, float *to) {
    for (long t = 0; t < count; t++) NAME(widen)(kind, from + t * step * (kind == F32 ? 4 : 2), dim, to + t * dim);
    memset(to + count * dim, 0, sizeof(float) * dim * (MANY_POSITIONS - count));
}

static void NAME(take_bias)(const struct many_attention *a, int batch, long token, int tokens, long first, long count, float *to) {
    const int group = a->heads / a->kv_heads;
    for (int q = 0; q < tokens; q++) {
        float bias[MANY_POSITIONS] = {0};
        NAME(widen)(a->bias_kind, item((void *)a->bias, a->bias_kind, batch * a->bias_row + (token + q) * a->past + first), count, bias);
        for (int t = 0; t < MANY_POSITIONS; t++)
            for (int g = 0; g < group; g++) to[t * MANY_ROWS + q * group + g] = bias[t];
    }
}

/* `tokens` tokens from `token` on: at most MANY_ROWS rows. */
static void NAME(attend_many)(const struct many_attention *a, int batch, int kv_head, long token, int tokens, struct many_room *room) {
    const int group = a->heads / a->kv_heads, dim = a->head_dim, rows = tokens * group;
    const int vectors = (rows + 16 * ROW_VECTORS - 1) / (16 * ROW_VECTORS) * ROW_VECTORS;
    long limits[MANY_ROWS] = {0};
    memset(room->queries, 0, sizeof(float) * dim * MANY_ROWS);
    memset(room->out, 0, sizeof(float) * dim * MANY_ROWS);
    for (int r = 0; r < 16 * vectors; r++) {
        const int q = r / group, head = kv_head * group + r % group;
        room->largest[r] = a->sinks && r < rows ? a->sinks[head] : -INFINITY;
        room->sums[r] = a->sinks && r < rows ? 1 : 0;
        if (r >= rows) continue;
        limits[r] = a->causal_time ? a->past - a->causal_time + token + q + 1 : a->past;
        NAME(widen)(a->kind, item((void *)a->query, a->kind, ((batch * a->heads + head) * a->time + token + q) * dim), dim, room->query);
        for (int d = 0; d < dim; d++) room->queries[d * MANY_ROWS + r] = room->query[d] * a->scale;
    }
    const char *keys = item((void *)a->keys, a->cache_kind, batch * a->key_row + kv_head * a->key_head);
    const char *values = item((void *)a->values, a->cache_kind, batch * a->value_row + kv_head * a->value_head);
    const long bytes = a->cache_kind == F32 ? 4 : 2, seen = limits[rows - 1];
    for (long first = 0; first < seen; first += MANY_POSITIONS) {
        const long count = seen - first < MANY_POSITIONS ? seen - first : MANY_POSITIONS;
        NAME(take_block)(a->cache_kind, keys + first * a->key_step * bytes, a->key_step, count, dim, room->keys);
        NAME(take_block)(a->cache_kind, values + first * a->value_step * bytes, a->value_step, count, dim, room->values);
        for (int v = 0; v < vectors; v += ROW_VECTORS)
            for (int t = 0; t < MANY_POSITIONS; t += POSITION_TILE)
                NAME(score_tile)(room->keys + t * dim, room->queries + 16 * v, dim, room->scores + t * MANY_ROWS + 16 * v);
        if (a->bias) NAME(take_bias)(a, batch, token, tokens, first, count, room->bias);
        NAME(soften)(a, first, limits, vectors, room);
        for (int r = 0; r < rows; r += ROW_TILE) {
            int d = 0;
            for (; d + 16 * DIM_VECTORS <= dim; d += 16 * DIM_VECTORS)
                NAME(mix_tile)(room->scores + r, room->values + d, room->factor + r, dim, DIM_VECTORS, room->out + r * dim + d);
            for (; d < dim; d += 16)
                NAME(mix_tile)(room->scores + r, room->values + d, room->factor + r, dim, 1, room->out + r * dim + d);
        }
    }
    for (int r = 0; r < rows; r++) {
        const float inverse = 1.0f / room->sums[r];
        for (int d = 0; d < dim; d++) room->query[d] = room->out[r * dim + d] * inverse;
        const long row = ((batch * a->time + token + r / group) * a->heads + kv_head * group + r % group) * dim;
        NAME(narrow)(a->kind, room->query, dim, item(a->out, a->kind, row));
    }
}

#undef POSITION_TILE
#undef ROW_VECTORS
#undef ROW_TILE
#undef DIM_VECTORS
