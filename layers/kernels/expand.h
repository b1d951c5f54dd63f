/* Packed rows to fp32 or bf16, a vector at a time; included by kernels.h once per kind of processor. */

/* One row of weights; bf16 is rounded half to even. */
static void NAME(expand)(int kind, const uint8_t *row, long columns, float *wide, uint16_t *narrow) {
    const int values = FORMATS[kind].values, bytes = FORMATS[kind].bytes;
    int8_t integers[256];
    float scales[16], minimums[8] = {0};
    for (long at = 0; at < columns; at += values, row += bytes) {
        NAME(integers)[kind](row, integers, scales, minimums);
        for (int i = 0; i < values; i += LANES) {
            const FLOATS found = NAME(load_i8)(integers + i) * scales[i / 16] - minimums[i / 32];
            if (wide) *(FLOATS *)(wide + at + i) = found;
            else *(SHORTS *)(narrow + at + i) = NAME(to_bf16)(found);
        }
    }
}
