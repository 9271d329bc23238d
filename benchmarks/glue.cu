/* What lies between a Llama block's linear layers, in fp16 with sums in fp32. Every kernel waits for the one before it
 * by itself and lets the next one start at once, so that launches overlap and a layer may fetch weights meanwhile. What
 * nothing writes between a step's first kernel, which overlaps with none, and its last is fetched before the wait: the
 * norms' weights, the place of the token, keys and values of those before it. */
extern "C" {

typedef unsigned short half_bits;

static __device__ __forceinline__ float widened(half_bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

static __device__ __forceinline__ half_bits rounded(float value) {
    half_bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

typedef struct __align__(16) eight {
    half_bits at[8];
} eight;

static __device__ __forceinline__ void let_next_start(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

static __device__ __forceinline__ void wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void begin(void) {
    let_next_start();
    wait_for_previous();
}

/* The sum over a block of 32 * n threads, in every thread of it. */
static __device__ __forceinline__ float sum_of_block(float value, float *shared) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0;
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

/* out = values / rms(values) * scales of a row of n values, of which a thread has 8. */
static __device__ __forceinline__ void norm(eight *out, const float values[8], const eight *scales, int n, float eps) {
    __shared__ float shared[32];
    float squares = 0;
    for (int i = 0; i < 8; i++) squares += values[i] * values[i];
    const float factor = rsqrtf(sum_of_block(squares, shared) / (float)n + eps);
    eight made;
    for (int i = 0; i < 8; i++) made.at[i] = rounded(widened(rounded(values[i] * factor)) * widened(scales->at[i]));
    if (threadIdx.x * 8 < n) *out = made;
}

static __device__ __forceinline__ eight zeros(void) {
    eight made;
    for (int i = 0; i < 8; i++) made.at[i] = 0;
    return made;
}

/* x [rows, n] += delta if that is not null; out = norm of x. A block a row, 8 values a thread; n a multiple of 8. */
__global__ void __launch_bounds__(1024)
    add_norm(half_bits *out, half_bits *x, const half_bits *delta, const half_bits *weight, int n, float eps) {
    const int column = (int)threadIdx.x * 8;
    const long long at = (long long)blockIdx.x * n + column;
    const bool mine = column < n;
    let_next_start();
    const eight scales = mine ? *(const eight *)(weight + column) : zeros();
    wait_for_previous();
    eight own = mine ? *(const eight *)(x + at) : zeros();
    if (delta && mine) {
        const eight more = *(const eight *)(delta + at);
        for (int i = 0; i < 8; i++) own.at[i] = rounded(widened(own.at[i]) + widened(more.at[i]));
        *(eight *)(x + at) = own;
    }
    float values[8];
    for (int i = 0; i < 8; i++) values[i] = widened(own.at[i]);
    norm((eight *)(out + at), values, &scales, n, eps);
}

/* A prompt: qkv [batch, tokens, heads + 2 * kv_heads, 2 * half_dim] -> q [batch, heads, tokens, 2 * half_dim], turned,
 * and keys, turned, and values into caches [batch, kv_heads, capacity, 2 * half_dim] at first[0] + token. turns
 * [capacity, half_dim, 2]: cosine, sine. One block a head of a token, half_dim threads. */
__global__ void turn_and_store(half_bits *q, half_bits *keys, half_bits *values, const half_bits *qkv,
                               const float *turns, const long long *first, int tokens, int heads, int kv_heads,
                               int capacity) {
    begin();
    const int half_dim = (int)blockDim.x, head = (int)blockIdx.x, i = (int)threadIdx.x;
    const int token = (int)blockIdx.y % tokens, batch = (int)blockIdx.y / tokens;
    const long long place = first[0] + token;
    const half_bits *from = qkv + ((long long)blockIdx.y * (heads + 2 * kv_heads) + head) * 2 * half_dim;
    half_bits *to;
    if (head < heads)
        to = q + (((long long)batch * heads + head) * tokens + token) * 2 * half_dim;
    else {
        const int kv_head = (head - heads) % kv_heads;
        to = (head < heads + kv_heads ? keys : values) +
             (((long long)batch * kv_heads + kv_head) * capacity + place) * 2 * half_dim;
    }
    half_bits low = from[i], high = from[i + half_dim];
    if (head < heads + kv_heads) {
        const float cosine = turns[(place * half_dim + i) * 2], sine = turns[(place * half_dim + i) * 2 + 1];
        const float a = widened(low), b = widened(high);
        low = rounded(a * cosine - b * sine);
        high = rounded(b * cosine + a * sine);
    }
    to[i] = low;
    to[i + half_dim] = high;
}

/* Four values of a head, turned: a lane has 4 * lane and on, its partner 16 lanes further those that are 64 further. */
static __device__ __forceinline__ void turned(float value[4], ushort4 from, const float4 turns[2], int lane) {
    const float own[4] = {widened(from.x), widened(from.y), widened(from.z), widened(from.w)};
    const float cosine[4] = {turns[0].x, turns[0].z, turns[1].x, turns[1].z};
    const float sine[4] = {turns[0].y, turns[0].w, turns[1].y, turns[1].w};
    for (int i = 0; i < 4; i++) {
        const float other = __shfl_xor_sync(~0u, own[i], 16);
        value[i] = widened(rounded(own[i] * cosine[i] + (lane < 16 ? -other : other) * sine[i]));
    }
}

static __device__ __forceinline__ ushort4 narrowed(const float value[4]) {
    return make_ushort4(rounded(value[0]), rounded(value[1]), rounded(value[2]), rounded(value[3]));
}

static __device__ __forceinline__ float product(const float a[4], ushort4 b) {
    return a[0] * widened(b.x) + a[1] * widened(b.y) + a[2] * widened(b.z) + a[3] * widened(b.w);
}

static __device__ __forceinline__ void add_share(float average[4], float share, ushort4 value) {
    average[0] += share * widened(value.x), average[1] += share * widened(value.y);
    average[2] += share * widened(value.z), average[3] += share * widened(value.w);
}

#define WARPS 16
#define KEYS 8
#define MOST_QUERIES 4

/* Eight sums over a warp at once: the lanes 4 * i to 4 * i + 3 have that of value[i]. */
static __device__ __forceinline__ float eight_sums(float value[8], int lane) {
#pragma unroll
    for (int step = 16, count = 4; count; step /= 2, count /= 2)
#pragma unroll
        for (int i = 0; i < count; i++) {
            const float kept = lane & step ? value[count + i] : value[i],
                        sent = lane & step ? value[i] : value[count + i];
            value[i] = kept + __shfl_xor_sync(~0u, sent, step);
        }
    value[0] += __shfl_xor_sync(~0u, value[0], 2);
    return value[0] + __shfl_xor_sync(~0u, value[0], 1);
}

/* Of a head's query so far: the greatest score, the sum of exp(score - most) of this lane's keys, and the average of
 * the values (four of them a lane) before it is divided by all lanes' sum. */
typedef struct running {
    float most, sum, average[4];
} running;

/* KEYS keys and values, every WARPS-th from `first` on. For those that there are not any place will do. */
static __device__ __forceinline__ void fetch_keys(ushort4 key[KEYS], ushort4 value[KEYS], const half_bits *keys,
                                                  const half_bits *values, long long cache, int first, int bound) {
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
        const long long offset = cache + (long long)min(first + WARPS * j, bound - 1) * 128;
        key[j] = *(const ushort4 *)(keys + offset), value[j] = *(const ushort4 *)(values + offset);
    }
}

/* One new token: qkv [batch, heads + 2 * kv_heads, 128] -> out [batch, heads * 128], its attention to the caches up to
 * place[0] and to itself; its key, turned, and its value go into the caches there. A block has `queries` heads that
 * share their keys: a warp takes every WARPS-th key, KEYS of them at a time, and what warps found is put together at
 * the end. */
static __device__ __forceinline__ void attend(half_bits *out, half_bits *keys, half_bits *values, const half_bits *qkv,
                                              const float *turns, const long long *place, int heads, int kv_heads,
                                              int capacity, float scale, const int queries) {
    __shared__ float greatest[MOST_QUERIES][WARPS], sums[MOST_QUERIES][WARPS], averages[MOST_QUERIES][WARPS][128];
    let_next_start();
    const int head = (int)blockIdx.x * queries, batch = (int)blockIdx.y, each = heads / kv_heads, kv_head = head / each;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const long long cache = ((long long)batch * kv_heads + kv_head) * capacity * 128 + lane * 4;
    const half_bits *row = qkv + (long long)batch * (heads + 2 * kv_heads) * 128 + lane * 4;
    /* The first keys are fetched before it is known how many there are. Four heads leave no registers for that. */
    const bool ahead = queries == 1;
    ushort4 key[KEYS], held[KEYS];
    if (ahead) fetch_keys(key, held, keys, values, cache, warp, capacity);
    const int count = (int)place[0];
    const float4 *turn = (const float4 *)(turns + ((long long)count * 64 + lane % 16 * 4) * 2);
    const float4 own[2] = {turn[0], turn[1]};
    wait_for_previous();
    float query[MOST_QUERIES][4];
    running state[MOST_QUERIES];
#pragma unroll
    for (int h = 0; h < queries; h++) {
        turned(query[h], *(const ushort4 *)(row + (head + h) * 128), own, lane);
        for (int i = 0; i < 4; i++) query[h][i] *= scale;
        state[h].most = -1e30f, state[h].sum = 0;
        for (int i = 0; i < 4; i++) state[h].average[i] = 0;
    }
    const ushort4 value = *(const ushort4 *)(row + (heads + kv_heads + kv_head) * 128);
    const ushort4 unturned = *(const ushort4 *)(row + (heads + kv_head) * 128);
    for (int first = warp; first < count; first += WARPS * KEYS) {
        if (!ahead || first > warp) fetch_keys(key, held, keys, values, cache, first, count);
        const bool is_key = first + WARPS * (lane / 4) < count;
#pragma unroll
        for (int h = 0; h < queries; h++) {
            float score[KEYS];
            for (int j = 0; j < KEYS; j++) score[j] = product(query[h], key[j]);
            const float found = eight_sums(score, lane), mine = is_key ? found : -1e30f;
            float now = mine;
            for (int step = 16; step >= 4; step /= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
            now = fmaxf(now, state[h].most);
            const float shrink = __expf(state[h].most - now), share = is_key ? __expf(mine - now) : 0;
            state[h].most = now, state[h].sum = state[h].sum * shrink + share;
            for (int i = 0; i < 4; i++) state[h].average[i] *= shrink;
            for (int j = 0; j < KEYS; j++) add_share(state[h].average, __shfl_sync(~0u, share, 4 * j), held[j]);
        }
    }
    float wide[4];
    turned(wide, unturned, own, lane);
    const ushort4 own_key = narrowed(wide);
    if (warp == 0 && head % each == 0) {
        *(ushort4 *)(keys + cache + (long long)count * 128) = own_key;
        *(ushort4 *)(values + cache + (long long)count * 128) = value;
    }
#pragma unroll
    for (int h = 0; h < queries; h++) {
        /* Every fourth lane has a sum of its own. */
        for (int step = 16; step >= 4; step /= 2) state[h].sum += __shfl_xor_sync(~0u, state[h].sum, step);
        float score = product(query[h], own_key);
        for (int step = 16; step; step >>= 1) score += __shfl_xor_sync(~0u, score, step);
        if (warp == 0) {
            const float now = fmaxf(state[h].most, score), shrink = __expf(state[h].most - now),
                        share = __expf(score - now);
            state[h].most = now, state[h].sum = state[h].sum * shrink + share;
            for (int i = 0; i < 4; i++) state[h].average[i] *= shrink;
            add_share(state[h].average, share, value);
        }
        if (lane == 0) greatest[h][warp] = state[h].most, sums[h][warp] = state[h].sum;
        *(float4 *)&averages[h][warp][lane * 4] =
            make_float4(state[h].average[0], state[h].average[1], state[h].average[2], state[h].average[3]);
    }
    __syncthreads();
    const int h = (int)threadIdx.x / 128, i = (int)threadIdx.x % 128;
    if (h >= queries) return;
    float most = greatest[h][0], total = 0, made = 0;
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, greatest[h][w]);
    for (int w = 0; w < WARPS; w++) {
        const float share = __expf(greatest[h][w] - most);
        total += sums[h][w] * share;
        made += averages[h][w][i] * share;
    }
    out[((long long)batch * heads + head + h) * 128 + i] = rounded(made / total);
}

#define DEFINE_ATTEND(queries)                                                                                         \
    __global__ void __launch_bounds__(32 * WARPS)                                                                      \
        attend_##queries(half_bits *out, half_bits *keys, half_bits *values, const half_bits *qkv, const float *turns, \
                         const long long *place, int heads, int kv_heads, int capacity, float scale) {                 \
        attend(out, keys, values, qkv, turns, place, heads, kv_heads, capacity, scale, queries);                       \
    }
DEFINE_ATTEND(1)
DEFINE_ATTEND(4)

/* both [rows, 2 * n] -> out [rows, n]: silu of the first half times the second, 8 values a thread, a row in blockIdx.y. */
__global__ void gate(half_bits *out, const half_bits *both, int n) {
    begin();
    const int column = ((int)blockIdx.x * (int)blockDim.x + (int)threadIdx.x) * 8;
    if (column >= n) return;
    const half_bits *from = both + (long long)blockIdx.y * 2 * n + column;
    const eight a = *(const eight *)from, b = *(const eight *)(from + n);
    eight made;
    for (int i = 0; i < 8; i++) {
        const float value = widened(a.at[i]);
        made.at[i] = rounded(widened(rounded(__fdividef(value, 1 + __expf(-value)))) * widened(b.at[i]));
    }
    *(eight *)(out + (long long)blockIdx.y * n + column) = made;
}

/* A value's bits so that greater values are greater integers. */
static __device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The end of a step: tokens[row] = the first place of the greatest of logits [rows, n], place[0]++. n a multiple of 8.
 * best, done [rows], zero, which they are again: of a row the greatest value so far above the complement of its place, and
 * how many blocks are through. A row has gridDim.x blocks. */
__global__ void pick(long long *tokens, long long *place, unsigned long long *best, unsigned *done,
                     const half_bits *logits, int n) {
    __shared__ unsigned long long found[32];
    begin();
    const int row = (int)blockIdx.y;
    unsigned long long own = 0;
    for (int at = ((int)blockIdx.x * (int)blockDim.x + (int)threadIdx.x) * 8; at < n;
         at += (int)(gridDim.x * blockDim.x) * 8) {
        const eight values = *(const eight *)(logits + (long long)row * n + at);
        for (int i = 0; i < 8; i++) {
            const unsigned long long here =
                (unsigned long long)ordered(widened(values.at[i])) << 32 | ~(unsigned)(at + i);
            own = here > own ? here : own;
        }
    }
    for (int step = 16; step; step >>= 1) {
        const unsigned long long other = __shfl_xor_sync(~0u, own, step);
        own = other > own ? other : own;
    }
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) own = found[warp] > own ? found[warp] : own;
    atomicMax(best + row, own);
    __threadfence();
    if (atomicAdd(done + row, 1) != gridDim.x - 1) return;
    tokens[row] = (long long)(~(unsigned)atomicExch(best + row, 0));
    done[row] = 0;
    if (row == 0) place[0]++;
}
}
