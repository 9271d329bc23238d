/* Packing on the device: a checkpoint's tensors to the sections of packed.h, and back bit for bit. A thread makes what it
 * writes: the codes of a lane in a tile, two scales with their zeros, or a word of the checkpoint. */
#include "params.h"
#include "weight.cuh"

enum { THREADS = QL_LINEAR_THREADS, WARPS = THREADS / 32, BLOCK_ROWS = WARPS * QL_STRIP };

static __device__ __forceinline__ int64_t first_item(void) { return (int64_t)blockIdx.x * THREADS + threadIdx.x; }
static __device__ __forceinline__ int64_t item_step(void) { return (int64_t)gridDim.x * THREADS; }

/* Where a lane finds its codes in the checkpoint: for each of its two rows, what has the tile's first column. 32-bit
 * numbers count within a tile: 64-bit ones would take most of the time. */
typedef struct lane_source {
    const uint8_t *at[2]; /* NULL beyond the last row */
    int shift;            /* AWQ: of the rows' nibble in its word */
} lane_source;

/* Columns `inside` the tile, even, and the next, which lies 16 bits up, of row h. `format`, `code` and `stride`, the words
 * of a line of those that pack along N, are constants, and so is all of inside but the lane's part. */
static __device__ __forceinline__ uint32_t source_pair(const lane_source *source, int h, int inside, int stride,
                                                       int format, int code) {
    const uint8_t *at = source->at[h];
    if (!at) return 0;
    if (format == QL_WEIGHT_GPTQ) {
        /* A tile is whole words. Of 3 bit a pair can straddle two. */
        const int bits = QL_CODE_BITS(code), bit = inside * bits, shift = bit & 31;
        const uint32_t *words = (const uint32_t *)at + (bit >> 5) * stride, mask = (1u << bits) - 1u;
        uint32_t pair = words[0] >> shift;
        if (bits == 3 && shift + 6 > 32) pair |= words[stride] << (32 - shift);
        return (pair & mask) | (pair >> bits & mask) << 16;
    }
    if (format == QL_WEIGHT_AWQ) {
        const uint32_t *words = (const uint32_t *)at + inside * stride;
        return (words[0] >> source->shift & 15u) | (words[stride] >> source->shift & 15u) << 16;
    }
    if (format == QL_WEIGHT_EETQ) {
        /* Of 16 inputs, four bytes are columns c, c + 8, c + 1, c + 9. */
        return *(const uint32_t *)(at + inside / 16 * 16 + inside % 8 * 2) >> (inside / 8 % 2 * 8) & 0xff00ffu;
    }
    uint32_t byte = at[inside / 2];
    return byte >> 4 | (byte & 15u) << 16;
}

/* The same of GPTQ with act-order, wherever it has the columns; 0 beyond the last of them. */
static __device__ __forceinline__ uint32_t ordered_pair(const ql_pack_params *p, int64_t row, int64_t col, int code) {
    const int32_t *words = (const int32_t *)p->words + row;
    const int bits = QL_CODE_BITS(code);
    if (row >= p->n || col >= p->k) return 0;
    uint32_t pair = load_code(words, p->n, bits, p->order[col]);
    return col + 1 < p->k ? pair | load_code(words, p->n, bits, p->order[col + 1]) << 16 : pair;
}

/* The 16 bytes of a lane, and of 3 bit 8 more. ordered: a constant, too; then there is no source. */
static __device__ __forceinline__ void pack_lane(const ql_pack_params *p, const lane_source *source, int64_t strip,
                                                 int64_t tile, int lane, int stride, bool ordered, int format,
                                                 int code) {
    const int columns = QL_TILE_K(code) / 4; /* of a word */
    const int64_t tiles = (p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code);
    uint32_t low[4] = {0}, high[2] = {0};
#pragma unroll
    for (int word = 0; word < 4; word++) {
#pragma unroll
        for (int i = 0; i < columns / 8; i++) {
            const int step = word * columns + i * 8; /* the lane's columns come in pairs, 8 apart */
            const int inside = step + lane % 4 * 2;
            /* Rows of 4 bit end in the middle of a tile at most; the others' words are 0 there, or they end with it. */
            if (format == QL_WEIGHT_FOURBIT && tile * QL_TILE_K(code) + step >= p->k) continue;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t pair = ordered ? ordered_pair(p, strip * QL_STRIP + lane / 4 + 8 * h,
                                                       tile * QL_TILE_K(code) + inside, code)
                                        : source_pair(source, h, inside, stride, format, code);
                if (code == QL_CODE_TABLE4) pair = (pair & 15u) | pair >> 12;
                low[word] |= (code == QL_CODE_INT3 ? pair & 0x30003u : pair) << QL_PACKED_BIT(code, 8 * h, step);
                if (code == QL_CODE_INT3)
                    high[QL_PACKED_HIGH_WORD(step)] |= (pair >> 2 & 0x10001u) << QL_PACKED_HIGH_BIT(8 * h, step);
            }
        }
    }
    uint8_t *to = (uint8_t *)p->codes + (strip * tiles + tile) * QL_TILE_BYTES(code);
    *(uint4 *)(to + 16 * lane) = make_uint4(low[0], low[1], low[2], low[3]);
    if (code == QL_CODE_INT3) *(uint2 *)(to + 512 + 8 * lane) = make_uint2(high[0], high[1]);
}

/* A warp a tile, one below the other: a block brings what they have in common into shared memory, lines of words. */
static __device__ __forceinline__ void pack_lines(const ql_pack_params *p, uint32_t *shared, int format, int code) {
    const int bits = QL_CODE_BITS(code);
    const bool awq = format == QL_WEIGHT_AWQ;
    const int lines = awq ? QL_TILE_K(code) : QL_TILE_K(code) * bits / 32, across = awq ? BLOCK_ROWS / 8 : BLOCK_ROWS;
    const int64_t width = awq ? (p->n + 7) / 8 : p->n, height = awq ? p->k : (p->k * bits + 31) / 32;
    const uint32_t columns = (uint32_t)((p->n + BLOCK_ROWS - 1) / BLOCK_ROWS);
    const uint32_t last = p->word_tail && !awq ? (1u << (p->k * bits) % 32) - 1u : 0xffffffffu; /* of the last line */
    const int64_t blocks = columns * ((p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code));
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const int64_t tile = (uint32_t)block / columns, column = (uint32_t)block % columns;
        const int64_t first = column * across;
        __syncthreads();
        for (int i = (int)threadIdx.x; i < lines * across; i += THREADS) {
            int64_t line = tile * lines + i / across, word = first + i % across;
            uint32_t found = line < height && word < width ? ((const uint32_t *)p->words)[line * width + word] : 0;
            shared[i] = line == height - 1 ? found & last : found;
        }
        __syncthreads();
        const int lane = (int)threadIdx.x % 32, local = (int)threadIdx.x / 32 * QL_STRIP + lane / 4;
        const int64_t strip = column * WARPS + threadIdx.x / 32;
        if (strip * QL_STRIP >= p->n) continue;
        lane_source source = {{NULL, NULL}, 4 * awq_place(lane / 4)};
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (column * BLOCK_ROWS + local + 8 * h < p->n)
                source.at[h] = (const uint8_t *)(shared + (awq ? (local + 8 * h) / 8 : local + 8 * h));
        pack_lane(p, &source, strip, tile, lane, across, false, format, code);
    }
}

/* A warp a tile, one beside the other, for what is read where it lies: row-major formats, and columns in another order. */
static __device__ __forceinline__ void pack_rows(const ql_pack_params *p, int format, int code) {
    const uint32_t tiles = (uint32_t)((p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code));
    const int64_t count = (p->n + QL_STRIP - 1) / QL_STRIP * tiles;
    const int lane = (int)threadIdx.x % 32;
    for (int64_t i = first_item() / 32; i < count; i += item_step() / 32) {
        const int64_t strip = (uint32_t)i / tiles, tile = (uint32_t)i % tiles;
        lane_source source = {{NULL, NULL}, 0};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int64_t row = strip * QL_STRIP + lane / 4 + 8 * h, col = tile * QL_TILE_K(code);
            if (row >= p->n) continue;
            int64_t byte = format == QL_WEIGHT_EETQ ? eetq_offset(p->k, row, col) : (row * p->k + col) / 2;
            source.at[h] = (const uint8_t *)p->words + byte;
        }
        pack_lane(p, &source, strip, tile, lane, 0, format == QL_WEIGHT_GPTQ, format, code);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) ql_pack_codes(const __grid_constant__ ql_pack_params p) {
    __shared__ uint32_t shared[12 * BLOCK_ROWS]; /* of 3 bit, whose tiles have the most words */
    if (p.format == QL_WEIGHT_AWQ) {
        pack_lines(&p, shared, QL_WEIGHT_AWQ, QL_CODE_INT4);
    } else if (p.format == QL_WEIGHT_EETQ) {
        pack_rows(&p, QL_WEIGHT_EETQ, QL_CODE_INT8);
    } else if (p.format == QL_WEIGHT_FOURBIT) {
        pack_rows(&p, QL_WEIGHT_FOURBIT, QL_CODE_TABLE4);
    } else if (p.order) {
        switch (p.code) {
        case QL_CODE_INT2: pack_rows(&p, QL_WEIGHT_GPTQ, QL_CODE_INT2); break;
        case QL_CODE_INT3: pack_rows(&p, QL_WEIGHT_GPTQ, QL_CODE_INT3); break;
        case QL_CODE_INT4: pack_rows(&p, QL_WEIGHT_GPTQ, QL_CODE_INT4); break;
        default: pack_rows(&p, QL_WEIGHT_GPTQ, QL_CODE_INT8); break;
        }
    } else {
        switch (p.code) {
        case QL_CODE_INT2: pack_lines(&p, shared, QL_WEIGHT_GPTQ, QL_CODE_INT2); break;
        case QL_CODE_INT3: pack_lines(&p, shared, QL_WEIGHT_GPTQ, QL_CODE_INT3); break;
        case QL_CODE_INT4: pack_lines(&p, shared, QL_WEIGHT_GPTQ, QL_CODE_INT4); break;
        default: pack_lines(&p, shared, QL_WEIGHT_GPTQ, QL_CODE_INT8); break;
        }
    }
}

static __device__ __forceinline__ void copy_element(void *to, int64_t to_index, const void *from, int64_t from_index,
                                                    int size) {
    switch (size) {
    case 1: ((uint8_t *)to)[to_index] = ((const uint8_t *)from)[from_index]; break;
    case 2: ((uint16_t *)to)[to_index] = ((const uint16_t *)from)[from_index]; break;
    default: ((uint32_t *)to)[to_index] = ((const uint32_t *)from)[from_index]; break;
    }
}

/* Where the checkpoint has scale (row, group). */
static __device__ __forceinline__ int64_t scale_index(const ql_pack_params *p, int64_t row, int64_t group) {
    return p->format == QL_WEIGHT_FOURBIT ? row * p->groups + group : group * p->n + row;
}

/* The zero as it counts, and the checkpoint's place for it. */
static __device__ __forceinline__ uint32_t source_zero(const ql_pack_params *p, int64_t row, int64_t group) {
    if (p->format == QL_WEIGHT_AWQ) return awq_nibble(p->zeros + group * ((p->n + 7) / 8), row);
    int bits = QL_CODE_BITS(p->code);
    return (load_code(p->zeros + group * ((p->n * bits + 31) / 32), 1, bits, row) + (uint32_t)p->zero_offset) &
           ((1u << bits) - 1u);
}

/* The scale and the zero of a place; 0 for places of no row or no group. */
static __device__ __forceinline__ uint32_t pack_entry(const ql_pack_params *p, int64_t place) {
    int64_t row = place, group = 0;
    if (p->groups > 1) {
        int64_t pairs = (p->groups + 1) / 2, rest = place / 32;
        row = rest / pairs * QL_STRIP + place % 2 * 8 + place / 4 % 8;
        group = rest % pairs * 2 + place / 2 % 2;
    }
    if (row >= p->n || group >= p->groups) {
        const uint32_t none = 0;
        copy_element(p->packed_scales, place, &none, 0, p->scale_size);
        return 0;
    }
    copy_element(p->packed_scales, place, p->scales, scale_index(p, row, group), p->scale_size);
    return p->packed_zeros ? source_zero(p, row, group) : 0;
}

/* Scales and zeros, two places a thread: their zeros share a byte, and the number of places is even. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_pack_entries(const __grid_constant__ ql_pack_params p) {
    const int64_t places = QL_GROUP_PLACES(p.n, p.groups);
    for (int64_t i = first_item(); i < places / 2; i += item_step()) {
        uint32_t first = pack_entry(&p, 2 * i), second = pack_entry(&p, 2 * i + 1);
        if (!p.packed_zeros) continue;
        if (p.code == QL_CODE_INT8)
            *(uchar2 *)(p.packed_zeros + 2 * i) = make_uchar2((uint8_t)first, (uint8_t)second);
        else
            p.packed_zeros[i] = (uint8_t)(first | second << 4);
    }
}

/* The columns sorted by their groups, where codes will be: a column comes after all of smaller groups and those of its own group
 * that come before it. A block's threads count together, as each group is read by all: of a column that comes before all
 * of the block's, a group up to the own counts, of one that comes after, a smaller one. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_pack_order(const __grid_constant__ ql_pack_params p) {
    __shared__ int4 shared[THREADS / 4];
    int32_t *groups = (int32_t *)shared;
    const int64_t block = (int64_t)blockIdx.x * THREADS, col = block + threadIdx.x;
    const int32_t own = col < p.k ? p.g_idx[col] : 0;
    int32_t rank = 0;
    for (int64_t base = 0; base < p.k; base += THREADS) {
        __syncthreads();
        groups[threadIdx.x] = base + threadIdx.x < p.k ? p.g_idx[base + threadIdx.x] : INT32_MAX;
        __syncthreads();
        if (base == block) {
            for (int i = 0; i < THREADS; i++) rank += groups[i] < own + (i < (int)threadIdx.x);
            continue;
        }
        const int32_t bound = own + (base < block);
#pragma unroll 8
        for (int i = 0; i < THREADS / 4; i++) {
            int4 four = shared[i];
            rank += (four.x < bound) + (four.y < bound) + (four.z < bound) + (four.w < bound);
        }
    }
    if (col < p.k) ((int32_t *)p.codes)[rank] = (int32_t)col;
}

/* Where the packed weight has them, by QL_ORDER_CLASS: a warp a group. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_pack_places(const __grid_constant__ ql_pack_params p) {
    __shared__ int64_t next[THREADS / 32][QL_ORDER_CLASSES];
    const int lane = (int)threadIdx.x % 32;
    int64_t *own = next[threadIdx.x / 32];
    const int32_t *sorted = (const int32_t *)p.codes;
    for (int64_t group = first_item() / 32; group < p.groups; group += item_step() / 32) {
        const int64_t first = group * p.group_size, end = min(first + p.group_size, p.k);
        for (int64_t at = first + lane; at < end; at += 32) p.order[at] = -1;
        __syncwarp();
        if (lane < QL_ORDER_CLASSES) {
            int64_t at = first + lane;
            for (int64_t i = first; i < end && at < end; i++) {
                if (QL_ORDER_CLASS(sorted[i]) != lane) continue;
                p.order[at] = sorted[i];
                p.inverse[sorted[i]] = (int32_t)at;
                at += QL_ORDER_CLASSES;
            }
            own[lane] = first + lane;
        }
        __syncwarp();
        if (lane == 0) {
            int64_t bare = first;
            for (int64_t i = first; i < end; i++) {
                int64_t *at = &own[QL_ORDER_CLASS(sorted[i])];
                if (*at >= end) {
                    while (p.order[bare] >= 0) bare++;
                    p.order[bare] = sorted[i];
                    p.inverse[sorted[i]] = (int32_t)bare;
                }
                *at += QL_ORDER_CLASSES;
            }
        }
        __syncwarp();
    }
}

/* The codes that the checkpoint calls (row, col), even, and (row, col + 1), the second 16 bits up. */
static __device__ __forceinline__ uint32_t unpack_pair(const ql_pack_params *p, int64_t row, int64_t col, int code) {
    if (!p->inverse) return packed_pair(p->codes, code, p->k, row, col);
    const int64_t last = p->k - 1;
    int64_t first = max((int64_t)0, min((int64_t)p->inverse[col], last));
    int64_t second = max((int64_t)0, min((int64_t)p->inverse[min(col + 1, last)], last));
    return packed_code(p->codes, code, p->k, row, first) | packed_code(p->codes, code, p->k, row, second) << 16;
}

/* A word of GPTQ's qweight: the codes that have a bit in it. */
static __device__ __forceinline__ uint32_t gptq_word(const ql_pack_params *p, int64_t line, int64_t row, int code) {
    const int bits = QL_CODE_BITS(code);
    if (p->word_tail && line == (p->k * bits) / 32) return (uint32_t)p->word_tail[row];
    const int64_t begin = line * 32 / bits & ~(int64_t)1;
    const int over = (int)(line * 32 - begin * bits); /* bits of the first pair that belong to the word before */
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < (bits == 3 ? 7 : 16 / bits); i++) {
        int shift = 2 * i * bits - over;
        if (bits == 3 && shift >= 32) break;
        uint32_t pair = unpack_pair(p, row, begin + 2 * i, code);
        pair = (pair & 0xffffu) | (pair >> 16) << bits;
        word |= shift < 0 ? pair >> -shift : pair << shift;
    }
    return word;
}

static __device__ __forceinline__ uint32_t awq_word(const ql_pack_params *p, int64_t col, int64_t place) {
    if (p->word_tail && place * 8 + 8 > p->n) return (uint32_t)p->word_tail[col];
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        word |= packed_code(p->codes, QL_CODE_INT4, p->k, place * 8 + i, col) << (4 * awq_place(i));
    return word;
}

/* Four bytes of EETQ's weight: columns c, c + 8, c + 1, c + 9 of one of two rows, which take turns each 64 bytes. */
static __device__ __forceinline__ uint32_t eetq_word(const ql_pack_params *p, int64_t pair, int64_t place) {
    uint32_t inside = (uint32_t)place % 16;
    int64_t row = 2 * pair + place / 16 % 2, col = place / 32 * 64 + inside / 4 * 16 + inside % 4 * 2;
    return packed_pair(p->codes, QL_CODE_INT8, p->k, row, col) | packed_pair(p->codes, QL_CODE_INT8, p->k, row, col + 8)
                                                                     << 8;
}

/* Four bytes of 4 bit: the first of two values is the high nibble. */
static __device__ __forceinline__ uint32_t fourbit_word(const ql_pack_params *p, int64_t row, int64_t place) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t pair = packed_pair(p->codes, QL_CODE_TABLE4, p->k, row, 8 * place + 2 * i);
        word |= ((pair & 15u) << 4 | pair >> 16) << (8 * i);
    }
    return word;
}

/* The checkpoint's words as lines of `width`: a block makes `wide` of `tall` lines, which lie in the same tiles. All but
 * p, lines and width are constants. */
static __device__ __forceinline__ void unpack_lines(const ql_pack_params *p, int64_t lines, int64_t width, int wide,
                                                    int tall, int format, int code) {
    const uint32_t across = (uint32_t)((width + wide - 1) / wide);
    const int64_t blocks = across * ((lines + tall - 1) / tall);
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        int64_t place = (int64_t)((uint32_t)block % across) * wide + threadIdx.x % wide;
        int64_t first = (int64_t)((uint32_t)block / across) * tall, end = min(first + tall, lines);
        if (place >= width) continue;
        for (int64_t line = first + threadIdx.x / wide; line < end; line += THREADS / wide)
            ((uint32_t *)p->words)[line * width + place] = format == QL_WEIGHT_GPTQ   ? gptq_word(p, line, place, code)
                                                           : format == QL_WEIGHT_AWQ  ? awq_word(p, line, place)
                                                           : format == QL_WEIGHT_EETQ ? eetq_word(p, line, place)
                                                                                      : fourbit_word(p, line, place);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_unpack_words(const __grid_constant__ ql_pack_params p) {
    const int64_t n = p.n, k = p.k;
    if (p.format == QL_WEIGHT_AWQ) {
        unpack_lines(&p, k, (n + 7) / 8, 32, 64, QL_WEIGHT_AWQ, QL_CODE_INT4);
    } else if (p.format == QL_WEIGHT_EETQ) {
        unpack_lines(&p, n / 2, k / 2, THREADS, 1, QL_WEIGHT_EETQ, QL_CODE_INT8);
    } else if (p.format == QL_WEIGHT_FOURBIT) {
        unpack_lines(&p, n, k / 8, THREADS, 1, QL_WEIGHT_FOURBIT, QL_CODE_TABLE4);
    } else {
        switch (p.code) {
        case QL_CODE_INT2: unpack_lines(&p, (k * 2 + 31) / 32, n, 32, 8, QL_WEIGHT_GPTQ, QL_CODE_INT2); break;
        case QL_CODE_INT3: unpack_lines(&p, (k * 3 + 31) / 32, n, 32, 8, QL_WEIGHT_GPTQ, QL_CODE_INT3); break;
        case QL_CODE_INT4: unpack_lines(&p, (k * 4 + 31) / 32, n, 32, 8, QL_WEIGHT_GPTQ, QL_CODE_INT4); break;
        default: unpack_lines(&p, (k * 8 + 31) / 32, n, 32, 8, QL_WEIGHT_GPTQ, QL_CODE_INT8); break;
        }
    }
}

/* Word `index` of qzeros. */
static __device__ __forceinline__ uint32_t zeros_word(const ql_pack_params *p, int64_t index) {
    const int bits = QL_CODE_BITS(p->code);
    int64_t words = (p->n * bits + 31) / 32, group = index / words, line = index % words;
    if (p->zero_tail && line == words - 1) return (uint32_t)p->zero_tail[group];
    uint32_t word = 0, mask = (1u << bits) - 1u;
    for (int64_t row = line * 32 / bits; row * bits < (line + 1) * 32; row++) {
        uint32_t zero = packed_zero(p->packed_zeros, p->code, QL_GROUP_PLACE(row, group, p->groups));
        uint32_t stored = (zero - (uint32_t)p->zero_offset) & mask;
        int shift = (int)(row * bits - line * 32);
        if (p->format == QL_WEIGHT_AWQ) shift = 4 * awq_place((int)(row & 7));
        word |= shift < 0 ? stored >> -shift : stored << shift;
    }
    return word;
}

/* Scales an element a thread, then zeros a word a thread. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_unpack_entries(const __grid_constant__ ql_pack_params p) {
    const int64_t scales = p.groups * p.n;
    const int64_t words = p.zeros ? p.groups * ((p.n * QL_CODE_BITS(p.code) + 31) / 32) : 0;
    for (int64_t i = first_item(); i < scales + words; i += item_step()) {
        if (i >= scales) {
            p.zeros[i - scales] = (int32_t)zeros_word(&p, i - scales);
            continue;
        }
        bool row_major = p.format == QL_WEIGHT_FOURBIT;
        int64_t row = row_major ? i / p.groups : i % p.n, group = row_major ? i % p.groups : i / p.n;
        copy_element(p.scales, i, p.packed_scales, QL_GROUP_PLACE(row, group, p.groups), p.scale_size);
    }
}
