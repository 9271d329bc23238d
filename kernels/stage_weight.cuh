/* What a multiplying warp reads of a stage of the stream-K product, and what it makes of it: 16-bit numbers in the
 * fragment order of wgmma's A. They are (q - zero) * scale, rounded once; or exact q - zero, where a group is all of K
 * and scales are left to the outputs, or tokens are few and they are left to the group's sums; or a table's values, rounded
 * once, with absmax left to the group's sums. And how such a warp goes from stage to stage.
 *
 * Scales of x's own type multiply in it. Beside bf16 x others (wide) are two bf16 parts, the product of which is
 * rounded once by a fused multiply-add; beside fp16 x, whose small range would lose bits of them, they multiply in
 * fp32. */
#ifndef QL_KERNELS_STAGE_WEIGHT_CUH
#define QL_KERNELS_STAGE_WEIGHT_CUH

#include "code_exact.cuh"
#include "planes.cuh"

/* Of a lane's rows g and g + 8 in a group, as it lies in shared memory: scales, two in a word if they have 16 bits;
 * zeros, a byte of two nibbles or two bytes. */
typedef struct raw_entry {
    uint32_t scales[2], second;
} raw_entry;

/* The same as decoding takes it. zero: zero words; scale: pairs in x's type, or fp32 bits; rest: the lower parts of
 * scales in two parts. */
typedef struct entry {
    uint32_t zero[2], scale[2], rest[2];
} entry;

/* What is the same in all stages. Addresses: this lane's in the first stage, entries in the group at hand. */
typedef struct reader {
    uint32_t codes, high, scales, seconds; /* high: of 3 bit */
    int scales_type, scale_shift;          /* scale_shift: 1 where a scale has 32 bits, else 0 */
    bool has_seconds;
    entry row; /* where a group is all of K */
} reader;

/* A lane's share of a stage. */
typedef struct stage_words {
    uint32_t words[16], high[2]; /* high: of 3 bit */
    raw_entry entries[MOST_GROUPS];
    planes products; /* of a table, in the group at hand */
} stage_words;

/* A warp's strip of the tile; another set's warps have the same ones. */
static __device__ __forceinline__ int strip_of(shape k) {
    const int warp = (int)threadIdx.x / WARP;
    return SETS(k) == 2 ? warp % WARPS : warp;
}

static __device__ __forceinline__ reader make_reader(const ql_streamk_params *q, uint32_t base, shape k) {
    const ql_packed_params *p = &q->product;
    const int lane = (int)threadIdx.x % WARP, g = lane / 4, strip = strip_of(k);
    const bool table = k.code == QL_CODE_TABLE4;
    const uint32_t stage = stages_at(base, k);
    const uint32_t entries = stage + QL_STREAMK_ENTRIES_AT(k.code, k.rows, k.tokens, k.stage_k);
    reader r;
    r.scales_type = table ? QL_VALUE_F32 : p->scales_type;
    r.scale_shift = table || (k.wide && r.scales_type == QL_VALUE_F32);
    r.has_seconds = !table && p->zeros != NULL;
    r.codes = stage + QL_STREAMK_CODES_AT(k.tokens, k.stage_k) + strip * QL_STREAMK_STRIP_BYTES(k.code, k.stage_k);
    r.high = r.codes + 512 + lane * 8;
    r.codes += lane * 16;
    r.scales = entries + ((strip * 64 + g * 8) << r.scale_shift);
    if (HAS_PLANES(k)) r.scales = entries + (strip * 16 + g) * PLANE;
    r.seconds = entries + k.rows / 16 * 128;
    r.seconds += k.code == QL_CODE_INT8 ? strip * 32 + g * 4 : strip * 16 + g * 2;
    return r;
}

/* Absmax of 128 tokens is read when the stage's first product runs: a stage ahead it is waited for at once, as it is moved. */
#define HAS_LATE_ABSMAX(k) ((k).code == QL_CODE_TABLE4 && (k).tokens == 128)

/* From the first half of a tile of codes to the second, and back. */
static __device__ __forceinline__ void flip_half(reader *r) {
    r->codes ^= 8;
    r->high ^= 4;
}

/* From the first group of a pair to the second, and back. */
static __device__ __forceinline__ void flip_group(reader *r, shape k) {
    if (HAS_PLANES(k)) return;
    r->scales ^= 4u << r->scale_shift;
    r->seconds ^= k.code == QL_CODE_INT8 ? 2 : 1;
}

/* What stands for the zeros of two rows where none are stored. */
static __device__ __forceinline__ uint32_t no_zeros(int code) {
    return code == QL_CODE_INT8 ? 0x8080u : 0x11u << (QL_CODE_BITS(code) - 1);
}

static __device__ __forceinline__ raw_entry read_entry(const reader *r, uint32_t at, int group, shape k) {
    const bool bytes = k.code == QL_CODE_INT8;
    raw_entry raw = {{0, 0}, no_zeros(k.code)};
    const int pair = group / 2 * QL_STREAMK_PAIR_BYTES(k.code, k.rows), second = group % 2;
    const uint32_t scales = r->scales + at + (pair + (second * 4 << r->scale_shift));
    const uint32_t seconds = r->seconds + at + (pair + (bytes ? second * 2 : second));
    if (k.code == QL_CODE_TABLE4 || (k.wide && r->scales_type == QL_VALUE_F32)) {
        const uint2 v = load_shared_8(scales);
        raw.scales[0] = v.x;
        raw.scales[1] = v.y;
    } else {
        raw.scales[0] = load_shared_4(scales);
    }
    if (r->has_seconds) raw.second = bytes ? load_shared_2(seconds) : load_shared_1(seconds);
    return raw;
}

/* The codes of `tiles` tiles of a stage, from tile `first` of it on. at: bytes from the first stage. */
static __device__ __forceinline__ void read_codes(stage_words *d, const reader *r, uint32_t at, int first, int tiles,
                                                  shape k) {
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
        const uint32_t from = at + (first + tile) * QL_TILE_BYTES(k.code);
        const uint4 v = load_shared_16(r->codes + from);
        d->words[4 * tile] = v.x;
        d->words[4 * tile + 1] = v.y;
        d->words[4 * tile + 2] = v.z;
        d->words[4 * tile + 3] = v.w;
        if (k.code == QL_CODE_INT3) {
            const uint2 h = load_shared_8(r->high + from);
            d->high[0] = h.x;
            d->high[1] = h.y;
        }
    }
}

static __device__ __forceinline__ void read_entries(stage_words *d, const reader *r, uint32_t at, shape k) {
#pragma unroll
    for (int group = 0; group < k.groups; group++) d->entries[group] = read_entry(r, at, group, k);
}

static __device__ __forceinline__ void read_stage(stage_words *d, const reader *r, uint32_t at, shape k) {
    read_codes(d, r, at, 0, k.stage_k / QL_TILE_K(k.code), k);
    if (HAS_HALVES(k)) {
        const uint2 v = load_shared_8(r->codes + at);
        d->words[0] = v.x;
        d->words[1] = v.y;
        if (k.code == QL_CODE_INT3) d->high[0] = load_shared_4(r->high + at);
    }
    if (HAS_PLANES(k))
        read_planes(&d->products, r->scales + at, k);
    else if (!HAS_LATE_ABSMAX(k))
        read_entries(d, r, at, k);
}

static __device__ __forceinline__ float scale_value(const raw_entry *raw, int h, int type) {
    if (type == QL_VALUE_F32) return __uint_as_float(raw->scales[h]);
    return value_of16(h ? raw->scales[0] >> 16 : raw->scales[0] & 0xffffu, type);
}

/* Zeros as they are stored: of 8 bit a byte a row, else a nibble. */
static __device__ __forceinline__ uint32_t stored_zero(uint32_t zeros, int h, int code) {
    return code == QL_CODE_INT8 ? zeros >> 8 * h & 255u : zeros >> 4 * h & 15u;
}

static __device__ __forceinline__ entry make_entry(const reader *r, const raw_entry *raw, shape k) {
    entry e;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        e.zero[h] = zero_word(stored_zero(raw->second, h, k.code), k.code, k.type);
        if (SETS(k) == 2) {
            const float as_half = scale_value(raw, h, QL_VALUE_F16), as_bf16 = scale_value(raw, h, QL_VALUE_BF16);
            e.scale[h] = __float_as_uint(r->scales_type == QL_VALUE_F16 ? as_half : as_bf16);
            continue;
        }
        if (!k.wide) {
            e.scale[h] = __byte_perm(raw->scales[0], 0, h ? 0x3232 : 0x1010);
            continue;
        }
        const float scale = scale_value(raw, h, r->scales_type);
        if (k.type == QL_VALUE_F16) {
            e.scale[h] = __float_as_uint(scale);
        } else {
            e.scale[h] = round16_pair(scale, scale, QL_VALUE_BF16);
            const float rest = scale - __uint_as_float(e.scale[h] & 0xffff0000u);
            e.rest[h] = round16_pair(rest, rest, QL_VALUE_BF16);
        }
    }
    return e;
}

/* Absmax of a stage's groups. at: bytes from the first stage. */
static __device__ __forceinline__ void absmax_entries(entry *e, const stage_words *d, const reader *r, uint32_t at,
                                                      shape k) {
#pragma unroll
    for (int i = 0; i < k.groups; i++) {
        const raw_entry raw = HAS_LATE_ABSMAX(k) ? read_entry(r, at, i, k) : d->entries[i];
        e[i].scale[0] = raw.scales[0];
        e[i].scale[1] = raw.scales[1];
    }
}

/* The group of a stage that a step is in. */
static __device__ __forceinline__ int group_of_step(int step, shape k) { return step * 16 * k.groups / k.stage_k; }

/* a[4 * steps]: exact codes of steps from step `from` on become weights. */
static __device__ __forceinline__ void scale_codes(uint32_t *a, const entry *entries, int from, int steps, shape k) {
#pragma unroll
    for (int i = 0; i < 4 * steps; i++) {
        const entry *e = &entries[group_of_step(from + i / 4, k)];
        const uint32_t scale = e->scale[i & 1];
        if (!k.wide) {
            a[i] = k.type == QL_VALUE_F16 ? mul_half2(a[i], scale) : mul_bf162(a[i], scale);
        } else if (k.type == QL_VALUE_F16) {
            const float2 v = half2_values(a[i]);
            a[i] = round16_pair(__fmul_rn(v.x, __uint_as_float(scale)), __fmul_rn(v.y, __uint_as_float(scale)), k.type);
        } else {
            a[i] = fma_bf162(a[i], scale, mul_bf162(a[i], e->rest[i & 1]));
        }
    }
}

/* Pairs of a table's values by four bytes of two codes; lane_at: this lane's place among its pairs. */
static __device__ __forceinline__ void look_up(uint32_t a[4], uint32_t word, uint32_t lane_at, shape k) {
    extern __shared__ __align__(1024) uint8_t shared[];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t at = __byte_perm(word, lane_at, 0x7604 | i << 4); /* lane_at, with a byte as bits 8-15 */
        a[i] = *(const uint32_t *)(shared + QL_STREAMK_TABLE_AT(k.code, k.tokens, k.groups) + at);
    }
}

/* a[4 * steps]: `steps` steps from step `from` of the stage. entries: of the stage's groups. */
static __device__ __forceinline__ void decode(uint32_t *a, const stage_words *d, const entry *entries, bool has_zeros,
                                              int from, int steps, shape k) {
    const int tile_steps = QL_TILE_K(k.code) / 16;
    const uint32_t *words = d->words;
#pragma unroll
    for (int i = 0; i < steps; i++) {
        const int at = from + i;
        if (HAS_PLANES(k))
            pick_step(a + 4 * i, words[at], &d->products);
        else if (k.code == QL_CODE_TABLE4)
            look_up(a + 4 * i, words[at], (threadIdx.x & 31) * 4, k);
        else
            exact_step(a + 4 * i, words + at / tile_steps * 4, d->high, at % tile_steps,
                       entries[group_of_step(at, k)].zero, has_zeros, k.code, k.type);
    }
    if (k.code != QL_CODE_TABLE4 && k.groups && SETS(k) == 1) scale_codes(a, entries, from, steps, k);
    settle_bits(a, 4 * steps);
}

/* Scales of a lane's rows, applied to the sums of a group. */
static __device__ __forceinline__ void add_scaled(float *sums, float *part, const entry *e, int count) {
    settle(part, count);
#pragma unroll
    for (int i = 0; i < count; i++) sums[i] += part[i] * __uint_as_float(e->scale[i / 2 % 2]);
}

/* Pairs of a table's values by a byte of two codes, one for each lane: a thread makes one of them. */
static __device__ __forceinline__ void fill_tables(const ql_packed_params *p, uint32_t table, int type) {
    const int thread = (int)threadIdx.x, first = thread / WARP * WARP, lane = thread % WARP;
    const uint32_t pair = round16_pair(__ldg(p->table + (thread & 15)), __ldg(p->table + (thread >> 4)), type);
#pragma unroll 4
    for (int i = 0; i < WARP; i++)
        store_shared_4(table + (first + i) * 256 + lane * 4, __shfl_sync(ALL_LANES, pair, i));
}

/* ---- from stage to stage ---- */

/* A warp's place among stages and groups, across tiles. */
typedef struct place {
    uint32_t base, parity;
    int slot, first; /* first: the set's */
    int at;          /* bytes from the first stage */
    int left;        /* blocks of the group */
} place;

static __device__ __forceinline__ place first_place(uint32_t base, int set, shape k) {
    const place c = {base, 0, set, set, set * stage_bytes(k), 1};
    return c;
}

static __device__ __forceinline__ void await_stage(const place *c) { barrier_wait(c->base + 8 * c->slot, c->parity); }

/* From one stage of the set to the next. */
static __device__ __forceinline__ void next_slot(place *c, const ql_streamk_params *q, shape k) {
    c->at += SETS(k) * stage_bytes(k);
    c->slot += SETS(k);
    if (c->slot == q->stages + c->first) {
        c->slot = c->first;
        c->parity ^= 1;
        c->at = c->first * stage_bytes(k);
    }
}

static __device__ __forceinline__ void step_on(place *c, reader *reads, const ql_streamk_params *q, shape k) {
    next_slot(c, q, k);
    if (HAS_HALVES(k)) flip_half(reads);
    c->left -= SETS(k);
    if (k.groups == 1 && (SETS(k) == 1 ? c->left == 0 : c->left <= 0)) {
        c->left = SETS(k) == 1 ? q->group_blocks : c->left + q->group_blocks;
        flip_group(reads, k);
    }
}

static __device__ __forceinline__ void find_group(place *c, reader *reads, const ql_streamk_params *q, int first,
                                                  shape k) {
    if (HAS_HALVES(k) && (first & 1)) flip_half(reads);
    if (k.groups != 1) return;
    const int group = group_of(q, first, 1);
    c->left = (group + 1) * q->group_blocks - first;
    /* One set's blocks are then all first groups of their pairs, or all second ones. */
    if (SETS(k) == 2 && q->group_blocks == 1) c->left = 1 << 30;
    if (group & 1) flip_group(reads, k);
}

static __device__ __forceinline__ uint64_t descriptor_of(const place *c, shape k) {
    return descriptor_at(rows_descriptor(stages_at(c->base, k)), 0) + ((uint32_t)c->at >> 4);
}

#endif
