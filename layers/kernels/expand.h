/* Packed rows to fp32 or bf16, sixteen values at a time; included by kernels.h once per kind of processor. */

/* Spelled out: compilers make scalar code of __builtin_convertvector here. */
static inline V16 NAME(signed16)(const int8_t *integers) {
#if VNNI512
    return (V16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)integers)));
#elif F16C
    const __m128i all = _mm_loadu_si128((const __m128i *)integers), last = _mm_srli_si128(all, 8);
    return NAME(joined)(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(last)));
#else
    V16 v;
    for (int i = 0; i < 16; i++) v[i] = integers[i];
    return v;
#endif
}

/* One row of weights; bf16 is rounded half to even. */
static void NAME(expand)(int kind, const uint8_t *row, long columns, float *wide, uint16_t *narrow) {
    const int values = FORMATS[kind].values, bytes = FORMATS[kind].bytes;
    int8_t integers[256];
    float scales[16], minimums[8] = {0};
    for (long at = 0; at < columns; at += values, row += bytes) {
        NAME(integers)[kind](row, integers, scales, minimums);
        for (int i = 0; i < values; i += 16) {
            const V16 found = NAME(signed16)(integers + i) * scales[i / 16] - minimums[i / 32];
            if (wide) *(V16 *)(wide + at + i) = found;
            else *(U16 *)(narrow + at + i) = NAME(to_bf16)(found);
        }
    }
}
