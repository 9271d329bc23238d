/* Packing on the device: a checkpoint's tensors to the sections of packed.h, and back bit for bit. A thread makes what it
 * writes: the codes of a lane in a tile, two scales with their zeros, or a word of the checkpoint. */
#include "params.h"
#include "weight.cuh"

enum { THREADS = QL_LINEAR_THREADS };

static __device__ __forceinline__ int64_t first_item(void) { return (int64_t)blockIdx.x * THREADS + threadIdx.x; }
static __device__ __forceinline__ int64_t item_step(void) { return (int64_t)gridDim.x * THREADS; }

/* Code (row, col) as the checkpoint has it. `format` and `code` are constants. */
static __device__ __forceinline__ uint32_t source_code(const ql_pack_params *p, int64_t row, int64_t col, int format,
                                                       int code) {
    switch (format) {
    case QL_WEIGHT_GPTQ: return load_code((const int32_t *)p->words + row, p->n, QL_CODE_BITS(code), col);
    case QL_WEIGHT_AWQ: return awq_nibble((const int32_t *)p->words + col * ((p->n + 7) / 8), row);
    case QL_WEIGHT_EETQ: return ((const uint8_t *)p->words)[eetq_offset(p->k, row, col)];
    default: {
        uint32_t byte = ((const uint8_t *)p->words)[(row * p->k + col) >> 1];
        return col & 1 ? byte & 15u : byte >> 4;
    }
    }
}

/* The 16 bytes of a lane, and of 3 bit 8 more. */
static __device__ __forceinline__ void pack_lane(const ql_pack_params *p, int64_t strip, int64_t tile, int lane,
                                                 int format, int code) {
    const int columns = QL_TILE_K(code) / 4; /* of a word */
    const int64_t tiles = (p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code);
    uint32_t low[4] = {0}, high[2] = {0};
#pragma unroll
    for (int word = 0; word < 4; word++) {
#pragma unroll
        for (int i = 0; i < columns / 4; i++) {
            int step = word * columns + i / 2 * 8 + i % 2; /* the lane's columns come in pairs, 8 apart */
            int64_t col = tile * QL_TILE_K(code) + step + lane % 4 * 2;
            if (col >= p->k) continue;
            int64_t from = format == QL_WEIGHT_GPTQ && p->order ? p->order[col] : col;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int64_t row = strip * QL_STRIP + lane / 4 + 8 * h;
                uint32_t q = row < p->n ? source_code(p, row, from, format, code) : 0;
                low[word] |= (code == QL_CODE_INT3 ? q & 3u : q) << QL_PACKED_BIT(code, 8 * h, step);
                if (code == QL_CODE_INT3)
                    high[QL_PACKED_HIGH_WORD(step)] |= (q >> 2) << QL_PACKED_HIGH_BIT(8 * h, step);
            }
        }
    }
    uint8_t *to = (uint8_t *)p->codes + (strip * tiles + tile) * QL_TILE_BYTES(code);
    *(uint4 *)(to + 16 * lane) = make_uint4(low[0], low[1], low[2], low[3]);
    if (code == QL_CODE_INT3) *(uint2 *)(to + 512 + 8 * lane) = make_uint2(high[0], high[1]);
}

/* A warp a tile. Neighbouring warps take what is close in the checkpoint: strips where it packs along N, tiles where it
 * is row-major. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_pack_codes(const __grid_constant__ ql_pack_params p) {
    const int64_t strips = (p.n + QL_STRIP - 1) / QL_STRIP, tiles = (p.k + QL_TILE_K(p.code) - 1) / QL_TILE_K(p.code);
    const bool along_n = p.format == QL_WEIGHT_GPTQ || p.format == QL_WEIGHT_AWQ;
    const int lane = (int)threadIdx.x % 32;
    for (int64_t i = first_item() / 32; i < strips * tiles; i += item_step() / 32) {
        int64_t strip = along_n ? i % strips : i / tiles, tile = along_n ? i / strips : i % tiles;
        if (p.format == QL_WEIGHT_AWQ) {
            pack_lane(&p, strip, tile, lane, QL_WEIGHT_AWQ, QL_CODE_INT4);
        } else if (p.format == QL_WEIGHT_EETQ) {
            pack_lane(&p, strip, tile, lane, QL_WEIGHT_EETQ, QL_CODE_INT8);
        } else if (p.format == QL_WEIGHT_FOURBIT) {
            pack_lane(&p, strip, tile, lane, QL_WEIGHT_FOURBIT, QL_CODE_TABLE4);
        } else {
            switch (p.code) {
            case QL_CODE_INT2: pack_lane(&p, strip, tile, lane, QL_WEIGHT_GPTQ, QL_CODE_INT2); break;
            case QL_CODE_INT3: pack_lane(&p, strip, tile, lane, QL_WEIGHT_GPTQ, QL_CODE_INT3); break;
            case QL_CODE_INT4: pack_lane(&p, strip, tile, lane, QL_WEIGHT_GPTQ, QL_CODE_INT4); break;
            default: pack_lane(&p, strip, tile, lane, QL_WEIGHT_GPTQ, QL_CODE_INT8); break;
            }
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

/* The place of each column among those sorted by their groups: after all of smaller groups and those of its own group
 * that come before it. A block's threads count together, as each group is read by all. */
extern "C" __global__ void __launch_bounds__(THREADS) ql_pack_order(const __grid_constant__ ql_pack_params p) {
    __shared__ int32_t groups[THREADS];
    const int64_t col = first_item();
    const int32_t own = col < p.k ? p.g_idx[col] : 0;
    int32_t rank = 0;
    for (int64_t base = 0; base < p.k; base += THREADS) {
        int count = (int)min((int64_t)THREADS, p.k - base);
        __syncthreads();
        if ((int)threadIdx.x < count) groups[threadIdx.x] = p.g_idx[base + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < count; i++) rank += groups[i] < own || (groups[i] == own && base + i < col);
    }
    if (col >= p.k) return;
    p.order[rank] = (int32_t)col;
    p.inverse[col] = rank;
}

/* The code that the checkpoint calls (row, col). */
static __device__ __forceinline__ uint32_t unpack_code(const ql_pack_params *p, int64_t row, int64_t col, int code) {
    if (p->inverse) col = max((int64_t)0, min((int64_t)p->inverse[col], p->k - 1));
    return packed_code(p->codes, code, p->k, row, col);
}

/* Word `index` of GPTQ's qweight: the codes that have a bit in it. */
static __device__ __forceinline__ uint32_t gptq_word(const ql_pack_params *p, int64_t index, int code) {
    const int bits = QL_CODE_BITS(code);
    int64_t line = index / p->n, row = index % p->n;
    if (p->word_tail && line == (p->k * bits) / 32) return (uint32_t)p->word_tail[row];
    uint32_t word = 0;
    for (int64_t col = line * 32 / bits; col * bits < (line + 1) * 32; col++) {
        uint32_t q = unpack_code(p, row, col, code);
        int shift = (int)(col * bits - line * 32);
        word |= shift < 0 ? q >> -shift : q << shift;
    }
    return word;
}

static __device__ __forceinline__ uint32_t awq_word(const ql_pack_params *p, int64_t index) {
    int64_t words = (p->n + 7) / 8, col = index / words, row = index % words * 8;
    if (p->word_tail && row + 8 > p->n) return (uint32_t)p->word_tail[col];
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= unpack_code(p, row + i, col, QL_CODE_INT4) << (4 * awq_place(i));
    return word;
}

/* Four bytes of EETQ's weight: their order within 16 inputs is 0, 8, 1, 9, ... */
static __device__ __forceinline__ uint32_t eetq_word(const ql_pack_params *p, int64_t index) {
    int64_t byte = 4 * index, pair = byte / (2 * p->k), inside = byte % (2 * p->k);
    int64_t row = 2 * pair + inside / 64 % 2, col = inside / 128 * 64 + (inside & 48) + (inside & 15) / 2;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) word |= unpack_code(p, row, col + i / 2 + i % 2 * 8, QL_CODE_INT8) << (8 * i);
    return word;
}

/* Four bytes of 4 bit: the first of two values is the high nibble. */
static __device__ __forceinline__ uint32_t fourbit_word(const ql_pack_params *p, int64_t index) {
    int64_t row = 8 * index / p->k, col = 8 * index % p->k;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= unpack_code(p, row, col + i, QL_CODE_TABLE4) << (4 * (i ^ 1));
    return word;
}

extern "C" __global__ void __launch_bounds__(THREADS) ql_unpack_words(const __grid_constant__ ql_pack_params p) {
    const int bits = QL_CODE_BITS(p.code);
    const int64_t count = p.format == QL_WEIGHT_GPTQ  ? (p.k * bits + 31) / 32 * p.n
                          : p.format == QL_WEIGHT_AWQ ? p.k * ((p.n + 7) / 8)
                                                      : p.n * p.k * bits / 32;
    for (int64_t i = first_item(); i < count; i += item_step()) {
        uint32_t word;
        if (p.format == QL_WEIGHT_AWQ) {
            word = awq_word(&p, i);
        } else if (p.format == QL_WEIGHT_EETQ) {
            word = eetq_word(&p, i);
        } else if (p.format == QL_WEIGHT_FOURBIT) {
            word = fourbit_word(&p, i);
        } else {
            switch (p.code) {
            case QL_CODE_INT2: word = gptq_word(&p, i, QL_CODE_INT2); break;
            case QL_CODE_INT3: word = gptq_word(&p, i, QL_CODE_INT3); break;
            case QL_CODE_INT4: word = gptq_word(&p, i, QL_CODE_INT4); break;
            default: word = gptq_word(&p, i, QL_CODE_INT8); break;
            }
        }
        ((uint32_t *)p.words)[i] = word;
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
