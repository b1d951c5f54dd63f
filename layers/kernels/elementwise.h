/* What lies between the products of a decoder block, over whole vectors; included by kernels.h once per kind of
   processor. Lengths need not fill vectors: the rest is done one by one. */

static inline FLOATS NAME(splat)(float value) {
    FLOATS v = {0};
    return v + value;
}

/* e^x for x <= 88, relative error below 2e-7; 0 below -87.3, where fp32 has no normal number left; not a
   number of none. */
static inline FLOATS NAME(exponential)(FLOATS x) {
    const FLOATS magic = NAME(splat)(12582912.0f);
    const WORDS normal = ~(WORDS)(x < -87.3f);
    const FLOATS clamped = (FLOATS)((WORDS)x & normal);
    const FLOATS shifted = clamped * 1.44269504f + magic;
    const FLOATS n = shifted - magic;
    const FLOATS r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    FLOATS p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const WORDS power = ((WORDS)shifted - 0x4B400000u + 127u) << 23;
    return (FLOATS)((WORDS)(p * (FLOATS)power) & normal);
}

/* `count` values stored as `kind` to fp32. */
static void NAME(widen)(int kind, const void *from, long count, float *to) {
    const uint8_t *p = from;
    if (kind == F32) {
        memcpy(to, from, sizeof(float) * count);
        return;
    }
    long i = 0;
    for (; i + LANES <= count; i += LANES) *(FLOATS *)(to + i) = kind == BF16 ? NAME(load_bf16)(p + 2 * i) : NAME(load_f16)(p + 2 * i);
    for (; i < count; i++) to[i] = kind == BF16 ? scalar_bf16(p + 2 * i) : scalar_f16(p + 2 * i);
}

/* fp32 values stored as `kind`, rounded half to even. */
static void NAME(narrow)(int kind, const float *from, long count, void *to) {
    uint16_t *p = to;
    if (kind == F32) {
        memcpy(to, from, sizeof(float) * count);
        return;
    }
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        const FLOATS v = NAME(load_f32)(from + i);
        if (kind == BF16) *(SHORTS *)(p + i) = NAME(to_bf16)(v);
        else NAME(to_f16)(v, p + i);
    }
    if (i < count) {
        FLOATS v = {0};
        uint16_t rest[LANES];
        memcpy(&v, from + i, sizeof(float) * (count - i));
        if (kind == BF16) *(SHORTS *)rest = NAME(to_bf16)(v);
        else NAME(to_f16)(v, rest);
        memcpy(p + i, rest, 2 * (count - i));
    }
}

/* to = x / sqrt(mean(x^2) + epsilon) * weight. */
static void NAME(normalise)(const float *x, const float *weight, long count, float epsilon, float *to) {
    FLOATS sums[IN_32] = {{0}};
    long i = 0;
    for (; i + 32 <= count; i += 32)
#pragma GCC unroll 8
        for (int k = 0; k < IN_32; k++) {
            const FLOATS v = NAME(load_f32)(x + i + LANES * k);
            sums[k] += v * v;
        }
    float total = NAME(sum_32)(sums);
    for (; i < count; i++) total += x[i] * x[i];
    const float factor = 1.0f / sqrtf(total / (float)count + epsilon);
    for (i = 0; i + LANES <= count; i += LANES) *(FLOATS *)(to + i) = NAME(load_f32)(x + i) * factor * NAME(load_f32)(weight + i);
    for (; i < count; i++) to[i] = x[i] * factor * weight[i];
}

/* The smaller of v and limit; what is not a number stays. */
static inline FLOATS NAME(at_most)(FLOATS v, float limit) {
    const WORDS over = (WORDS)(v > limit);
    return (FLOATS)(((WORDS)v & ~over) | ((WORDS)NAME(splat)(limit) & over));
}

/* v / (1 + e^u). */
static inline FLOATS NAME(damped)(FLOATS v, FLOATS u) { return v / (1.0f + NAME(exponential)(NAME(at_most)(u, 88.0f))); }

static inline FLOATS NAME(activated)(int activation, FLOATS gate) {
    /* gelu(x) = x (1 + tanh(u)) / 2 = x / (1 + e^-2u): arXiv 1606.08415 with the usual cubic u. */
    if (activation == GELU_TANH) return NAME(damped)(gate, -1.5957691216f * (gate + 0.044715f * gate * gate * gate));
    return NAME(damped)(gate, -gate);
}

/* to = activation(gate) * up. */
static void NAME(gated)(int activation, const float *gate, const float *up, long count, float *to) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) *(FLOATS *)(to + i) = NAME(activated)(activation, NAME(load_f32)(gate + i)) * NAME(load_f32)(up + i);
    if (i < count) {
        FLOATS g = {0}, u = {0};
        memcpy(&g, gate + i, sizeof(float) * (count - i));
        memcpy(&u, up + i, sizeof(float) * (count - i));
        const FLOATS result = NAME(activated)(activation, g) * u;
        memcpy(to + i, &result, sizeof(float) * (count - i));
    }
}

/* gpt-oss: gate <= limit, |up| <= limit, to = gate * sigmoid(alpha * gate) * (up + 1); gates and ups alternate. */
static void NAME(clamped)(float alpha, float limit, const float *gate_up, long count, float *to) {
    for (long i = 0; i < count; i += LANES) {
        const int here = count - i < LANES ? (int)(count - i) : LANES;
        FLOATS gate = {0}, up = {0};
        for (int k = 0; k < here; k++) gate[k] = gate_up[2 * (i + k)], up[k] = gate_up[2 * (i + k) + 1];
        gate = NAME(at_most)(gate, limit);
        up = -NAME(at_most)(-NAME(at_most)(up, limit), limit);
        const FLOATS result = NAME(damped)(gate, -alpha * gate) * (up + 1.0f);
        memcpy(to + i, &result, sizeof(float) * here);
    }
}
