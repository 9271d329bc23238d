/* Chunks of 32 codes in a stream of bits, which take `bits` whole words whatever the width (formats/bits.h). */
#ifndef QL_KERNELS_STREAM_CUH
#define QL_KERNELS_STREAM_CUH

#include <stdint.h>

enum { CHUNK = 32 };

/* Words of a chunk where `count` codes are left, itself included. */
static __device__ __forceinline__ int chunk_words(int64_t count, int bits) {
    return count >= CHUNK ? bits : (int)((count * bits + 31) / 32);
}

/* Stores 32 codes, which come four in a word, as words[i * stride], the first `count` of them. */
static __device__ __forceinline__ void store_chunk(int32_t *words, int64_t stride, const uint32_t *four, int bits,
                                                   int count) {
    uint64_t stream = 0;
    int filled = 0, written = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        stream |= (uint64_t)(four[i / 4] >> 8 * (i % 4) & 0xff) << filled;
        filled += bits;
        if (filled < 32) continue;
        if (written < count) words[written * stride] = (int32_t)(uint32_t)stream;
        written++;
        stream >>= 32;
        filled -= 32;
    }
}

/* The nibble of its word in AWQ's order that code `j` of eight has. */
static __device__ __forceinline__ int awq_shift(int j) { return 4 * (j / 2 + j % 2 * 4); }

#endif
