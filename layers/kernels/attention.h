/* Attention given out to the team: for one token head by head, for many in pieces of MANY_ROWS rows. */

struct heads {
    const struct attention *attention;
    float *scores;
    int kind, threads;
    atomic_long next, buffer;
};

/* The threads' share of the heads; where there are fewer key-value heads than threads, several take one. */
static void attend_units(const struct attention *a, int kind, atomic_long *next, int threads, float *scores) {
    const int group = a->heads / a->kv_heads;
    const long rows = (long)a->batch * a->time;
    int parts = 1;
    while (rows * a->kv_heads * parts < threads && group % (2 * parts) == 0) parts *= 2;
    const int heads = group / parts;
    for (long unit; (unit = atomic_fetch_add(next, 1)) < rows * a->kv_heads * parts;) {
        const int head = (int)(unit / parts % a->kv_heads), part = (int)(unit % parts);
        processor->attend[kind](a, unit / parts / a->kv_heads, head, part * heads, heads, scores);
    }
}

static void attend_heads(void *argument) {
    struct heads *job = argument;
    const struct attention *a = job->attention;
    const long mine = atomic_fetch_add(&job->buffer, 1);
    float *scores = job->scores + mine * (a->heads / a->kv_heads) * padded(a->past);
    attend_units(a, job->kind, &job->next, job->threads, scores);
}

/* Attention over a cache; strides are in values. Returns 0, or -1 where memory is short. */
EXPORT int causallm_attend(const struct attention *attention, int kind, int threads) {
    const long group = attention->heads / attention->kv_heads;
    float *scores = malloc(sizeof(float) * threads * group * padded(attention->past));
    if (!scores) return -1;
    struct heads job = {attention, scores, kind, threads, 0, 0};
    run(attend_heads, &job, threads);
    free(scores);
    return 0;
}

struct many_heads {
    const struct many_attention *attention;
    char *memory;
    long bytes;
    int tokens; /* of a unit */
    atomic_long next, room;
};

static long room_bytes(long dim) {
    return sizeof(float) * ((2 * MANY_ROWS + 2 * MANY_POSITIONS + 1) * dim + (2 * MANY_POSITIONS + 3) * MANY_ROWS) + 11 * 64;
}

static struct many_room room_at(char *at, long dim) {
    const long rows = sizeof(float) * MANY_ROWS, row = sizeof(float) * dim;
    struct many_room room;
    room.queries = aligned(&at, rows * dim), room.out = aligned(&at, rows * dim);
    room.keys = aligned(&at, row * MANY_POSITIONS), room.values = aligned(&at, row * MANY_POSITIONS);
    room.scores = aligned(&at, rows * MANY_POSITIONS), room.bias = aligned(&at, rows * MANY_POSITIONS);
    room.query = aligned(&at, row);
    room.largest = aligned(&at, rows), room.sums = aligned(&at, rows), room.factor = aligned(&at, rows);
    return room;
}

static void attend_many_heads(void *argument) {
    struct many_heads *job = argument;
    const struct many_attention *a = job->attention;
    struct many_room room = room_at(job->memory + atomic_fetch_add(&job->room, 1) * job->bytes, a->head_dim);
    const long pieces = (a->time + job->tokens - 1) / job->tokens, units = pieces * a->batch * a->kv_heads;
    for (long unit; (unit = atomic_fetch_add(&job->next, 1)) < units;) {
        /* The last tokens of all first: they see the most. */
        const long token = (pieces - 1 - unit / (a->batch * a->kv_heads)) * job->tokens, which = unit % (a->batch * a->kv_heads);
        const int here = (int)(a->time - token < job->tokens ? a->time - token : job->tokens);
        processor->attend_many(a, (int)(which / a->kv_heads), (int)(which % a->kv_heads), token, here, &room);
    }
}

/* Attention of many tokens. Returns 0, or -1 where memory is short. */
EXPORT int causallm_attend_many(const struct many_attention *a, int threads) {
    const int group = a->heads / a->kv_heads, tokens = MANY_ROWS / group;
    struct many_heads job = {a, 0, room_bytes(a->head_dim), tokens, 0, 0};
    job.memory = malloc(threads * job.bytes);
    if (!job.memory) return -1;
    run(attend_many_heads, &job, threads);
    free(job.memory);
    return 0;
}
