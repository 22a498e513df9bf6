/* The operations of a local step beside the products, and the program's loop. Included once for each instruction set. */

/* e^x to 2 ulp, without branches, so that loops over it become vectors (Cephes: ln 2 in two parts, a degree-6 polynomial).
   NaN stays NaN, above 88.7 it is infinite, below -103.9 zero. */
INLINE float NAME(exponential)(float x) {
    const float clamped = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f; /* rounds to a whole number in the low bits */
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* 2^n in two factors: n may be 128 or below -126. */
    const int whole = (int)(n == n ? n : 0.0f), half = whole / 2, other = whole - half;
    union {
        int i;
        float f;
    } first = {.i = (half + 127) << 23}, second = {.i = (other + 127) << 23};
    return p * first.f * second.f;
}

INLINE float NAME(logistic)(float x) { return 1.0f / (1.0f + NAME(exponential)(-x)); }

/* tanh x = sign * (1 - e) / (1 + e), e = exp(-2|x|); near zero, where that cancels, an odd polynomial (Cephes). */
INLINE float NAME(hyperbolic)(float x) {
    const float size = x < 0 ? -x : x, square = x * x;
    const float e = NAME(exponential)(-2.0f * size), far = (1.0f - e) / (1.0f + e);
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return size < 0.625f ? p * square * x + x : x < 0 ? -far : far;
}

INLINE void NAME(log_softmax)(long n, const float *x, float *out) {
    float top = x[0], sum = 0;
    for (long j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
    for (long j = 0; j < n; j++) out[j] = NAME(exponential)(x[j] - top);
    for (long j = 0; j < n; j++) sum += out[j];
    const float rest = logf(sum); /* not added to the top: beside 1e38 it would be lost */
    for (long j = 0; j < n; j++) out[j] = (x[j] - top) - rest;
}

INLINE void NAME(log_softmax_backward)(long n, const float *g, const float *log_p, float *out) {
    float sum = 0;
    for (long j = 0; j < n; j++) sum += g[j];
    for (long j = 0; j < n; j++) out[j] = g[j] - NAME(exponential)(log_p[j]) * sum;
}

/* rules/optimiser.py has the formula; `number` is beta1, beta2, eps, decay. */
INLINE void NAME(adam)(long n, const float *g, float *m, long ld, const double *number, double t, double lr,
                       float *theta) {
    float *v = m + ld;
    const float beta1 = (float)number[0], rest1 = (float)(1 - number[0]);
    const float beta2 = (float)number[1], rest2 = (float)(1 - number[1]);
    const float eps = (float)number[2], keep = (float)(1 - lr * number[3]);
    const float size = (float)(lr / (1 - pow(number[0], t))), scale = (float)sqrt(1 - pow(number[1], t));
    ELEMENTWISE
    for (long j = 0; j < n; j++) {
        m[j] = beta1 * m[j] + rest1 * g[j];
        v[j] = beta2 * v[j] + rest2 * (g[j] * g[j]);
        theta[j] = keep * theta[j] - size * (m[j] / (sqrtf(v[j]) / scale + eps));
    }
}

static int NAME(run)(const op *program, int64_t length, char *const *base) {
    for (const op *o = program; o < program + length; o++) {
        const float *a = (const float *)(base[o->a.base] + o->a.at);
        const float *b = (const float *)(base[o->b.base] + o->b.at);
        const float *c = (const float *)(base[o->c.base] + o->c.at);
        const void *d = base[o->d.base] + o->d.at;
        float *out = (float *)(base[o->out.base] + o->out.at);
        const long m = o->m, n = o->n;
        switch (o->code) {
        case PRODUCT_NT: NAME(product_nt)(o, a, b, c, out); break;
        case PRODUCT_NN: NAME(product)(o, a, o->a.ld, 1, b, c, out); break;
        case PRODUCT_TN: NAME(product)(o, a, 1, o->a.ld, b, c, out); break;
        case RELU:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] < 0 ? 0 : a[j];
            break;
        case THRESHOLD_BACKWARD:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = b[j] <= o->alpha ? 0 : a[j];
            break;
        case TANH:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = NAME(hyperbolic)(a[j]);
            break;
        case TANH_BACKWARD:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] * (1 - b[j] * b[j]);
            break;
        case SIGMOID:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = NAME(logistic)(a[j]);
            break;
        case SIGMOID_BACKWARD:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] * ((1 - b[j]) * b[j]);
            break;
        case LOG_SOFTMAX:
            for (long i = 0; i < m; i++) NAME(log_softmax)(n, a + i * n, out + i * n);
            break;
        case LOG_SOFTMAX_BACKWARD:
            for (long i = 0; i < m; i++) NAME(log_softmax_backward)(n, a + i * n, b + i * n, out + i * n);
            break;
        case NLL: {
            const int64_t *label = (const int64_t *)b;
            for (long i = 0; i < m; i++) {
                if (label[i] != IGNORED && (label[i] < 0 || label[i] >= n)) return 1;
                out[i] = label[i] == IGNORED ? 0 : -a[i * n + label[i]];
            }
            break;
        }
        case NLL_BACKWARD: {
            const int64_t *label = (const int64_t *)b;
            memset(out, 0, 4 * (size_t)(m * n));
            for (long i = 0; i < m; i++)
                if (label[i] != IGNORED) out[i * n + label[i]] = -a[i];
            break;
        }
        case ADD:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] + o->alpha * b[j];
            break;
        case MULTIPLY:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] * b[j];
            break;
        case SCALE:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] * o->alpha;
            break;
        case SCALE_BY:
            ELEMENTWISE
            for (long j = 0; j < n; j++) out[j] = a[j] * *b;
            break;
        case TICK: *(double *)out += 1; break;
        /* out is theta, a its gradient, b its two moments, c Adam's numbers in double, d the number of the step. */
        case ADAM: NAME(adam)(n, a, (float *)b, o->b.ld, (const double *)c, *(const double *)d, o->alpha, out); break;
        /* Row i of out (m, n) is (row b[i] of a - c) * alpha, b int64: a client's next batch. */
        case GATHER_BYTES:
            for (long i = 0; i < m; i++) {
                const uint8_t *row = (const uint8_t *)a + ((const int64_t *)b)[i] * n;
                for (long j = 0; j < n; j++) out[i * n + j] = ((float)row[j] - *c) * o->alpha;
            }
            break;
        case GATHER_FLOATS:
            for (long i = 0; i < m; i++) {
                const float *row = a + ((const int64_t *)b)[i] * n;
                for (long j = 0; j < n; j++) out[i * n + j] = (row[j] - *c) * o->alpha;
            }
            break;
        case GATHER_LABELS:
            for (long i = 0; i < m; i++) ((int64_t *)out)[i] = ((const int64_t *)a)[((const int64_t *)b)[i]];
            break;
        case TO_LAST: NAME(to_last)(a, m, n, o->k, out); break;
        case TO_ROWS: NAME(to_rows)(a, m, n, o->k, out); break;
        case CONV: NAME(conv_forward)(d, a, b, o->c.at ? c : 0, out); break;
        case CONV_DATA: NAME(conv_data)(d, a, b, out); break;
        case CONV_WEIGHT: NAME(conv_weight)(d, a, b, out, o->c.at ? (float *)c : 0); break;
        case CONV_EACH: NAME(conv_each)(d, a, b, out, o->c.at ? (float *)c : 0); break;
        case NORM_ROWS: NAME(norm_rows)(o, a, b, out); break;
        case NORM_LAST: NAME(norm_last)(o, a, out); break;
        case FACTORS: NAME(factors)(o, (float *)a, (float *)b, c, out); break;
        case SCALE_ROWS: NAME(scale_rows)(o, a, b, out); break;
        case WEIGH_LAST: NAME(weigh_last)(o, a, b, out); break;
        case POOL: NAME(pool)(d, a, out, (float *)b); break;
        case POOL_BACKWARD: NAME(pool_backward)(d, a, b, out); break;
        }
    }
    return 0;
}
