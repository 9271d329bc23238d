/* Products of 1 to 16 tokens with a packed weight: mma.m16n8k16 with 16 rows of the weight as the large operand and 8 or 16
 * tokens as the small one. The weight is read once, straight into the registers that multiply it; time is the reading.
 *
 * A thread block is some teams of warps (decode.h). A team takes every so many-th strip of 16 rows; its warps split K and
 * meet once a strip, where their sums are added in shared memory, in order, so that the same call gives the same bits. x
 * lies in shared memory, whole, or split over the blocks of a cluster, which then add their sums once at the end. While a
 * warp multiplies a batch the next one is on its way: each tile is loaded again, from the next batch or strip, as soon as
 * its registers are free.
 *
 * Codes are multiplied as they are (code_raw.cuh); what they lack is made up in fp32 at the end of each group:
 * sum W x = scale * (sum raw x - zero * sum x). The sums of x come from mma as well, with ones as the large operand, once
 * a launch. The weight does not depend on the kernel before, so its loads go out before that one is waited for.
 *
 * Grid: as many blocks as are resident, blockDim.x = 32 * teams * team_warps, at most QL_DECODE_THREADS. */
#include "code_raw.cuh"
#include "decode.h"
#include "ptx.cuh"
#include "value.cuh"
#include "variants.h"

/* What a warp is, and its part of a strip. */
typedef struct ql_decode_warp {
    int lane, team, warp; /* warp: of the team */
    int first, count;     /* batches */
} ql_decode_warp;

/* What a lane holds of scale and zero until the warp gets to them: an entry of each pair of groups. */
typedef struct ql_raw_entry {
    uint32_t scale[4], zero[4]; /* of nested absmax: its byte, and the second level's as a float */
} ql_raw_entry;

extern __shared__ __align__(1024) uint8_t shared[];

/* ---- barriers in shared memory: phases with a number of arrivals each ---- */

static __device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

static __device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared.b64 state, [%0];\n\t}" ::"r"(barrier) : "memory");
}

/* Until the phase of this parity is complete. */
static __device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    while (!done);
}

static __device__ __forceinline__ int cluster_rank(void) {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

static __device__ __forceinline__ int cluster_number(void) {
    uint32_t number = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
#endif
    return (int)number;
}

/* That this block has started, nothing else. */
static __device__ __forceinline__ void arrive_cluster_started(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void arrive_cluster(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void wait_cluster(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* To the same place in the shared memory of block `rank` of the cluster. */
static __device__ __forceinline__ void store_remote(uint32_t at, int rank, float value) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .u32 to;\n\tmapa.shared::cluster.u32 to, %0, %1;\n\tst.shared::cluster.f32 [to], %2;\n\t}" ::"r"(at),
        "r"(rank), "f"(value)
        : "memory");
#endif
}

/* A tile of the batch; at: the batch's first tile, for this lane's 16 bytes. */
static __device__ __forceinline__ void load_tile(ql_batch_codes *codes, int code, const uint8_t *at, int tile,
                                                 int lane) {
    codes->low[tile] = load_stream_16(at + tile * QL_TILE_BYTES(code));
    if (code == QL_CODE_INT3) codes->high[tile] = load_stream_8(at + tile * QL_TILE_BYTES(code) + 512 - 8 * lane);
}

/* ---- scales and zeros ----
 * A batch's entries are loaded a batch ahead, a lane an entry of each pair of groups, or a strip ahead and 16 lanes a row
 * each where all of K is one group. At the batch's start the warp makes fp32 of them in shared memory: {scale, zero}, or
 * with a table absmax, as multiply() wants them. */

/* One entry: `place` among the scales, of a row and group. */
static __device__ __forceinline__ void load_raw(const ql_decode_params *p, int code, uint32_t *scale, uint32_t *zero,
                                                int place, int row, int group) {
    const ql_packed_params *w = &p->product;
    const uint8_t *at = (const uint8_t *)w->scales + (int64_t)place * p->scale_size;
    if (p->scale_size == 2 && code != QL_CODE_TABLE4) *scale = __ldg((const uint16_t *)at);
    if (p->scale_size == 4) *scale = __ldg((const uint32_t *)at);
    if (code == QL_CODE_TABLE4) {
        if (p->scale_size == 1) {
            *scale = __ldg(at);
            /* Rows beyond n have no absmax of the second level. */
            if (row < (int)w->n && group < (int)w->groups)
                *zero = __float_as_uint(__ldg(w->nested_absmax + ((row * (int)w->groups + group) >> p->nested_shift)));
        }
    } else if (p->bare_zero < 0) {
        *zero = __ldg(w->zeros + (code == QL_CODE_INT8 ? place : place >> 1));
    }
}

/* The entries of batch `batch` of a strip; of groups that K has not, zeros. */
static __device__ __forceinline__ void load_entries(const ql_decode_params *p, int code, int groups, ql_raw_entry *raw,
                                                    int lane, int strip, int batch) {
    if (groups == QL_DECODE_CHANNEL) {
        int row = strip * 16 + lane % 16;
        load_raw(p, code, &raw->scale[0], &raw->zero[0], row, row, 0);
        return;
    }
    int first = groups == 1 ? batch >> p->group_shift >> 1 : batch * (groups / 2);
#pragma unroll
    for (int i = 0; i < (groups + 1) / 2; i++) {
        if (i && first + i >= p->pairs) {
            raw->scale[i] = 0;
            continue;
        }
        load_raw(p, code, &raw->scale[i], &raw->zero[i], (strip * p->pairs + first + i) * 32 + lane,
                 strip * 16 + (lane & 1) * 8 + lane / 4, (first + i) * 2 + (lane >> 1 & 1));
    }
}

/* Without branches: types other than the scales' cost a shift and a choice. */
static __device__ __forceinline__ float value_of_bits(uint32_t bits, int type) {
    float wide = __uint_as_float(bits << (type == QL_VALUE_F32 ? 0 : 16)),
          half = __half2float(__ushort_as_half((uint16_t)bits));
    return type == QL_VALUE_F16 ? half : wide;
}

/* place: of the entry in a pair; its lowest bit says which of a lane's two rows it is. */
static __device__ __forceinline__ void store_entry(const ql_decode_params *p, int code, int type, int entries,
                                                   int place, uint32_t scale, uint32_t zero) {
    const ql_packed_params *w = &p->product;
    const float unit = QL_RAW_UNIT(code, type, 1), one = 1.0f / QL_RAW_ONE(code, type);
    if (code == QL_CODE_TABLE4) {
        float absmax = __uint_as_float(scale);
        if (w->nested_table)
            absmax = __fadd_rn(__fmul_rn(((const float *)(shared + p->nested_at))[scale], __uint_as_float(zero)),
                               w->nested_offset);
        *(float *)(shared + entries + place * 4) = absmax;
    } else {
        uint32_t bits = code == QL_CODE_INT8 ? zero : zero >> place % 2 * 4 & 15;
        float z = __uint_as_float(bits | 0x4b000000u) - (0x1p23f - QL_RAW_OFFSET(code, type));
        *(float2 *)(shared + entries + place * 8) = make_float2(
            value_of_bits(scale, w->scales_type) * (place % 2 ? one / unit : one), z * (place % 2 ? unit : 1.0f));
    }
}

static __device__ __forceinline__ void store_entries(const ql_decode_params *p, int code, int type, int groups,
                                                     const ql_raw_entry *raw, int entries, int lane) {
    __syncwarp();
    if (groups == QL_DECODE_CHANNEL) {
        if (lane < 16) {
            /* Its zero, of which two share a byte, is not where a pair of groups has it. */
            uint32_t zero =
                code == QL_CODE_INT8 || code == QL_CODE_TABLE4 ? raw->zero[0] : raw->zero[0] >> lane % 2 * 4 & 15;
            store_entry(p, code, type, entries, lane % 8 * 4 + lane / 8, raw->scale[0],
                        code == QL_CODE_INT8 || code == QL_CODE_TABLE4 ? zero : zero * 17);
        }
    } else {
#pragma unroll
        for (int i = 0; i < (groups + 1) / 2; i++)
            store_entry(p, code, type, entries, i * 32 + lane, raw->scale[i], raw->zero[i]);
    }
    __syncwarp();
}

/* ---- x ---- */

/* Copies the columns of x that the warp multiplies, `columns` from `first` on, into shared memory at `to`, those beyond k
 * as zeros; where the teams share x, each takes some of the rows. */
static __device__ __forceinline__ void load_x(const ql_decode_params *p, const ql_decode_warp *me, int first,
                                              int columns, uint32_t to) {
    const ql_packed_params *w = &p->product;
    int k = (int)w->k, m = (int)w->m, team = p->x_team_bytes ? 0 : me->team, teams = p->x_team_bytes ? 1 : p->teams;
    if (p->x_aligned) {
#pragma unroll 1
        for (int column = me->lane * 8; column < columns; column += 256) {
            int bytes = min(max((k - first - column) * 2, 0), 16);
            const uint16_t *from = (const uint16_t *)w->x + (bytes ? first + column : 0) + team * w->x_stride;
            uint32_t at = to + (uint32_t)(column * 2 + team * p->x_pitch);
#pragma unroll 1
            for (int row = team; row < m; row += teams) {
                cp_async_16(at, from, bytes);
                from += teams * w->x_stride;
                at += (uint32_t)(teams * p->x_pitch);
            }
        }
        return;
    }
#pragma unroll 1
    for (int column = me->lane; column < columns; column += 32) {
        bool inside = first + column < k;
        int from = inside && w->order ? w->order[first + column] : first + column;
#pragma unroll 1
        for (int row = team; row < m; row += teams) {
            uint16_t value = inside ? ((const uint16_t *)w->x)[row * w->x_stride + from] : (uint16_t)0;
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + (uint32_t)(row * p->x_pitch + column * 2)), "h"(value)
                         : "memory");
        }
    }
}

/* ---- the table of pairs ---- */

/* What a thread makes of it, at least: values of two pieces of 32 bytes, and one of the nested table. */
typedef struct ql_table_part {
    float low[2], high[2], nested;
} ql_table_part;

static __device__ __forceinline__ void load_piece(float *low, float *high, const float *table, int piece) {
    *low = __ldg(table + piece / 4 % 16);
    *high = __ldg(table + piece / 64 % 16);
}

static __device__ __forceinline__ ql_table_part load_table(const ql_packed_params *w) {
    ql_table_part part = {{0}, {0}, 0};
#pragma unroll
    for (int i = 0; i < 2; i++)
        load_piece(&part.low[i], &part.high[i], w->table, (int)threadIdx.x + i * (int)blockDim.x);
    if (w->nested_table) part.nested = __ldg(w->nested_table + threadIdx.x % 256);
    return part;
}

/* Entry `byte` is the values of its two nibbles, 256 bytes apart, a copy a lane; four threads make one. */
static __device__ __forceinline__ void store_piece(int piece, float low, float high, int type) {
    uint32_t pair = round16_pair(low, high, type);
    uint4 *to = (uint4 *)(shared + piece / 4 * 256 + piece % 4 * 32);
    if (piece < 1024) to[0] = to[1] = make_uint4(pair, pair, pair, pair);
}

static __device__ __forceinline__ void store_table(const ql_decode_params *p, const ql_table_part *part, int type) {
    const ql_packed_params *w = &p->product;
    int piece = (int)threadIdx.x, threads = (int)blockDim.x;
    float *nested = (float *)(shared + p->nested_at);
    store_piece(piece, part->low[0], part->high[0], type);
    store_piece(piece + threads, part->low[1], part->high[1], type);
#pragma unroll 1
    for (piece += 2 * threads; piece < 1024; piece += threads) {
        float low, high;
        load_piece(&low, &high, w->table, piece);
        store_piece(piece, low, high, type);
    }
    if (!w->nested_table) return;
    if (threadIdx.x < 256) nested[threadIdx.x] = part->nested;
#pragma unroll 1
    for (int i = (int)threadIdx.x + threads; i < 256; i += threads) nested[i] = w->nested_table[i];
}

/* ---- the product ---- */

/* What a group starts from: sum = -zero * sum of x. With 8 tokens a team's first strip does not know the sums of x yet. entry: of the
 * lane's two rows; sums: where the lane's tokens' sums of x lie. */
static __device__ __forceinline__ void begin_group(float *sum, float *sum_x, int code, int tokens, int entry, int sums,
                                                   bool first) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = sum_x[i] = 0.0f;
    if (code == QL_CODE_TABLE4 || first) return;
    float zero = *(const float *)(shared + entry + 4), zero_8 = *(const float *)(shared + entry + 12);
#pragma unroll
    for (int i = 0; i < tokens / 2; i += 4) {
        float2 x = *(const float2 *)(shared + sums + i * 8);
        sum[i] = -zero * x.x;
        sum[i + 1] = -zero * x.y;
        sum[i + 2] = -zero_8 * x.x;
        sum[i + 3] = -zero_8 * x.y;
    }
}

/* out += scale * sum. The first strip takes the sums of x in here and leaves them for the others. */
static __device__ __forceinline__ void end_group(float *out, float *sum, const float *sum_x, int code, int tokens,
                                                 int entry, int sums, int lane, bool first) {
    float scale = *(const float *)(shared + entry),
          scale_8 = *(const float *)(shared + entry + (code == QL_CODE_TABLE4 ? 4 : 8));
    if (code != QL_CODE_TABLE4 && first) {
        float zero = *(const float *)(shared + entry + 4), zero_8 = *(const float *)(shared + entry + 12);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(-(i & 2 ? zero_8 : zero), sum_x[i & 1], sum[i]);
        if (lane < 4) *(float2 *)(shared + sums) = make_float2(sum_x[0], sum_x[1]);
    }
#pragma unroll
    for (int i = 0; i < tokens / 2; i++) out[i] = fmaf(i & 2 ? scale_8 : scale, sum[i], out[i]);
}

/* Sums of x over the parts of groups in a warp's batches, ahead of the first strip: for 16 tokens there are no registers to
 * take them in along with it. */
static __device__ __forceinline__ void sum_x_16(int code, int type, int groups, int count, int lane, uint32_t x,
                                                int sums) {
    const int parts = groups ? groups : 1, blocks = QL_DECODE_BATCH_K(code) / QL_DECODE_BLOCK / parts;
    const uint32_t ones[4] = {QL_RAW_ONES(type), QL_RAW_ONES(type), QL_RAW_ONES(type), QL_RAW_ONES(type)};
    float sum[8] = {0};
#pragma unroll 1
    for (int i = count * parts * blocks; i > 0; i--, x += QL_DECODE_BLOCK * 2) {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            uint32_t b[2][2];
            load_matrices(b[0], b[1], x + (uint32_t)(step * 32));
            multiply_16816(sum, ones, b[0], type);
            multiply_16816(sum + 4, ones, b[1], type);
        }
        if (groups ? (i - 1) % blocks : i > 1) continue;
        if (lane < 4) {
            *(float2 *)(shared + sums) = make_float2(sum[0], sum[1]);
            *(float2 *)(shared + sums + 32) = make_float2(sum[4], sum[5]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = 0.0f;
        sums += 64;
    }
    __syncwarp();
}

/* The four steps of a block. x: the lane's row at the block. The first strip sums x as well, with ones for the weight. */
static __device__ __forceinline__ void multiply_block(float *sum, float *sum_x, const ql_batch_codes *codes, int code,
                                                      int type, int tokens, int block, uint32_t x, uint32_t low,
                                                      bool first) {
    const uint32_t ones[4] = {QL_RAW_ONES(type), QL_RAW_ONES(type), QL_RAW_ONES(type), QL_RAW_ONES(type)};
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
        uint32_t a[4], b[2][2];
        load_matrices(b[0], b[1], x + (uint32_t)(step * 32));
        raw_fragment(a, codes, code, type, block, step, shared, low);
        multiply_16816(sum, a, b[0], type);
        if (code != QL_CODE_TABLE4 && first) {
            multiply_16816(sum_x, ones, b[0], type);
            multiply_16816(sum_x, ones, b[1], type);
        }
        if (tokens == 16) {
            multiply_16816(sum + 4, a, b[1], type);
            load_matrices(b[0], b[1], x + (uint32_t)(step * 32 + 32));
        }
        raw_fragment(a, codes, code, type, block, step + 1, shared, low);
        multiply_16816(sum, a, b[tokens == 16 ? 0 : 1], type);
        if (tokens == 16) multiply_16816(sum + 4, a, b[1], type);
    }
}

static __device__ __forceinline__ void write_output(const ql_packed_params *w, int type, int token, int64_t row,
                                                    float sum) {
    if (row >= w->n) return;
    float bias = w->bias ? load_value(w->bias, w->bias_type, row * w->bias_stride) : 0.0f;
    store_value(w->out, type, token * w->n + row, sum + bias);
}

/* Where block `rank`'s sums of the strip of a round lie with the block that owns the strip. */
static __device__ __forceinline__ int exchange_at(const ql_decode_params *p, int team, int round, int rank) {
    return p->exchange_at + ((round / p->cluster * p->teams + team) * p->cluster + rank) * (int)p->product.m * 64;
}

/* Gives the warp's sums of the team's round-th strip to the warps whose turn it is, which add them and write the outputs or
 * give them to the block that owns the strip. There are two buffers: while one strip is added up the next one comes in. */
static __device__ __forceinline__ void finish_strip(const ql_decode_params *p, int type, int tokens,
                                                    const ql_decode_warp *me, const float *out, int strip, int round,
                                                    int turn) {
    const ql_packed_params *w = &p->product;
    const int rows = tokens / 2; /* of a warp's partials: two tokens each */
    int lane = me->lane, m = (int)w->m, team = (round % 2 * p->teams + me->team) * p->team_warps;
    uint32_t full = shared_address(shared) + (uint32_t)(p->barriers_at + (me->team * 2 + round % 2) * 16),
             parity = round / 2 % 2;
    uint8_t *mine = shared + p->partials_at + (team + me->warp) * rows * p->partial_pitch;
    if (round > 1) wait_barrier(full + 8, parity ^ 1);
#pragma unroll
    for (int i = 0; i < tokens / 2; i++) {
        int pair = i / 4 * 4 + lane % 4, row = (lane / 4 + (i & 2) * 4) ^ (lane & 1) * 8;
        if (2 * pair < m) *(float *)(mine + pair * p->partial_pitch + (i & 1) * 64 + row * 4) = out[i];
    }
    __syncwarp();
    if (lane == 0) arrive(full);
    int place = me->warp - turn;
    if (place < 0) place += p->team_warps;
    if (place >= p->adders) return;
    wait_barrier(full, parity);
#pragma unroll 1
    for (int token = place * 2 + lane / 16; token < m; token += p->adders * 2) {
        const uint8_t *from = shared + p->partials_at + (team * rows + token / 2) * p->partial_pitch + token % 2 * 64 +
                              (lane % 16 ^ (token / 2 & 1) * 8) * 4;
        float sum = 0.0f;
#pragma unroll 4
        for (int i = 0; i < p->team_warps; i++) sum += *(const float *)(from + i * rows * p->partial_pitch);
        if (p->cluster == 1)
            write_output(w, type, token, (int64_t)strip * 16 + lane % 16, sum);
        else
            store_remote(shared_address(shared) +
                             (uint32_t)(exchange_at(p, me->team, round, cluster_rank()) + (token * 16 + lane % 16) * 4),
                         round % p->cluster, sum);
    }
    __syncwarp();
    if (lane == 0) arrive(full + 8);
}

/* Adds the sums of a cluster's blocks, in order, for the strips that this block owns. */
static __device__ __forceinline__ void finish_cluster(const ql_decode_params *p, int type) {
    const ql_packed_params *w = &p->product;
    int team = (int)threadIdx.x / 32 * p->warp_team >> 16, threads = p->team_warps * 32, m = (int)w->m;
    arrive_cluster();
    wait_cluster();
    int strip = cluster_number() + team * p->blocks + cluster_rank() * p->hop;
#pragma unroll 1
    for (int round = cluster_rank(); strip < p->strips; round += p->cluster, strip += p->cluster * p->hop)
#pragma unroll 1
        for (int item = (int)threadIdx.x - team * threads; item < 16 * m; item += threads) {
            const uint8_t *from = shared + exchange_at(p, team, round, 0) + item * 4;
            float sum = 0.0f;
#pragma unroll 1
            for (int i = 0; i < p->cluster; i++) sum += *(const float *)(from + i * m * 64);
            write_output(w, type, item / 16, (int64_t)strip * 16 + item % 16, sum);
        }
}

/* Where a warp is in its stream of batches, and what it holds of the next one. */
typedef struct ql_decode_stream {
    ql_batch_codes codes;
    ql_raw_entry raw;
    const uint8_t *at;      /* the batch that is being loaded, for this lane */
    int strip, round, turn; /* turn: the first of the warps that add this strip up */
    uint32_t x;             /* shared memory: the lane's row of x at the warp's first column */
    int sums, entries;
    int tail; /* tiles of the warp's last batch */
} ql_decode_stream;

static __device__ __forceinline__ void multiply_strip(const ql_decode_params *p, int code, int type, int tokens,
                                                      int groups, const ql_decode_warp *me, ql_decode_stream *s,
                                                      bool first) {
    const int tiles = QL_DECODE_BATCH_TILES(code), blocks = QL_DECODE_BATCH_K(code) / QL_DECODE_BLOCK;
    const int part = groups ? blocks / groups : blocks; /* of a batch, in one group */
    const int entry_bytes = code == QL_CODE_TABLE4 ? 4 : 8;
    float out[8] = {0}, sum[8], sum_x[8];
#pragma unroll 1
    for (int to_go = me->count; to_go > 0; to_go--) {
        bool last = to_go == 1;
        int next_strip = last ? s->strip + p->hop : s->strip;
        int have = next_strip >= p->strips ? 0 : to_go == 2 || (last && me->count == 1) ? s->tail : tiles;
        s->at += last ? p->hop_bytes - (me->count - 1) * QL_DECODE_BATCH_BYTES(code) : QL_DECODE_BATCH_BYTES(code);
        int entry = s->entries + me->lane / 4 * 4 * entry_bytes, next = me->first + me->count - to_go + 1;
        if (groups == 1) entry += (next - 1 >> p->group_shift) % 2 * 2 * entry_bytes;
        if (groups || to_go == me->count) {
            store_entries(p, code, type, groups, &s->raw, s->entries, me->lane);
            if (groups ? have : s->strip + p->hop < p->strips)
                load_entries(p, code, groups, &s->raw, me->lane, groups ? next_strip : s->strip + p->hop,
                             last ? me->first : next);
            if (!groups) begin_group(sum, sum_x, code, tokens, entry, s->sums, first);
        }
#pragma unroll
        for (int b = 0; b < blocks; b++) {
            const int group = groups ? b / part : 0;
            const int place = (group / 2 * 32 + group % 2 * 2) * entry_bytes;
            if (groups && b % part == 0)
                begin_group(sum, sum_x, code, tokens, entry + place, s->sums + group * tokens * 4, first);
            multiply_block(sum, sum_x, &s->codes, code, type, tokens, b, s->x + (uint32_t)(b * 128),
                           (uint32_t)me->lane * 4, first);
#pragma unroll
            for (int i = 0; i < tiles; i++)
                if ((i + 1) * QL_TILE_K(code) > b * 64 && (i + 1) * QL_TILE_K(code) <= (b + 1) * 64 && i < have)
                    load_tile(&s->codes, code, s->at, i, me->lane);
            if (groups && b % part == part - 1)
                end_group(out, sum, sum_x, code, tokens, entry + place, s->sums + group * tokens * 4, me->lane, first);
        }
        if (!groups && last) end_group(out, sum, sum_x, code, tokens, entry, s->sums, me->lane, first);
        s->x += QL_DECODE_BATCH_K(code) * 2;
        s->sums += groups * tokens * 4;
    }
    s->x -= (uint32_t)(me->count * QL_DECODE_BATCH_K(code) * 2);
    s->sums -= me->count * groups * tokens * 4;
    finish_strip(p, type, tokens, me, out, s->strip, s->round, s->turn);
    s->strip += p->hop;
    s->round++;
    s->turn += p->adders;
    if (s->turn >= p->team_warps) s->turn -= p->team_warps;
}

static __device__ __forceinline__ void decode(const ql_decode_params *p, int code, int type, int tokens, int groups) {
    const ql_packed_params *w = &p->product;
    const int tiles = QL_DECODE_BATCH_TILES(code), entry_bytes = code == QL_CODE_TABLE4 ? 4 : 8;
    const int warp = (int)(threadIdx.x >> 5);
    ql_decode_warp me;
    ql_decode_stream s = {.round = 0, .turn = 0};
    int block = (int)blockIdx.x, first_batch = 0;
    me.lane = (int)(threadIdx.x & 31);
    me.team = (int)((uint32_t)(warp * p->warp_team) >> 16);
    me.warp = warp - me.team * p->team_warps;
    if (p->cluster > 1) {
        first_batch = cluster_rank() * p->block_batches;
        block = cluster_number();
    }
    me.first = first_batch + me.warp * p->share + min(me.warp, p->rest);
    me.count = min(p->share + (me.warp < p->rest), max(p->batches - me.first, 0));
    s.strip = block + me.team * p->blocks;
    s.at = w->codes + (uint64_t)(uint32_t)s.strip * p->strip_bytes +
           (uint32_t)(me.first * QL_DECODE_BATCH_BYTES(code) + me.lane * 16);
    s.tail = me.first + me.count == p->batches ? p->last_tiles : tiles;
    int have = s.strip < p->strips && me.count ? me.count == 1 ? s.tail : tiles : 0;
    /* What is asked for after the codes comes after them, 64 KB a multiprocessor later, so what the first of them meet goes
     * before. x may have to wait for the kernel before: where a weight is large enough to hide it, codes go first. */
    const int early = groups == QL_DECODE_CHANNEL || code == QL_CODE_INT2 ? tiles : 0;
#pragma unroll
    for (int i = 0; i < 4; i++) s.raw.scale[i] = 0, s.raw.zero[i] = (uint32_t)max(p->bare_zero, 0);
    if (have) load_entries(p, code, groups, &s.raw, me.lane, s.strip, me.first);
    ql_table_part table = {{0}, {0}, 0};
    if (code == QL_CODE_TABLE4) table = load_table(w);
#pragma unroll
    for (int i = 0; i < early; i++)
        if (i < have) load_tile(&s.codes, code, s.at, i, me.lane);
    start_next_kernel();
    if (p->cluster > 1) arrive_cluster_started();
    uint32_t x_at = shared_address(shared) + (uint32_t)(p->x_at + me.team * p->x_team_bytes +
                                                        (me.first - first_batch) * QL_DECODE_BATCH_K(code) * 2);
    wait_for_previous_kernel();
    load_x(p, &me, me.first * QL_DECODE_BATCH_K(code), me.count * QL_DECODE_BATCH_K(code), x_at);
    cp_async_commit();
#pragma unroll
    for (int i = early; i < tiles; i++)
        if (i < have) load_tile(&s.codes, code, s.at, i, me.lane);
    if (code == QL_CODE_TABLE4) store_table(p, &table, type);

    /* Lanes 0-7 give the rows of a matrix, and so on: four of 8 columns each, or two for tokens 0-7 and two for 8-15. Rows
     * beyond m are doubles of the last. */
    int token = min(tokens == 8 ? me.lane % 8 : me.lane % 8 + me.lane / 16 * 8, (int)w->m - 1);
    s.x = x_at + (uint32_t)(token * p->x_pitch + (tokens == 8 ? me.lane / 8 : me.lane / 8 % 2) * 16);
    s.sums = p->sums_at + me.lane % 4 * 8 +
             (groups ? (me.team * p->block_batches + me.first - first_batch) * groups : warp) * tokens * 4;
    s.entries = p->entries_at + warp * ((groups + 2) / 2 * 32 * entry_bytes);
    if (me.warp == 0 && me.lane < 4)
        init_barrier(shared_address(shared) + (uint32_t)(p->barriers_at + (me.team * 4 + me.lane) * 8),
                     me.lane % 2 ? p->adders : p->team_warps);
    if (p->x_team_bytes) __syncthreads();
    cp_async_wait(0);
    if (p->x_team_bytes)
        __syncwarp();
    else
        __syncthreads();
    if (p->cluster > 1) wait_cluster();
    if (tokens == 16 && code != QL_CODE_TABLE4) sum_x_16(code, type, groups, me.count, me.lane, s.x, s.sums);
    if (tokens == 8 && code != QL_CODE_TABLE4 && s.strip < p->strips)
        multiply_strip(p, code, type, tokens, groups, &me, &s, true);
#pragma unroll 1
    while (s.strip < p->strips) multiply_strip(p, code, type, tokens, groups, &me, &s, false);
    if (p->cluster > 1) finish_cluster(p, type);
}

#define QL_DEFINE_DECODE(name, source, code, type, tokens, groups)                                                     \
    extern "C" __global__ void __launch_bounds__(QL_DECODE_THREADS, 1)                                                 \
        name(const __grid_constant__ ql_decode_params params) {                                                        \
        decode(&params, code, type, tokens, groups);                                                                   \
    }
QL_DECODE_VARIANTS(QL_DEFINE_DECODE)
