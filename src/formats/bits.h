/* A stream of codes of 1 to 8 bits: code i sits in bits [bits * i, bits * i + bits) of consecutive 32-bit words, lowest
 * bit first. Every 32 codes take `bits` whole words, so that a chunk of 32 starts at a word whatever the width; inside a
 * chunk 3-bit codes 10 and 21 straddle words. The words of one stream lie `stride` words apart in memory: down a column
 * of a matrix of words that is its row length, along a row it is 1. */
#ifndef QL_FORMATS_BITS_H
#define QL_FORMATS_BITS_H

#include <stdint.h>

enum { QL_CHUNK = 32, QL_MAX_CODE_BITS = 8 };

/* The largest code. */
static inline uint32_t ql_code_mask(int bits) { return (1u << bits) - 1u; }

/* Words that `count` codes take: ceil(count * bits / 32), without overflow for any count. */
static inline int64_t ql_code_words(int64_t count, int bits) {
    return count / QL_CHUNK * bits + (count % QL_CHUNK * bits + 31) / 32;
}

/* Code `index` of the stream at `words`. */
static inline uint32_t ql_code_get(const int32_t *words, int64_t stride, int bits, int64_t index) {
    int64_t word = index / QL_CHUNK * bits + index % QL_CHUNK * bits / 32;
    int offset = (int)(index % QL_CHUNK * bits % 32);
    uint32_t code = (uint32_t)words[word * stride] >> offset;
    if (offset + bits > 32) code |= (uint32_t)words[(word + 1) * stride] << (32 - offset);
    return code & ql_code_mask(bits);
}

/* Puts code `index`, which must not exceed the mask, into a stream whose bits there are zero. */
static inline void ql_code_put(int32_t *words, int64_t stride, int bits, int64_t index, uint32_t code) {
    int64_t word = index / QL_CHUNK * bits + index % QL_CHUNK * bits / 32;
    int offset = (int)(index % QL_CHUNK * bits % 32);
    words[word * stride] = (int32_t)((uint32_t)words[word * stride] | code << offset);
    if (offset + bits > 32)
        words[(word + 1) * stride] = (int32_t)((uint32_t)words[(word + 1) * stride] | code >> (32 - offset));
}

/* A value already rounded as a code in [0, mask]: what lies outside is clamped, so that it never reaches the bits of a
 * neighbour; NaN gives 0. */
static inline uint32_t ql_code_from_f32(float rounded, uint32_t mask) {
    if (!(rounded > 0.0f)) return 0;
    return rounded < (float)mask ? (uint32_t)rounded : mask;
}

#endif
