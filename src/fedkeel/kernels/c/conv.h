/* Convolutions of small images, a batch at a time. Included once for each instruction set, after simd.h.

   Images lie batch-last, (channels, height, width, lanes), the lanes being the examples of the batch and zeros up to a
   multiple of 16. So every vector is full whatever the image's size, and the pixels of a row, of all examples, are one
   run of memory, which a kernel's column moves along by `lanes`. Sums run in an order that depends on the shapes and the set
   alone. */

typedef int32_t NAME(bits) __attribute__((vector_size(4 * V)));

/* x (channels, height, width, lanes) with `pad` columns of zeros at both sides of its rows. */
static void NAME(widen)(const float *x, long rows, long width, long pad, long lanes, float *out) {
    const size_t side = 4 * (size_t)(pad * lanes), middle = 4 * (size_t)(width * lanes);
    for (long i = 0; i < rows; i++) {
        memset(out, 0, side);
        memcpy(out + pad * lanes, x + i * width * lanes, middle);
        memset(out + (pad + width) * lanes, 0, side);
        out += (width + 2 * pad) * lanes;
    }
}

/* `m` output channels at one row, `wide` vectors of its run. x is widened; the kernel's rows [from, to) meet the image;
   w are the weights from (in, kh, kw, out), at the first of these channels. */
INLINE void NAME(pixels)(const int m, const int wide, const conv *s, const float *x, long width, long from, long to,
                         const float *w, const float *bias, float *out) {
    vec sum[CONV_M][CONV_WIDE];
    UNROLL(8)
    for (int r = 0; r < m; r++)
        UNROLL(4)
        for (int v = 0; v < wide; v++) sum[r][v] = (vec){0} + (bias ? bias[r] : 0.0f);
    for (long i = 0; i < s->in; i++)
        for (long kh = from; kh < to; kh++) {
            const float *row = x + (i * s->height + kh) * width;
            const float *weight = w + (i * s->kh + kh) * s->kw * s->out;
            for (long kw = 0; kw < s->kw; kw++, row += s->lanes, weight += s->out) {
                vec pixel[CONV_WIDE];
                UNROLL(4)
                for (int v = 0; v < wide; v++) pixel[v] = LOAD(row + v * V);
                UNROLL(8)
                for (int r = 0; r < m; r++)
                    UNROLL(4)
                    for (int v = 0; v < wide; v++) sum[r][v] += weight[r] * pixel[v];
            }
        }
    const long plane = s->out_height * s->out_width * s->lanes;
    UNROLL(8)
    for (int r = 0; r < m; r++)
        UNROLL(4)
        for (int v = 0; v < wide; v++) STORE(out + r * plane + v * V, sum[r][v]);
}

/* How many of the channels that are left go together. */
INLINE long NAME(channels)(long left) {
    return left >= CONV_M ? CONV_M : left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* out (out, out_height, out_width, lanes) from x and weights (in, kh, kw, out). */
static void NAME(convolve)(const conv *s, const float *x, const float *w, const float *bias, float *out) {
    const float *wide = x;
    const long width = (s->width + 2 * s->pad_w) * s->lanes, run = s->out_width * s->lanes;
    if (s->pad_w) {
        NAME(widen)(x, s->in * s->height, s->width, s->pad_w, s->lanes, s->widened);
        wide = s->widened;
    }
    for (long oh = 0; oh < s->out_height; oh++) {
        const long top = oh - s->pad_h; /* the image's row under the kernel's first */
        const long from = top < 0 ? -top : 0, to = top + s->kh > s->height ? s->height - top : s->kh;
        for (long j = 0, v; j < run; j += v * V) {
            v = run - j < CONV_WIDE * V ? 1 : CONV_WIDE;
            for (long c = 0, m; c < s->out; c += m) {
                m = NAME(channels)(s->out - c);
                const float *start = wide + top * width + j, *weight = w + c, *b = bias ? bias + c : 0;
                float *to_ = out + (c * s->out_height + oh) * run + j;
#define PIXELS(m)                                                                                                     \
    if (v == 1) NAME(pixels)(m, 1, s, start, width, from, to, weight, b, to_);                                        \
    else NAME(pixels)(m, CONV_WIDE, s, start, width, from, to, weight, b, to_)
                switch (m) {
                case 1: PIXELS(1); break;
                case 2: PIXELS(2); break;
                case 4: PIXELS(4); break;
#if CONV_M == 8
                case 6: PIXELS(6); break;
#endif
                default: PIXELS(CONV_M);
                }
#undef PIXELS
            }
        }
    }
}

static void NAME(conv_forward)(const conv *s, const float *x, const float *w, const float *bias, float *out) {
    const long kernel = s->kh * s->kw;
    for (long o = 0; o < s->out; o++)
        for (long i = 0; i < s->in * kernel; i++) s->packed[i * s->out + o] = w[o * s->in * kernel + i];
    NAME(convolve)(s, x, s->packed, bias, out);
}

/* The gradient of the inputs is the convolution of that of the outputs with the kernels turned round: `s` has in and
   out exchanged, and the padding that this takes. w is (in, out, kh, kw) as `s` counts them. */
static void NAME(conv_data)(const conv *s, const float *g, const float *w, float *out) {
    const long kernel = s->kh * s->kw;
    for (long i = 0; i < s->in; i++)
        for (long o = 0; o < s->out; o++)
            for (long k = 0; k < kernel; k++)
                s->packed[(i * kernel + kernel - 1 - k) * s->out + o] = w[(i * s->out + o) * kernel + k];
    NAME(convolve)(s, g, s->packed, 0, out);
}

/* Weights (m, n) of m output channels and n neighbouring columns of the kernel: inner products of runs, over rows; in
   `each` lane by itself, or over all of them. */
INLINE void NAME(inner)(const int m, const int n, const int each, const conv *s, const float *g, const float *x,
                        long width, long from, long to, float *out) {
    const long run = s->out_width * s->lanes, plane = s->out_height * run, step = each ? s->lanes : V;
    for (long first = 0; first < step; first += V) {
        vec sum[CONV_G][5];
        UNROLL(4)
        for (int r = 0; r < m; r++)
            UNROLL(5)
            for (int c = 0; c < n; c++) sum[r][c] = (vec){0};
        for (long oh = from; oh < to; oh++)
            for (long j = first; j < run; j += step) {
                vec pixel[5];
                UNROLL(5)
                for (int c = 0; c < n; c++) pixel[c] = LOAD(x + oh * width + c * s->lanes + j);
                UNROLL(4)
                for (int r = 0; r < m; r++) {
                    const vec gradient = LOAD(g + r * plane + oh * run + j);
                    UNROLL(5)
                    for (int c = 0; c < n; c++) sum[r][c] += gradient * pixel[c];
                }
            }
        for (int r = 0; r < m; r++)
            for (int c = 0; c < n; c++) {
                const long at = r * s->in * s->kh * s->kw + c;
                if (each) STORE(out + at * s->lanes + first, sum[r][c]);
                else {
                    float lane[V], total = 0;
                    STORE(lane, sum[r][c]);
                    for (int v = 0; v < V; v++) total += lane[v];
                    out[at] = total;
                }
            }
    }
}

/* The gradients of weights (out, in, kh, kw) and, where it is wanted, bias (out); those of `each` lane batch-last. */
INLINE void NAME(conv_weights)(const int each, const conv *s, const float *g, const float *x, float *out, float *bias) {
    const float *wide = x;
    const long width = (s->width + 2 * s->pad_w) * s->lanes, plane = s->out_height * s->out_width * s->lanes;
    if (s->pad_w) {
        NAME(widen)(x, s->in * s->height, s->width, s->pad_w, s->lanes, s->widened);
        wide = s->widened;
    }
    for (long o = 0, m; o < s->out; o += m) {
        m = s->out - o < CONV_G ? 1 : CONV_G;
        for (long i = 0; i < s->in; i++)
            for (long kh = 0; kh < s->kh; kh++) {
                const long top = kh - s->pad_h; /* the image's row under the outputs' first */
                const long from = top < 0 ? -top : 0;
                const long to = top + s->out_height > s->height ? s->height - top : s->out_height;
                for (long kw = 0, n; kw < s->kw; kw += n) {
                    n = s->kw - kw < 3 ? 1 : s->kw - kw < 5 ? 3 : 5;
                    const float *start = wide + (i * s->height + top) * width + kw * s->lanes, *go = g + o * plane;
                    float *to_ = out + (((o * s->in + i) * s->kh + kh) * s->kw + kw) * (each ? s->lanes : 1);
#define INNER(m, n) NAME(inner)(m, n, each, s, go, start, width, from, to, to_)
                    if (m == CONV_G) {
                        if (n == 5) INNER(CONV_G, 5);
                        else if (n == 3) INNER(CONV_G, 3);
                        else INNER(CONV_G, 1);
                    } else {
                        if (n == 5) INNER(1, 5);
                        else if (n == 3) INNER(1, 3);
                        else INNER(1, 1);
                    }
#undef INNER
                }
            }
    }
    if (!bias) return;
    const long step = each ? s->lanes : V;
    for (long o = 0; o < s->out; o++)
        for (long first = 0; first < step; first += V) {
            vec sum = {0};
            for (long j = first; j < plane; j += step) sum += LOAD(g + o * plane + j);
            if (each) STORE(bias + o * s->lanes + first, sum);
            else {
                float lane[V], total = 0;
                STORE(lane, sum);
                for (int v = 0; v < V; v++) total += lane[v];
                bias[o] = total;
            }
        }
}

static void NAME(conv_weight)(const conv *s, const float *g, const float *x, float *out, float *bias) {
    NAME(conv_weights)(0, s, g, x, out, bias);
}

static void NAME(conv_each)(const conv *s, const float *g, const float *x, float *out, float *bias) {
    NAME(conv_weights)(1, s, g, x, out, bias);
}

/* The largest of each window of kh x kw, side by side, and which it was: the first of equals, the last NaN if any. */
static void NAME(pool)(const conv *s, const float *x, float *out, float *which) {
    const long lanes = s->lanes;
    for (long row = 0; row < s->in * s->out_height; row++)
        for (long ow = 0; ow < s->out_width; ow++, out += lanes, which += lanes) {
            const long c = row / s->out_height, oh = row % s->out_height;
            const float *corner = x + ((c * s->height + oh * s->kh) * s->width + ow * s->kw) * lanes;
            for (long b = 0; b < lanes; b += V) {
                vec most = LOAD(corner + b), at = {0};
                for (long kh = 0, k = 0; kh < s->kh; kh++)
                    for (long kw = 0; kw < s->kw; kw++, k++) {
                        const vec pixel = LOAD(corner + (kh * s->width + kw) * lanes + b);
                        const NAME(bits) better = (pixel > most) | (pixel != pixel);
                        most = (vec)((better & (NAME(bits))pixel) | (~better & (NAME(bits))most));
                        at = (vec)((better & (NAME(bits))((vec){0} + (float)k)) | (~better & (NAME(bits))at));
                    }
                STORE(out + b, most);
                STORE(which + b, at);
            }
        }
}

static void NAME(pool_backward)(const conv *s, const float *g, const float *which, float *out) {
    const long lanes = s->lanes;
    if (s->height > s->out_height * s->kh || s->width > s->out_width * s->kw)
        memset(out, 0, 4 * (size_t)(s->in * s->height * s->width * lanes));
    for (long row = 0; row < s->in * s->out_height; row++)
        for (long ow = 0; ow < s->out_width; ow++, g += lanes, which += lanes) {
            const long c = row / s->out_height, oh = row % s->out_height;
            float *corner = out + ((c * s->height + oh * s->kh) * s->width + ow * s->kw) * lanes;
            for (long k = 0; k < s->kh * s->kw; k++) {
                float *other = corner + (k / s->kw * s->width + k % s->kw) * lanes;
                const float number = (float)k;
                ELEMENTWISE
                for (long b = 0; b < lanes; b++) other[b] = which[b] == number ? g[b] : 0.0f;
            }
        }
}

/* x (m, n) to out (n, lanes), zeros in the lanes past m. */
static void NAME(to_last)(const float *x, long m, long n, long lanes, float *out) {
    for (long j = 0; j < n; j += 16) {
        const long stop = j + 16 < n ? j + 16 : n;
        for (long b = 0; b < lanes; b += 16)
            for (long k = j; k < stop; k++)
                for (long l = b; l < b + 16; l++) out[k * lanes + l] = l < m ? x[l * n + k] : 0.0f;
    }
}

static void NAME(to_rows)(const float *x, long m, long n, long lanes, float *out) {
    for (long j = 0; j < n; j += 16) {
        const long stop = j + 16 < n ? j + 16 : n;
        for (long b = 0; b < m; b++)
            for (long k = j; k < stop; k++) out[b * n + k] = x[k * lanes + b];
    }
}
