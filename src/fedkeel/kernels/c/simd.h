/* Products of small matrices and elementwise sums, included once for each instruction set that `native.c` names.

   V floats make a vector; TILE_B x TILE_N dot products, or TILE_M rows x 2 vectors, are summed at a time, as many as
   the set has registers for. Every element's sum runs in an order that depends on the shapes and the set alone. */

typedef float NAME(vec) __attribute__((vector_size(4 * V)));
typedef float NAME(loose) __attribute__((vector_size(4 * V), aligned(4), may_alias));
#define vec NAME(vec)
#define LOAD(p) ((vec) * (const NAME(loose) *)(p))
#define STORE(p, x) (*(NAME(loose) *)(p) = (NAME(loose))(x))

#if V == 16
#define LOAD_PART(p, n) ((vec)_mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), (p)))
#define STORE_PART(p, x, n) _mm512_mask_storeu_ps((p), (__mmask16)((1u << (n)) - 1), (__m512)(x))
#elif V == 8
INLINE __m256i NAME(mask)(long n) {
    static const int ones_then_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones_then_zeros + 8 - n));
}
#define LOAD_PART(p, n) ((vec)_mm256_maskload_ps((p), NAME(mask)(n)))
#define STORE_PART(p, x, n) _mm256_maskstore_ps((p), NAME(mask)(n), (__m256)(x))
#else
INLINE vec NAME(load_part)(const float *p, long n) {
    float t[V] = {0};
    memcpy(t, p, 4 * (size_t)n);
    return LOAD(t);
}
INLINE void NAME(store_part)(float *p, vec x, long n) {
    float t[V];
    STORE(t, x);
    memcpy(p, t, 4 * (size_t)n);
}
#define LOAD_PART NAME(load_part)
#define STORE_PART NAME(store_part)
#endif

/* sums[i] of the lanes of x[i], for V vectors: each pass adds the halves of two, side by side in one. */
#define ADD_HALVES(half)                                                                                              \
    UNROLL(16)                                                                                                        \
    for (int i = 0; i < half; i++)                                                                                    \
        x[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], LANES(half, 0)) +                                      \
               __builtin_shufflevector(x[2 * i], x[2 * i + 1], LANES(half, half));
INLINE vec NAME(sum_lanes)(vec *x) {
#if V == 16
    ADD_HALVES(8)
#endif
#if V >= 8
    ADD_HALVES(4)
#endif
    ADD_HALVES(2)
    ADD_HALVES(1)
    return x[0];
}

/* out (b, n) = start + alpha * x (b, k) w (n, k)^T for b <= TILE_B and n <= TILE_N. */
INLINE void NAME(dots)(const int b, const int n, const op *o, const float *x, const float *w, const float *start,
                       float *out) {
    vec sum[TILE_B * TILE_N] = {0};
    const long ldx = o->a.ld, ldw = o->b.ld, full = o->k / V * V, rest = o->k - full;
    for (long k = 0; k < full; k += V) {
        vec row[TILE_B];
        UNROLL(TILE_B)
        for (int i = 0; i < b; i++) row[i] = LOAD(x + i * ldx + k);
        UNROLL(TILE_N)
        for (int j = 0; j < n; j++) {
            const vec column = LOAD(w + j * ldw + k);
            UNROLL(TILE_B)
            for (int i = 0; i < b; i++) sum[i * TILE_N + j] += row[i] * column;
        }
    }
    if (rest) {
        UNROLL(TILE_N)
        for (int j = 0; j < n; j++) {
            const vec column = LOAD_PART(w + j * ldw + full, rest);
            UNROLL(TILE_B)
            for (int i = 0; i < b; i++) sum[i * TILE_N + j] += LOAD_PART(x + i * ldx + full, rest) * column;
        }
    }
    float total[TILE_B * TILE_N];
    UNROLL(4)
    for (int i = 0; i < TILE_B * TILE_N; i += V) STORE(total + i, NAME(sum_lanes)(sum + i));
    for (int i = 0; i < b; i++)
        for (int j = 0; j < n; j++) {
            float *to = out + i * o->out.ld + j;
            float from = o->start == START_ROW ? start[j] : o->start == START_OUT ? *to : 0;
            if (o->start == START_BLEND) from = o->keep * *to + o->beta * start[i * o->c.ld + j];
            *to = from + o->alpha * total[i * TILE_N + j];
        }
}

static void NAME(product_nt)(const op *o, const float *x, const float *w, const float *start, float *out) {
    for (long j = 0, n; j < o->n; j += n) {
        n = o->n - j < TILE_N ? 1 : TILE_N;
        for (long i = 0, b; i < o->m; i += b) {
            b = o->m - i < TILE_B ? 1 : TILE_B;
            const long row = o->start == START_BLEND ? i * o->c.ld : 0;
            const float *xi = x + i * o->a.ld, *wj = w + j * o->b.ld, *from = start ? start + row + j : 0;
            float *to = out + i * o->out.ld + j;
            if (b == TILE_B && n == TILE_N) NAME(dots)(TILE_B, TILE_N, o, xi, wj, from, to);
            else if (b == TILE_B) NAME(dots)(TILE_B, 1, o, xi, wj, from, to);
            else if (n == TILE_N) NAME(dots)(1, TILE_N, o, xi, wj, from, to);
            else NAME(dots)(1, 1, o, xi, wj, from, to);
        }
    }
}

/* out (m, n) = start + alpha * a (m, k) b (k, n) for m <= TILE_M rows and n = 2 V, V or fewer columns; a's element
   (i, k) lies at a[i * rows + k * columns]. */
INLINE void NAME(strip)(const int m, const long n, const op *o, const float *a, long rows, long columns,
                        const float *b, const float *start, float *out) {
    vec sum[TILE_M][2] = {0};
    for (long k = 0; k < o->k; k++) {
        const vec left = n < V ? LOAD_PART(b + k * o->b.ld, n) : LOAD(b + k * o->b.ld);
        const vec right = n == 2 * V ? LOAD(b + k * o->b.ld + V) : left;
        UNROLL(TILE_M)
        for (int i = 0; i < m; i++) {
            const float x = a[i * rows + k * columns];
            sum[i][0] += x * left;
            if (n == 2 * V) sum[i][1] += x * right;
        }
    }
    UNROLL(TILE_M)
    for (int i = 0; i < m; i++) {
        float *to = out + i * o->out.ld;
        const float *from = o->start == START_ROW ? start : to;
        const vec zero = {0};
        if (o->start == START_BLEND) {
            const float *other = start + i * o->c.ld;
            if (n < V) {
                const vec there = o->keep * LOAD_PART(to, n) + o->beta * LOAD_PART(other, n);
                STORE_PART(to, there + o->alpha * sum[i][0], n);
            } else {
                STORE(to, o->keep * LOAD(to) + o->beta * LOAD(other) + o->alpha * sum[i][0]);
                if (n == 2 * V)
                    STORE(to + V, o->keep * LOAD(to + V) + o->beta * LOAD(other + V) + o->alpha * sum[i][1]);
            }
        } else if (n < V) {
            STORE_PART(to, (o->start ? LOAD_PART(from, n) : zero) + o->alpha * sum[i][0], n);
        } else {
            STORE(to, (o->start ? LOAD(from) : zero) + o->alpha * sum[i][0]);
            if (n == 2 * V) STORE(to + V, (o->start ? LOAD(from + V) : zero) + o->alpha * sum[i][1]);
        }
    }
}

INLINE void NAME(strips)(const int m, const op *o, long n, const float *a, long rows, long columns, const float *b,
                         const float *start, float *out) {
    long j = 0;
    for (; j + 2 * V <= n; j += 2 * V) NAME(strip)(m, 2 * V, o, a, rows, columns, b + j, start + j, out + j);
    for (; j + V <= n; j += V) NAME(strip)(m, V, o, a, rows, columns, b + j, start + j, out + j);
    if (j < n) NAME(strip)(m, n - j, o, a, rows, columns, b + j, start + j, out + j);
}

/* Columns in blocks whose part of b stays in the first cache; in each, tiles of rows; in each, strips of columns. */
static void NAME(product)(const op *o, const float *a, long rows, long columns, const float *b, const float *start,
                          float *out) {
    long block = 4096 / (o->k > 0 ? o->k : 1) / (2 * V) * (2 * V);
    if (block < 2 * V) block = 2 * V;
    for (long j = 0; j < o->n; j += block) {
        const long stop = j + block < o->n ? j + block : o->n;
        for (long i = 0, m; i < o->m; i += m) {
            m = o->m - i < 4 ? 1 : o->m - i < TILE_M ? 4 : TILE_M;
            const long row = o->start == START_BLEND ? i * o->c.ld : 0;
            const float *ai = a + i * rows, *bj = b + j, *from = start ? start + row + j : 0;
            float *to = out + i * o->out.ld + j;
            if (m == TILE_M) NAME(strips)(TILE_M, o, stop - j, ai, rows, columns, bj, from, to);
            else if (m == 4) NAME(strips)(4, o, stop - j, ai, rows, columns, bj, from, to);
            else NAME(strips)(1, o, stop - j, ai, rows, columns, bj, from, to);
        }
    }
}

#undef ADD_HALVES
#undef LOAD_PART
#undef STORE_PART
