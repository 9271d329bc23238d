/* What the decode kernels' warps have of a strip's outputs: left in shared memory, added once there is no more room, in order,
 * so that the same call gives the same bits, exchanged between the blocks of a cluster, stored. */
#ifndef QL_KERNELS_SUMS_CUH
#define QL_KERNELS_SUMS_CUH

#include "cluster.cuh"
#include "few_tokens.cuh"
#include "value.cuh"

extern __shared__ __align__(1024) uint8_t shared[];

/* Whether a warp goes through the end of a round once before its first (decode.cu). Elsewhere that wants for registers. */
#if __CUDA_ARCH__ == 900
#define QL_DECODE_LEADS true
#else
#define QL_DECODE_LEADS false
#endif

/* What to change in the place of a row of a line, a token's rows of a band. Of two strips eight rows change places by the token's
 * pair, as the four lanes that have the same rows would want the same banks. */
static __device__ __forceinline__ int line_turn(int abreast, int token) {
    return abreast == 2 ? token / 2 % 4 * 32 : 0;
}

/* A warp's sums of a band into shared memory; turn: of the rounds that are held. */
static __device__ __forceinline__ void leave_sums(const ql_decode_params *p, float *sum, int code, int type, int tokens,
                                                  int groups, int slots, bool roomy, int partials, int turn) {
    const int abreast = QL_DECODE_ABREAST(code, tokens), line = abreast * 64;
    if (tokens == 1) {
        leave_sums_of_one(sum, shared + partials + (turn * p->teams * p->team_warps + (int)threadIdx.x / 32) * line);
        return;
    }
    const int width = tokens == 16 ? 8 : 4;
    const bool anew = abreast == 2 ? groups < 8 || !roomy
                                   : tokens == 16 || groups >= 8 || type == QL_VALUE_BF16 || (!roomy && !groups);
    const int thread = anew ? thread_anew() : (int)threadIdx.x;
    const int token = thread % 4 * 2;                                  /* with slots: of the first */
    const int place = turn * p->teams * p->team_warps + (thread >> 5); /* team * team_warps + member */
    const int row = thread % 32 / 4 * 4 + line_turn(abreast, token);
    uint8_t *to = shared + partials + (place * p->m + token) * line;
#pragma unroll
    for (int strip = 0; strip < abreast; strip++)
#pragma unroll
        for (int j = 0; j < width; j++) {
            float mine = sum[strip * 4 + j];
            if (slots == 2) mine += __shfl_xor_sync(ALL_LANES, mine, 2);
            const int eighth = strip * 64 + j % 4 / 2 * 32, at = abreast == 2 ? row ^ eighth : row + eighth;
            if (j / 4 * 8 + j % 2 + token < p->m) *(float *)(to + (j / 4 * 8 + j % 2) * line + at) = mine;
        }
}

/* Where block `rank`'s sums of the band of a round lie with the block that owns it. */
static __device__ __forceinline__ int exchange_at(const ql_decode_params *p, int abreast, int team, int round,
                                                  int rank) {
    return p->exchange_at +
           (((round >> p->cluster_shift) * p->teams + team << p->cluster_shift) + rank) * p->m * (abreast * 64);
}

/* `rows` values of an array, `stride` apart, of which `inside` are there. */
static __device__ __forceinline__ void load_rows_of(float *values, const void *array, int type, int64_t at,
                                                    int64_t stride, int rows, int inside) {
#pragma unroll
    for (int i = 0; i < rows; i++, at += stride) values[i] = i < inside ? load_value(array, type, at) : 0.0f;
}

/* The same of any of the three types. */
static __device__ __forceinline__ void load_rows(float *values, const void *array, int type, int64_t at, int64_t stride,
                                                 int rows, int inside) {
    if (type == QL_VALUE_F16)
        load_rows_of(values, array, QL_VALUE_F16, at, stride, rows, inside);
    else if (type == QL_VALUE_BF16)
        load_rows_of(values, array, QL_VALUE_BF16, at, stride, rows, inside);
    else
        load_rows_of(values, array, QL_VALUE_F32, at, stride, rows, inside);
}

/* Neighbours in a row of outputs. */
static __device__ __forceinline__ void store_rows(void *array, int type, int64_t at, const float *values, int rows,
                                                  int inside) {
    uint16_t *to = (uint16_t *)array + at;
    if (rows == 4 && inside >= rows && (uintptr_t)to % (uintptr_t)(rows * 2) == 0) {
        const uint32_t low = round16_pair(values[0], values[1], type);
        *(uint2 *)to = make_uint2(low, round16_pair(values[2], values[3], type));
        return;
    }
#pragma unroll
    for (int i = 0; i < rows; i++)
        if (i < inside) to[i] = round16(values[i], type);
}

/* sum += the first `count` of `most` parts, all of which are loaded first. */
static __device__ __forceinline__ void add_parts(float *sum, const uint8_t *from, int pitch, int rows, int count,
                                                 int most) {
    float4 part[8];
#pragma unroll
    for (int i = 0; i < most; i++, from += pitch) {
        part[i] = make_float4(0, 0, 0, 0);
        if (i >= count) continue;
        if (rows == 4)
            part[i] = *(const float4 *)from;
        else
            part[i].x = *(const float *)from;
    }
#pragma unroll
    for (int i = 0; i < most; i++) {
        sum[0] += part[i].x;
        if (rows == 4) sum[1] += part[i].y, sum[2] += part[i].z, sum[3] += part[i].w;
    }
}

/* Adds the warps' sums of `rounds` rounds from `round` on, which lie at `partials` once all warps are here. They become
 * outputs, or go to the block that owns the strip. A thread takes `rows` neighbouring rows of a token: four where there are
 * many, as where their sums are, and where they go, is found once for all of them. Of no rounds no warp is waited for, and all
 * instructions are met with nothing to load or to store. */
static __device__ __forceinline__ void finish_rows(const ql_decode_params *p, int code, int type, int abreast,
                                                   int groups, int rows, int block, int rank, int round, int rounds,
                                                   int partials) {
    const ql_packed_params *w = &p->product;
    const int line_rows = abreast * 16, line_items = line_rows / rows, most = groups && rows == 4 ? 4 : 8;
    const int items = rounds * p->teams * p->m * line_items, parts = p->team_warps, pitch = p->m * line_rows * 4;
    const float one = 1.0f / QL_RAW_ONE(code, type), one_8 = one / QL_RAW_UNIT(code, type, 1);
    bool first = true;
    uint32_t item = (uint32_t)thread_anew();
    /* Warps without an item turn once as well: all come to the barrier by one instruction, as tools that watch barriers want. */
#pragma unroll 1
    do {
        const int row = (int)(item % (uint32_t)line_items) * rows, line = (int)(item / (uint32_t)line_items);
        const int place = line * p->token_part >> 16, token = line - place * p->m;
        const int band = block + (place + round * p->teams) * p->blocks, out = band * line_rows + row;
        const int inside = (int)item < items ? (int)w->n - out : 0;
        /* What is far is asked for before the others are waited for. */
        float scale[4] = {1, 1, 1, 1}, bias[4] = {0};
        if (!groups) load_rows(scale, p->scales, w->scales_type, out, 1, rows, inside);
        if (w->bias && !p->cluster_shift)
            load_rows(bias, w->bias, w->bias_type, out * w->bias_stride, w->bias_stride, rows, inside);
        if (first && rounds) __syncthreads();
        first = false;
        if (!QL_DECODE_LEADS && inside <= 0) continue;
        const uint8_t *from =
            shared + partials + place * parts * pitch + token * (line_rows * 4) + (row * 4 ^ line_turn(abreast, token));
        float sum[4] = {0};
        int left = inside > 0 ? parts : 0;
#pragma unroll 1
        do {
            add_parts(sum, from, pitch, rows, left, most);
            left -= most, from += most * pitch;
        } while (left > 0);
#pragma unroll
        for (int i = 0; i < rows; i++) sum[i] = fmaf(sum[i], scale[i] * (row % 16 < 8 ? one : one_8), bias[i]);
        if (!p->cluster_shift) {
            store_rows(w->out, type, token * w->n + out, sum, rows, inside);
            continue;
        }
        const int turn = round + place / p->teams, owner = turn & (1 << p->cluster_shift) - 1;
        const int to = exchange_at(p, abreast, place % p->teams, turn, rank) + (token * line_rows + row) * 4;
#pragma unroll
        for (int i = 0; i < rows && inside > 0; i++)
            store_remote(shared_address(shared) + (uint32_t)(to + i * 4), owner, sum[i]);
    } while ((item += blockDim.x) < (uint32_t)(items + 31 & ~31));
}

static __device__ __forceinline__ void finish_rounds(const ql_decode_params *p, int code, int type, int tokens,
                                                     int groups, int block, int rank, int round, int rounds,
                                                     int partials) {
    const int abreast = QL_DECODE_ABREAST(code, tokens);
    if (tokens != 4 && p->flush_rounds * p->teams * p->m * (abreast * 16) > 2 * (int)blockDim.x)
        finish_rows(p, code, type, abreast, groups, 4, block, rank, round, rounds, partials);
    else
        finish_rows(p, code, type, abreast, groups, 1, block, rank, round, rounds, partials);
}

/* Adds the sums of a cluster's blocks, in order, for the bands that this block owns. */
static __device__ __forceinline__ void finish_cluster(const ql_decode_params *p, int type, int abreast, int block,
                                                      int rank) {
    const ql_packed_params *w = &p->product;
    const int line_rows = abreast * 16;
    const int cluster = 1 << p->cluster_shift, turns = p->rounds - rank + cluster - 1 >> p->cluster_shift;
    meet_cluster();
#pragma unroll 1
    for (int item = (int)threadIdx.x; item < turns * p->teams * p->m * line_rows; item += (int)blockDim.x) {
        const int row = item % line_rows, line = item / line_rows, place = line * p->token_part >> 16,
                  token = line - place * p->m;
        const int team = place % p->teams, round = (place / p->teams << p->cluster_shift) + rank;
        const int out = (block + (team + round * p->teams) * p->blocks) * line_rows + row;
        if (out >= (int)w->n) continue;
        const uint8_t *from = shared + exchange_at(p, abreast, team, round, 0) + (token * line_rows + row) * 4;
        float sum = 0.0f;
#pragma unroll 1
        for (int i = 0; i < cluster; i++) sum += *(const float *)(from + i * p->m * (line_rows * 4));
        store_value(w->out, type, token * w->n + out, sum + BIAS_AT(w, out));
    }
}

#endif
