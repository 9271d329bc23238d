/* The read floor: kernels that do nothing but read `count` 16-byte words once, `batch` loads of a thread in flight. */
extern "C" {

static __device__ __forceinline__ uint4 load_once(const uint4 *from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

/* Blocks go over the words together, batch * blockDim.x of them at a time. What was read has to reach a store, or the
 * compiler drops the loads: `never` is written where all bits of a thread's words cancel, which random words do not. */
static __device__ __forceinline__ void read_words(const uint4 *words, long long count, unsigned *never, int batch) {
    unsigned sum = 0x9e3779b9u;
    long long each = (long long)batch * blockDim.x;
    for (long long first = blockIdx.x * each; first < count; first += gridDim.x * each) {
        uint4 value[16];
#pragma unroll
        for (int i = 0; i < batch; i++) {
            long long at = first + (long long)i * blockDim.x + threadIdx.x;
            value[i] = at < count ? load_once(words + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < batch; i++) sum ^= value[i].x ^ value[i].y ^ value[i].z ^ value[i].w;
    }
    if (sum == 0) *never = 1;
}

#define DEFINE_READER(batch)                                                                                           \
    __global__ void __launch_bounds__(512) read_##batch(const uint4 *words, long long count, unsigned *never) {        \
        read_words(words, count, never, batch);                                                                        \
    }
DEFINE_READER(4)
DEFINE_READER(8)
DEFINE_READER(16)
}
