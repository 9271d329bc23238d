/* Products of 1 to 16 tokens with a packed weight: mma.m16n8k16 with 16 rows of the weight as the large operand and 8 or 16
 * tokens as the small one. The weight is read once, straight into the registers that multiply it; time is the reading.
 *
 * A thread block is some teams of warps (decode.h). A team takes every so many-th strip of 16 rows; its warps split K, and
 * leave their sums of each strip in shared memory. Warps run free of each other until there is no more room for sums; then
 * these are added, in order, so that the same call gives the same bits. x lies in shared memory, whole, or split over the
 * blocks of a cluster, which then add their sums once at the end. While a warp multiplies a batch the next one is on its
 * way: each tile is loaded again, from the next batch or strip, as soon as its registers are free.
 *
 * Codes are multiplied as they are (code_raw.cuh); what they lack is made up in fp32 at the end of each group (entries.cuh),
 * for which sums of x come from mma as well, with ones as the large operand: beside the products of every batch, as the
 * tensor cores have time for that and a stage before the first product would be waited for, or for 16 tokens, of which
 * there are twice as many products, ahead of the first strip. Up to four tokens leave half the columns of mma free: there
 * two groups have their sums side by side, and what is done at the end of a group is done for both at once.
 *
 * The weight does not depend on the kernel before, so its loads go out before that one is waited for.
 *
 * Grid: as many blocks as are resident, blockDim.x = 32 * teams * team_warps, at most QL_DECODE_THREADS. */
#include "cluster.cuh"
#include "entries.cuh"
#include "pairs.cuh"
#include "ptx.cuh"
#include "value.cuh"
#include "variants.h"

extern __shared__ __align__(1024) uint8_t shared[];

/* ---- weights ---- */

/* The same address, which the compiler takes for something new: it would make it again at each use. */
static __device__ __forceinline__ const uint8_t *held(const uint8_t *at) {
    asm volatile("" : "+l"(at));
    return at;
}

/* A tile of the batch. at: this lane's 16 bytes of the batch's first tile; high: for 3 bit its 8 bytes of high bits there. */
static __device__ __forceinline__ void load_tile(ql_batch_codes *codes, int code, const uint8_t *at,
                                                 const uint8_t *high, int tile) {
    codes->low[tile] = load_stream_16(at + tile * QL_TILE_BYTES(code));
    if (code == QL_CODE_INT3) codes->high[tile] = load_stream_8(high + tile * QL_TILE_BYTES(code));
}

/* ---- x ---- */

/* Columns of rows of x into shared memory, zeros beyond k, and a row of zeros where slots are left empty: of `columns` from
 * `first` on, the piece of 256 that is `piece`, and every `pieces`-th after it; of the rows every `rows`-th from `row` on.
 * to: the place of column `first`. */
static __device__ __forceinline__ void copy_x(const ql_decode_params *p, int slots, int first, int columns, uint32_t to,
                                              int piece, int pieces, int row, int rows, int lane) {
#pragma unroll 1
    for (int column = piece * 256 + lane * 8; column < columns; column += pieces * 256) {
        const int bytes = min(max((p->k - first - column) * 2, 0), 16);
        const uint16_t *from = (const uint16_t *)p->x + (bytes ? first + column : 0) + row * p->x_stride;
        uint32_t at = to + (uint32_t)(column * 2);
        if (slots == 2) store_shared_16(at + (uint32_t)(p->m * p->x_pitch), make_uint4(0, 0, 0, 0));
        at += (uint32_t)(row * p->x_pitch);
#pragma unroll 1
        for (int i = row; i < p->m; i += rows, from += rows * p->x_stride, at += (uint32_t)(rows * p->x_pitch))
            cp_async_16(at, from, bytes);
    }
}

/* Of the same warps of all teams, which share columns of x. */
static __device__ __forceinline__ void wait_for_teams(int teams, int member) {
    if (teams == 1)
        __syncwarp();
    else
        named_barrier(member + 1, teams * 32);
}

/* Columns of another order, or of rows that pieces of 16 bytes do not meet: a thread takes eight neighbours of every row,
 * out of x as it lies in shared memory at stage_at, or where there is no room for that out of global memory. The order
 * belongs to the weight: its first part is loaded before the wait. */
static __device__ __forceinline__ void gather_x(const ql_decode_params *p, int first, int columns) {
    const int32_t *order = p->product.order;
    const int inside = min(columns, p->k - first);
    const bool staged = p->stage_at >= 0;
    bool waited = false;
#pragma unroll 1
    for (int column = (int)threadIdx.x * 8; column < columns || !waited; column += (int)blockDim.x * 8) {
        int from[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int here = first + max(min(column + i, inside - 1), 0);
            from[i] = order ? __ldg(order + here) : here;
        }
        if (!waited) {
            wait_for_previous_kernel();
            if (staged) {
                copy_x(p, 1, 0, p->k, shared_address(shared) + (uint32_t)p->stage_at, (int)threadIdx.x / 32,
                       (int)blockDim.x / 32, 0, 1, (int)threadIdx.x % 32);
                cp_async_commit();
                cp_async_wait(0);
                __syncthreads();
            }
            waited = true;
        }
        if (column >= columns) continue;
        const uint16_t *x = staged ? (const uint16_t *)(shared + p->stage_at) : (const uint16_t *)p->x;
        uint8_t *to = shared + p->x_at + column * 2;
#pragma unroll 1
        for (int row = 0; row < p->m; row++) {
            __align__(16) uint16_t values[8];
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = column + i < inside ? x[from[i]] : (uint16_t)0;
            *(uint4 *)to = *(const uint4 *)values;
            x += staged ? p->x_pitch / 2 : p->x_stride;
            to += p->x_pitch;
        }
    }
}

/* A row of zeros, where slots are left empty. */
static __device__ __forceinline__ void clear_row(const ql_decode_params *p) {
#pragma unroll 1
    for (int i = (int)threadIdx.x * 16; i < p->x_pitch; i += (int)blockDim.x * 16)
        *(uint4 *)(shared + p->x_at + p->m * p->x_pitch + i) = make_uint4(0, 0, 0, 0);
}

/* Where a lane reads x, whose first column for the warp lies at `at`: a row of the matrices that ldmatrix loads. other: what
 * to add to it where the second slot's group is multiplied. A slot's columns are zeros while the other's group is. */
typedef struct ql_decode_x {
    uint32_t row, other;
} ql_decode_x;

static __device__ __forceinline__ ql_decode_x place_x(const ql_decode_params *p, int tokens, int slots, uint32_t at,
                                                      int lane) {
    ql_decode_x x = {0, 0};
    if (tokens == 16) {
        /* Lanes 0-7 give the rows of a matrix, and so on: two of 8 columns each for tokens 0-7 and two for 8-15. */
        x.row = at + (uint32_t)(min(lane % 8 + lane / 16 * 8, p->m - 1) * p->x_pitch + lane / 8 % 2 * 16);
        return x;
    }
    /* Four of 8 columns each. Rows beyond m are doubles of the last. */
    const int here = lane % 8, token = min(slots == 2 ? here % 4 : here, p->m - 1);
    const int live = token * p->x_pitch, zero = p->m * p->x_pitch;
    const bool second = slots == 2 && here >= 4;
    x.row = at + (uint32_t)((second ? zero : live) + lane / 8 * 16);
    x.other = (uint32_t)(second ? live - zero : zero - live);
    return x;
}

/* ---- the product ---- */

/* threadIdx.x, read anew: what is made of it at the end of a strip would else be held in registers all along, of which
 * there are too few where 16 tokens or 8 groups want many, or a constant of bf16's one. */
static __device__ __forceinline__ int thread_anew(void) {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

#define ONES(type) ((type) == QL_VALUE_F16 ? 0x3c003c00u : 0x3f803f80u)

/* The four steps of a block: sum += W x, of odd steps `odd` where they are apart, and, but for 16 tokens and tables, sum_x +=
 * 1 x. */
static __device__ __forceinline__ void multiply_block(float *sum, float *odd, float *sum_x, const ql_batch_codes *codes,
                                                      int code, int type, int tokens, int block, uint32_t x,
                                                      uint32_t low) {
    const bool apart = QL_RAW_APART(code, type, tokens);
    const uint32_t ones[4] = {ONES(type), ONES(type), ONES(type), ONES(type)};
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
        uint32_t a[4], b[2][2];
        load_matrices(b[0], b[1], x + (uint32_t)(step * 32));
        raw_fragment(a, codes, code, type, apart, block, step, shared, low);
        multiply_16816(sum, a, b[0], type);
        if (tokens != 16 && code != QL_CODE_TABLE4) {
            multiply_16816(sum_x, ones, b[0], type);
            multiply_16816(sum_x, ones, b[1], type);
        }
        if (tokens == 16) {
            multiply_16816(sum + 4, a, b[1], type);
            load_matrices(b[0], b[1], x + (uint32_t)(step * 32 + 32));
        }
        raw_fragment(a, codes, code, type, apart, block, step + 1, shared, low);
        multiply_16816(apart ? odd : sum, a, b[tokens == 16 ? 0 : 1], type);
        if (tokens == 16) multiply_16816(sum + 4, a, b[1], type);
    }
}

/* sum += the odd steps' sums, where they are apart. */
static __device__ __forceinline__ void add_odd(float sum[4], const float odd[4], int code, int type, int tokens) {
#pragma unroll
    for (int j = 0; QL_RAW_APART(code, type, tokens) && j < 4; j++) sum[j] = fmaf(odd[j], 1.0f / QL_RAW_ODD, sum[j]);
}

/* Sums of 16 tokens' x over the parts of groups in a warp's batches. */
static __device__ __forceinline__ void sum_x_16(int code, int type, int groups, int count, int lane, uint32_t x,
                                                int sums) {
    const int parts = groups ? groups : 1, blocks = QL_DECODE_BATCH_K(code) / QL_DECODE_BLOCK / parts;
    const uint32_t ones[4] = {ONES(type), ONES(type), ONES(type), ONES(type)};
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
            *(float2 *)(shared + sums + lane * 8) = make_float2(sum[0], sum[1]);
            *(float2 *)(shared + sums + lane * 8 + 32) = make_float2(sum[4], sum[5]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = 0.0f;
        sums += 64;
    }
    __syncwarp();
}

/* sum -= zero * sum of x. sums: where the lane's tokens' sums of x lie, for 16 tokens. */
static __device__ __forceinline__ void take_zeros(float *sum, const float *sum_x, const float *zero, int code,
                                                  int tokens, int sums) {
    if (code == QL_CODE_TABLE4) return;
#pragma unroll
    for (int i = 0; i < (tokens == 16 ? 8 : 4); i += 4) {
        float2 x = make_float2(sum_x[0], sum_x[1]);
        if (tokens == 16) x = *(const float2 *)(shared + sums + i * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i + j] = fmaf(-zero[j / 2], j % 2 ? x.y : x.x, sum[i + j]);
    }
}

/* Zeros of rows g and g + 8 of a strip where all of K is one group. */
static __device__ __forceinline__ void load_row_zeros(float zero[2], const ql_decode_params *p, int code, int type,
                                                      int row) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int place = min(row + 8 * h, (int)p->product.n - 1);
        uint32_t byte = (uint32_t)p->bare_zero;
        if (p->bare_zero < 0)
            byte = __ldg(p->zeros + (code == QL_CODE_INT8 ? place : place >> 1)) >>
                   (code == QL_CODE_INT8 ? 0 : place % 2 * 4);
        zero[h] = zero_of_byte(code == QL_CODE_INT8 ? byte : byte & 15, code, type) * QL_RAW_UNIT(code, type, h);
    }
}

/* A warp's sums of a strip into shared memory; turn: of the rounds that are held. */
static __device__ __forceinline__ void leave_sums(const ql_decode_params *p, const float *from, int type, int tokens,
                                                  int groups, int slots, bool roomy, int partials, int turn) {
    const int width = tokens == 16 ? 8 : 4;
    const int thread =
        tokens == 16 || groups == 8 || type == QL_VALUE_BF16 || (!roomy && !groups) ? thread_anew() : (int)threadIdx.x;
    const int column = thread % 4 * 2, token = slots == 2 ? column % 4 : column;
    const int place = turn * p->teams * p->team_warps + (thread >> 5); /* team * team_warps + member */
    uint8_t *to =
        shared + partials + ((place * slots + (slots == 2 ? column / 4 : 0)) * p->m + token) * 64 + thread % 32 / 4 * 4;
#pragma unroll
    for (int j = 0; j < width; j++)
        if (j / 4 * 8 + j % 2 + token < p->m) *(float *)(to + j / 4 * 512 + j % 2 * 64 + j % 4 / 2 * 32) = from[j];
}

/* Where block `rank`'s sums of the strip of a round lie with the block that owns the strip. */
static __device__ __forceinline__ int exchange_at(const ql_decode_params *p, int team, int round, int rank) {
    return p->exchange_at + (((round >> p->cluster_shift) * p->teams + team << p->cluster_shift) + rank) * p->m * 64;
}

/* Adds the warps' sums of `rounds` rounds from `round` on, which lie at `partials` once all warps are here. They become
 * outputs, or go to the block that owns the strip. */
static __device__ __forceinline__ void finish_rounds(const ql_decode_params *p, int code, int type, int groups,
                                                     int slots, int block, int rank, int round, int rounds,
                                                     int partials) {
    const ql_packed_params *w = &p->product;
    const int items = rounds * p->teams * p->m * 16, parts = p->team_warps * slots;
    const float one = 1.0f / QL_RAW_ONE(code, type), one_8 = one / QL_RAW_UNIT(code, type, 1);
    bool first = true;
#pragma unroll 1
    for (int item = (int)threadIdx.x; item < (items + 31 & ~31); item += (int)blockDim.x) {
        const int row = item & 15, line = item >> 4;
        const int place = line * p->token_part >> 16, token = line - place * p->m, pitch = p->m * 64;
        const int strip = block + (place + round * p->teams) * p->blocks, out = strip * 16 + row;
        const bool inside = item < items && out < (int)w->n;
        /* What is far is asked for before the others are waited for. */
        const float scale = groups || !inside ? 1.0f : load_value(p->scales, w->scales_type, out);
        const float bias = p->cluster_shift || !inside ? 0.0f : BIAS_AT(w, out);
        if (first) __syncthreads();
        first = false;
        if (!inside) continue;
        const uint8_t *from = shared + partials + place * parts * pitch + token * 64 + row * 4;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < parts; i++, from += pitch) sum += *(const float *)from;
        sum *= scale * (row < 8 ? one : one_8);
        if (!p->cluster_shift) {
            store_value(w->out, type, token * w->n + out, sum + bias);
        } else {
            const int turn = round + place / p->teams;
            store_remote(shared_address(shared) +
                             (uint32_t)(exchange_at(p, place % p->teams, turn, rank) + (token * 16 + row) * 4),
                         turn & (1 << p->cluster_shift) - 1, sum);
        }
    }
    if (first) __syncthreads();
}

/* Adds the sums of a cluster's blocks, in order, for the strips that this block owns. */
static __device__ __forceinline__ void finish_cluster(const ql_decode_params *p, int type, int block, int rank) {
    const ql_packed_params *w = &p->product;
    const int cluster = 1 << p->cluster_shift, turns = p->rounds - rank + cluster - 1 >> p->cluster_shift;
    meet_cluster();
#pragma unroll 1
    for (int item = (int)threadIdx.x; item < turns * p->teams * p->m * 16; item += (int)blockDim.x) {
        const int row = item & 15, line = item >> 4, place = line * p->token_part >> 16, token = line - place * p->m;
        const int team = place % p->teams, round = (place / p->teams << p->cluster_shift) + rank;
        const int out = (block + (team + round * p->teams) * p->blocks) * 16 + row;
        if (out >= (int)w->n) continue;
        const uint8_t *from = shared + exchange_at(p, team, round, 0) + (token * 16 + row) * 4;
        float sum = 0.0f;
#pragma unroll 1
        for (int i = 0; i < cluster; i++) sum += *(const float *)(from + i * p->m * 64);
        store_value(w->out, type, token * w->n + out, sum + BIAS_AT(w, out));
    }
}

static __device__ __forceinline__ void decode(const ql_decode_params *p, int code, int type, int tokens, int groups) {
    const int tiles = QL_DECODE_BATCH_TILES(code), batch_k = QL_DECODE_BATCH_K(code),
              blocks = batch_k / QL_DECODE_BLOCK;
    const int slots = QL_DECODE_SLOTS(tokens, groups), width = tokens == 16 ? 8 : 4;
    const int part = groups ? blocks / groups : blocks; /* blocks of a batch in one group */
    const int pairs = groups >= 2 ? groups / 2 : groups;
    const bool both = slots == 1 && groups >= 2;
    /* Elsewhere than on sm_90 the compiler wants for registers: there entries of many groups are not asked for a batch
     * ahead, and what can be found again is not kept. */
#if __CUDA_ARCH__ == 900
    const bool roomy = true;
#else
    const bool roomy = false;
#endif
    const bool ahead = roomy || groups < 8 || tokens < 8;
    /* Few rows of x are there so soon that warps do better to start together, next to each other in memory; of many a warp
     * waits for the columns that it wants. */
    const bool shared_start = tokens == 4;
    const int lane = (int)(threadIdx.x & 31), warp = (int)(threadIdx.x >> 5), g = lane >> 2;
    const int team = warp * p->warp_team >> 16, member = warp - team * p->team_warps;
    const int rank = (int)blockIdx.x & (1 << p->cluster_shift) - 1, block = (int)blockIdx.x >> p->cluster_shift;
    const int first_batch = rank * p->block_batches, own = member * p->share + min(member, p->rest);
    const int first = first_batch + own, count = min(p->share + (member < p->rest), p->batches - first);
    int strip = block + team * p->blocks;
    const uint8_t *at = p->codes + (uint64_t)(uint32_t)strip * p->strip_bytes +
                        (uint32_t)(first * QL_DECODE_BATCH_BYTES(code) + lane * 16);
    const int to_high = 512 - 8 * lane; /* of 3 bit: from the lane's low bits to its high ones */
    const int tail = first + count == p->batches ? p->last_tiles : tiles;
    int have = strip >= p->strips || count <= 0 ? 0 : count == 1 ? tail : tiles;
    /* The lane's entry of the batch's first pair. */
    int entry = 0;
    if (groups >= 2) entry = (strip * p->pairs + first * pairs) * 32 + g * 4 + (slots == 2 ? lane & 2 : 0);
    if (groups == 1) entry = group_entry(p, strip, first, g);
    ql_batch_codes codes;
    ql_raw_entries raw;
    ql_table_part table = {{0}, {0}, 0};
    if (code == QL_CODE_TABLE4) table = load_table(&p->product);
#pragma unroll
    for (int i = 0; i < pairs; i++) {
        clear_pair(&raw, p, i);
        if (have && (i == 0 || first * pairs + i < p->pairs)) load_pair(p, code, both, &raw, i, entry + i * 32);
    }
    if (code == QL_CODE_TABLE4 && p->scale_size == 1 && have)
        load_nested(p, &raw, strip * 16 + g, groups == 1 ? first >> p->group_shift : first * groups);
    /* What is asked for after the codes comes after them, 64 KB a multiprocessor later, so what the first of them meet goes
     * before. x may have to wait for the kernel before: some of the codes are on their way then, half where little else is
     * waited for; more would hold up x in a launch by itself. */
    const int early = groups == QL_DECODE_CHANNEL || code == QL_CODE_TABLE4 ? tiles / 2 : roomy ? tiles / 4 : 0;
#pragma unroll
    for (int i = 0; i < early; i++)
        if (i < have) load_tile(&codes, code, at, at + to_high, i);
    start_next_kernel();
    if (code == QL_CODE_TABLE4) store_table(shared, (float *)(shared + p->nested_at), &p->product, &table, type);
    if (p->cluster_shift) arrive_cluster_started();
    const uint32_t x_at = shared_address(shared) + (uint32_t)(p->x_at + own * batch_k * 2);
    if (p->x_aligned) {
        wait_for_previous_kernel();
        if (shared_start)
            copy_x(p, slots, first_batch * batch_k, p->block_batches * batch_k,
                   shared_address(shared) + (uint32_t)p->x_at, warp, (int)(blockDim.x >> 5), 0, 1, lane);
        else
            copy_x(p, slots, first * batch_k, count * batch_k, x_at, 0, 1, team, p->teams, lane);
    }
    cp_async_commit();
#pragma unroll
    for (int i = early; i < tiles; i++)
        if (i < have) load_tile(&codes, code, at, at + to_high, i);
    ql_decode_x x = place_x(p, tokens, slots, x_at, lane);
    if (!p->x_aligned) {
        gather_x(p, first_batch * batch_k, p->block_batches * batch_k);
        if (slots == 2) clear_row(p);
    }
    cp_async_wait(0);
    if (shared_start || code == QL_CODE_TABLE4 || !p->x_aligned)
        __syncthreads();
    else
        wait_for_teams(p->teams, member);
    /* 16 tokens: a warp's sums of x; the lane's column of them. */
    int sums = p->sums_at + (groups ? (team * p->block_batches + own) * groups : warp) * 64;
    if (tokens == 16 && code != QL_CODE_TABLE4) sum_x_16(code, type, groups, count, lane, x.row, sums);
    sums += lane % 4 * 8;
    int partials = p->partials_at;
    if (p->cluster_shift) wait_cluster();
    int begin = 0; /* the first round whose sums are held */
#pragma unroll 1
    for (int round = 0; round < p->rounds; round++) {
        if (strip < p->strips) {
            float out[8] = {0}, sum[8] = {0}, odd[4] = {0}, sum_x[4] = {0}, row_zero[2] = {0};
            if (!groups) load_row_zeros(row_zero, p, code, type, strip * 16 + g);
#pragma unroll 1
            for (int to_go = count; to_go > 0; to_go--) {
                const bool last = to_go == 1;
                const int next_strip = last ? strip + p->hop : strip, next = last ? first : first + count - to_go + 1;
                have = next_strip >= p->strips ? 0 : to_go == 2 || (last && count == 1) ? tail : tiles;
                at += last ? p->hop_bytes - (count - 1) * QL_DECODE_BATCH_BYTES(code) : QL_DECODE_BATCH_BYTES(code);
                const uint8_t *high = at;
                if (code == QL_CODE_INT3) high = held(at + to_high);
                if (groups >= 2 && ahead) entry += (last ? p->hop * p->pairs - (count - 1) * pairs : pairs) * 32;
                if (groups == 1) entry = group_entry(p, next_strip, next, g);
#pragma unroll
                for (int b = 0; b < blocks; b++) {
                    const int set = groups ? b / (part * slots) : 0, slot = slots == 2 ? b / part % 2 : 0;
                    if (groups && b % (part * slots) == 0)
#pragma unroll
                        for (int j = 0; j < 8; j++) sum[j] = odd[j % 4] = sum_x[j % 4] = 0.0f;
                    multiply_block(sum, odd, sum_x, &codes, code, type, tokens, b,
                                   (slot ? x.row + x.other : x.row) + (uint32_t)(b * 128), (uint32_t)lane * 4);
#pragma unroll
                    for (int j = 0; j < tiles; j++)
                        if ((j + 1) * QL_TILE_K(code) > b * 64 && (j + 1) * QL_TILE_K(code) <= (b + 1) * 64 && j < have)
                            load_tile(&codes, code, at, high, j);
                    if (groups && b % (part * slots) == part * slots - 1) {
                        const int pair = both ? set / 2 : set;
                        if (!ahead && (!both || set % 2 == 0)) {
                            clear_pair(&raw, p, pair);
                            if (pair == 0 || (first + count - to_go) * pairs + pair < p->pairs)
                                load_pair(p, code, both, &raw, pair, entry + pair * 32);
                        }
                        const ql_entry e =
                            entry_of(p, code, type, both, &raw, set, (const float *)(shared + p->nested_at));
                        add_odd(sum, odd, code, type, tokens);
                        take_zeros(sum, sum_x, e.zero, code, tokens, sums + set * 64);
#pragma unroll
                        for (int j = 0; j < width; j++) out[j] = fmaf(e.scale[j % 4 / 2], sum[j], out[j]);
                        if (ahead && (!both || set % 2)) {
                            if (have && (pair == 0 || next * pairs + pair < p->pairs))
                                load_pair(p, code, both, &raw, pair, entry + pair * 32);
                            else if (pair)
                                clear_scales(&raw, pair);
                        }
                    }
                }
                if (code == QL_CODE_TABLE4 && p->scale_size == 1 && have)
                    load_nested(p, &raw, next_strip * 16 + g, groups == 1 ? next >> p->group_shift : next * groups);
                if (!ahead) entry += (to_go == 1 ? p->hop * p->pairs - (count - 1) * pairs : pairs) * 32;
                x.row += (uint32_t)(batch_k * 2);
                sums += groups * 64;
            }
            x.row -= (uint32_t)(count * batch_k * 2);
            sums -= count * groups * 64;
            if (!groups) add_odd(sum, odd, code, type, tokens);
            if (!groups && count > 0) take_zeros(sum, sum_x, row_zero, code, tokens, sums);
            const float *from = groups ? out : sum;
            leave_sums(p, from, type, tokens, groups, slots, roomy, partials, round - begin);
        }
        strip += p->hop;
        if (round + 1 < p->rounds && round + 1 < begin + p->flush_rounds) continue;
        wait_for_previous_kernel();
        finish_rounds(p, code, type, groups, slots, block, rank, begin, round + 1 - begin, partials);
        begin = round + 1;
        if (!p->partials_bytes)
            __syncthreads();
        else
            partials = 2 * p->partials_at + p->partials_bytes - partials;
    }
    if (p->cluster_shift) finish_cluster(p, type, block, rank);
}

#define KERNEL(name, source, code, type, tokens, groups)                                                               \
    extern "C" __global__ void __launch_bounds__(QL_DECODE_THREADS, 1)                                                 \
        name(const __grid_constant__ ql_decode_params params) {                                                        \
        decode(&params, code, type, tokens, groups);                                                                   \
    }
QL_DECODE_VARIANTS(KERNEL)
