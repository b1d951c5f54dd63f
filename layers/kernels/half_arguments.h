/* What the caller says of the halves of decoder blocks, and of a head; half_arguments.py, mixture_arguments.py,
   part_arguments.py and native_norm.py have the same structs. */

/* A vector of weights stored as `kind`, or none. */
struct stored {
    const void *values;
    int kind;
};

struct layer {
    const uint8_t *weight;
    struct stored bias;
    long rows, columns;
    int kind;
};

struct norm {
    struct stored weight;
    float epsilon, offset; /* offset: what is added to each weight (Gemma: 1) */
};

/* `x` and `out`: (batch, time, dim) of one kind of float; they may be the same. */
struct tokens {
    const void *x;
    void *out;
    long batch, time, dim;
    int kind;
};

struct attention_half {
    struct norm norm, query_norm, key_norm, post_norm;
    struct layer first[3], last; /* queries, keys, values; output */
    struct stored sinks;
    void *keys, *values; /* of the cache */
    float *key_scales, *value_scales; /* of one of int8 */
    long key_row, key_head, key_step, value_row, value_head, value_step, scale_row, scale_head;
    long past, slot, bias_row, table_row;
    const float *bias, *cosines, *sines;
    int cache_kind, heads, kv_heads, head_dim;
    float scale, softcap;
};

struct mlp_half {
    struct norm norm, post_norm;
    struct layer first[2], last; /* gate and up; down */
    int activation;
};

/* Gate and up, or both in alternating rows of the first alone; down. */
struct expert {
    struct layer first[2], last;
};

struct moe_half {
    struct norm norm, post_norm;
    struct layer router;
    const struct expert *const *experts; /* by number, null where one is not in memory */
    int *used;      /* which experts were chosen, (tokens, chosen); null where the caller does not ask */
    float *weights; /* theirs, and */
    float *outputs; /* what they gave, (tokens, chosen, dim): kept between the steps of causallm_mixture, else null */
    long hidden;
    int count, chosen, normalised, activation;
    int packed; /* whether any weight of the router or the experts is */
    float alpha, limit; /* of CLAMPED */
};

/* What follows the last half: the norm, and a score for each of `layer.rows` tokens of the vocabulary. */
struct head {
    struct norm norm;
    struct layer layer;
    void *logits; /* (tokens, rows), of the tokens' kind */
};

enum half_kind { ATTENTION, MLP, MOE, HEAD };

struct half {
    int kind;
    union {
        struct attention_half attention;
        struct mlp_half mlp;
        struct moe_half moe;
        struct head head;
    };
};
