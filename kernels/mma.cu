/* The product with a packed weight on mma.sync: every GPU from sm_80 on that has no wgmma, from a few tokens up.
 *
 * A block of 8 warps makes 128 outputs of some tokens over a part of K ("split"). x and the codes of its strips come to
 * shared memory by cp.async, some stages ahead: x in rows of 128 bytes whose 16-byte pieces are swizzled by the row,
 * codes as they are. A warp makes 16-bit fragments of its strips' codes in registers. Where K is split, the blocks of
 * all parts but the last leave fp32 sums in scratch and the last adds them in order: the same bits each time. It has the
 * highest index of its tile, so what it waits for was started before it. */
#include "ptx.cuh"
#include "variants.h"
#include "weight16.cuh"

enum { WARPS = 8, THREADS = QL_MMA_THREADS, ROWS = QL_MMA_ROWS, MOST_FRAGMENTS = 8, PANEL_PITCH = 128 };

#define STAGE_K(code) QL_MMA_STAGE_K(code)

/* Warps that share the tokens of a block; of a warp the strips of 16 rows, and the fragments of 8 tokens. */
#define TOKEN_WARPS(tokens) ((tokens) >= 64 ? 2 : 1)
#define WARP_STRIPS(tokens) (ROWS / 16 * TOKEN_WARPS(tokens) / WARPS)
#define FRAGMENTS(tokens) ((tokens) / TOKEN_WARPS(tokens) / 8)

/* Byte offset of the 16-byte piece `piece` (8 columns) of a token's row in a stage of x. */
static __device__ __forceinline__ uint32_t x_place(int tokens, int row, int piece) {
    return (uint32_t)((piece / 8 * tokens + row) * PANEL_PITCH + ((piece % 8 ^ row % 8) << 4));
}

/* The pieces of x that a thread brings in each stage: `first` is at column 0, the others whole numbers of rows below. */
typedef struct x_pieces {
    const uint16_t *first;
    int64_t step;    /* elements from one to the next */
    int row, column; /* of the first */
    int rows;        /* tokens from `row` on that exist */
} x_pieces;

static __device__ __forceinline__ x_pieces pieces_of(const ql_packed_params *p, int code, int64_t token) {
    const int across = STAGE_K(code) / 8;
    x_pieces pieces = {.row = (int)threadIdx.x / across, .column = (int)threadIdx.x % across * 8};
    pieces.rows = (int)min(max(p->m - token - pieces.row, (int64_t)0), (int64_t)1024);
    pieces.first = (const uint16_t *)p->x + (token + (pieces.rows ? pieces.row : 0)) * p->x_stride + pieces.column;
    pieces.step = THREADS / across * p->x_stride;
    return pieces;
}

/* A stage of x into shared memory: tokens beyond m and columns beyond k become zeros. */
static __device__ __forceinline__ void load_x(uint32_t stage, const x_pieces *pieces, int64_t k, int code, int tokens,
                                              int64_t col) {
    const int rows = THREADS / (STAGE_K(code) / 8);
    const int64_t left = k - col - pieces->column;
    const int bytes = left <= 0 ? 0 : left >= 8 ? 16 : (int)left * 2;
#pragma unroll
    for (int i = 0; i < (tokens + rows - 1) / rows; i++) {
        if (tokens < rows && pieces->row >= tokens) break;
        const bool inside = i * rows < pieces->rows && bytes;
        const uint16_t *from = inside ? pieces->first + i * pieces->step + col : pieces->first;
        cp_async_16(stage + x_place(tokens, pieces->row + i * rows, pieces->column / 8), from, inside ? bytes : 0);
    }
}

/* The pieces of codes that a thread brings in each stage, as they lie in the strips; zeros beyond the last strip or tile. */
typedef struct code_pieces {
    const uint8_t *from[2]; /* in the first tile */
    int offset[2];          /* of `from` in its strip */
    int bytes;              /* of a strip */
} code_pieces;

/* Bytes of a strip in a stage, and 16-byte pieces that a thread brings of 8 strips, the last of them by some alone. */
#define RUN_BYTES(code) (STAGE_K(code) / QL_TILE_K(code) * QL_TILE_BYTES(code))
#define RUN_PIECES(code) ((ROWS / 16 * RUN_BYTES(code) / 16 + THREADS - 1) / THREADS)

static __device__ __forceinline__ code_pieces code_pieces_of(const ql_packed_params *p, int code, int64_t row_tile) {
    const int64_t strips = (p->n + 15) / 16;
    code_pieces pieces = {.bytes = (int)((p->k + QL_TILE_K(code) - 1) / QL_TILE_K(code)) * QL_TILE_BYTES(code)};
#pragma unroll
    for (int i = 0; i < RUN_PIECES(code); i++) {
        const int piece = (int)threadIdx.x + i * THREADS, run = RUN_BYTES(code) / 16;
        const int64_t strip = row_tile * (ROWS / 16) + piece / run;
        const bool inside = piece < ROWS / 16 * run && strip < strips;
        pieces.offset[i] = inside ? piece % run * 16 : INT32_MAX / 2;
        pieces.from[i] = p->codes + (inside ? strip * pieces.bytes + piece % run * 16 : 0);
    }
    return pieces;
}

static __device__ __forceinline__ void load_codes(uint32_t to, const code_pieces *pieces, int code, int stage) {
    const int64_t ahead = (int64_t)stage * RUN_BYTES(code);
#pragma unroll
    for (int i = 0; i < RUN_PIECES(code); i++) {
        if ((i + 1) * THREADS > ROWS / 16 * RUN_BYTES(code) / 16 &&
            (int)threadIdx.x + i * THREADS >= ROWS / 16 * RUN_BYTES(code) / 16)
            break;
        const bool inside = pieces->offset[i] + ahead < pieces->bytes;
        cp_async_16(to + (uint32_t)(threadIdx.x + i * THREADS) * 16, inside ? pieces->from[i] + ahead : pieces->from[i],
                    inside ? 16 : 0);
    }
}

/* This lane's codes of tile j of a strip in a stage. */
static __device__ __forceinline__ ql_lane_codes lane_codes(const uint8_t *codes, int code, int strip, int j) {
    const uint8_t *tile = codes + strip * RUN_BYTES(code) + j * QL_TILE_BYTES(code);
    const int lane = (int)threadIdx.x % 32;
    ql_lane_codes result = {.low = *(const uint4 *)(tile + lane * 16)};
    if (code == QL_CODE_INT3) result.high = *(const uint2 *)(tile + 512 + lane * 8);
    return result;
}

/* The address of B fragments for ldmatrix.x4: two groups of 8 tokens by the 16 columns of a step. */
static __device__ __forceinline__ uint32_t fragment_place(int tokens, int token, int step) {
    int lane = (int)threadIdx.x % 32;
    return x_place(tokens, token + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2);
}

/* The sums of a block's warps become outputs, through shared memory, so that a token's are written in runs. */
static __device__ __forceinline__ void store_tile(const ql_packed_params *p, uint8_t *shared,
                                                  float (*sum)[MOST_FRAGMENTS][4], int64_t row_tile, int64_t token,
                                                  int first_strip, int first_token, int type, int tokens) {
    const int warp_strips = WARP_STRIPS(tokens), fragments = FRAGMENTS(tokens), lane = (int)threadIdx.x % 32;
    __syncthreads();
    uint16_t *const out = (uint16_t *)shared;
    const int pitch = ROWS + 8;
#pragma unroll
    for (int i = 0; i < warp_strips; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = (first_strip + i) * 16 + h * 8 + lane / 4;
            const int64_t n = row_tile * ROWS + row;
            const float bias = n < p->n ? BIAS_AT(p, n) : 0.0f;
#pragma unroll
            for (int f = 0; f < fragments; f++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    out[(first_token + f * 8 + lane % 4 * 2 + e) * pitch + row] =
                        round16(sum[i][f][h * 2 + e] + bias, type);
        }
    __syncthreads();
    const int64_t width = min(p->n - row_tile * ROWS, (int64_t)ROWS);
    const bool whole = HAS_WHOLE_PIECES(p);
    for (int piece = (int)threadIdx.x; piece < tokens * (ROWS / 8); piece += THREADS) {
        const int row = piece / (ROWS / 8), col = piece % (ROWS / 8) * 8;
        if (token + row >= p->m || col >= width) continue;
        uint16_t *to = (uint16_t *)p->out + (token + row) * p->n + row_tile * ROWS + col;
        const uint16_t *from = out + row * pitch + col;
        if (whole)
            *(uint4 *)to = *(const uint4 *)from;
        else
            for (int i = 0; i < 8 && col + i < width; i++) to[i] = from[i];
    }
}

static __device__ __forceinline__ void product(const ql_split_params *q, int code, int type, bool wide, int tokens) {
    const int row_warps = WARPS / TOKEN_WARPS(tokens), warp_tokens = tokens / TOKEN_WARPS(tokens);
    const int warp_strips = WARP_STRIPS(tokens), fragments = FRAGMENTS(tokens);
    const int stage_k = STAGE_K(code), tiles = stage_k / QL_TILE_K(code), tile_steps = QL_TILE_K(code) / 16;
    const ql_packed_params *p = &q->product;
    extern __shared__ __align__(128) uint8_t shared[];
    const int x_bytes = tokens * stage_k * 2, stage_bytes = QL_MMA_STAGE_BYTES(code, tokens);
    const int depth = QL_MMA_STAGES(code, tokens);
    const uint32_t base = shared_address(shared);
    uint8_t *const table = shared + depth * stage_bytes;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int first_strip = warp % row_warps * warp_strips, first_token = warp / row_warps * warp_tokens;

    const int64_t row_tiles = (p->n + ROWS - 1) / ROWS;
    const int64_t tile = blockIdx.x / (unsigned)q->splits;
    const int split = (int)(blockIdx.x % (unsigned)q->splits);
    const int64_t row_tile = tile % row_tiles, token_tile = tile / row_tiles;
    const int stages = (int)((p->k + stage_k - 1) / stage_k);
    const int begin = (int)((int64_t)stages * split / q->splits),
              end = (int)((int64_t)stages * (split + 1) / q->splits);
    const int64_t token = token_tile * tokens;

    const code_pieces codes = code_pieces_of(p, code, row_tile);
    for (int d = 0; d < depth - 1 && begin + d < end; d++)
        load_codes(base + (uint32_t)(d * stage_bytes + x_bytes), &codes, code, begin + d);

    ql_lane_rows rows[2];
    const int64_t all_strips = (p->n + 15) / 16;
#pragma unroll
    for (int i = 0; i < warp_strips; i++) {
        const int64_t strip = min(row_tile * (ROWS / 16) + first_strip + i, all_strips - 1);
        rows[i].row = strip * 16 + lane / 4;
        rows[i].place = p->groups == 1 ? rows[i].row : (strip * ((p->groups + 1) / 2) * 8 + lane / 4) * 4;
    }
    /* Groups are whole steps: `left` counts those that remain of the group at hand. */
    ql_group16 group[2];
    const int group_steps = p->groups == 1 ? INT32_MAX : (int)(p->group_size / 16);
    const int first_step = begin * (stage_k / 16), groups = (int)p->groups;
    int current = first_step / group_steps, left = 0;
    ql_group_bits bits[2];
#pragma unroll
    for (int i = 0; i < warp_strips; i++) load_group(&bits[i], p, code, rows[i], min(current, groups - 1));
    fill_table(table, p, code);
    const x_pieces pieces = pieces_of(p, code, token);
    wait_for_previous_kernel();
    start_next_kernel();
    for (int d = 0; d < depth - 1; d++) {
        if (begin + d < end)
            load_x(base + (uint32_t)(d * stage_bytes), &pieces, p->k, code, tokens, (int64_t)(begin + d) * stage_k);
        cp_async_commit();
    }

    float sum[2][MOST_FRAGMENTS][4] = {0};
    int slot = 0, next_slot = depth - 1;
    for (int stage = begin; stage < end; stage++) {
        cp_async_wait(depth - 2);
        __syncthreads();
        const int next = stage + depth - 1;
        if (next < end) {
            const uint32_t to = base + (uint32_t)(next_slot * stage_bytes);
            load_codes(to + (uint32_t)x_bytes, &codes, code, next);
            load_x(to, &pieces, p->k, code, tokens, (int64_t)next * stage_k);
        }
        cp_async_commit();
        next_slot = slot;
        const uint32_t x = base + (uint32_t)(slot * stage_bytes);
        const uint8_t *const stage_codes = shared + slot * stage_bytes + x_bytes;
        slot = slot == depth - 1 ? 0 : slot + 1;
#pragma unroll
        for (int j = 0; j < tiles; j++) {
            ql_lane_codes words[2];
#pragma unroll
            for (int i = 0; i < warp_strips; i++) words[i] = lane_codes(stage_codes, code, first_strip + i, j);
#pragma unroll
            for (int step = 0; step < tile_steps; step++) {
                const int stage_step = j * tile_steps + step;
                if (left == 0) {
#pragma unroll
                    for (int i = 0; i < warp_strips; i++) use_group(&group[i], &bits[i], p, code, type);
                    left = group_steps - (stage == begin && stage_step == 0 ? first_step % group_steps : 0);
                    current++;
                    /* Columns beyond k belong to no group; x is zero there. */
                    const int next_group = min(current, groups - 1);
#pragma unroll
                    for (int i = 0; i < warp_strips; i++) load_group(&bits[i], p, code, rows[i], next_group);
                }
                left--;
                uint32_t b[MOST_FRAGMENTS][2];
#pragma unroll
                for (int f = 0; f < fragments; f += 2)
                    load_matrices(b[f], b[f + 1], x + fragment_place(tokens, first_token + f * 8, stage_step));
#pragma unroll
                for (int i = 0; i < warp_strips; i++) {
                    uint32_t a[4];
                    weights16(a, &words[i], step, &group[i], table, code, type, wide);
#pragma unroll
                    for (int f = 0; f < fragments; f++) multiply_16816(sum[i][f], a, b[f], type);
                }
            }
        }
    }
    cp_async_wait(0);

    const int values = warp_strips * fragments;
    if (q->splits > 1) {
        float4 *partial = (float4 *)q->partial + tile * (q->splits - 1) * values * THREADS + threadIdx.x;
        uint64_t *flags = q->flags + tile * (q->splits - 1);
        if (split < q->splits - 1) {
#pragma unroll
            for (int v = 0; v < values; v++) {
                const float *from = sum[v / fragments][v % fragments];
                partial[(split * values + v) * THREADS] = make_float4(from[0], from[1], from[2], from[3]);
            }
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) store_release(&flags[split], q->nonce);
            return;
        }
        for (int other = 0; other < q->splits - 1; other++) {
            if (threadIdx.x == 0) {
                while (load_acquire(&flags[other]) != q->nonce) {
                }
                store_release(&flags[other], 0);
            }
            __syncthreads();
#pragma unroll
            for (int v = 0; v < values; v++) {
                float *to = sum[v / fragments][v % fragments];
                float4 more = __ldcg(&partial[(other * values + v) * THREADS]);
                to[0] += more.x, to[1] += more.y, to[2] += more.z, to[3] += more.w;
            }
        }
    }

    store_tile(p, shared, sum, row_tile, token, first_strip, first_token, type, tokens);
}

#define KERNEL(name, source, code, type, wide, tokens)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, (tokens) == 16 ? 2 : 1)                                      \
        name(const __grid_constant__ ql_split_params params) {                                                         \
        product(&params, code, type, wide, tokens);                                                                    \
    }
QL_MMA_VARIANTS(KERNEL)
