/* A mixture of experts for a few tokens: router, the best few experts of each token, their weighted sum. */

#define MOST_CHOSEN 64
#define MOST_TOKENS 8
#define PIECE_ROWS 64

/* The chosen experts of one token by softmax over all scores, best first, and their weights. */
static void choose_experts(const struct moe_half *half, const float *scores, int *chosen, float *weights) {
    float largest = scores[0], total = 0, sum = 0;
    for (int e = 1; e < half->count; e++) largest = scores[e] > largest ? scores[e] : largest;
    for (int e = 0; e < half->count; e++) total += expf(scores[e] - largest);
    for (int j = 0; j < half->chosen; j++) {
        int best = -1;
        for (int e = 0; e < half->count; e++) {
            int taken = 0;
            for (int i = 0; i < j; i++) taken |= chosen[i] == e;
            if (!taken && (best < 0 || scores[e] > scores[best])) best = e;
        }
        chosen[j] = best;
        weights[j] = expf(scores[best] - largest) / total;
        sum += weights[j];
    }
    if (half->normalised)
        for (int j = 0; j < half->chosen; j++) weights[j] /= sum;
}

/* A thread's share of sum over experts of weight * W_down h; h of the experts are `vectors`. */
static void multiply_down(const struct moe_half *half, const int *chosen, const float *weights, const struct vector *vectors,
                          const float *add, float *out, long dim, atomic_long *next) {
    for (long begin; (begin = atomic_fetch_add(next, PIECE_ROWS)) < dim;) {
        const long count = dim - begin < PIECE_ROWS ? dim - begin : PIECE_ROWS;
        float total[PIECE_ROWS];
        for (long i = 0; i < count; i++) total[i] = add ? add[begin + i] : 0;
        for (int j = 0; j < half->chosen; j++) {
            const struct layer *down = half->experts + 3 * chosen[j] + 2;
            float part[PIECE_ROWS];
            const struct matrix matrix = matrix_of(down, part - begin, 0, 0);
            const struct product product = {.columns = down->columns, .tokens = 1};
            multiply_rows(&product, &matrix, vectors + j, begin, begin + count);
            for (long i = 0; i < count; i++) total[i] += weights[j] * part[i];
        }
        memcpy(out + begin, total, sizeof(float) * count);
    }
}

static void mix_experts(struct shared *shared, struct team *team, const struct own *own, int me) {
    const struct moe_half *half = &shared->half->moe;
    const struct tokens *tokens = &shared->tokens;
    const long count = tokens->batch * tokens->time, dim = tokens->dim, hidden = half->experts[0].rows;
    const long width = half->count + 2 * half->chosen * hidden;
    int chosen[MOST_TOKENS][MOST_CHOSEN];
    float weights[MOST_TOKENS][MOST_CHOSEN];

    begin(tokens, &half->norm, own, half->router.kind > F16 || any_packed(half->experts, 3));
    multiply(&shared->products[FIRST], own->vectors);
    wait_for_all(team);
    for (long t = 0; t < count; t++) {
        float *scores = shared->projected + t * width, *out = scores + half->count;
        choose_experts(half, scores, chosen[t], weights[t]);
        if (me == 0) memcpy(half->used + t * half->chosen, chosen[t], sizeof(int) * half->chosen);
        struct matrix matrices[2 * MOST_CHOSEN];
        for (int i = 0; i < 2 * half->chosen; i++)
            matrices[i] = matrix_of(half->experts + 3 * chosen[t][i / 2] + i % 2, out + i * hidden, 0, 0);
        const struct product product = product_of(matrices, 2 * half->chosen, dim, 1, team->size);
        multiply_shared(&product, own->vectors + t, &shared->expert_next[t]);
    }
    wait_for_all(team);
    const int writes = writes_result(tokens, &half->post_norm);
    for (long t = 0; t < count; t++) {
        const float *out = shared->projected + t * width + half->count;
        for (int j = 0; j < half->chosen; j++)
            processor->gated(half->activation, out + 2 * j * hidden, out + (2 * j + 1) * hidden, hidden, own->rows + j * hidden);
        prepare(own->vectors, own->prepared, own->rows, half->chosen, hidden, any_packed(half->experts, 3));
        float *result = writes ? (float *)tokens->out : shared->sum;
        const float *add = writes ? (const float *)tokens->x + t * dim : 0;
        multiply_down(half, chosen[t], weights[t], own->vectors, add, result + t * dim, dim,
                      &shared->expert_next[MOST_TOKENS + t]);
    }
    if (!writes) finish(&half->post_norm, shared, own, team);
}
