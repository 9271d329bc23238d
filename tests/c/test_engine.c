/* The CPU engine against its own definition: ql_weight_at in double, over odd shapes, formats, dtypes and numbers of rows.
 * Prints the first differences and exits with 1 where there is one. The instruction set comes from QLINEAR_CPU_ISA. */
#include "../../src/cpu/engine.h"
#include "../../src/cpu/threads.h"
#include "../../src/formats/fp8.h"
#include "../../src/formats/int8.h"
#include "../../src/formats/number.h"

#include <stdio.h>
#include <stdlib.h>

static int failures, checks;

static uint64_t state = 88172645463325252u;
static uint32_t random_bits(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}
static float random_float(void) { return (float)(int32_t)random_bits() * 0x1p-31f; }

/* Exactly `size` bytes, so that a sanitizer sees each read beyond them. */
static void *random_bytes(int64_t size) {
    uint8_t *bytes = malloc(size ? (size_t)size : 1);
    for (int64_t i = 0; i < size; i++) bytes[i] = (uint8_t)random_bits();
    return bytes;
}

static void *random_array(ql_dtype dtype, int64_t count, float least, float most) {
    void *array = malloc(count ? (size_t)count * ql_dtype_size(dtype) : 1);
    for (int64_t i = 0; i < count; i++)
        ql_f32_store(array, dtype, i, least + (most - least) * (0.5f + 0.5f * random_float()));
    return array;
}

/* ---- weights ---- */

static void *owned[16];
static int owned_count;
static void *own(void *memory) { return owned[owned_count++] = memory; }
static void free_owned(void) {
    while (owned_count) free(owned[--owned_count]);
}

static ql_weight make_gptq(int64_t n, int64_t k, int bits, int64_t group_size, ql_dtype scales, bool act_order) {
    int64_t groups = (k + group_size - 1) / group_size;
    int32_t *g_idx = NULL;
    if (act_order) {
        g_idx = own(malloc((size_t)k * sizeof *g_idx));
        for (int64_t i = 0; i < k; i++) g_idx[i] = (int32_t)(random_bits() % (uint32_t)groups);
    }
    return (ql_weight){.format = QL_FORMAT_GPTQ,
                       .n = n,
                       .k = k,
                       .gptq = {.qweight = own(random_bytes((k * bits + 31) / 32 * n * 4)),
                                .qzeros = own(random_bytes((n * bits + 31) / 32 * groups * 4)),
                                .scales = own(random_array(scales, groups * n, 0.001f, 0.02f)),
                                .g_idx = g_idx,
                                .scales_dtype = scales,
                                .bits = bits,
                                .zero_offset = (int)(random_bits() & 1),
                                .group_size = group_size,
                                .groups = groups}};
}

static ql_weight make_awq(int64_t n, int64_t k, int64_t group_size, ql_dtype scales, bool products) {
    int64_t groups = (k + group_size - 1) / group_size;
    return (ql_weight){.format = QL_FORMAT_AWQ,
                       .n = n,
                       .k = k,
                       .awq = {.qweight = own(random_bytes((n + 7) / 8 * k * 4)),
                               .qzeros = products ? NULL : own(random_bytes((n + 7) / 8 * groups * 4)),
                               .scales = own(random_array(scales, groups * n, 0.001f, 0.02f)),
                               .zero_products = products ? own(random_array(scales, groups * n, -0.2f, 0.0f)) : NULL,
                               .scales_dtype = scales,
                               .group_size = group_size,
                               .groups = groups}};
}

static ql_weight make_eetq(int64_t n, int64_t k, ql_dtype scales) {
    return (ql_weight){.format = QL_FORMAT_EETQ,
                       .n = n,
                       .k = k,
                       .eetq = {own(random_bytes(n * k)), own(random_array(scales, n, 0.001f, 0.01f)), scales}};
}

static ql_weight make_int8(int64_t n, int64_t k, float threshold) {
    return (ql_weight){.format = QL_FORMAT_INT8,
                       .n = n,
                       .k = k,
                       .int8 = {own(random_bytes(n * k)), own(random_array(QL_F32, n, 0.1f, 2.0f)), threshold}};
}

static ql_weight make_fourbit(int64_t n, int64_t k, int64_t blocksize, bool nested) {
    int64_t blocks = (n * k + blocksize - 1) / blocksize;
    return (ql_weight){
        .format = QL_FORMAT_FOURBIT,
        .n = n,
        .k = k,
        .fourbit = {.packed = own(random_bytes((n * k + 1) / 2)),
                    .code = own(random_array(QL_F32, 16, -1.0f, 1.0f)),
                    .absmax = own(random_array(QL_F32, nested ? (blocks + 255) / 256 : blocks, 0.1f, 1.0f)),
                    .nested = nested ? own(random_bytes(blocks)) : NULL,
                    .nested_code = nested ? own(random_array(QL_F32, 256, -1.0f, 1.0f)) : NULL,
                    .offset = nested ? 0.3f : 0.0f,
                    .blocksize = blocksize,
                    .nested_blocksize = 256}};
}

static ql_weight make_fp8(int64_t n, int64_t k, int64_t block_n, int64_t block_k, ql_fp8_activation activation,
                          bool transposed) {
    uint8_t *bytes = own(random_bytes(n * k));
    for (int64_t i = 0; i < n * k; i++)
        if ((bytes[i] & 0x7f) == 0x7f) bytes[i] ^= 1;
    int64_t across = (k + block_k - 1) / block_k;
    return (ql_weight){.format = QL_FORMAT_FP8,
                       .n = n,
                       .k = k,
                       .fp8 = {.weight = bytes,
                               .row_stride = transposed ? 1 : k,
                               .col_stride = transposed ? n : 1,
                               .scale = own(random_array(QL_F32, (n + block_n - 1) / block_n * across, 0.001f, 0.01f)),
                               .block_n = block_n,
                               .block_k = block_k,
                               .scale_stride = across,
                               .activation = activation,
                               .input_scale = 0.01f,
                               .input_upper_bound = activation == QL_FP8_TOKEN ? 0.9f : INFINITY}};
}

/* ---- checks ---- */

static void fail(const char *what, const char *name, ql_dtype dtype, const ql_weight *w, int64_t m, int64_t i,
                 int64_t j, double got, double want, double bound) {
    if (failures++ < 40)
        printf("%s %s %s m=%lld n=%lld k=%lld [%lld][%lld]: %.9g, not %.9g (+- %.3g)\n", name, what,
               ql_dtype_name(dtype), (long long)m, (long long)w->n, (long long)w->k, (long long)i, (long long)j, got,
               want, bound);
}

static double half_ulp(ql_dtype dtype, double value) {
    double step = dtype == QL_F32 ? 0x1p-24 : dtype == QL_F16 ? 0x1p-11 : 0x1p-8;
    double least = dtype == QL_F32 ? 0x1p-150 : dtype == QL_F16 ? 0x1p-25 : 0x1p-134;
    return fabs(value) * step + least;
}

/* What the format makes of a row of x: value[col] to multiply W with, and whether outlier columns leave the codes. */
static void quantized_row(double *value, const ql_weight *w, const float *x, const float *all, int64_t m) {
    int64_t k = w->k;
    for (int64_t c = 0; c < k; c++) value[c] = x[c];
    if (w->format == QL_FORMAT_INT8) {
        int8_t *codes = malloc((size_t)k + 1);
        float absmax;
        ql_int8_quantize_row(codes, &absmax, x, k, w->int8.threshold);
        for (int64_t c = 0; c < k; c++) {
            bool outlier = false;
            for (int64_t i = 0; i < m; i++)
                outlier |= w->int8.threshold > 0 && fabsf(all[i * k + c]) >= w->int8.threshold;
            value[c] = outlier ? (double)x[c] : (double)codes[c] * absmax / 127.0;
        }
        free(codes);
        return;
    }
    if (w->format != QL_FORMAT_FP8 || w->fp8.activation == QL_FP8_NONE) return;
    uint8_t *codes = malloc((size_t)k + 1);
    int64_t step = w->fp8.activation == QL_FP8_GROUP ? 128 : k;
    for (int64_t c = 0; c < k; c += step) {
        int64_t count = k - c < step ? k - c : step;
        float scale = w->fp8.input_scale;
        if (w->fp8.activation == QL_FP8_TENSOR) scale = ql_fp8_scale(ql_fp8_absmax(all, m * k));
        if (w->fp8.activation == QL_FP8_TOKEN)
            scale = ql_fp8_token_scale(ql_fp8_absmax(x, k), w->fp8.input_upper_bound);
        if (w->fp8.activation == QL_FP8_GROUP) scale = ql_fp8_scale(ql_fp8_absmax(x + c, count));
        ql_fp8_quantize_row(codes, x + c, count, scale,
                            w->fp8.activation == QL_FP8_STATIC || w->fp8.activation == QL_FP8_TENSOR);
        for (int64_t i = 0; i < count; i++) value[c + i] = (double)ql_f32_from_e4m3(codes[i]) * scale;
    }
    free(codes);
}

/* sums[j] += sum_i x[i] * W[i][j] and sizes[j] += sum_i |x[i] * W[i][j]|, a row of W at a time, so that no sum waits for
 * itself: nearly all of the time goes here. */
static void add_products(double *restrict sums, double *restrict sizes, const double *restrict x,
                         const double *restrict W, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++, W += cols) {
        const double factor = x[i];
        for (int64_t j = 0; j < cols; j++) {
            double term = factor * W[j];
            sums[j] += term;
            sizes[j] += fabs(term);
        }
    }
}

static double *doubles(int64_t count) { return calloc((size_t)count + 1, sizeof(double)); }

static void check(const char *name, const ql_weight *w, const int64_t *ms, int m_count) {
    static const ql_dtype dtypes[] = {QL_F32, QL_F16, QL_BF16};
    const int64_t n = w->n, k = w->k;
    double *dense = doubles(n * k), *turned = doubles(n * k), *sums = doubles(n + k), *sizes = doubles(n + k);
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < k; c++) turned[c * n + i] = dense[i * k + c] = ql_weight_at(w, i, c);
    float *bias = random_array(QL_F32, n, -1.0f, 1.0f);
    for (int d = 0; d < 3; d++) {
        ql_dtype dtype = dtypes[d];
        void *flat = malloc((size_t)(n * k + 1) * ql_dtype_size(dtype)), *want = malloc(sizeof(double));
        if (ql_cpu_dequantize(flat, dtype, w)) fail("dequantize", name, dtype, w, 0, 0, 0, -1, 0, 0);
        for (int64_t i = 0; i < n * k; i++, checks++) {
            size_t size = ql_dtype_size(dtype);
            ql_f32_store(want, dtype, 0, (float)dense[i]);
            if (memcmp(want, (char *)flat + (size_t)i * size, size) != 0)
                fail("dequantize", name, dtype, w, 0, i / k, i % k, ql_f32_load(flat, dtype, i), dense[i], 0);
        }
        free(flat);
        free(want);
        for (int mi = 0; mi < m_count; mi++) {
            int64_t m = ms[mi], stride = k + (mi % 3);
            void *x = random_array(dtype, m * stride, -1.0f, 1.0f);
            /* Small numbers, whose products are denormal: nothing may be flushed. */
            const bool small = mi % 4 == 0 && dtype != QL_F16;
            for (int64_t i = 0; small && i < m * stride; i++)
                ql_f32_store(x, dtype, i, ql_f32_load(x, dtype, i) * 0x1p-122f);
            /* Or spread over many powers of two, up to the largest significand. */
            for (int64_t i = 0; mi % 4 == 1 && i < m * stride; i++) {
                int32_t power = 126 - (int32_t)(random_bits() % (i / 64 % 3 == 0 ? 4 : i / 64 % 3 == 1 ? 24 : 40));
                ql_f32_store(x, dtype, i, ql_f32_load(x, dtype, i) * ql_f32_from_bits((uint32_t)power << 23));
                if (i % 61 == 0) ql_f32_store(x, dtype, i, i % 2 ? 1.9921875f : -1.9921875f);
            }
            float *xf = malloc((size_t)(m * k + 1) * sizeof *xf);
            for (int64_t i = 0; i < m; i++)
                for (int64_t c = 0; c < k; c++) xf[i * k + c] = ql_f32_load(x, dtype, i * stride + c);
            void *out = malloc((size_t)(m * n + 1) * ql_dtype_size(dtype));
            const float *added = mi % 2 ? bias : NULL;
            if (ql_cpu_linear(out, x, stride, dtype, m, w, added)) fail("linear", name, dtype, w, m, 0, 0, -1, 0, 0);
            double *value = doubles(n + k);
            for (int64_t i = 0; i < m; i++) {
                quantized_row(value, w, xf + i * k, xf, m);
                for (int64_t j = 0; j < n; j++) {
                    sums[j] = added ? added[j] : 0;
                    sizes[j] = fabs(sums[j]);
                }
                add_products(sums, sizes, value, turned, k, n);
                for (int64_t j = 0; j < n; j++, checks++) {
                    const double sum = sums[j], size = sizes[j];
                    double bound = size * 0x1p-24 * (12 + (double)k / 32) + half_ulp(dtype, sum);
                    bound += (double)k * 0x1p-149;
                    if (dtype == QL_BF16) bound += size * 0x1p-8; /* W may be rounded to bf16 */
                    double got = ql_f32_load(out, dtype, i * n + j);
                    if (!(fabs(got - sum) <= bound)) fail("linear", name, dtype, w, m, i, j, got, sum, bound);
                }
            }
            free(out);
            free(x);
            free(xf);

            void *g = random_array(dtype, m * (n + 1), -1.0f, 1.0f);
            out = malloc((size_t)(m * k + 1) * ql_dtype_size(dtype));
            if (ql_cpu_linear_grad(out, g, n + 1, dtype, m, w)) fail("grad", name, dtype, w, m, 0, 0, -1, 0, 0);
            for (int64_t i = 0; i < m; i++) {
                for (int64_t j = 0; j < n; j++) value[j] = ql_f32_load(g, dtype, i * (n + 1) + j);
                for (int64_t c = 0; c < k; c++) sums[c] = sizes[c] = 0;
                add_products(sums, sizes, value, dense, n, k);
                for (int64_t c = 0; c < k; c++, checks++) {
                    const double sum = sums[c],
                                 bound = sizes[c] * 0x1p-24 * (12 + (double)n / 32) + half_ulp(dtype, sum);
                    double got = ql_f32_load(out, dtype, i * k + c);
                    if (!(fabs(got - sum) <= bound)) fail("grad", name, dtype, w, m, i, c, got, sum, bound);
                }
            }
            free(value);
            free(g);
            free(out);
        }
    }
    /* A NaN in x is a NaN in its row, and in no other. */
    if (n && k && !(w->format == QL_FORMAT_FP8 && w->fp8.activation == QL_FP8_TENSOR)) {
        for (int64_t m = 2; m <= 9; m += 7) {
            float *x = random_array(QL_F32, m * k, -1.0f, 1.0f), *out = malloc((size_t)(m * n) * sizeof *out);
            x[(m - 1) * k + k - 1] = NAN;
            ql_cpu_linear(out, x, k, QL_F32, m, w, bias);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++, checks++)
                    if (isnan(out[i * n + j]) != (i == m - 1))
                        fail("nan", name, QL_F32, w, m, i, j, out[i * n + j], 0, 0);
            for (int64_t i = 0; i < m * k; i++) x[i] = 0;
            ql_cpu_linear(out, x, k, QL_F32, m, w, bias);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++, checks++)
                    if (out[i * n + j] != bias[j]) fail("zero", name, QL_F32, w, m, i, j, out[i * n + j], bias[j], 0);
            free(x);
            free(out);
        }
    }
    free(bias);
    free(dense);
    free(turned);
    free(sums);
    free(sizes);
    free_owned();
}

int main(int argc, char **argv) {
    const bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    static const int64_t few[] = {0, 1, 3, 7, 17, 18}, many[] = {0, 1, 2, 3, 4, 5, 7, 8, 17, 64, 130};
    const int64_t *ms = quick ? few : many;
    const int m_count = quick ? 6 : 11;
    static const struct {
        int64_t n, k;
    } shapes[] = {{1, 1}, {3, 5}, {17, 40}, {40, 129}, {130, 64}, {200, 320}, {64, 300}, {9, 515}};
    char name[96];
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t n = shapes[s].n, k = shapes[s].k;
        static const int bits[] = {2, 3, 4, 8};
        static const ql_dtype scales[] = {QL_F16, QL_BF16, QL_F32};
        static const int64_t groups[] = {128, 32, 64, 7, 1 << 20};
        for (int b = 0; b < 4; b++)
            for (int g = 0; g < 5; g++) {
                int64_t group = groups[g] > k ? k : groups[g];
                ql_dtype dtype = scales[(b + g) % 3];
                snprintf(name, sizeof name, "gptq bits=%d group=%lld scales=%s", bits[b], (long long)group,
                         ql_dtype_name(dtype));
                ql_weight w = make_gptq(n, k, bits[b], group, dtype, false);
                check(name, &w, ms, m_count);
                if (g % 2) continue;
                snprintf(name, sizeof name, "gptq act-order bits=%d group=%lld", bits[b], (long long)group);
                w = make_gptq(n, k, bits[b], group, dtype, true);
                check(name, &w, ms, m_count);
            }
        for (int g = 0; g < 5; g++)
            for (int products = 0; products < 2; products++) {
                snprintf(name, sizeof name, "awq group=%lld products=%d", (long long)groups[g], products);
                ql_weight w = make_awq(n, k, groups[g] > k ? k : groups[g], scales[g % 3], products);
                check(name, &w, ms, m_count);
            }
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "eetq scales=%s", ql_dtype_name(scales[i]));
            ql_weight w = make_eetq((n + 1) / 2 * 2, (k + 63) / 64 * 64, scales[i]);
            check(name, &w, ms, m_count);
            float threshold = (float)i * 0.49f;
            snprintf(name, sizeof name, "int8 threshold=%g", (double)threshold);
            w = make_int8(n, k, threshold);
            check(name, &w, ms, m_count);
        }
        for (int64_t blocksize = 32; blocksize <= 4096; blocksize *= blocksize == 64 ? 8 : 2)
            for (int nested = 0; nested < 2; nested++) {
                snprintf(name, sizeof name, "fourbit blocksize=%lld nested=%d", (long long)blocksize, nested);
                ql_weight w = make_fourbit(n, k, blocksize, nested);
                check(name, &w, ms, m_count);
            }
        for (int a = 0; a < 5; a++) {
            static const int64_t blocks[4][2] = {{1 << 20, 1 << 20}, {1, 1 << 20}, {128, 128}, {24, 48}};
            for (int b = 0; b < 4; b++) {
                snprintf(name, sizeof name, "fp8 activation=%d block=%lldx%lld", a, (long long)blocks[b][0],
                         (long long)blocks[b][1]);
                ql_weight w = make_fp8(n, k, blocks[b][0] > n ? n : blocks[b][0], blocks[b][1] > k ? k : blocks[b][1],
                                       (ql_fp8_activation)a, b == 1 && a % 2);
                check(name, &w, ms, m_count);
            }
        }
    }
    printf("%s, %d threads of %s: %d checks, %d failures\n", ql_cpu_isa(), ql_cpu_thread_count(),
           ql_cpu_thread_runtime(), checks, failures);
    return failures != 0;
}
