/* Sums over a whole row. Included once for each instruction set. */

/* Products of floats are exact in double, and each of the 32 partial sums has its elements and its place whatever the
   instruction set: all give the same bits. */
static double NAME(sq_norm)(const float *x, int64_t n) {
    double sum[32] = {0};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; j++) sum[j] += (double)x[i + j] * (double)x[i + j];
    for (int j = 0; i + j < n; j++) sum[j] += (double)x[i + j] * (double)x[i + j];
    for (int half = 16; half; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
}
