/* Products of 1 to 16 tokens with a packed weight: mma.m16n8k16 with 16 rows of the weight as the large operand and 8 or 16
 * tokens as the small one. The weight is read once, straight into the registers that multiply it; time is the reading.
 *
 * A thread block is some teams of warps (decode.h). A team takes every so many-th band, one strip of 16 rows or two; its warps
 * split K, and leave their sums of each band in shared memory. Warps run free of each other until there is no more room for sums; then
 * these are added, in order, so that the same call gives the same bits. x lies in shared memory, whole, or split over the
 * blocks of a cluster, which then add their sums once at the end. While a warp multiplies a batch the next one is on its
 * way: each tile is loaded again, from the next batch or band, as soon as its registers are free.
 *
 * Codes are multiplied as they are (code_raw.cuh); what they lack is made up in fp32 at the end of each group (entries.cuh).
 * The sums of x that this takes come from mma, too, in a team's first strip, batch by batch, and lie in shared memory from
 * then on. Up to four tokens leave half the columns of mma free: there two groups have their sums side by side, and what is
 * done at the end of a group is done for both at once.
 *
 * The weight does not depend on the kernel before, so its loads go out before that one is waited for.
 *
 * Grid: as many blocks as are resident, blockDim.x = 32 * teams * team_warps, at most QL_DECODE_THREADS. */
#include "cells.cuh"
#include "decode_x.cuh"
#include "entries.cuh"
#include "nested.cuh"
#include "order.cuh"
#include "pairs.cuh"
#include "ptx.cuh"
#include "sums.cuh"
#include "variants.h"

/* ---- weights ---- */

/* The same address, which the compiler takes for something new: it would make it again at each use. */
static __device__ __forceinline__ const uint8_t *held(const uint8_t *at) {
    asm volatile("" : "+l"(at));
    return at;
}

/* A tile of the batch. at: this lane's 16 bytes of the batch's first tile; high: for 3 bit its 8 bytes of high bits there. */
static __device__ __forceinline__ void load_tile(ql_batch_codes *codes, int code, bool in_turn, const uint8_t *at,
                                                 const uint8_t *high, int tile) {
    const uint8_t *from = at + tile * QL_TILE_BYTES(code);
    codes->low[tile] = in_turn ? load_in_turn_16(from) : load_stream_16(from);
    if (code == QL_CODE_INT3) codes->high[tile] = load_stream_8(high + tile * QL_TILE_BYTES(code));
}

/* The tile of all strips of a band. beside: as `at`, of the second strip. */
static __device__ __forceinline__ void load_band_tile(ql_batch_codes *codes, int code, bool in_turn, int abreast,
                                                      const uint8_t *at, const uint8_t *high, const uint8_t *beside,
                                                      int tile) {
    load_tile(codes, code, in_turn, at, high, tile);
    if (abreast == 2) load_tile(codes + 1, code, in_turn, beside, beside, tile);
}

/* Tiles from `first` to `end` of a batch that has `tiles`, of a table. */
static __device__ __forceinline__ void load_late_tiles(ql_batch_codes *codes, int code, bool in_turn, int abreast,
                                                       const uint8_t *at, const uint8_t *beside, int first, int end,
                                                       int tiles) {
#pragma unroll
    for (int i = first; i < end; i++)
        if (i < tiles) load_band_tile(codes, code, in_turn, abreast, at, at, beside, i);
}

/* Brings `tiles` tiles of a batch into the second-level cache, a line a lane. */
static __device__ __forceinline__ void prefetch_tiles(const uint8_t *at, int tiles, int lane) {
    if (lane < tiles * 4) prefetch_line(at + lane * (128 - 16));
}

/* ---- a warp's walk ---- */

/* The first round whose sums are held, found again where registers are few; `begin` is it. */
static __device__ __forceinline__ int first_held(const ql_decode_params *p, bool counted, int round, int begin) {
    return counted ? begin : round - round % p->flush_rounds;
}

/* Of `tiles` tiles those that a batch has. */
static __device__ __forceinline__ int tiles_of(const ql_decode_params *p, int batch, int tiles) {
    return batch == p->batches - 1 ? p->last_tiles : tiles;
}

/* The first batch of a thread's warp. */
static __device__ __forceinline__ int first_batch_of(const ql_decode_params *p, int rank, int thread) {
    const int warp = thread >> 5;
    return rank * p->block_batches + warp - (warp * p->warp_team >> 16) * p->team_warps;
}

/* ---- the product ---- */

#define ONES(type) ((type) == QL_VALUE_F16 ? 0x3c003c00u : 0x3f803f80u)

/* Whether bytes in bf16 are parted (code_raw.cuh): where there are registers for the sums of both parts. */
#define PARTED(code, type, tokens, groups)                                                                             \
    ((code) == QL_CODE_INT8 && (type) == QL_VALUE_BF16 && (tokens) != 16 && (groups) < (ROOMY(code) ? 8 : 4))

/* Whether odd steps have sums of their own: wherever there are registers for it, and a group has more than two steps. Some want
 * for registers as the compiler asks for much of x at once. */
#define TWO_CHAINS(code, type, tokens, groups)                                                                         \
    ((tokens) == 16 || (tokens) == 1 || (code) == QL_CODE_INT2 || QL_DECODE_ABREAST(code, tokens) == 2 ? false         \
     : PARTED(code, type, tokens, groups)                                                              ? true          \
     : QL_DECODE_HALVES(code, tokens, groups)                                                          ? false         \
     : (code) == QL_CODE_TABLE4 ? (type) == QL_VALUE_F16 && ((groups) != 8 || ROOMY(code))                             \
     : (tokens) == 4            ? true                                                                                 \
     : (groups)                 ? (groups) < 8 && ((code) != QL_CODE_INT8 || (type) == QL_VALUE_F16)                   \
                                : (code) != QL_CODE_INT4)

/* Elsewhere than on sm_90, and for 2 bit, of which the compiler asks for much at once, it wants for registers: there entries
 * of many groups are not asked for ahead, and what can be found again is not kept. */
#if __CUDA_ARCH__ == 900
#define ROOMY(code) ((code) != QL_CODE_INT2)
#define HALVES_AHEAD(code, type, tokens)                                                                               \
    ((code) == QL_CODE_INT2                              ? (type) == QL_VALUE_BF16 && (tokens) == 4                    \
     : (code) == QL_CODE_INT4 && (type) == QL_VALUE_BF16 ? (tokens) == 4                                               \
     : (code) == QL_CODE_INT3                            ? (tokens) == 4                                               \
                                                         : (tokens) != 16 || (code) == QL_CODE_TABLE4)
#else
#define ROOMY(code) false
#define HALVES_AHEAD(code, type, tokens)                                                                               \
    ((code) == QL_CODE_INT2     ? (type) == QL_VALUE_BF16 && (tokens) == 4                                             \
     : (code) == QL_CODE_TABLE4 ? (tokens) == 4                                                                        \
                                : ((code) == QL_CODE_INT4 || (code) == QL_CODE_INT8) && (tokens) == 4)
#endif
#define AHEAD(code, type, tokens, groups)                                                                              \
    ((groups) < 2                             ? true                                                                   \
     : QL_DECODE_HALVES(code, tokens, groups) ? HALVES_AHEAD(code, type, tokens)                                       \
     : (groups) < 8                           ? (tokens) != 16 || ((type) == QL_VALUE_F16 && (code) != QL_CODE_INT2)   \
     : (code) == QL_CODE_TABLE4               ? (tokens) <= 4 || ((tokens) == 8 && ROOMY(code))                        \
                                              : (tokens) == 4 && (code) != QL_CODE_INT2)

/* Whether loads have a turn (code_raw.cuh). 16 tokens, and two strips with groups of 32, want for registers so; of large groups nothing is gained. */
#define IN_TURN(code, tokens, groups)                                                                                  \
    (QL_RAW_IN_TURN && (code) == QL_CODE_TABLE4 && (tokens) != 16 && (groups) >= 2 &&                                  \
     !((tokens) == 8 && QL_DECODE_HALVES(code, tokens, groups)))

/* Whether a kernel has a loop for absmax that are all made as a batch begins, and the next batch's asked for then: all loads that the
 * next turn of the loop waits for share a scoreboard, so that what is asked for last holds up the first code. */
#define AT_ONCE(code, tokens, groups)                                                                                  \
    (IN_TURN(code, tokens, groups) && ((tokens) == 1 || ((tokens) == 4 && (groups) <= 8)))

/* Tiles of a batch that are asked for as it begins, the others as the batch before it leaves their registers: what a turn of the loop
 * asks for and waits for has a scoreboard of its own. As many as the compiler gives one that nothing soon waits for. */
#define LATE(code, tokens, groups, absmax)                                                                             \
    (!IN_TURN(code, tokens, groups)                                                    ? 0                             \
     : (tokens) == 8                                                                   ? 1                             \
     : (absmax) == QL_ABSMAX_EITHER || ((tokens) == 1 && (absmax) == QL_ABSMAX_NESTED) ? 0                             \
     : (groups) == 2                                                                   ? 1                             \
     : (groups) == 4                                                                   ? 4                             \
     : (groups) == 8                                                                   ? 2                             \
                                                                                       : 3)

/* The most loads of entries that are ahead of their own turn: of groups of 32 fewer where codes take most registers. */
#define MOST_AHEAD(code, type, tokens, groups)                                                                         \
    (!QL_DECODE_HALVES(code, tokens, groups)                                                           ? QL_MOST_HELD  \
     : !QL_DECODE_LEADS                                                                                ? 2             \
     : ((code) == QL_CODE_INT4 || (code) == QL_CODE_INT8) && ((tokens) != 4 || (type) != QL_VALUE_F16) ? 2             \
                                                                                                       : QL_MOST_HELD)

/* Of 16 tokens: whether two groups are multiplied by turns, so that a product seldom waits for the one before; of 4 bit that
 * gains nothing, of bf16 it wants registers. Whether what is asked for early is, as with fewer tokens: it costs the loop registers,
 * which not all of these can spare. */
#if __CUDA_ARCH__ == 900
#define PAIRED_GROUPS(code, type, tokens, groups)                                                                      \
    ((tokens) == 16 && (code) == QL_CODE_INT8 && (type) == QL_VALUE_F16 && (groups) >= 2 &&                            \
     !QL_DECODE_HALVES(code, tokens, groups))
#define EARLY_OF_16(code, type, groups) ((groups) < 8 && ((type) == QL_VALUE_F16 || (code) == QL_CODE_INT3))
#else
#define PAIRED_GROUPS(code, type, tokens, groups) false
#define EARLY_OF_16(code, type, groups) false
#endif

/* Half of a block, steps `step` and step + 1, of all strips of a band: sum += W x, of odd steps `odd`: chains of products half as
 * long. 16 tokens, and two strips, have two chains as it is. x: the lane's place in the batch's first line; of four rows none changes
 * places with the second half of a line. */
static __device__ __forceinline__ void multiply_half(float *sum, float *odd, const ql_batch_codes *codes, int code,
                                                     int type, int tokens, int groups, bool cells, int block, int step,
                                                     uint32_t x, uint32_t low) {
    const bool two_chains = TWO_CHAINS(code, type, tokens, groups);
    const bool parted = PARTED(code, type, tokens, groups);
    const bool in_turn = IN_TURN(code, tokens, groups);
    const bool odd_apart = two_chains && !parted && QL_RAW_ODD(code, type, PARTED(code, type, tokens, groups)) != 1.0f;
    uint32_t a[4], b[2][2];
    const uint32_t place = tokens == 4 ? x + (uint32_t)(step * 32) : x ^ (uint32_t)(step * 32);
    if (cells)
        load_cells(b, x, block, step);
    else
        load_matrices(b[0], b[1], place + (uint32_t)(block * 128));
#pragma unroll
    for (int strip = 0; strip < QL_DECODE_ABREAST(code, tokens); strip++) {
        raw_fragment(a, codes + strip, code, type, odd_apart, parted, in_turn, block, step, shared, low);
        multiply_16816(sum + strip * 4, a, b[0], type);
        if (parted) {
            raw_excess(a, a);
            multiply_16816(odd, a, b[0], type);
        }
        if (tokens == 16) {
            multiply_16816(sum + 4, a, b[1], type);
            load_matrices(b[0], b[1], (x ^ (uint32_t)(step * 32 + 32)) + (uint32_t)(block * 128));
        }
        raw_fragment(a, codes + strip, code, type, odd_apart, parted, in_turn, block, step + 1, shared, low);
        multiply_16816((two_chains && !parted ? odd : sum) + strip * 4, a, b[tokens == 16 ? 0 : 1], type);
        if (parted) {
            raw_excess(a, a);
            multiply_16816(odd, a, b[1], type);
        }
        if (tokens == 16) multiply_16816(sum + 4, a, b[1], type);
    }
}

/* What sums of one group lack: the odd steps', what rows g + 8 have of rows g, and zeros. sums: where sums of x over the group
 * lie, for the lane's tokens. */
static __device__ __forceinline__ void complete_sums(float *sum, const float *odd, const float *zero, int code,
                                                     int type, int tokens, int groups, int sums) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (TWO_CHAINS(code, type, tokens, groups))
            sum[j] = fmaf(odd[j], 1.0f / QL_RAW_ODD(code, type, PARTED(code, type, tokens, groups)), sum[j]);
    if (code == QL_CODE_TABLE4) return;
#pragma unroll
    for (int i = 0; i < (tokens == 16 ? 8 : 4); i += 4) {
        const float2 x = *(const float2 *)(shared + sums + i * 8);
        if (QL_RAW_JOINED(code, type)) sum[i + 2] -= sum[i], sum[i + 3] -= sum[i + 1];
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i + j] = fmaf(-zero[j / 2], j % 2 ? x.y : x.x, sum[i + j]);
    }
}

/* Sums of x over the parts of groups in a batch, [parts][tokens] in fp32 at `sums`, or one sum over a warp's batches. x is the
 * large operand of mma: its 16 rows are all tokens of a run of columns, then of the next. at: the batch's first column; sums:
 * lanes 0, 4, ... store. Of lines that are summed whole pieces may come in any order, so that of four tokens runs, too, want
 * different banks; of lines of two groups they come as they are. */
static __device__ __forceinline__ void sum_x(const ql_decode_params *p, int code, int type, int tokens, int groups,
                                             bool cells, bool first, int lane, uint32_t at, int sums) {
    if (cells) {
        sum_cells((float *)(shared + sums), code, type, tokens, groups, ONES(type), at);
        return;
    }
    const int runs = 16 / tokens, run_k = QL_DECODE_BATCH_K(code, tokens) / runs, parts = groups ? groups : 1;
    const int run_parts = parts > runs ? parts / runs : 1, steps = run_k / run_parts / 16;
    const uint32_t ones[2] = {ONES(type), ONES(type)};
    const int row = lane % 16, here = lane / 4;
    at += (uint32_t)(min(row % tokens, p->m - 1) * p->x_pitch + row / tokens * run_k * 2);
    at += (uint32_t)(lane / 16 * 16) ^ QL_DECODE_TURN(steps < 4 ? row % tokens : lane);
#pragma unroll 1
    for (int i = 0; i < run_parts; i++, at = steps < 4 ? (at ^ 64) + (i % 2 ? 0 : 128) : at + (uint32_t)(steps * 32)) {
        float sum[4] = {0}, odd[4] = {0};
#pragma unroll
        for (int step = 0; step < steps; step++) {
            uint32_t a[4];
            load_matrices(a, a + 2, (at ^ (uint32_t)(step % 4 * 32)) + (uint32_t)(step / 4 * 128));
            multiply_16816(step % 2 ? odd : sum, a, ones, type);
        }
        /* Rows here and here + 8. */
        float low = sum[0] + odd[0], high = sum[2] + odd[2];
        if (runs == 4 && parts < 4) {
            low += __shfl_xor_sync(ALL_LANES, low, 16);
            high += __shfl_xor_sync(ALL_LANES, high, 16);
        }
        if (runs > parts && parts == 1) high = low += high;
        if (lane % 4) continue;
        float *to = (float *)(shared + sums) + i * tokens;
        float *to_low = to + here / tokens * parts / runs * tokens + here % tokens;
        float *to_high = to + (here + 8) / tokens * parts / runs * tokens + (here + 8) % tokens;
        if (!groups && !first) low += *to_low, high += *to_high;
        *to_low = low, *to_high = high;
    }
    __syncwarp();
}

/* Zeros of rows g and g + 8 of a strip where all of K is one group. */
static __device__ __forceinline__ void load_row_zeros(float zero[2], const ql_decode_params *p, int code, int type,
                                                      bool parted, int row) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int place = min(row + 8 * h, (int)p->product.n - 1);
        uint32_t byte = (uint32_t)p->bare_zero;
        if (p->bare_zero < 0)
            byte = __ldg(p->zeros + (code == QL_CODE_INT8 ? place : place >> 1)) >>
                   (code == QL_CODE_INT8 ? 0 : place % 2 * 4);
        zero[h] =
            zero_of_byte(code == QL_CODE_INT8 ? byte : byte & 15, code, type, parted) * QL_RAW_UNIT(code, type, h);
    }
}

/* cells: columns of x are in another order and lie in cells (cells.cuh). */
static __device__ __forceinline__ void decode(const ql_decode_params *p, int code, int type, int tokens, int groups,
                                              bool cells, int absmax_kind /* QL_ABSMAX_* */) {
    const int tiles = QL_DECODE_BATCH_TILES(code, tokens), batch_k = QL_DECODE_BATCH_K(code, tokens);
    const int abreast = QL_DECODE_ABREAST(code, tokens);
    const int batch_x = batch_k * (cells ? QL_DECODE_CELL : 2); /* bytes of x, or of a row of it */
    const int slots = QL_DECODE_SLOTS(tokens, groups), width = tokens == 16 ? 8 : 4;
    const bool one = tokens == 1; /* of double quantization */
    const bool zeros = QL_DECODE_ZEROS(code, tokens, groups);
    /* Whether lanes make absmax for each other (nested.cuh). */
    const bool in_turns = absmax_kind == QL_ABSMAX_NESTED && abreast == 2;
    const bool halves = QL_DECODE_HALVES(code, tokens, groups);
    const int part_k = groups ? batch_k / groups : batch_k;             /* columns of a batch in one group */
    const int sides = one && halves ? 4 : one ? 2 : slots;              /* groups whose sums are side by side */
    const int unit_k = halves && sides == 1 ? part_k : QL_DECODE_BLOCK; /* a unit: a block, or its half */
    const int span = part_k * sides / unit_k;                           /* units that such groups have */
    const int pairs = groups >= 2 ? groups / 2 : groups;
    const bool both = sides == 1 && groups >= 2;
    const bool paired = PAIRED_GROUPS(code, type, tokens, groups);
    /* A batch's entries come by `loads` loads, each of `spread` pairs and asked for `kept` loads before its own turn. */
    const int spread = sides == 4 ? 2 : 1, loads = pairs / spread;
    const int most = MOST_AHEAD(code, type, tokens, groups), kept = loads > most ? most : loads;
    const bool at_once =
        AT_ONCE(code, tokens, groups) && (absmax_kind == QL_ABSMAX_UNDIVIDED || absmax_kind == QL_ABSMAX_PLAIN);
    const bool in_turn = IN_TURN(code, tokens, groups);
    const int late = LATE(code, tokens, groups, absmax_kind);
    /* Whether columns may be in another order. */
    const bool ordered = QL_DECODE_ORDERED(code, tokens, groups);
    const bool roomy = ROOMY(code), ahead = AHEAD(code, type, tokens, groups);
    /* Few rows of x are there so soon that warps do better to start together, next to each other in memory; of many a warp
     * waits for the columns that it wants, but where groups are of 32, and that wants registers. */
    const bool shared_start = tokens <= 4 || (code == QL_CODE_TABLE4 && tokens != 16) || (halves && tokens == 16);
    const int lane = (int)(threadIdx.x & 31), warp = (int)(threadIdx.x >> 5), g = lane >> 2;
    /* Half of the warps fill the table, while the others ask for x, which may have to wait for the kernel before. */
    const bool divides = code == QL_CODE_TABLE4 && tokens != 16;
    const int idle = divides ? (int)(blockDim.x >> 6) : 0, fillers = divides ? idle : (int)(blockDim.x >> 5);
    const bool fills = code == QL_CODE_TABLE4 && (!divides || warp < idle);
    if (fills) ask_for_table(shared_address(shared), &p->product, warp, fillers, lane);
    const int team = warp * p->warp_team >> 16, member = warp - team * p->team_warps;
    const int rank = (int)blockIdx.x & (1 << p->cluster_shift) - 1, block = (int)blockIdx.x >> p->cluster_shift;
    /* Of the block's part of K the warp takes every walk-th batch, so that a team reads what lies together. */
    const int walk = p->team_warps, first_batch = rank * p->block_batches, first = first_batch + member;
    const int end = min(first_batch + p->block_batches, p->batches);
    int band = block + team * p->blocks;
    const uint8_t *at = p->codes + (uint64_t)(uint32_t)band * p->band_bytes +
                        (uint32_t)(first * QL_DECODE_BATCH_BYTES(code, tokens) + lane * 16);
    const int to_high = 512 - 8 * lane; /* of 3 bit: from the lane's low bits to its high ones */
    int have = band >= p->bands || first >= end ? 0 : tiles_of(p, first, tiles);
    /* The lane's entry of the batch's first load, of the band's first strip. */
    int entry = 0;
    const int own_pair = sides == 4 ? lane >> 1 & 1 : 0;
    const int own_group = sides == 4 ? (lane & 1) * 2 : sides == 2 ? lane & 2 : 0;
    const int own_nested = sides == 4 ? lane & 3 : sides == 2 ? lane >> 1 & 1 : 0;
    /* The groups of a batch that may be in two blocks of the second level. */
    const int divided = absmax_kind == QL_ABSMAX_UNDIVIDED ? 1 : QL_DECODE_DIVIDED(tokens, groups);
    if (groups >= 2) entry = (band * abreast * p->pairs + first * pairs + own_pair) * 32 + g * 4 + own_group;
    if (groups == 1) entry = group_entry(p, band * abreast, first, g);
    const uint8_t *at_beside = at; /* of the band's second strip */
    if (abreast == 2 && band != p->lone) at_beside += p->band_bytes / 2;
    const bool anew = (groups >= 8 && code != QL_CODE_TABLE4) || tokens == 16; /* what can be found again is not kept */
    ql_batch_codes codes[2];
    ql_raw_entries raw[2];
    ql_nested_entries nested_raw[2];
    ql_columns columns;
    if (cells) load_places(&columns, p);
#pragma unroll
    for (int i = 0; i < kept; i++) {
#pragma unroll
        for (int s = 0; s < abreast; s++) {
            clear_pair(&raw[s], p, i);
            if (!in_turns && have && (i + spread == 1 || first * pairs + i * spread + own_pair < p->pairs))
                load_pair(p, code, absmax_kind, both, &raw[s], i, entry + s * entry_beside(p, band) + i * spread * 32);
        }
    }
    const int first_group = groups == 1 ? first >> p->group_shift : first * groups;
    if (code == QL_CODE_TABLE4 && !in_turns && is_nested(p, absmax_kind) && have)
        load_nested(p, &raw[0], band * 16 + g, first_group, divided, own_nested);
    if (in_turns && have)
#pragma unroll
        for (int s = 0; s < abreast; s++)
            load_nested_entries(&nested_raw[s], p, groups, strip_of(p, band, s), first_group, lane);
    /* What is asked for after the codes comes after them, 64 KB a multiprocessor later, so what the first of them meet goes
     * before. x may have to wait for the kernel before: some of the codes are on their way then, half where little else is
     * waited for; more would hold up x in a launch by itself. */
    const int early = cells ? (roomy && (tokens == 4 || code == QL_CODE_INT8) ? 2 : 0)
                      : IN_TURN(code, tokens, groups) && tokens == 4               ? tiles / 4
                      : groups == QL_DECODE_CHANNEL || code == QL_CODE_TABLE4      ? tiles / 2
                      : roomy && (tokens != 16 || EARLY_OF_16(code, type, groups)) ? tiles / 4
                                                                                   : 0;
#pragma unroll
    for (int i = 0; i < early; i++)
        if (i < have) load_band_tile(codes, code, in_turn, abreast, at, at + to_high, at_beside, i);
    start_next_kernel();
    if (code == QL_CODE_TABLE4) make_pairs(shared, &p->product, type, fills ? warp : 32, fillers, lane);
    if (p->cluster_shift) arrive_cluster_started();
    const uint32_t x_at = shared_address(shared) + (uint32_t)(p->x_at + member * batch_x);
    if (cells) {
        clear_cells(p, tokens, p->block_batches * batch_k, shared_address(shared) + (uint32_t)p->x_at);
        if (tokens == 4) __syncthreads();
        wait_for_previous_kernel();
        load_columns(&columns, p, tokens);
        /* Where x is long, and codes are: the second-level cache may have some by then. */
        if (code == QL_CODE_INT8 && p->k > QL_CELLS_PIECE * (int)blockDim.x)
            prefetch_tiles(at + early * QL_TILE_BYTES(code), have - early, lane);
        /* What is asked for from here on does not go before x. */
        at = held(at);
        store_columns(&columns, p, 1, tokens, part_k, shared_address(shared) + (uint32_t)p->x_at);
    } else if (p->x_aligned) {
        const bool copies = !divides || warp >= idle;
        if (copies) wait_for_previous_kernel();
        const uint32_t to = shared_address(shared) + (uint32_t)p->x_at;
        if (shared_start && copies)
            copy_x(p, zeros, tokens, first_batch * batch_k, p->block_batches * batch_k, to, 256, warp - idle,
                   (int)(blockDim.x >> 5) - idle, 0, 1, lane);
        else if (!shared_start)
            copy_x(p, zeros, tokens, first_batch * batch_k, p->block_batches * batch_k, to, batch_k, member, walk, team,
                   p->teams, lane);
    } else if (ordered && p->stage_columns) {
        ask_for_columns(p, shared_address(shared));
        cp_async_commit();
    }
#pragma unroll
    for (int i = early; i < tiles; i++)
        if (i < have) load_band_tile(codes, code, in_turn, abreast, at, at + to_high, at_beside, i);
    /* Meanwhile the cache may fetch the next batch. */
    if (!cells && code == QL_CODE_INT8 && p->ahead) {
        if (first + walk < end)
            prefetch_tiles(at + p->walk_bytes, tiles_of(p, first + walk, tiles), lane);
        else if (band + p->hop < p->bands)
            prefetch_tiles(at + p->hop_bytes, have, lane);
    }
    /* The scales of bands, which the last sums would wait for. */
    if (!groups && (int)threadIdx.x < p->rounds * p->teams && block + (int)threadIdx.x * p->blocks < p->bands)
        prefetch_line((const uint8_t *)p->scales +
                      (int64_t)(block + (int)threadIdx.x * p->blocks) * (abreast * 16) * p->scale_size);
    ql_decode_x x = place_x(p, code, tokens, slots, cells, part_k / QL_DECODE_BLOCK, x_at, lane);
    if (cells) {
        store_columns(&columns, p, 0, tokens, part_k, shared_address(shared) + (uint32_t)p->x_at);
    } else if (!p->x_aligned) {
        const int part_columns = p->block_batches * batch_k;
        if (ordered && p->stage_columns)
            move_columns(p, shared_address(shared), first_batch * batch_k, part_columns);
        else
            load_row((const uint16_t *)p->x, p->k, p->x_at, first_batch * batch_k, part_columns);
        if (zeros) clear_row(p);
    }
    if (!cells) cp_async_wait(0);
    if (cells || shared_start || code == QL_CODE_TABLE4 || !p->x_aligned)
        __syncthreads();
    else
        wait_for_teams(p->teams, member);
    /* The warp's sums of x; the lane's tokens in them. */
    int sums = p->sums_at + (groups ? (team * p->block_batches + member) * groups : warp) * tokens * 4;
    sums += lane % 4 * 8;
    /* The first batch's while its codes are on their way, but where registers are few. */
    const bool sums_ahead = code != QL_CODE_TABLE4 && (tokens != 16 || (EARLY_OF_16(code, type, groups) && !paired)) &&
                            !(halves && (QL_TILE_K(code) == 128 || (code == QL_CODE_INT8 && !roomy)));
    if (sums_ahead && band < p->bands && first < end)
        sum_x(p, code, type, tokens, groups, cells, true, lane, x_at, sums);
    int partials = p->partials_at;
    if (p->cluster_shift) wait_cluster();
    uint32_t x_of_256[2][2], is_step[8], is_side[2] = {g < 4, g >= 4};
#pragma unroll
    for (int i = 0; i < 8; i++) is_step[i] = g == i;
    if (one) hide(is_step, 8);
    if (slots == 2 && !zeros) hide(is_side, 2);
    int begin = 0; /* the first round whose sums are held */
    const bool counted = QL_DECODE_LEADS || (code != QL_CODE_TABLE4 && !cells);
    int rest = 0; /* tiles of the batch at hand, or 0 where all are asked for */
    /* One warp goes through the end of a round before its first, without sums: instructions and parameters that are met for the
     * first time are far, and the whole block would wait for them. */
    const bool leads = QL_DECODE_LEADS && warp == (int)(blockDim.x >> 5) - 1;
#pragma unroll 1
    for (int round = leads ? -1 : 0; round < p->rounds; round++) {
        if (round >= 0 && band < p->bands) {
            float out[8] = {0}, sum[8] = {0}, odd[8] = {0}, row_zero[2][2] = {{0}};
            if (!groups)
#pragma unroll
                for (int s = 0; s < abreast; s++)
                    load_row_zeros(row_zero[s], p, code, type, PARTED(code, type, tokens, groups),
                                   (band * abreast + s) * 16 + g);
            int batch = anew ? first_batch_of(p, rank, thread_anew()) : first;
#pragma unroll 1
            for (; batch < end; batch += walk) {
                const int begins = anew ? first_batch_of(p, rank, thread_anew()) : first;
                if (code != QL_CODE_TABLE4 && round == 0 && !(sums_ahead && batch == begins))
                    sum_x(p, code, type, tokens, groups, cells, batch == begins, thread_anew() % 32,
                          code == QL_CODE_INT3 && !halves ? x_at + (uint32_t)((batch - begins) * batch_x)
                                                          : x_at_anew(p, batch - first_batch, batch_x),
                          sums);
                const uint8_t *now = at, *now_beside = at_beside;
                const int missing = rest;
                /* Here or below, where the compiler gives them a scoreboard that nothing soon waits for. */
                if (tokens <= 4)
                    load_late_tiles(codes, code, in_turn, abreast, now, now_beside, tiles - late, tiles, missing);
                const bool last = batch + walk >= end;
                const int next_band = last ? band + p->hop : band, next = last ? begins : batch + walk;
                have = next_band >= p->bands ? 0 : tiles_of(p, next, tiles);
                at += last ? p->hop_bytes - (batch - begins) * QL_DECODE_BATCH_BYTES(code, tokens) : p->walk_bytes;
                rest = have;
                const uint8_t *high = at;
                if (code == QL_CODE_INT3) high = held(at + to_high);
                at_beside = next_band == p->lone ? at : at + p->band_bytes / 2;
                if (abreast == 2) at_beside = held(at_beside);
                const int entry_hop = last ? p->hop_entries - (batch - begins) * pairs * 32 : p->walk_entries;
                if (groups == 1) entry = group_entry(p, next_band * abreast, next, g);
                const int next_group = groups == 1 ? next >> p->group_shift : next * groups;
                float absmax[2][2][2], absmax_of[QL_MOST_HELD][2];
                if (tokens > 4)
                    load_late_tiles(codes, code, in_turn, abreast, now, now_beside, tiles - late, tiles, missing);
                if (at_once) {
                    make_sets(absmax_of, &raw[0], p, absmax_kind, loads, shared, (uint32_t)lane * 4);
                    entry += entry_hop;
                    load_sets(&raw[0], p, absmax_kind, loads, spread, entry,
                              have ? p->pairs - next * pairs - own_pair : 0, next_band * 16 + g, next_group);
                }
                if (in_turns)
#pragma unroll
                    for (int s = 0; s < abreast; s++) {
                        make_absmax(absmax[s], &nested_raw[s], p, groups, shared, (uint32_t)lane * 4);
                        /* Without a branch: where paths meet again the compiler has all loads waited for. */
                        if (have || in_turn)
                            load_nested_entries(&nested_raw[s], p, groups, strip_of(p, min(next_band, p->bands - 1), s),
                                                next_group, lane);
                    }
#pragma unroll
                for (int unit = 0; unit < batch_k / unit_k; unit++) {
                    const int b = unit * unit_k / QL_DECODE_BLOCK, begin_k = unit * unit_k % QL_DECODE_BLOCK;
                    const int end_k = begin_k + unit_k, set = groups ? unit / span : 0;
                    const bool starts = groups && unit % span == 0, ends = groups && unit % span == span - 1;
                    /* What is asked for from here on is the next batch's. */
                    if (groups >= 2 && ahead && starts && !at_once &&
                        (both ? set == 2 * (loads - kept) : set == loads - kept))
                        entry += entry_hop;
                    if (starts)
#pragma unroll
                        for (int j = 0; j < 8; j++)
                            if (!paired || set % 2 == 0) sum[j] = odd[j] = 0.0f;
                    if (one) {
                        if (b % 4 == 0) load_matrices(x_of_256[0], x_of_256[1], x.row + (uint32_t)(b * 128));
                        multiply_block_of_one(sum, codes, type, b, x_of_256, is_step, shared, (uint32_t)lane * 4);
                    } else if (slots == 2 && !zeros) {
                        if (unit * unit_k / part_k % 2 == 0)
                            multiply_both_blocks(sum, TWO_CHAINS(code, type, tokens, groups) ? odd : sum, codes, type,
                                                 b, part_k / QL_DECODE_BLOCK, x.row, is_side, shared,
                                                 (uint32_t)lane * 4);
                    } else if (paired) {
                        /* The second group's sums are where others have those of odd steps. */
#pragma unroll
                        for (int k = 0; set % 2 == 0 && k < QL_DECODE_BLOCK; k += 32) {
                            multiply_half(sum, NULL, codes, code, type, tokens, groups, false, b, k / 16, x.row,
                                          (uint32_t)lane * 4);
                            multiply_half(odd, NULL, codes, code, type, tokens, groups, false, b + span, k / 16, x.row,
                                          (uint32_t)lane * 4);
                        }
                    } else {
#pragma unroll
                        for (int k = begin_k; k < end_k; k += 32) {
                            const int slot = slots == 2 ? (b * QL_DECODE_BLOCK + k) / part_k % 2 : 0;
                            multiply_half(sum, odd, codes, code, type, tokens, groups, cells, b, k / 16,
                                          slot ? x.row + x.other : x.row, (uint32_t)lane * 4);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < tiles; j++)
                        if ((j + 1) * QL_TILE_K(code) > b * 64 + begin_k &&
                            (j + 1) * QL_TILE_K(code) <= b * 64 + end_k && j < have && j < tiles - late)
                            load_band_tile(codes, code, in_turn, abreast, at, high, at_beside, j);
                    if (ends) {
                        const int load = both ? set / 2 : set, slot = load % kept;
                        /* The load to ask for, and whether it is this batch's. */
                        const bool here = load + kept < loads;
                        const int other = (here ? load + kept : load + kept - loads) * spread;
#pragma unroll
                        for (int s = 0; s < abreast; s++) {
                            if (!ahead && (!both || set % 2 == 0)) {
                                clear_pair(&raw[s], p, slot);
                                if (load == 0 || batch * pairs + load < p->pairs)
                                    load_pair(p, code, absmax_kind, both, &raw[s], slot,
                                              entry + s * entry_beside(p, band) + load * 32);
                            }
                            ql_entry e;
                            if (at_once)
                                e = (ql_entry){{absmax_of[set][0], absmax_of[set][1]}, {0}};
                            else if (in_turns)
                                e = (ql_entry){{absmax_of_set(absmax[s], set, 0, groups),
                                                absmax_of_set(absmax[s], set, 1, groups)},
                                               {0}};
                            else
                                e = entry_of(p, code, type, PARTED(code, type, tokens, groups), absmax_kind, both,
                                             &raw[s], both ? slot * 2 + set % 2 : slot, set * sides, divided, shared,
                                             (uint32_t)lane * 4);
                            float *part = paired && set % 2 ? odd : sum + s * 4;
                            complete_sums(part, odd + s * 4, e.zero, code, type, tokens, groups,
                                          sums + set * slots * tokens * 4);
#pragma unroll
                            for (int j = 0; j < width; j++)
                                out[s * 4 + j] = fmaf(e.scale[j % 4 / 2], part[j], out[s * 4 + j]);
                            if (!in_turns && !at_once && ahead && (!both || set % 2)) {
                                const int of = here ? batch : next;
                                if ((here || have) && (other + spread == 1 || of * pairs + other + own_pair < p->pairs))
                                    load_pair(p, code, absmax_kind, both, &raw[s], slot,
                                              entry + s * entry_beside(p, here ? band : next_band) + other * 32);
                                else if (other + spread > 1)
                                    clear_scales(&raw[s], slot);
                            }
                        }
                    }
                }
                if (code == QL_CODE_TABLE4 && !in_turns && !at_once && is_nested(p, absmax_kind) && have)
                    load_nested(p, &raw[0], next_band * 16 + g, next_group, divided, own_nested);
                if (!ahead) entry += entry_hop;
                x.row += (uint32_t)p->walk_x;
                sums += p->walk_sums;
            }
            batch -= anew ? first_batch_of(p, rank, thread_anew()) : first;
            x.row -= (uint32_t)(batch * batch_x);
            sums -= batch * groups * tokens * 4;
            if (!groups && first < end)
#pragma unroll
                for (int s = 0; s < abreast; s++)
                    complete_sums(sum + s * 4, odd + s * 4, row_zero[s], code, type, tokens, groups, sums);
            leave_sums(p, groups ? out : sum, code, type, tokens, groups, slots, roomy, partials,
                       round - first_held(p, counted, round, begin));
        }
        if (round >= 0) band += p->hop;
        if (round >= 0 && round + 1 < p->rounds &&
            (counted ? round + 1 < begin + p->flush_rounds : (round + 1) % p->flush_rounds != 0))
            continue;
        wait_for_previous_kernel();
        begin = first_held(p, counted, round, begin);
        finish_rounds(p, code, type, tokens, groups, block, rank, begin, round + 1 - begin, partials);
        if (round < 0) continue;
        begin = round + 1;
        if (!p->partials_bytes)
            __syncthreads();
        else
            partials = 2 * p->partials_at + p->partials_bytes - partials;
    }
    if (p->cluster_shift) finish_cluster(p, type, abreast, block, rank);
}

/* Two loops where the registers are, as absmax in fp32 wants others; one that takes both elsewhere. */
#define KERNEL(name, source, code, type, tokens, groups)                                                               \
    extern "C" __global__ void __launch_bounds__(QL_DECODE_THREADS, 1)                                                 \
        name(const __grid_constant__ ql_decode_params params) {                                                        \
        if (AT_ONCE(code, tokens, groups) && params.undivided)                                                         \
            decode(&params, code, type, tokens, groups, false, QL_ABSMAX_UNDIVIDED);                                   \
        else if (AT_ONCE(code, tokens, groups) && (tokens) == 4 && params.scale_size == 4)                             \
            decode(&params, code, type, tokens, groups, false, QL_ABSMAX_PLAIN);                                       \
        else if ((tokens) != 1 && QL_DECODE_ABREAST(code, tokens) == 1)                                                \
            decode(&params, code, type, tokens, groups, false, QL_ABSMAX_EITHER);                                      \
        else if ((tokens) == 1 || params.scale_size == 1)                                                              \
            decode(&params, code, type, tokens, groups, false, QL_ABSMAX_NESTED);                                      \
        else                                                                                                           \
            decode(&params, code, type, tokens, groups, false, QL_ABSMAX_PLAIN);                                       \
    }
QL_DECODE_VARIANTS(KERNEL)

#define CELLS_KERNEL(name, source, code, type, tokens, groups)                                                         \
    extern "C" __global__ void __launch_bounds__(QL_DECODE_THREADS, 1)                                                 \
        name(const __grid_constant__ ql_decode_params params) {                                                        \
        decode(&params, code, type, tokens, groups, true, QL_ABSMAX_EITHER);                                           \
    }
QL_DECODE_CELLS_VARIANTS(CELLS_KERNEL)
