/* Instructions of sm_90a that CUDA C has no name for: barriers in shared memory, copies that complete on them, what orders
 * them. Products of a warpgroup are in warpgroup.cuh. */
#ifndef QL_KERNELS_HOPPER_CUH
#define QL_KERNELS_HOPPER_CUH

#include "ptx.cuh"

/* ---- barriers in shared memory: `parity` is that of the phase waited for, 0 at first ---- */

static __device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* Makes initialized barriers visible to the copies that complete on them. */
static __device__ __forceinline__ void barrier_init_done(void) {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and lets the phase wait for `bytes` of copies as well. */
static __device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "wait:\n\t"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
                 "@!done bra wait;\n\t"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Whether that phase is over, at once. */
static __device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred done;\n\t"
                 "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, done; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

/* An arrival of this thread once its copies so far (cp_async) are there; one that the phase counts. */
static __device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/* A place in a ring of slots, each with its barriers, and the parity of its turn: 0 where a slot's first phase is waited
 * for, 1 where its first wait is to be none, as for slots that are empty to begin with. */
typedef struct ring {
    int slot;
    uint32_t parity;
} ring;

static __device__ __forceinline__ void advance(ring *r, int slots) {
    if (++r->slot == slots) {
        r->slot = 0;
        r->parity ^= 1;
    }
}

/* True for one lane of the warp, which the compiler knows to be one. */
static __device__ __forceinline__ bool is_elected(void) {
    uint32_t is;
    asm volatile("{ .reg .pred is;\n\telect.sync _|is, 0xffffffff;\n\tselp.u32 %0, 1, 0, is; }" : "=r"(is));
    return is != 0;
}

/* ---- copies into shared memory ---- */

/* `bytes` contiguous bytes, a multiple of 16. */
static __device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* The box of a two-dimensional tensor map whose first element is (row, col); what lies outside becomes zeros. */
static __device__ __forceinline__ void copy_box(uint32_t to, const void *map, int col, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(col), "r"(row), "r"(barrier)
        : "memory");
}

/* As copy_box, of bytes that are read once: they leave the second-level cache before others do. */
static __device__ __forceinline__ void copy_box_once(uint32_t to, const void *map, int col, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(barrier), "l"(EVICT_FIRST)
                 : "memory");
}

/* The same box, or the 32 bytes at an address, into the second-level cache alone: no barrier is needed. */
static __device__ __forceinline__ void prefetch_box(const void *map, int col, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(col), "r"(row)
                 : "memory");
}

static __device__ __forceinline__ void prefetch_sector(const void *from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

static __device__ __forceinline__ void prefetch_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* ---- copies out of shared memory, which a thread counts in groups of its own ---- */

/* The box of a two-dimensional tensor map whose first element is (row, col), without what lies outside. */
static __device__ __forceinline__ void store_box(const void *map, uint32_t from, int col, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col),
                 "r"(row), "r"(from)
                 : "memory");
}

static __device__ __forceinline__ void commit_stores(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Until all but the last `pending` groups have read shared memory. */
#define AWAIT_STORES(pending) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory")

/* ---- what orders stores of threads before what other units read ---- */

/* What threads stored in shared memory is there for products to read, and what they read of it is in their registers before
 * copies write there: an arrival at a barrier does not wait for reads that are on their way. */
static __device__ __forceinline__ void fence_shared(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* What threads of other thread blocks stored, and this one has seen the marks of, is there for bulk copies to read. */
static __device__ __forceinline__ void fence_for_copies(void) {
    asm volatile("fence.acq_rel.gpu;\n\tfence.proxy.async.global;" ::: "memory");
}

/* ---- matrices and registers ---- */

/* Four 8 x 8 matrices of 16-bit values, each lane giving the address of a row. */
static __device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t m[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
                 "r"(m[2]), "r"(m[3])
                 : "memory");
}

/* The same, transposed. */
static __device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t m[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]),
                 "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

/* A warpgroup's registers a thread: a multiple of 8. */
#define WARPGROUP_GIVES_REGISTERS(count) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count))
#define WARPGROUP_TAKES_REGISTERS(count) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count))

#endif
