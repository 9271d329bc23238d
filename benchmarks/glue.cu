/* What lies between a Llama block's linear layers, in fp16 with sums in fp32. Every kernel waits for the one before it
 * by itself and lets the next one start at once, so that launches overlap and a layer may fetch weights meanwhile. */
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

static __device__ __forceinline__ void begin(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The sum over a block of 32 * n threads, in every thread of it. */
static __device__ __forceinline__ float sum_of_block(float value, float *shared) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < (int)blockDim.x / 32; warp++) value += shared[warp];
    return value;
}

/* out = values / rms(values) * weight of a row of n values, of which a thread has 8 and 8 more blockDim.x * 8 on. */
static __device__ __forceinline__ void norm(half_bits *out, const float values[2][8], const half_bits *weight, int n,
                                            float eps) {
    __shared__ float shared[32];
    float squares = 0;
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8)
        for (int i = 0; i < 8; i++) squares += values[part][i] * values[part][i];
    const float factor = rsqrtf(sum_of_block(squares, shared) / (float)n + eps);
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8) {
        const eight scale = *(const eight *)(weight + at);
        eight made;
        for (int i = 0; i < 8; i++)
            made.at[i] = rounded(widened(rounded(values[part][i] * factor)) * widened(scale.at[i]));
        *(eight *)(out + at) = made;
    }
}

/* x [rows, n] += delta if that is not null; out = norm of x. A block a row; n a multiple of 8, at most 16 a thread. */
__global__ void __launch_bounds__(1024)
    add_norm(half_bits *out, half_bits *x, const half_bits *delta, const half_bits *weight, int n, float eps) {
    begin();
    const long long row = (long long)blockIdx.x * n;
    float values[2][8];
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8) {
        eight own = *(const eight *)(x + row + at);
        if (delta) {
            const eight more = *(const eight *)(delta + row + at);
            for (int i = 0; i < 8; i++) own.at[i] = rounded(widened(own.at[i]) + widened(more.at[i]));
            *(eight *)(x + row + at) = own;
        }
        for (int i = 0; i < 8; i++) values[part][i] = widened(own.at[i]);
    }
    norm(out + row, values, weight, n, eps);
}

typedef struct __align__(16) packet {
    unsigned data, epoch, more, again;
} packet;

static __device__ __forceinline__ void send(packet *to, unsigned data, unsigned more, unsigned epoch) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(to), "r"(data), "r"(epoch), "r"(more)
                 : "memory");
}

/* Waits for what the other process sends, some ten seconds at most. */
static __device__ __forceinline__ packet receive(const packet *from, unsigned epoch) {
    packet got;
    for (int tries = 0;; tries++) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(got.data), "=r"(got.epoch), "=r"(got.more), "=r"(got.again)
                     : "l"(from)
                     : "memory");
        if (got.epoch == epoch && got.again == epoch) return got;
        if (tries == 1 << 24) __trap();
    }
}

typedef union words {
    eight halves;
    unsigned word[4];
} words;

/* add_norm where delta is this process' part of a sum of two: it is sent into the other's inbox and the other's read
 * from this one's. Inboxes [2, rows, n / 4] packets, whose words are valid by the epoch beside them (as NCCL's LL
 * protocol has it), so that nothing is waited for but the words themselves; epochs [rows] counts the exchanges, and
 * every second one takes the same place: by then its words were read, as the other's answer to the one between them
 * came after. */
__global__ void __launch_bounds__(1024)
    exchange_add_norm(half_bits *out, half_bits *x, const half_bits *delta, const half_bits *weight, packet *inbox,
                      packet *outbox, unsigned *epochs, int n, float eps) {
    begin();
    const long long row = (long long)blockIdx.x * n;
    const unsigned epoch = epochs[blockIdx.x] + 1;
    const long long place = ((long long)(epoch & 1) * gridDim.x + blockIdx.x) * (n / 4);
    words own[2];
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8) {
        own[part].halves = *(const eight *)(delta + row + at);
        send(outbox + place + at / 4, own[part].word[0], own[part].word[1], epoch);
        send(outbox + place + at / 4 + 1, own[part].word[2], own[part].word[3], epoch);
    }
    float values[2][8];
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8) {
        const packet low = receive(inbox + place + at / 4, epoch), high = receive(inbox + place + at / 4 + 1, epoch);
        words other;
        other.word[0] = low.data, other.word[1] = low.more, other.word[2] = high.data, other.word[3] = high.more;
        eight sum = *(const eight *)(x + row + at);
        for (int i = 0; i < 8; i++) {
            const half_bits both = rounded(widened(own[part].halves.at[i]) + widened(other.halves.at[i]));
            sum.at[i] = rounded(widened(sum.at[i]) + widened(both));
            values[part][i] = widened(sum.at[i]);
        }
        *(eight *)(x + row + at) = sum;
    }
    norm(out + row, values, weight, n, eps);
    if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
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

/* One new token: qkv [batch, heads + 2 * kv_heads, 128] -> out [batch, heads * 128], its attention to the caches up to
 * place[0] and to itself; its key, turned, and its value go into the caches there. A block has `queries` heads that
 * share their keys: a warp takes every WARPS-th key, KEYS of them at a time, and what warps found is put together at
 * the end. */
static __device__ __forceinline__ void attend(half_bits *out, half_bits *keys, half_bits *values, const half_bits *qkv,
                                              const float *turns, const long long *place, int heads, int kv_heads,
                                              int capacity, float scale, const int queries) {
    __shared__ float greatest[MOST_QUERIES][WARPS], sums[MOST_QUERIES][WARPS], averages[MOST_QUERIES][WARPS][128];
    begin();
    const int head = (int)blockIdx.x * queries, batch = (int)blockIdx.y, each = heads / kv_heads, kv_head = head / each;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const long long cache = ((long long)batch * kv_heads + kv_head) * capacity * 128 + lane * 4;
    const half_bits *row = qkv + (long long)batch * (heads + 2 * kv_heads) * 128 + lane * 4;
    const int count = (int)place[0];
    const float4 *turn = (const float4 *)(turns + ((long long)count * 64 + lane % 16 * 4) * 2);
    const float4 own[2] = {turn[0], turn[1]};
    float query[MOST_QUERIES][4];
    running state[MOST_QUERIES];
#pragma unroll
    for (int h = 0; h < queries; h++) {
        turned(query[h], *(const ushort4 *)(row + (head + h) * 128), own, lane);
        for (int i = 0; i < 4; i++) query[h][i] *= scale;
        state[h].most = -1e30f, state[h].sum = 0;
        for (int i = 0; i < 4; i++) state[h].average[i] = 0;
    }
    /* The first keys are fetched before it is known how many there are. */
    int first = warp, bound = capacity;
    do {
        ushort4 key[KEYS], value[KEYS];
        for (int j = 0; j < KEYS; j++) {
            /* For keys that there are not any place will do. */
            const long long offset = cache + (long long)min(first + WARPS * j, bound - 1) * 128;
            key[j] = *(const ushort4 *)(keys + offset), value[j] = *(const ushort4 *)(values + offset);
        }
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
            for (int j = 0; j < KEYS; j++) add_share(state[h].average, __shfl_sync(~0u, share, 4 * j), value[j]);
        }
        first += WARPS * KEYS, bound = count;
    } while (first < count);
    const ushort4 value = *(const ushort4 *)(row + (heads + kv_heads + kv_head) * 128);
    float wide[4];
    turned(wide, *(const ushort4 *)(row + (heads + kv_head) * 128), own, lane);
    const ushort4 key = narrowed(wide);
    if (warp == 0 && head % each == 0) {
        *(ushort4 *)(keys + cache + (long long)count * 128) = key;
        *(ushort4 *)(values + cache + (long long)count * 128) = value;
    }
#pragma unroll
    for (int h = 0; h < queries; h++) {
        /* Every fourth lane has a sum of its own. */
        for (int step = 16; step >= 4; step /= 2) state[h].sum += __shfl_xor_sync(~0u, state[h].sum, step);
        float score = product(query[h], key);
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

/* both [rows, 2 * n] -> out [rows, n]: silu of the first half times the second, 8 values a thread. */
__global__ void gate(half_bits *out, const half_bits *both, int n, long long count) {
    begin();
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    const long long row = at / n, column = at % n;
    const eight a = *(const eight *)(both + row * 2 * n + column),
                b = *(const eight *)(both + row * 2 * n + n + column);
    eight made;
    for (int i = 0; i < 8; i++) {
        const float value = widened(a.at[i]);
        made.at[i] = rounded(widened(rounded(value / (1 + __expf(-value)))) * widened(b.at[i]));
    }
    *(eight *)(out + at) = made;
}
}
