/* Attention of many tokens: softmax(q k^T) v for some tokens and all query heads of one key-value head, POSITIONS keys at
   a time, with the softmax so far (Milakov and Gimelshein 2018, arXiv:1805.02867). Included by kernels.h for
   AVX2 and AVX-512.

   A row is a token and a head. Scores lie as (position, row): a vector holds LANES rows, whose maxima and sums need no
   sums within vectors. No row's result depends on what others are computed with it. */

#define DIM_VECTORS 4
#define ROW_VECTORS 2
#if VNNI512
#define POSITION_TILE 8
#define ROW_TILE 4
#else
#define POSITION_TILE 4
#define ROW_TILE 2
#endif

/* scores[position][row] = keys[position] . queries[.][row] for a tile of positions and of vectors of rows. */
static inline void NAME(score_tile)(const float *keys, const float *queries, int dim, float *scores) {
    FLOATS sums[POSITION_TILE][ROW_VECTORS] = {{{0}}};
    for (int d = 0; d < dim; d++) {
        FLOATS rows[ROW_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < ROW_VECTORS; v++) rows[v] = NAME(load_f32)(queries + d * MANY_ROWS + LANES * v);
#pragma GCC unroll 8
        for (int t = 0; t < POSITION_TILE; t++)
#pragma GCC unroll 2
            for (int v = 0; v < ROW_VECTORS; v++) sums[t][v] += rows[v] * keys[t * dim + d];
    }
#pragma GCC unroll 8
    for (int t = 0; t < POSITION_TILE; t++)
#pragma GCC unroll 2
        for (int v = 0; v < ROW_VECTORS; v++) *(FLOATS *)(scores + t * MANY_ROWS + LANES * v) = sums[t][v];
}

/* out[row] = out[row] * factor[row] + sum of weights[position][row] * values[position] for ROW_TILE rows and `vectors`
   vectors of dimensions. */
static inline __attribute__((always_inline)) void NAME(mix_tile)(const float *weights, const float *values, const float *factor,
                                                                 int dim, const int vectors, float *out) {
    FLOATS sums[ROW_TILE][DIM_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROW_TILE; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = NAME(load_f32)(out + r * dim + LANES * v) * factor[r];
    for (int t = 0; t < MANY_POSITIONS; t++) {
        FLOATS value[DIM_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) value[v] = NAME(load_f32)(values + t * dim + LANES * v);
#pragma GCC unroll 4
        for (int r = 0; r < ROW_TILE; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += value[v] * weights[t * MANY_ROWS + r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROW_TILE; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(FLOATS *)(out + r * dim + LANES * v) = sums[r][v];
}

/* 1 - 2 / (1 + e^2x), which is inexact about zero: there its series. */
static inline FLOATS NAME(tangent)(FLOATS x) {
    const FLOATS square = x * x;
    const FLOATS near = x + x * square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835))));
    const FLOATS far = 1.0f - 2.0f / (1.0f + NAME(exponential)(NAME(at_most)(2 * x, 88.0f)));
    const WORDS small = (WORDS)(square < 0.09f);
    return (FLOATS)(((WORDS)near & small) | ((WORDS)far & ~small));
}

static inline FLOATS NAME(larger_of)(FLOATS a, FLOATS b) {
    const WORDS less = (WORDS)(a < b);
    return (FLOATS)(((WORDS)a & ~less) | ((WORDS)b & less));
}

/* Scores of a block, masked, to weights; the rows' maxima and sums so far are brought up to date, and `factor` is what
   was summed before has to be multiplied with. */
static void NAME(soften)(const struct many_attention *a, long first, const long *limits, int vectors, struct many_room *room) {
    for (int v = 0; v < vectors; v++) {
        float *scores = room->scores + LANES * v;
        FLOATS limit, largest = NAME(load_f32)(room->largest + LANES * v);
        const FLOATS before = largest;
        for (int r = 0; r < LANES; r++) limit[r] = (float)(limits[LANES * v + r] - first);
        for (int t = 0; t < MANY_POSITIONS; t++) {
            FLOATS score = NAME(load_f32)(scores + t * MANY_ROWS);
            if (a->softcap > 0) score = a->softcap * NAME(tangent)(score / a->softcap);
            if (a->bias) score += NAME(load_f32)(room->bias + t * MANY_ROWS + LANES * v);
            const WORDS hidden = (WORDS)(limit <= (float)t);
            score = (FLOATS)(((WORDS)score & ~hidden) | ((WORDS)NAME(splat)(-INFINITY) & hidden));
            *(FLOATS *)(scores + t * MANY_ROWS) = score;
            largest = NAME(larger_of)(largest, score);
        }
        /* Where nothing has been seen yet the largest is -inf, and anything finite serves. */
        const FLOATS base = NAME(larger_of)(largest, NAME(splat)(-3.0e38f)), factor = NAME(exponential)(before - base);
        FLOATS sum = NAME(load_f32)(room->sums + LANES * v) * factor;
        for (int t = 0; t < MANY_POSITIONS; t++) {
            const FLOATS weight = NAME(exponential)(NAME(load_f32)(scores + t * MANY_ROWS) - base);
            *(FLOATS *)(scores + t * MANY_ROWS) = weight;
            sum += weight;
        }
        *(FLOATS *)(room->largest + LANES * v) = largest;
        *(FLOATS *)(room->sums + LANES * v) = sum;
        *(FLOATS *)(room->factor + LANES * v) = factor;
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
    const int vectors = (rows + LANES * ROW_VECTORS - 1) / (LANES * ROW_VECTORS) * ROW_VECTORS;
    long limits[MANY_ROWS] = {0};
    memset(room->queries, 0, sizeof(float) * dim * MANY_ROWS);
    memset(room->out, 0, sizeof(float) * dim * MANY_ROWS);
    for (int r = 0; r < LANES * vectors; r++) {
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
                NAME(score_tile)(room->keys + t * dim, room->queries + LANES * v, dim, room->scores + t * MANY_ROWS + LANES * v);
        if (a->bias) NAME(take_bias)(a, batch, token, tokens, first, count, room->bias);
        NAME(soften)(a, first, limits, vectors, room);
        for (int r = 0; r < rows; r += ROW_TILE) {
            int d = 0;
            for (; d + LANES * DIM_VECTORS <= dim; d += LANES * DIM_VECTORS)
                NAME(mix_tile)(room->scores + r, room->values + d, room->factor + r, dim, DIM_VECTORS, room->out + r * dim + d);
            for (; d < dim; d += LANES)
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
