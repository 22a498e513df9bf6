/* Gradients of single examples: norms, and sums of them scaled down. Included once for each instruction set. */

INLINE float NAME(squares)(long n, const float *x) {
    vec sum = {0};
    float lane[V], total = 0;
    const long full = n / V * V;
    for (long j = 0; j < full; j += V) sum += LOAD(x + j) * LOAD(x + j);
    STORE(lane, sum);
    for (int v = 0; v < V; v++) total += lane[v];
    for (long j = full; j < n; j++) total += x[j] * x[j];
    return total;
}

/* out[i] += |row i of b|^2 (|row i of a|^2 if start is WITH_WEIGHT): of a product's gradient b^T a, or a bias's b. */
static void NAME(norm_rows)(const op *o, const float *a, const float *b, float *out) {
    for (long i = 0; i < o->m; i++) {
        const float d = NAME(squares)(o->n, b + i * o->b.ld);
        out[i] += o->start == WITH_WEIGHT ? d * NAME(squares)(o->k, a + i * o->a.ld) : d;
    }
}

/* out[l] += the sum of a[j, l]^2 over j < n, for k lanes. */
static void NAME(norm_last)(const op *o, const float *a, float *out) {
    for (long l = 0; l < o->k; l += V) {
        vec sum = LOAD(out + l);
        for (long j = 0; j < o->n; j++) sum += LOAD(a + j * o->k + l) * LOAD(a + j * o->k + l);
        STORE(out + l, sum);
    }
}

/* Of squares a (m): norms b, and by which factor each gradient is scaled down to alpha, times c. a is cleared. */
static void NAME(factors)(const op *o, float *a, float *b, const float *c, float *out) {
    for (long i = 0; i < o->m; i++) {
        b[i] = sqrtf(a[i]);
        out[i] = c[i] * (b[i] > o->alpha ? o->alpha / b[i] : 1.0f);
    }
    memset(a, 0, 4 * (size_t)o->k);
}

/* Row i of out (m, n) is row i of a times b[i]. */
static void NAME(scale_rows)(const op *o, const float *a, const float *b, float *out) {
    for (long i = 0; i < o->m; i++) {
        ELEMENTWISE
        for (long j = 0; j < o->n; j++) out[i * o->n + j] = a[i * o->a.ld + j] * b[i];
    }
}

/* out[j] is the sum of a[j, l] b[l] over k lanes, those left out for which b is zero. */
static void NAME(weigh_last)(const op *o, const float *a, const float *b, float *out) {
    for (long j = 0; j < o->n; j++) {
        vec sum = {0};
        float lane[V], total = 0;
        for (long l = 0; l < o->k; l += V) {
            const vec weight = LOAD(b + l);
            sum += (vec)((NAME(bits))(LOAD(a + j * o->k + l) * weight) & (weight != 0.0f));
        }
        STORE(lane, sum);
        for (int v = 0; v < V; v++) total += lane[v];
        out[j] = total;
    }
}
