/* A mixture of experts for a few tokens: router, the best few experts of each token, their weighted sum. */

#define MOST_CHOSEN 64
#define MOST_TOKENS 8
#define MOST_PAIRS (MOST_TOKENS * MOST_CHOSEN)
#define WEIGHED_ROWS 64
#define OUTPUTS (MOST_PAIRS * 64) /* that a thread keeps until it has those of all experts */

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

/* The tokens that chose one expert: places `first` to `first` + `count` in what all experts gave. */
struct group {
    const struct expert *expert;
    long first, count;
};

/* Tokens and the experts that they chose. Those of one expert have places next to each other, so that its weights are
   read once; groups are of experts in memory alone. */
struct pairs {
    struct group groups[MOST_PAIRS];
    int place[MOST_PAIRS]; /* of a token's choice, (tokens, chosen) */
    int token[MOST_PAIRS]; /* at a place */
    int count;             /* of the groups */
};

static void pair_up(const struct moe_half *half, const int *chosen, int count, struct pairs *pairs) {
    int places = 0;
    pairs->count = 0;
    for (int i = 0; i < count; i++) {
        int seen = 0;
        for (int k = 0; k < i; k++) seen |= chosen[k] == chosen[i];
        if (seen) continue;
        const int first = places;
        for (int k = i; k < count; k++)
            if (chosen[k] == chosen[i]) pairs->token[places] = k / half->chosen, pairs->place[k] = places++;
        const struct expert *expert = half->experts ? half->experts[chosen[i]] : 0;
        if (expert) pairs->groups[pairs->count++] = (struct group){expert, first, places - first};
    }
}

/* Some rows of what experts gave, that at one place `stride` after that at the one before. */
struct piece {
    float *outputs;
    long stride, begin, end;
};

/* Add + sum over a token's experts of weight * output. It is one function for all callers, so that these round alike. */
static __attribute__((noinline)) void weigh(int chosen, const float *weights, const int *places, struct piece piece,
                                            const float *add, float *result) {
    float total[WEIGHED_ROWS];
    const long count = piece.end - piece.begin;
    for (long i = 0; i < count; i++) total[i] = add ? add[piece.begin + i] : 0;
    for (int j = 0; j < chosen; j++)
        for (long i = 0; i < count; i++) total[i] += weights[j] * piece.outputs[places[j] * piece.stride + i];
    memcpy(result + piece.begin, total, sizeof(float) * count);
}

/* Some rows of the results of all tokens, or of what a norm follows. */
static void weigh_all(const struct shared *shared, const struct pairs *pairs, const float *weights, struct piece piece) {
    const struct tokens *tokens = &shared->tokens;
    const int writes = writes_result(tokens, &shared->half->moe.post_norm), chosen = shared->half->moe.chosen;
    for (long t = 0; t < tokens->batch * tokens->time; t++) {
        const float *add = writes ? (const float *)tokens->x + t * tokens->dim : 0;
        float *result = (writes ? (float *)tokens->out : shared->sum) + t * tokens->dim;
        for (struct piece few = piece; few.begin < piece.end; few.begin += WEIGHED_ROWS, few.outputs += WEIGHED_ROWS) {
            few.end = piece.end - few.begin < WEIGHED_ROWS ? piece.end : few.begin + WEIGHED_ROWS;
            weigh(chosen, weights + t * chosen, pairs->place + t * chosen, few, add, result);
        }
    }
}

/* A thread's share of gate and up of the experts in memory; those at one place are a row of `gates`. */
static void multiply_up(struct shared *shared, const struct pairs *pairs, const struct vector *x, float *gates, int threads) {
    const long hidden = shared->half->moe.hidden, matrices = shared->half->moe.activation == CLAMPED ? 1 : 2;
    const long rows = 2 * hidden / matrices, groups = groups_of(rows);
    for (long begin, end; take_piece(&shared->next[UPS], pairs->count * matrices * groups, threads, &begin, &end);)
        for (long next; begin < end; begin = next) {
            const long unit = begin / groups, which = unit % matrices, last = (unit + 1) * groups;
            const struct group *group = pairs->groups + unit / matrices;
            next = end < last ? end : last;
            struct vector vectors[MOST_TOKENS];
            for (long i = 0; i < group->count; i++) vectors[i] = x[pairs->token[group->first + i]];
            const struct product product = {.columns = shared->tokens.dim, .tokens = group->count};
            const struct matrix matrix =
                matrix_of(group->expert->first + which, gates + 2 * hidden * group->first + which * hidden, 2 * hidden, 0);
            const long after = 4 * (next - unit * groups);
            multiply_rows(&product, &matrix, vectors, 4 * (begin - unit * groups), after < rows ? after : rows);
        }
}

/* What the down projections of the experts in memory take, to `own->vectors` by their places. */
static void activate(const struct moe_half *half, const struct pairs *pairs, const float *gates, const struct own *own) {
    const long hidden = half->hidden, bytes = vector_bytes(hidden) - sizeof(struct vector);
    for (const struct group *group = pairs->groups; group < pairs->groups + pairs->count; group++) {
        const long first = group->first;
        for (long place = first; place < first + group->count; place++) {
            const float *gate = gates + 2 * hidden * place;
            if (half->activation == CLAMPED) processor->clamped(half->alpha, half->limit, gate, hidden, own->rows + hidden * place);
            else processor->gated(half->activation, gate, gate + hidden, hidden, own->rows + hidden * place);
        }
        prepare(own->vectors + first, own->prepared + bytes * first, own->rows + hidden * first, group->count, hidden, half->packed);
    }
}

/* Some rows of W_down h, for the experts in memory. */
static void multiply_down(const struct moe_half *half, const struct pairs *pairs, const struct vector *vectors, struct piece piece) {
    for (const struct group *group = pairs->groups; group < pairs->groups + pairs->count; group++) {
        const struct product product = {.columns = half->hidden, .tokens = group->count};
        const struct matrix matrix =
            matrix_of(&group->expert->last, piece.outputs + group->first * piece.stride - piece.begin, piece.stride, 0);
        multiply_rows(&product, &matrix, vectors + group->first, piece.begin, piece.end);
    }
}

/* The experts in memory of all tokens, whose normalised rows are prepared: their sums where there are weights, else the
   outputs that the caller keeps. */
static void use_experts(struct shared *shared, struct team *team, const struct own *own, const int *chosen,
                        const float *weights) {
    const struct moe_half *half = &shared->half->moe;
    const long count = shared->tokens.batch * shared->tokens.time, dim = shared->tokens.dim;
    float *gates = shared->projected + count * half->count, outputs[OUTPUTS];
    const long most = OUTPUTS / (count * half->chosen);
    struct pairs pairs;
    pair_up(half, chosen, (int)count * half->chosen, &pairs);
    multiply_up(shared, &pairs, own->vectors, gates, team->size);
    wait_for_all(team);
    activate(half, &pairs, gates, own);
    for (long begin, end; take_piece(&shared->next[DOWNS], groups_of(dim), team->size, &begin, &end);)
        for (long row = 4 * begin, last = 4 * end < dim ? 4 * end : dim, next; row < last; row = next) {
            next = last - row < most ? last : row + most;
            const struct piece piece = weights ? (struct piece){outputs, most, row, next} : (struct piece){half->outputs + row, dim, row, next};
            multiply_down(half, &pairs, own->vectors, piece);
            if (weights) weigh_all(shared, &pairs, weights, piece);
        }
}

/* Which experts the tokens choose, and their weights. */
static void route(struct shared *shared, struct team *team, const struct own *own, int *chosen, float *weights) {
    const struct moe_half *half = &shared->half->moe;
    const long count = shared->tokens.batch * shared->tokens.time;
    begin(&shared->tokens, &half->norm, own, half->packed);
    multiply(&shared->products[FIRST], own->vectors);
    wait_for_all(team);
    for (long t = 0; t < count; t++)
        choose_experts(half, shared->projected + t * half->count, chosen + t * half->chosen, weights + t * half->chosen);
}

static void mix_experts(struct shared *shared, struct team *team, const struct own *own, int me) {
    const struct moe_half *half = &shared->half->moe;
    const struct tokens *tokens = &shared->tokens;
    int chosen[MOST_PAIRS];
    float weights[MOST_PAIRS];
    route(shared, team, own, chosen, weights);
    if (me == 0 && half->used) memcpy(half->used, chosen, sizeof(int) * tokens->batch * tokens->time * half->chosen);
    use_experts(shared, team, own, chosen, weights);
    if (!writes_result(tokens, &half->post_norm)) finish(&half->post_norm, shared, own, team);
}

/* A step of a mixture whose experts come to lie in memory one after the other. */
static void take_step(enum step step, struct shared *shared, struct team *team, const struct own *own, int me) {
    const struct moe_half *half = &shared->half->moe;
    const struct tokens *tokens = &shared->tokens;
    const long count = tokens->batch * tokens->time, dim = tokens->dim;
    if (step == ROUTE) {
        int chosen[MOST_PAIRS];
        float weights[MOST_PAIRS];
        route(shared, team, own, chosen, weights);
        if (me) return;
        memcpy(half->used, chosen, sizeof(int) * count * half->chosen);
        memcpy(half->weights, weights, sizeof(float) * count * half->chosen);
    } else if (step == USE) {
        begin(tokens, &half->norm, own, half->packed);
        use_experts(shared, team, own, half->used, 0);
    } else {
        struct pairs pairs;
        pair_up(half, half->used, (int)count * half->chosen, &pairs);
        processor->widen(tokens->kind, tokens->x, count * dim, own->x);
        weigh_all(shared, &pairs, half->weights, (struct piece){half->outputs, dim, 0, dim});
        if (!writes_result(tokens, &half->post_norm)) finish(&half->post_norm, shared, own, team);
    }
}
