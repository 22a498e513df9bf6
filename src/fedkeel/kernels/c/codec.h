/* Rows to small integers and back, and what is large in a row. Included once for each instruction set.

   Every set gives the same bits, and so does kernels/quantise.py without them: a product is rounded once, and what is
   added to it is an integer, so that nothing can be fused. */

#define FRACTION 22 /* bits after the point of a value that is being rounded */

/* 32 bits that look random, of a key's two halves and a column: two rounds of multiply and shift (lowbias32). */
INLINE uint32_t NAME(scramble)(uint32_t at, uint32_t low, uint32_t high) {
    uint32_t h = at + low;
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= high;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    return h ^ h >> 16;
}

/* A run of columns with one factor: value * factor has FRACTION bits after the point. */
INLINE void NAME(round_run)(const int stochastic, const float *x, long n, uint32_t at, float factor, uint32_t low,
                            uint32_t high, int32_t levels, int8_t *restrict out) {
    ELEMENTWISE
    for (long i = 0; i < n; i++) {
        const uint32_t more =
            stochastic ? NAME(scramble)(at + (uint32_t)i, low, high) >> (32 - FRACTION) : 1u << (FRACTION - 1);
        int32_t q = ((int32_t)(x[i] * factor) + (int32_t)more) >> FRACTION;
        q = q > levels ? levels : q;
        out[i] = (int8_t)(q < -levels ? -levels : q);
    }
}

static void NAME(quantise)(const rounding *r, const float *x, uint8_t *out) {
    int8_t codes[CODES];
    const int64_t columns = r->bounds[r->count];
    for (int64_t at = 0, s = 0, stop; at < columns; at = stop) {
        stop = columns - at < CODES ? columns : at + CODES;
        int8_t *to = r->nibbles ? codes : (int8_t *)out + at;
        for (int64_t j = at, end; j < stop; j = end) {
            while (r->bounds[s + 1] <= j) s++;
            end = r->bounds[s + 1] < stop ? r->bounds[s + 1] : stop;
            const float f = r->factor[s];
            const int32_t levels = (int32_t)r->levels;
            if (f == 0) memset(to + (j - at), 0, (size_t)(end - j));
            else if (r->stochastic)
                NAME(round_run)(1, x + j, end - j, (uint32_t)j, f, r->low, r->high, levels, to + (j - at));
            else NAME(round_run)(0, x + j, end - j, (uint32_t)j, f, 0, 0, levels, to + (j - at));
        }
        if (!r->nibbles) continue;
        const int64_t n = stop - at;
        uint8_t *pairs = out + at / 2;
        if (n % 2) codes[n] = 0;
        for (int64_t i = 0; i < (n + 1) / 2; i++)
            pairs[i] = (uint8_t)((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
    }
}

/* out = code * factor, the factors being the scales. */
static void NAME(dequantise)(const rounding *r, const uint8_t *in, float *out) {
    int8_t codes[CODES];
    const int64_t columns = r->bounds[r->count];
    for (int64_t at = 0, s = 0, stop; at < columns; at = stop) {
        stop = columns - at < CODES ? columns : at + CODES;
        const int8_t *from = r->nibbles ? codes : (const int8_t *)in + at;
        if (r->nibbles)
            for (int64_t i = 0; i < (stop - at + 1) / 2; i++) {
                const uint8_t pair = in[at / 2 + i];
                codes[2 * i] = (int8_t)((int8_t)(pair << 4) >> 4);
                codes[2 * i + 1] = (int8_t)((int8_t)pair >> 4);
            }
        for (int64_t j = at, end; j < stop; j = end) {
            while (r->bounds[s + 1] <= j) s++;
            end = r->bounds[s + 1] < stop ? r->bounds[s + 1] : stop;
            const float f = r->factor[s];
            ELEMENTWISE
            for (int64_t i = j; i < end; i++) out[i] = (float)from[i - at] * f;
        }
    }
}

/* The largest magnitude of each run: as integers magnitudes are in order, infinity above the finite, NaN above all. */
static void NAME(peaks)(const float *x, const int64_t *bounds, int64_t count, int32_t *out) {
    const magnitude *bits = (const magnitude *)x;
    for (int64_t s = 0; s < count; s++) {
        int32_t most = 0;
        for (int64_t j = bounds[s]; j < bounds[s + 1]; j++) {
            const int32_t size = bits[j] & 0x7fffffff;
            most = size > most ? size : most;
        }
        out[s] = most;
    }
}

/* The columns whose magnitude is at least `least` (as an integer, above 0), in order. Returns how many there are, of
   which no more than `room` are written, or `room` + 1 or more when there are more; `out` has 16 places beyond. */
static int64_t NAME(above)(const float *x, int64_t n, int32_t least, int64_t room, uint32_t *out) {
    const magnitude *bits = (const magnitude *)x;
    int64_t count = 0, j = 0;
#if V == 16
    const __m512i limit = _mm512_set1_epi32(least - 1), size = _mm512_set1_epi32(0x7fffffff);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + 16 <= n; j += 16) {
        const __mmask16 found =
            _mm512_cmpgt_epi32_mask(_mm512_and_si512(_mm512_loadu_si512(bits + j), size), limit);
        if (!found) continue;
        if (count > room) return count;
        const __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int32_t)j), lanes);
        _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(found, at));
        count += __builtin_popcount(found);
    }
#elif V == 8
    const __m256i limit = _mm256_set1_epi32(least - 1), size = _mm256_set1_epi32(0x7fffffff);
    for (; j + 8 <= n; j += 8) {
        const __m256i here = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(bits + j)), size);
        unsigned found = (unsigned)_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(here, limit));
        if (found && count > room) return count;
        for (; found; found &= found - 1) out[count++] = (uint32_t)(j + __builtin_ctz(found));
    }
#endif
    for (; j < n && count <= room; j++) {
        out[count] = (uint32_t)j;
        count += (bits[j] & 0x7fffffff) >= least;
    }
    return count;
}

#undef FRACTION
