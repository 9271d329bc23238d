/* What lies between a Llama block's linear layers, in fp16 with sums in fp32. Every kernel waits for the one before it by
 * itself and lets the next one start at once, so that launches overlap and a layer may fetch weights meanwhile. */
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

/* x [rows, n] += delta where that is not null; out = x / rms(x) * weight. One block a row, 8 values a thread (twice that
 * at most), n a multiple of 8. */
__global__ void __launch_bounds__(1024)
    add_norm(half_bits *out, half_bits *x, const half_bits *delta, const half_bits *weight, int n, float eps) {
    __shared__ float shared[32];
    begin();
    half_bits *row = x + (long long)blockIdx.x * n;
    float kept[2][8], squares = 0;
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8) {
        eight own = *(const eight *)(row + at);
        if (delta) {
            eight more = *(const eight *)(delta + (long long)blockIdx.x * n + at);
            for (int i = 0; i < 8; i++) own.at[i] = rounded(widened(own.at[i]) + widened(more.at[i]));
            *(eight *)(row + at) = own;
        }
        for (int i = 0; i < 8; i++) {
            kept[part][i] = widened(own.at[i]);
            squares += kept[part][i] * kept[part][i];
        }
    }
    const float factor = rsqrtf(sum_of_block(squares, shared) / (float)n + eps);
    for (int part = 0, at = threadIdx.x * 8; part < 2 && at < n; part++, at += blockDim.x * 8) {
        eight scale = *(const eight *)(weight + at), made;
        for (int i = 0; i < 8; i++)
            made.at[i] = rounded(widened(rounded(kept[part][i] * factor)) * widened(scale.at[i]));
        *(eight *)(out + (long long)blockIdx.x * n + at) = made;
    }
}

/* qkv [batch, tokens, heads + 2 * kv_heads, 2 * half_dim] -> q [batch, heads, tokens, 2 * half_dim], turned, and keys, turned,
 * and values into caches [batch, kv_heads, capacity, 2 * half_dim] at first[0] + token. turns [capacity, half_dim, 2]: cosine,
 * sine. One block a head of a token, half_dim threads. */
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

/* out [batch, 1, heads, 128]: attention of one new token, q [batch, heads, 1, 128], to the caches up to last[0] and with
 * it. One block a head of a batch: a warp takes every warps-th key, four values a lane, and keeps the running maximum,
 * sum and average that are put together at the end. */
__global__ void __launch_bounds__(256)
    attend(half_bits *out, const half_bits *q, const half_bits *keys, const half_bits *values, const long long *last,
           int heads, int kv_heads, int capacity, float scale) {
    __shared__ float greatest[8], sums[8], averages[8][128];
    begin();
    const int head = (int)blockIdx.x, batch = (int)blockIdx.y, warp = (int)threadIdx.x / 32,
              lane = (int)threadIdx.x % 32;
    const long long cache = ((long long)batch * kv_heads + head / (heads / kv_heads)) * capacity * 128 + lane * 4;
    const half_bits *own = q + ((long long)batch * heads + head) * 128 + lane * 4;
    float query[4], average[4] = {0, 0, 0, 0}, most = -1e30f, sum = 0;
    for (int i = 0; i < 4; i++) query[i] = widened(own[i]) * scale;
    const int count = (int)last[0] + 1;
    for (int first = warp; first < count; first += 8 * 4) {
        float score[4], value[4][4];
        for (int j = 0; j < 4; j++) {
            const int at = first + 8 * j;
            const long long offset = cache + (long long)(at < count ? at : first) * 128;
            const ushort4 key = *(const ushort4 *)(keys + offset), held = *(const ushort4 *)(values + offset);
            score[j] = query[0] * widened(key.x) + query[1] * widened(key.y) + query[2] * widened(key.z) +
                       query[3] * widened(key.w);
            value[j][0] = widened(held.x), value[j][1] = widened(held.y);
            value[j][2] = widened(held.z), value[j][3] = widened(held.w);
        }
        for (int step = 16; step; step >>= 1)
            for (int j = 0; j < 4; j++) score[j] += __shfl_xor_sync(~0u, score[j], step);
        float now = most;
        for (int j = 0; j < 4; j++) {
            if (first + 8 * j >= count) score[j] = -1e30f;
            now = fmaxf(now, score[j]);
        }
        const float shrink = __expf(most - now);
        sum *= shrink;
        for (int i = 0; i < 4; i++) average[i] *= shrink;
        for (int j = 0; j < 4; j++) {
            const float share = first + 8 * j < count ? __expf(score[j] - now) : 0;
            sum += share;
            for (int i = 0; i < 4; i++) average[i] += share * value[j][i];
        }
        most = now;
    }
    if (lane == 0) greatest[warp] = most, sums[warp] = sum;
    for (int i = 0; i < 4; i++) averages[warp][lane * 4 + i] = average[i];
    __syncthreads();
    if (threadIdx.x >= 128) return;
    for (int i = 0; i < 8; i++) most = fmaxf(i ? most : greatest[0], greatest[i]);
    float total = 0, made = 0;
    for (int i = 0; i < 8; i++) {
        const float share = __expf(greatest[i] - most);
        total += sums[i] * share;
        made += averages[i][threadIdx.x] * share;
    }
    out[((long long)batch * heads + head) * 128 + threadIdx.x] = rounded(made / total);
}

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
