/* fedkeel's compiled kernels: a local step's program of small operations, selection networks over columns, what
   codecs do to a row, and noise.

   Plain C with the vector types of GCC and Clang, one copy for each instruction set, chosen when it is loaded. Without
   a compiler the package works all the same: `kernels/native.py` says what is there. Never build it with -ffast-math:
   that flushes denormals in the whole process. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define UNROLL(n) PRAGMA(unroll n)
#define ELEMENTWISE PRAGMA(clang loop vectorize(assume_safety))
#define BEGIN_TARGET(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define UNROLL(n) PRAGMA(GCC unroll n)
#define ELEMENTWISE PRAGMA(GCC ivdep)
#define BEGIN_TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

/* One operation of a program: train/native.py writes the same fields. An operand lies at base[base] + at, in bytes;
   its rows are ld elements apart. */
typedef struct {
    int64_t base, at, ld;
} operand;

typedef struct {
    int64_t code, m, n, k, start;
    float alpha, keep, beta, unused; /* 16 bytes */
    operand a, b, c, d, out;
} op;

/* What a product starts from: zero, a row for all, what is there, or keep * what is there + beta * a matrix. */
enum { START_ZERO, START_ROW, START_OUT, START_BLEND };
enum {
    PRODUCT_NT,
    PRODUCT_NN,
    PRODUCT_TN,
    RELU,
    THRESHOLD_BACKWARD,
    TANH,
    TANH_BACKWARD,
    SIGMOID,
    SIGMOID_BACKWARD,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    NLL,
    NLL_BACKWARD,
    ADD,
    MULTIPLY,
    SCALE,
    SCALE_BY,
    TICK,
    ADAM,
    GATHER_BYTES,
    GATHER_FLOATS,
    GATHER_LABELS,
    TO_LAST,
    TO_ROWS,
    CONV,
    CONV_DATA,
    CONV_WEIGHT,
    POOL,
    POOL_BACKWARD,
    CONV_EACH,
    NORM_ROWS,
    NORM_LAST,
    FACTORS,
    SCALE_ROWS,
    WEIGH_LAST,
};
enum { WITHOUT_WEIGHT, WITH_WEIGHT };

/* A convolution from `in` to `out` channels, or a pooling, as conv.h has them; train/lower.py writes the same fields.
   `packed` and `widened` are memory to work in. */
typedef struct {
    int64_t in, out, height, width, kh, kw, pad_h, pad_w, out_height, out_width, lanes;
    float *packed, *widened;
} conv;

/* A selection network over columns, as kernels/network.py plans it: steps of four numbers, (a, b, low, high), put the
   smaller of registers a and b into low and the larger into high, where these are not -1; the result is the mean, summed
   in double, of the registers `kept`. Registers are the rows, then working rows. Where `around` is not 0, the registers
   `kept` hold all values in order, and the result is the mean of the `around` ones nearest to the median. Where there are
   `weights`, one for each row, their sum 1, and a share after them, they hold all values in order as well: the result is
   their weighted mean without that share of the weight at each end. A column that holds a NaN gives NaN. */
typedef struct {
    int64_t rows, count, scratch, keeps, around;
    const int32_t *steps, *kept;
    float *out;
    const float *weights;
} network;

/* Runs of columns between `bounds` (count + 1 of them, the first 0), each with its factor, as small integers from
   -levels to levels: a byte each, or two to a byte. A factor of 0 stands for a run of zeros. */
typedef struct {
    int64_t count, levels, stochastic, nibbles;
    const int64_t *bounds;
    const float *factor;
    uint32_t low, high;
} rounding;
#define CODES 4096 /* columns at a time */
typedef int32_t magnitude __attribute__((may_alias)); /* a float as its bits */

#ifndef WIDTH
#define WIDTH 128 /* columns at a time */
#endif
#ifndef AHEAD
#define AHEAD (2 * WIDTH) /* columns that are fetched early, into the second cache */
#endif
#define ROUNDING 1e-6f /* of sums of weights, in float (order.py has the same) */
#define MAX_ROWS 128 /* of a network: order.py sorts where there are more */
#define RUN 512 /* columns of one product in float: its rounding stays below 1e-7 of the sum */
#define IGNORED (-100) /* torch's ignore_index */

#define JOIN(name, set) name##_##set
#define LANES_4(h, o) LANE(h, o, 0), LANE(h, o, 1), LANE(h, o, 2), LANE(h, o, 3)
#define LANES_8(h, o) LANES_4(h, o), LANE(h, o, 4), LANE(h, o, 5), LANE(h, o, 6), LANE(h, o, 7)
#define LANES_16(h, o)                                                                                                \
    LANES_8(h, o), LANE(h, o, 8), LANE(h, o, 9), LANE(h, o, 10), LANE(h, o, 11), LANE(h, o, 12), LANE(h, o, 13),      \
        LANE(h, o, 14), LANE(h, o, 15)
#define LANE(half, offset, lane) ((lane) / (half) * 2 * (half) + (lane) % (half) + (offset))

/* A double and its bits. */
typedef union {
    double value;
    int64_t bits;
} word;

#if defined(__x86_64__)
BEGIN_TARGET("avx512f,avx512vl,avx512dq,avx512bw,fma")
#define NAME(name) JOIN(name, avx512)
#define V 16
#define TILE_B 4
#define TILE_N 4
#define TILE_M 10
#define CONV_M 8
#define CONV_WIDE 3
#define CONV_G 4
#define LANES LANES_16
#include "set.h"
END_TARGET

BEGIN_TARGET("avx2,fma")
#define NAME(name) JOIN(name, avx2)
#define V 8
#define TILE_B 4
#define TILE_N 2
#define TILE_M 5
#define CONV_M 4
#define CONV_WIDE 3
#define CONV_G 2
#define LANES LANES_8
#include "set.h"
END_TARGET
#endif

#define NAME(name) JOIN(name, base)
#define V 4
#define TILE_B 4
#define TILE_N 2
#define TILE_M 4
#define CONV_M 4
#define CONV_WIDE 3
#define CONV_G 2
#define LANES LANES_4
#include "set.h"

typedef struct {
    const char *name;
    int (*run)(const op *, int64_t, char *const *);
    double (*sq_norm)(const float *, int64_t);
    void (*select)(const network *, const float *const *, int64_t, int64_t, const float **, float *, float *);
    void (*gram)(const float *const *, int64_t, int64_t, int64_t, int64_t, float *, float *, double *);
    void (*quantise)(const rounding *, const float *, uint8_t *);
    void (*dequantise)(const rounding *, const uint8_t *, float *);
    void (*peaks)(const float *, const int64_t *, int64_t, int32_t *);
    int64_t (*above)(const float *, int64_t, int32_t, int64_t, uint32_t *);
    void (*normals)(const int64_t *, int64_t, double *);
    void (*noised)(const double *, int64_t, double, double, double, const float *, float *);
} functions;

#define FUNCTIONS(set)                                                                                                \
    {#set,            run_##set,        sq_norm_##set, select_##set, gram_##set,                                          \
     quantise_##set, dequantise_##set, peaks_##set,   above_##set,  normals_##set, noised_##set}

static const functions *chosen;
static const functions base = FUNCTIONS(base);
#if defined(__x86_64__)
static const functions avx2 = FUNCTIONS(avx2);
static const functions avx512 = FUNCTIONS(avx512);
#endif

#define EXPORT __attribute__((visibility("default")))

/* kernels/native.py names the same number: one more with every change of `op` or of a function's arguments. */
EXPORT int fedkeel_abi(void) { return 11; }

/* Choose an instruction set by name, or (name = NULL) the widest that this machine has. Returns its name, NULL if it
   is not there. */
EXPORT const char *fedkeel_use(const char *name) {
    const functions *there[3] = {0};
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fused && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        there[count++] = &avx512;
    if (fused) there[count++] = &avx2;
#endif
    there[count++] = &base;
    for (int i = 0; i < count; i++)
        if (!name || !strcmp(name, there[i]->name)) {
            chosen = there[i];
            return chosen->name;
        }
    return 0;
}

/* The squared L2 norm of n floats, the same in every instruction set. */
EXPORT double fedkeel_sq_norm(const float *x, int64_t n) { return chosen->sq_norm(x, n); }

/* Run a program `times` over; each of the five bases moves on by its stride of bytes after each. Returns 0, or 1 + the number of the run
   that met a class that the model does not have. */
EXPORT int64_t fedkeel_run(const op *program, int64_t length, char **bases, const int64_t *stride, int64_t times) {
    for (int64_t i = 0; i < times; i++) {
        if (chosen->run(program, length, bases)) return i + 1;
        for (int j = 0; j < 5; j++) bases[j] += stride[j];
    }
    return 0;
}

/* Columns [start, stop) of the rows through a network. Returns 0, or 1 without the memory to work in. */
EXPORT int fedkeel_select(const network *net, const float *const *rows, int64_t start, int64_t stop) {
    const int64_t all = net->rows + net->scratch, working = all + 1 + (net->weights ? all : 0);
    float *scratch = 0;
    const float **registers = malloc((size_t)all * sizeof *registers);
    if (!registers || posix_memalign((void **)&scratch, 64, (size_t)(working * WIDTH) * sizeof *scratch)) {
        free(registers);
        return 1;
    }
    chosen->select(net, rows, start, stop, registers, scratch, net->weights ? scratch + (all + 1) * WIDTH : 0);
    free(scratch);
    free(registers);
    return 0;
}

/* Inner products of n centred rows over columns [start, stop), the lower triangle of G (n, n), added to what is there.
   Returns 0, or 1 without the memory to work in. */
EXPORT int fedkeel_gram(const float *const *rows, int64_t n, int64_t start, int64_t stop, int64_t origin, double *G) {
    float *room = 0;
    if (posix_memalign((void **)&room, 64, (size_t)(n * (RUN + n)) * sizeof *room)) return 1;
    chosen->gram(rows, n, start, stop, origin, room, room + n * RUN, G);
    free(room);
    return 0;
}

/* codec.h has these. */
EXPORT void fedkeel_quantise(const rounding *r, const float *x, uint8_t *out) { chosen->quantise(r, x, out); }
EXPORT void fedkeel_dequantise(const rounding *r, const uint8_t *in, float *out) { chosen->dequantise(r, in, out); }
EXPORT void fedkeel_peaks(const float *x, const int64_t *bounds, int64_t count, int32_t *out) {
    chosen->peaks(x, bounds, count, out);
}
EXPORT int64_t fedkeel_above(const float *x, int64_t n, int64_t least, int64_t room, uint32_t *out) {
    return chosen->above(x, n, (int32_t)least, room, out);
}

/* normal.h has these. */
EXPORT void fedkeel_normals(const int64_t *words, int64_t pairs, double *out) { chosen->normals(words, pairs, out); }
EXPORT void fedkeel_noised(const double *noise, int64_t n, double scale, double all, double share, const float *x,
                           float *out) {
    chosen->noised(noise, n, scale, all, share, x, out);
}

#include "bits.h"
