/* A packed weight as a matrix, to the bits of weight.cuh's formulas, at memory speed: a warp decodes a tile, whose rows lie
 * in shared memory side by side then, and stores them in whole pieces. */
#include "params.h"
#include "ptx.cuh"
#include "variants.h"
#include "weight.cuh"

enum { THREADS = QL_LINEAR_THREADS, WARP = 32, WARPS = THREADS / WARP, PIECE = 8 };

/* Words of a row of 16-bit values: with four more than it has, the rows of eight lanes lie in different banks. */
#define PITCH(code) (QL_TILE_K(code) / 2 + 4)

/* What a row's codes of one group count against. */
typedef struct entry {
    float zero, scale; /* of a table no zero */
} entry;

static __device__ __forceinline__ entry entry_of(const ql_linear_params *p, int code, int64_t row, int64_t group) {
    if (row >= p->n) return (entry){0.0f, 0.0f};
    const int64_t place = QL_GROUP_PLACE(row, group, p->groups);
    if (code == QL_CODE_TABLE4) return (entry){0.0f, packed_absmax(p, row, group, place)};
    return (entry){(float)packed_zero(p->zeros, code, place), load_value(p->scales, p->scales_type, place)};
}

/* Codes of columns that neighbour each other, the second 16 bits up: of row g + 8 * h, step s, half `half` of it, where a
 * lane's words are low and, of 3 bit, high. All but the words are constants. */
static __device__ __forceinline__ uint32_t pair_of(const uint32_t *low, const uint32_t *high, int code, int s, int half,
                                                   int h) {
    const int col = s * QL_STEP + half * 8, row = 8 * h;
    const uint32_t word = low[QL_PACKED_WORD(code, col)] >> QL_PACKED_BIT(code, row, col);
    if (code == QL_CODE_TABLE4) return (word & 15u) | (word & 0xf0u) << 12;
    if (code != QL_CODE_INT3) return word & ((1u << QL_CODE_BITS(code)) - 1u) * 0x10001u;
    return (word & 0x30003u) | (high[QL_PACKED_HIGH_WORD(col)] >> QL_PACKED_HIGH_BIT(row, col) & 0x10001u) << 2;
}

static __device__ __forceinline__ float value_of(uint32_t q, const entry *e, const float *table, int code) {
    /* 2^23 + q has q as its last bits: that is sooner there than a conversion. */
    const float number = code == QL_CODE_TABLE4 ? table[q] : __uint_as_float(0x4b000000u | q) - (0x1p23f + e->zero);
    return number * e->scale;
}

/* Columns [col, col + 2) of a row, which is inside, in fp32. */
static __device__ __forceinline__ void store_floats(const ql_linear_params *p, int64_t row, int64_t col, float first,
                                                    float second) {
    float *to = (float *)p->out + row * p->k + col;
    if (col + 1 < p->k && (uintptr_t)to % 8 == 0) {
        *(float2 *)to = make_float2(first, second);
        return;
    }
    if (col < p->k) to[0] = first;
    if (col + 1 < p->k) to[1] = second;
}

/* What a warp has laid out of rows from `row` and columns from `col` on. */
static __device__ __forceinline__ void store_rows(const ql_linear_params *p, const uint32_t *rows, int64_t row,
                                                  int64_t col, int code, bool whole) {
    const int lane = (int)threadIdx.x % WARP, pieces = QL_TILE_K(code) / PIECE;
    const int inside = (int)min(p->k - col, (int64_t)QL_TILE_K(code)), count = (int)min(p->n - row, (int64_t)QL_STRIP);
    uint16_t *to = (uint16_t *)p->out + row * p->k + col;
    if (whole) {
#pragma unroll
        for (int i = lane; i < QL_STRIP * pieces; i += WARP) {
            const int r = i / pieces, piece = i % pieces;
            if (r < count && piece * PIECE < inside)
                *(uint4 *)(to + r * p->k + piece * PIECE) =
                    *(const uint4 *)(rows + r * PITCH(code) + piece * (PIECE / 2));
        }
        return;
    }
    for (int i = lane; i < QL_STRIP * QL_TILE_K(code); i += WARP) {
        const int r = i / QL_TILE_K(code), c = i % QL_TILE_K(code);
        if (r < count && c < inside) to[r * p->k + c] = ((const uint16_t *)(rows + r * PITCH(code)))[c];
    }
}

/* A lane's codes of a tile, and of 3 bit their high parts. */
typedef struct words {
    uint32_t low[4], high[2];
} words;

static __device__ __forceinline__ words load_words(const uint8_t *tile, int code) {
    const int lane = (int)threadIdx.x % WARP;
    const uint4 four = *(const uint4 *)(tile + 16 * lane);
    words result = {{four.x, four.y, four.z, four.w}, {0, 0}};
    if (code == QL_CODE_INT3) {
        const uint2 two = *(const uint2 *)(tile + 512 + 8 * lane);
        result.high[0] = two.x;
        result.high[1] = two.y;
    }
    return result;
}

/* The tile whose first element is (row, col): into the warp's rows, or, of fp32, whose pieces of four lanes are 32 bytes, to
 * where it belongs. code and floats are constants. */
static __device__ __forceinline__ void decode_tile(uint32_t *rows, const ql_linear_params *p, const words *w,
                                                   const float *table, int64_t row, int64_t col, int code,
                                                   bool floats) {
    const int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int64_t group = divide(col, p->group_size);
    int left = (int)min((group + 1) * p->group_size - col, (int64_t)QL_TILE_K(code)); /* columns of the tile */
    const int inside = (int)min(p->k - col, (int64_t)QL_TILE_K(code));
    entry entries[2] = {entry_of(p, code, row + g, group), entry_of(p, code, row + g + 8, group)};
#pragma unroll
    for (int s = 0; s < QL_TILE_K(code) / QL_STEP; s++) {
        if (s * QL_STEP >= inside) break;
        if (left == 0) {
            group++;
            left = (int)min(p->group_size, (int64_t)QL_TILE_K(code));
            entries[0] = entry_of(p, code, row + g, group);
            entries[1] = entry_of(p, code, row + g + 8, group);
        }
        left -= QL_STEP;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = i / 2, half = i % 2, c = s * QL_STEP + half * 8 + 2 * t;
            const uint32_t pair = pair_of(w->low, w->high, code, s, half, h);
            const float first = value_of(pair & 0xffffu, &entries[h], table, code),
                        second = value_of(pair >> 16, &entries[h], table, code);
            if (!floats)
                rows[(g + 8 * h) * PITCH(code) + c / 2] = round16_pair(first, second, p->out_type);
            else if (row + g + 8 * h < p->n)
                store_floats(p, row + g + 8 * h, col + c, first, second);
        }
    }
}

/* code is a constant of each kernel. */
static __device__ __forceinline__ void dequantize(const ql_linear_params *p, int code, uint32_t *shared) {
    __shared__ float table[16];
    uint32_t *rows = shared + threadIdx.x / WARP * (QL_STRIP * PITCH(code));
    const uint32_t tiles = (uint32_t)((p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code));
    const int64_t count = (p->n + QL_STRIP - 1) / QL_STRIP * tiles;
    const bool whole = p->k % PIECE == 0 && (uintptr_t)p->out % 16 == 0;
    if (code == QL_CODE_TABLE4) {
        if (threadIdx.x < 16) table[threadIdx.x] = p->table[threadIdx.x];
        __syncthreads();
    }
    for (int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP; i < count; i += (int64_t)gridDim.x * WARPS) {
        const int64_t row = (uint32_t)i / tiles * (int64_t)QL_STRIP,
                      col = (uint32_t)i % tiles * (int64_t)QL_TILE_K(code);
        const words w = load_words((const uint8_t *)p->codes + i * QL_TILE_BYTES(code), code);
        if (p->out_type == QL_VALUE_F32) {
            decode_tile(rows, p, &w, table, row, col, code, true);
            continue;
        }
        decode_tile(rows, p, &w, table, row, col, code, false);
        __syncwarp();
        store_rows(p, rows, row, col, code, whole);
        __syncwarp();
    }
}

#define KERNEL(name, source, code)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const __grid_constant__ ql_linear_params params) {   \
        __shared__ uint4 shared[WARPS * QL_STRIP * PITCH(code) / 4];                                                   \
        dequantize(&params, code, (uint32_t *)shared);                                                                 \
    }
QL_DEQUANTIZE_VARIANTS(KERNEL)
