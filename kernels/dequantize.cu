/* Writes out the matrix that a packed GPTQ weight stands for, in fp32, fp16 or bf16, rounded once from fp32.
 *
 * The checkpoint packs codes along K, one column of W^T beside the next, while the result is row-major [n, k]: reading
 * wants neighbouring lanes at neighbouring n, writing wants them at neighbouring k. So a warp takes a tile of 32 n by 32
 * k, of which each lane decodes one n (`bits` words hold exactly its 32 codes), and turns it in shared memory. */
#include "params.h"
#include "value.cuh"
#include "variants.h"

/* An odd pitch keeps both the rows and the columns of a tile free of bank conflicts. */
enum { PITCH = QL_DEQUANTIZE_TILE_K + 1 };

/* The scale of row `row` and its zero, in the group `group`. */
static __device__ __forceinline__ float2 load_scale(const ql_dequantize_gptq_params *p, int bits, int64_t group,
                                                    int64_t row) {
    int64_t words = (p->n * bits + 31) / 32;
    uint32_t zero = load_code(p->qzeros + group * words, 1, bits, row) + (uint32_t)p->zero_offset;
    float scale = load_value(p->scales, p->scales_type, group * p->n + row);
    return make_float2(scale, (float)(zero & ((1u << bits) - 1u)));
}

/* One warp, one tile: decode down the columns of the checkpoint, write along the rows of W. */
static __device__ __forceinline__ void dequantize_gptq(const ql_dequantize_gptq_params *p, int bits, int type) {
    __shared__ float tiles[QL_DEQUANTIZE_WARPS][QL_DEQUANTIZE_TILE_N * PITCH];
    int lane = (int)(threadIdx.x & 31);
    int warp = (int)(threadIdx.x >> 5);
    float *tile = tiles[warp];

    int64_t tiles_n = (p->n + QL_DEQUANTIZE_TILE_N - 1) / QL_DEQUANTIZE_TILE_N;
    int64_t tiles_k = (p->k + QL_DEQUANTIZE_TILE_K - 1) / QL_DEQUANTIZE_TILE_K;
    int64_t index = (int64_t)blockIdx.x * QL_DEQUANTIZE_WARPS + warp;
    if (index >= tiles_n * tiles_k) return;
    int64_t first_n = index / tiles_k * QL_DEQUANTIZE_TILE_N;
    int64_t first_k = index % tiles_k * QL_DEQUANTIZE_TILE_K;
    int count_n = (int)min(p->n - first_n, (int64_t)QL_DEQUANTIZE_TILE_N);
    int count_k = (int)min(p->k - first_k, (int64_t)QL_DEQUANTIZE_TILE_K);

    if (lane < count_n) {
        int64_t row = first_n + lane;
        int64_t group = -1;
        float2 scale = make_float2(0.0f, 0.0f);
        for (int i = 0; i < count_k; i++) {
            int64_t col = first_k + i;
            int64_t next = p->g_idx ? (int64_t)p->g_idx[col] : col / p->group_size;
            if (next != group) scale = load_scale(p, bits, next, row);
            group = next;
            float code = (float)load_code(p->qweight + row, p->n, bits, col);
            tile[lane * PITCH + i] = (code - scale.y) * scale.x;
        }
    }
    __syncwarp();
    if (lane < count_k) {
        for (int i = 0; i < count_n; i++)
            store_value(p->out, type, (first_n + i) * p->k + first_k + lane, tile[i * PITCH + lane]);
    }
}

#define QL_DEQUANTIZE_GPTQ(name, bits, type)                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * QL_DEQUANTIZE_WARPS)                                             \
        name(const __grid_constant__ ql_dequantize_gptq_params params) {                                               \
        dequantize_gptq(&params, bits, type);                                                                          \
    }
QL_DEQUANTIZE_GPTQ_VARIANTS(QL_DEQUANTIZE_GPTQ)
