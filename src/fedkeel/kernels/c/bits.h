/* Runs of bits, the first in the lowest place of the first byte; the same for all instruction sets. */

/* n values of `width` bits, 1 to 32, one after the other; the last byte is filled up with zeros. */
EXPORT void fedkeel_pack(const uint32_t *values, int64_t n, int64_t width, uint8_t *out) {
    uint64_t held = 0;
    int64_t bits = 0;
    for (int64_t i = 0; i < n; i++) {
        held |= (uint64_t)values[i] << bits;
        for (bits += width; bits >= 8; bits -= 8, held >>= 8) *out++ = (uint8_t)held;
    }
    if (bits) *out = (uint8_t)held;
}

EXPORT void fedkeel_unpack(const uint8_t *in, int64_t n, int64_t width, uint32_t *out) {
    const uint64_t mask = (1ull << width) - 1;
    uint64_t held = 0;
    int64_t bits = 0;
    for (int64_t i = 0; i < n; i++) {
        for (; bits < width; bits += 8) held |= (uint64_t)*in++ << bits;
        out[i] = (uint32_t)(held & mask);
        held >>= width;
        bits -= width;
    }
}

/* Each value as so many zeros and a one, into memory that is zero. */
EXPORT void fedkeel_unary(const uint32_t *values, int64_t n, uint8_t *out) {
    int64_t at = -1;
    for (int64_t i = 0; i < n; i++) {
        at += 1 + (int64_t)values[i];
        out[at >> 3] |= (uint8_t)(1u << (at & 7));
    }
}

/* At most n values from `size` bytes. Returns how many ones there are in all. */
EXPORT int64_t fedkeel_from_unary(const uint8_t *in, int64_t size, int64_t n, uint32_t *out) {
    int64_t count = 0, last = -1;
    for (int64_t at = 0; at < size; at += 8) {
        uint64_t word = 0;
        for (int64_t i = 0, left = size - at < 8 ? size - at : 8; i < left; i++) word |= (uint64_t)in[at + i] << 8 * i;
        for (; word; word &= word - 1, count++) {
            const int64_t place = 8 * at + __builtin_ctzll(word);
            if (count < n) out[count] = (uint32_t)(place - last - 1);
            last = place;
        }
    }
    return count;
}
