/* Whole rows: norms, inner products, and selection networks over columns. Included once for each instruction set. */

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

#define ints NAME(ints)
typedef int32_t ints __attribute__((vector_size(4 * V)));
typedef double NAME(doubles) __attribute__((vector_size(8 * V)));
#define doubles NAME(doubles)
#if V == 16
#define MINIMUM(x, y) ((vec)_mm512_min_ps((__m512)(x), (__m512)(y)))
#define MAXIMUM(x, y) ((vec)_mm512_max_ps((__m512)(x), (__m512)(y)))
#elif V == 8
#define MINIMUM(x, y) ((vec)_mm256_min_ps((__m256)(x), (__m256)(y)))
#define MAXIMUM(x, y) ((vec)_mm256_max_ps((__m256)(x), (__m256)(y)))
#elif defined(__x86_64__)
#define MINIMUM(x, y) ((vec)_mm_min_ps((__m128)(x), (__m128)(y)))
#define MAXIMUM(x, y) ((vec)_mm_max_ps((__m128)(x), (__m128)(y)))
#else
INLINE vec NAME(choose)(ints first, vec x, vec y) { return (vec)(((ints)x & first) | ((ints)y & ~first)); }
#define MINIMUM(x, y) NAME(choose)((x) < (y), x, y)
#define MAXIMUM(x, y) NAME(choose)((x) > (y), x, y)
#endif

#if V == 16
#define LANES_OF __mmask16
#define UNORDERED(x) _mm512_cmp_ps_mask((__m512)(x), (__m512)(x), _CMP_UNORD_Q)
#define SPOIL(x, bad) ((vec)_mm512_mask_blend_ps(bad, (__m512)(x), _mm512_set1_ps(NAN)))
#else
#define LANES_OF ints
#define UNORDERED(x) ((x) != (x))
#define SPOIL(x, bad) ((vec)((ints)(x) | (bad)))
#endif
#define GROUP 4 /* vectors */

/* V columns of the mean of the `around` values nearest to the median, of values in order (order.py, _around). */
INLINE vec NAME(around)(const network *net, const float **registers, int64_t at) {
    const int64_t n = net->keeps, keep = net->around;
    vec kept[MAX_ROWS];
    for (int64_t j = 0; j < keep; j++) kept[j] = LOAD(registers[net->kept[j]] + at);
    const vec upper = LOAD(registers[net->kept[n / 2]] + at), lower = LOAD(registers[net->kept[(n - 1) / 2]] + at);
    /* Stored in between, so that it is not fused: the same bits in every instruction set. */
    volatile vec low = 0.5f * lower, high = 0.5f * upper;
    const vec middle = n % 2 ? upper : low + high;
    for (int64_t j = 0; j < n - keep; j++) {
        const vec value = LOAD(registers[net->kept[j]] + at), later = LOAD(registers[net->kept[j + keep]] + at);
        const ints nearer = middle - value > later - middle;
        kept[j % keep] = (vec)(((ints)later & nearer) | ((ints)kept[j % keep] & ~nearer));
    }
    doubles sum = __builtin_convertvector(kept[0], doubles);
    for (int64_t j = 1; j < keep; j++) sum += __builtin_convertvector(kept[j], doubles);
    return __builtin_convertvector(sum * (1.0 / (double)keep), vec);
}

/* A step of a network fetches its share of the columns to come: all at once they would wait for each other. `due` are
   the lines that the steps so far should have fetched beyond `line`, times the number of steps. */
INLINE void NAME(fetch)(const network *net, const float **registers, int64_t ahead, int64_t *line, int64_t *due) {
    for (*due += net->rows * (WIDTH / 16); *due >= net->count; *due -= net->count, ++*line)
        __builtin_prefetch(registers[*line / (WIDTH / 16)] + ahead + *line % (WIDTH / 16) * 16, 0, 2);
}

/* WIDTH columns sorted, each value with its row's weight in the register of the same number of `weights` (WIDTH apart),
   then their weighted mean without a share of the weight at each end. */
INLINE void NAME(weighted_block)(const network *net, const float **registers, int64_t ahead, float *weights,
                                 float *out) {
    for (int64_t i = 0; i < net->rows; i++)
        for (int64_t j = 0; j < WIDTH; j++) weights[i * WIDTH + j] = net->weights[i];
    int64_t line = 0, due = 0;
    for (const int32_t *s = net->steps; s < net->steps + 4 * net->count; s += 4) {
        NAME(fetch)(net, registers, ahead, &line, &due);
        const float *a = registers[s[0]], *b = registers[s[1]], *p = weights + s[0] * WIDTH, *q = weights + s[1] * WIDTH;
        float *low = (float *)registers[s[2]], *high = (float *)registers[s[3]];
        float *light = weights + s[2] * WIDTH, *heavy = weights + s[3] * WIDTH;
        UNROLL(2)
        for (int64_t j = 0; j < WIDTH; j += V) {
            const vec x = LOAD(a + j), y = LOAD(b + j);
            const ints u = (ints)LOAD(p + j), v = (ints)LOAD(q + j), keep = x < y;
            STORE(low + j, MINIMUM(x, y));
            STORE(high + j, MAXIMUM(x, y));
            STORE(light + j, (vec)((u & keep) | (v & ~keep)));
            STORE(heavy + j, (vec)((v & keep) | (u & ~keep)));
        }
    }
    const float first = net->weights[net->rows], last = 1 - first;
    const vec zero = {0};
    for (int64_t j = 0; j < WIDTH; j += V) {
        vec below = zero;
        doubles sum = {0}, whole = {0};
        for (int64_t i = 0; i < net->keeps; i++) {
            const vec x = LOAD(registers[net->kept[i]] + j), upto = below + LOAD(weights + net->kept[i] * WIDTH + j);
            const vec left = MINIMUM(upto, zero + last) - MAXIMUM(below, zero + first);
            const ints counts = left > zero + ROUNDING; /* what is cut off stays out, however large */
            const vec inside = (vec)((ints)left & counts), value = (vec)((ints)x & counts);
            sum += __builtin_convertvector(value, doubles) * __builtin_convertvector(inside, doubles);
            whole += __builtin_convertvector(inside, doubles);
            below = upto;
        }
        STORE(out + j, __builtin_convertvector(sum / whole, vec));
    }
}

/* WIDTH columns through a network: `registers` are the rows, then working rows. */
static void NAME(select_block)(const network *net, const float **registers, int64_t ahead, float *weights, float *out) {
    LANES_OF bad[WIDTH / V]; /* where a row holds a NaN: minima and maxima would lose it */
    for (int64_t j = 0; j < WIDTH; j += GROUP * V) {
        LANES_OF found[GROUP] = {0};
        for (int64_t i = 0; i < net->rows; i++) {
            const float *row = registers[i] + j;
            UNROLL(GROUP)
            for (int g = 0; g < GROUP; g++) {
                const vec x = LOAD(row + g * V);
                found[g] |= UNORDERED(x);
            }
        }
        UNROLL(GROUP)
        for (int g = 0; g < GROUP; g++) bad[j / V + g] = found[g];
    }
    if (weights) {
        NAME(weighted_block)(net, registers, ahead, weights, out);
        for (int64_t j = 0; j < WIDTH; j += V) STORE(out + j, SPOIL(LOAD(out + j), bad[j / V]));
        return;
    }
    int64_t line = 0, due = 0;
    for (const int32_t *s = net->steps; s < net->steps + 4 * net->count; s += 4) {
        NAME(fetch)(net, registers, ahead, &line, &due);
        const float *a = registers[s[0]], *b = registers[s[1]];
        float *low = s[2] >= 0 ? (float *)registers[s[2]] : 0, *high = s[3] >= 0 ? (float *)registers[s[3]] : 0;
        if (low && high) {
            UNROLL(4)
            for (int64_t j = 0; j < WIDTH; j += V) {
                const vec x = LOAD(a + j), y = LOAD(b + j);
                STORE(low + j, MINIMUM(x, y));
                STORE(high + j, MAXIMUM(x, y));
            }
        } else if (low) {
            UNROLL(4)
            for (int64_t j = 0; j < WIDTH; j += V) {
                const vec x = LOAD(a + j), y = LOAD(b + j);
                STORE(low + j, MINIMUM(x, y));
            }
        } else {
            UNROLL(4)
            for (int64_t j = 0; j < WIDTH; j += V) {
                const vec x = LOAD(a + j), y = LOAD(b + j);
                STORE(high + j, MAXIMUM(x, y));
            }
        }
    }
    if (net->around) {
        for (int64_t j = 0; j < WIDTH; j += V) STORE(out + j, SPOIL(NAME(around)(net, registers, j), bad[j / V]));
        return;
    }
    const double share = 1.0 / (double)net->keeps;
    const int32_t *kept = net->kept;
    for (int64_t j = 0; j < WIDTH; j += GROUP * V) {
        vec middle[GROUP];
        UNROLL(GROUP)
        for (int g = 0; g < GROUP; g++) middle[g] = LOAD(registers[kept[0]] + j + g * V);
        if (net->keeps > 1) {
            doubles sum[GROUP];
            UNROLL(GROUP)
            for (int g = 0; g < GROUP; g++) sum[g] = __builtin_convertvector(middle[g], doubles);
            for (int64_t i = 1; i < net->keeps; i++) {
                const float *row = registers[kept[i]] + j;
                UNROLL(GROUP)
                for (int g = 0; g < GROUP; g++) sum[g] += __builtin_convertvector(LOAD(row + g * V), doubles);
            }
            UNROLL(GROUP)
            for (int g = 0; g < GROUP; g++) middle[g] = __builtin_convertvector(sum[g] * share, vec);
        }
        UNROLL(GROUP)
        for (int g = 0; g < GROUP; g++) STORE(out + j + g * V, SPOIL(middle[g], bad[j / V + g]));
    }
}

static void NAME(select)(const network *net, const float *const *rows, int64_t start, int64_t stop,
                         const float **registers, float *scratch, float *weights) {
    const int64_t n = net->rows;
    float *spare = scratch + net->scratch * WIDTH;
    for (int64_t i = 0; i < net->scratch; i++) registers[n + i] = scratch + i * WIDTH;
    int64_t at = start;
    for (; at + WIDTH <= stop; at += WIDTH) {
        for (int64_t i = 0; i < n; i++) registers[i] = rows[i] + at;
        NAME(select_block)(net, registers, AHEAD, weights, net->out + at);
    }
    if (at < stop) { /* the rest in full width, beside zeros */
        memset(spare, 0, 4 * (size_t)((n + 1) * WIDTH));
        for (int64_t i = 0; i < n; i++) {
            registers[i] = spare + (i + 1) * WIDTH;
            memcpy(spare + (i + 1) * WIDTH, rows[i] + at, 4 * (size_t)(stop - at));
        }
        NAME(select_block)(net, registers, 0, weights, spare);
        memcpy(net->out + at, spare, 4 * (size_t)(stop - at));
    }
}

/* Columns [at, at + RUN) of the rows, less row `origin` (less their mean where that is -1), into block (n, RUN); columns
   from `stop` on are zero. */
static void NAME(centred)(const float *const *rows, int64_t n, int64_t at, int64_t stop, int64_t origin, float *block) {
    const int64_t width = stop - at < RUN ? stop - at : RUN;
    const float share = 1.0f / (float)n;
    int64_t j = 0;
    for (; j + GROUP * V <= width; j += GROUP * V) {
        vec centre[GROUP] = {0};
        if (origin >= 0) {
            UNROLL(GROUP)
            for (int g = 0; g < GROUP; g++) centre[g] = LOAD(rows[origin] + at + j + g * V);
        } else {
            for (int64_t i = 0; i < n; i++) {
                const float *row = rows[i] + at + j;
                UNROLL(GROUP)
                for (int g = 0; g < GROUP; g++) {
                    centre[g] += LOAD(row + g * V);
                    if (g * V % 16 == 0) __builtin_prefetch(row + AHEAD + g * V, 0, 2);
                }
            }
            UNROLL(GROUP)
            for (int g = 0; g < GROUP; g++) centre[g] *= share;
        }
        for (int64_t i = 0; i < n; i++) {
            const float *row = rows[i] + at + j;
            UNROLL(GROUP)
            for (int g = 0; g < GROUP; g++) STORE(block + i * RUN + j + g * V, LOAD(row + g * V) - centre[g]);
        }
    }
    for (; j < width; j++) {
        float centre = 0;
        for (int64_t i = 0; i < n && origin < 0; i++) centre += rows[i][at + j];
        centre = origin < 0 ? centre * share : rows[origin][at + j];
        for (int64_t i = 0; i < n; i++) block[i * RUN + j] = rows[i][at + j] - centre;
    }
    for (int64_t i = 0; i < n; i++) memset(block + i * RUN + width, 0, 4 * (size_t)(RUN - width));
}

/* Adds to G (n, n), double, the inner products of centred rows over columns [start, stop), its lower triangle: RUN
   columns at a time, multiplied in float, summed in double. */
static void NAME(gram)(const float *const *rows, int64_t n, int64_t start, int64_t stop, int64_t origin, float *block,
                       float *products, double *G) {
    op o = {.k = RUN, .alpha = 1, .start = START_ZERO};
    o.a.ld = o.b.ld = RUN;
    o.out.ld = n;
    for (int64_t at = start; at < stop; at += RUN) {
        NAME(centred)(rows, n, at, stop, origin, block);
        for (int64_t i = 0; i < n; i += TILE_B) { /* the lower triangle, a band of rows at a time */
            o.m = n - i < TILE_B ? n - i : TILE_B;
            o.n = i + o.m;
            NAME(product_nt)(&o, block + i * RUN, block, block, products + i * n);
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j++) G[i * n + j] += (double)products[i * n + j];
    }
}

#undef ints
#undef doubles
#undef MINIMUM
#undef MAXIMUM
#undef LANES_OF
#undef UNORDERED
#undef SPOIL
#undef GROUP
