/* Normals in double from random words, by Box and Muller. Included once for each instruction set. */

/* log x for normal x in (0, 1], to 1 ulp (FreeBSD's e_log.c): x = 2^k (1 + f), sqrt(1/2) < 1 + f < sqrt(2). */
INLINE double NAME(logarithm)(double x) {
    const word given = {.value = x};
    const int64_t shifted = given.bits + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd);
    const word size = {.bits = (shifted & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd};
    /* 2^52 + 2^51 + the exponent, as a double's bits: no conversion, which not every set has. */
    const word whole = {.bits = ((shifted >> 52) & 0x7ff) | 0x4330000000000000};
    const double k = whole.value - (4503599627370496.0 + 1023.0);
    const double f = size.value - 1.0, s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
    double p = 1.479819860511658591e-1;
    p = p * z + 1.531383769920937332e-1;
    p = p * z + 1.818357216161805012e-1;
    p = p * z + 2.222219843214978396e-1;
    p = p * z + 2.857142874366239149e-1;
    p = p * z + 3.999999999940941908e-1;
    p = p * z + 6.666666666666735130e-1;
    return k * 6.93147180369123816490e-1 - ((half - (s * (half + p * z) + k * 1.90821492927058770002e-10)) - f);
}

/* out[j] = r cos a, out[pairs + j] = r sin a, where r = sqrt(-2 log(|words[j] + 1/2| / 2^63)), a = pi words[pairs + j] /
   2^63: sine and cosine to 1 ulp by FreeBSD's polynomials within an eighth of the circle. */
static void NAME(normals)(const int64_t *words, int64_t pairs, double *out) {
    ELEMENTWISE
    for (int64_t j = 0; j < pairs; j++) {
        const double u = fabs((double)words[j] + 0.5) * 0x1p-63;
        const double radius = sqrt(-2.0 * NAME(logarithm)(u));
        const double turn = (double)words[pairs + j] * 0x1p-63;
        const word quarters = {.value = 2.0 * turn + 6755399441055744.0}; /* rounds; the number is in the low bits */
        const double x = (turn - 0.5 * (quarters.value - 6755399441055744.0)) * 3.14159265358979323846, z = x * x;
        double s = 1.58969099521155010221e-10, c = -1.13596475577881948265e-11;
        s = s * z - 2.50507602534068634195e-8, c = c * z + 2.08757232129817482790e-9;
        s = s * z + 2.75573137070700676789e-6, c = c * z - 2.75573143513906633035e-7;
        s = s * z - 1.98412698298579493134e-4, c = c * z + 2.48015872894767294178e-5;
        s = s * z + 8.33333333332248946124e-3, c = c * z - 1.38888888888741095749e-3;
        s = s * z - 1.66666666666666324348e-1, c = c * z + 4.16666666666666019037e-2;
        s = x + x * z * s, c = 1.0 - 0.5 * z + z * z * c;
        const int64_t odd = -(quarters.bits & 1), half = (quarters.bits & 2) << 62;
        const word sine = {.value = s}, cosine = {.value = c};
        /* A quarter on, (cos, sin) is (-sin, cos); half a turn on, both change sign. */
        const word across = {.bits = ((cosine.bits & ~odd) | ((sine.bits ^ INT64_MIN) & odd)) ^ half};
        const word up = {.bits = ((sine.bits & ~odd) | (cosine.bits & odd)) ^ half};
        out[j] = radius * across.value;
        out[pairs + j] = radius * up.value;
    }
}

/* out = (x + scale * noise) * share, the sum in whole units. `all` is 1.5 * 2^52 units: so large a double has no parts of
   one, and so adding it rounds. */
static void NAME(noised)(const double *noise, int64_t n, double scale, double all, double share, const float *x,
                         float *out) {
    ELEMENTWISE
    for (int64_t j = 0; j < n; j++) out[j] = (float)((((double)x[j] + scale * noise[j] + all) - all) * share);
}
