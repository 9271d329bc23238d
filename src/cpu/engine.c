/* What comes before the kernels: the choice of instruction set, activations as fp32, their quantization where the format
 * quantizes them, and blocks of rows, so that no call's scratch grows with its number of rows. */
#include "engine.h"

#include "../formats/fp8.h"
#include "../formats/int8.h"
#include "../formats/number.h"
#include "kernels.h"
#include "threads.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { ROW_BLOCK = 256, CODE_ALIGNMENT = 64 };

/* ---- the instruction set ---- */

static const ql_kernels *kernels;
static const char *isa_name;
static bool has_bf16;
static pthread_once_t isa_chosen = PTHREAD_ONCE_INIT;

static bool has_avx512(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
    return false;
#endif
}

static bool has_avx512_bf16(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

static bool has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

/* A wish that the processor cannot fulfil, or that names nothing, gives the best; ql_cpu_isa shows it. */
static void choose_isa(void) {
    const char *wish = getenv("QLINEAR_CPU_ISA");
    bool plain = wish && strcmp(wish, "plain") == 0, avx2 = wish && strcmp(wish, "avx2") == 0;
    if (!plain && !(avx2 && has_avx2()) && has_avx512()) {
        kernels = ql_kernels_avx512();
        has_bf16 = has_avx512_bf16();
        isa_name = has_bf16 ? "avx512+vnni+bf16" : "avx512+vnni";
    } else if (!plain && has_avx2()) {
        kernels = ql_kernels_avx2();
        isa_name = "avx2";
    } else {
        kernels = ql_kernels_plain();
        isa_name = "plain";
    }
}

const char *ql_cpu_isa(void) {
    pthread_once(&isa_chosen, choose_isa);
    return isa_name;
}

/* ---- activations ---- */

/* One call's x, read a row at a time by parallel loops over rows. */
typedef struct rows {
    const void *x;
    int64_t x_stride;
    ql_dtype dtype;
    int64_t k;
    int64_t first; /* the row that the outputs below begin with */
    float *values; /* [rows][k]: x, or the values of its codes */
    /* of FP8 */
    const ql_fp8 *fp8;
    float *scales; /* [rows] */
    float tensor_scale;
    uint16_t *pairs;     /* [rows][k]: the codes' values in bf16, which holds them exactly; `values` is scratch then */
    int64_t groups;      /* of QL_FP8_GROUP_SIZE columns in a row */
    float *group_scales; /* [rows][groups], where activations have one a group */
    uint16_t bf16_of[256]; /* of e4m3 */
    /* of INT8 */
    const ql_int8 *int8;
    int8_t *codes; /* [rows][codes_stride] */
    int64_t codes_stride;
    const int64_t *columns;
    int64_t column_count;
    float *outliers; /* [rows][column_count] */
    bool single;     /* the call has one row */
} rows;

static const void *row_of(const rows *all, int64_t row) {
    return (const char *)all->x + (all->first + row) * all->x_stride * (int64_t)ql_dtype_size(all->dtype);
}

static void convert_rows(void *context, int64_t begin, int64_t end) {
    const rows *all = context;
    for (int64_t i = begin; i < end; i++) kernels->to_f32(all->values + i * all->k, row_of(all, i), all->dtype, all->k);
}

/* values[i] = e4m3(codes[i]) * scale */
static void codes_as_floats(float *values, const uint8_t *codes, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i++) values[i] = ql_f32_from_e4m3(codes[i]) * scale;
}

static float fp8_row_scale(const rows *all, const float *values) {
    if (all->fp8->activation != QL_FP8_TOKEN) return all->tensor_scale;
    return ql_fp8_token_scale(ql_fp8_absmax(values, all->k), all->fp8->input_upper_bound);
}

/* Replaces `values`, which hold x, by the values of their codes; scales of rows and tensors are left to the sums. */
static void quantize_fp8_rows(void *context, int64_t begin, int64_t end) {
    const rows *all = context;
    const bool by_group = all->fp8->activation == QL_FP8_GROUP, by_token = all->fp8->activation == QL_FP8_TOKEN;
    uint8_t codes[1024];
    convert_rows(context, begin, end);
    for (int64_t i = begin; i < end; i++) {
        float *values = all->values + i * all->k;
        float scale = by_group ? 1.0f : fp8_row_scale(all, values);
        all->scales[i] = scale;
        int64_t step = by_group ? QL_FP8_GROUP_SIZE : (int64_t)sizeof codes;
        for (int64_t col = 0; col < all->k; col += step) {
            int64_t count = all->k - col < step ? all->k - col : step;
            if (by_group) scale = ql_fp8_scale(ql_fp8_absmax(values + col, count));
            ql_fp8_quantize_row(codes, values + col, count, scale, !by_token && !by_group);
            codes_as_floats(values + col, codes, count, by_group ? scale : 1.0f);
        }
    }
}

/* As quantize_fp8_rows, the codes' values into `pairs`; scales of groups are left to the sums, too. */
static void quantize_fp8_pairs(void *context, int64_t begin, int64_t end) {
    const rows *all = context;
    const bool by_group = all->fp8->activation == QL_FP8_GROUP, by_token = all->fp8->activation == QL_FP8_TOKEN;
    uint8_t codes[QL_FP8_GROUP_SIZE];
    convert_rows(context, begin, end);
    for (int64_t i = begin; i < end; i++) {
        const float *values = all->values + i * all->k;
        uint16_t *pairs = all->pairs + i * all->k;
        float scale = by_group ? 1.0f : fp8_row_scale(all, values), *group_scale = all->group_scales + i * all->groups;
        all->scales[i] = scale;
        for (int64_t col = 0; col < all->k; col += QL_FP8_GROUP_SIZE) {
            int64_t count = all->k - col < QL_FP8_GROUP_SIZE ? all->k - col : QL_FP8_GROUP_SIZE;
            if (by_group) *group_scale++ = scale = ql_fp8_scale(ql_fp8_absmax(values + col, count));
            ql_fp8_quantize_row(codes, values + col, count, scale, !by_token && !by_group);
            for (int64_t j = 0; j < count; j++) pairs[col + j] = all->bf16_of[codes[j]];
        }
    }
}

static void quantize_int8_rows(void *context, int64_t begin, int64_t end) {
    const rows *all = context;
    convert_rows(context, begin, end);
    for (int64_t i = begin; i < end; i++) {
        const float *values = all->values + i * all->k;
        int8_t *codes = all->codes + i * all->codes_stride;
        ql_int8_quantize_row(codes, all->scales + i, values, all->k, all->int8->threshold);
        for (int64_t j = 0; j < all->column_count; j++) {
            all->outliers[i * all->column_count + j] = values[all->columns[j]];
            if (!all->single) codes[all->columns[j]] = 0;
        }
    }
}

/* ---- products ---- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void *output_row(void *out, ql_dtype dtype, int64_t row, int64_t columns) {
    return (char *)out + row * columns * (int64_t)ql_dtype_size(dtype);
}

/* NaN where any value of x is. */
static int tensor_absmax(float *absmax, const rows *all, int64_t m) {
    float *row = malloc((size_t)(all->k + 1) * sizeof *row);
    if (!row) return -1;
    *absmax = 0;
    for (int64_t i = 0; i < m; i++) {
        kernels->to_f32(row, row_of(all, i), all->dtype, all->k);
        float most = ql_fp8_absmax(row, all->k);
        if (!(most <= *absmax) && !isnan(*absmax)) *absmax = most; /* NaN comes in, and stays */
    }
    free(row);
    return 0;
}

static bool quantizes_to_fp8(const ql_weight *weight) {
    return weight->format == QL_FORMAT_FP8 && weight->fp8.activation != QL_FP8_NONE;
}

/* The product with fp32 values of x, `columns` of them a row, through `kernel`. */
static int float_product(int (*kernel)(const ql_product *), ql_product *product, rows *all, int64_t m, int64_t columns,
                         bool quantize) {
    void *out = product->out;
    int64_t block = least(m, ROW_BLOCK);
    bool in_place = all->dtype == QL_F32 && !quantize;
    float *memory = NULL;
    if (!in_place) {
        memory = malloc((size_t)(block * (all->k + 1)) * sizeof *memory);
        if (!memory) return -1;
        all->values = memory;
        all->scales = memory + block * all->k;
        product->x_stride = all->k;
        product->row_scale = quantize ? all->scales : NULL;
    }
    int status = 0;
    for (int64_t row = 0; row < m && !status; row += block) {
        all->first = row;
        product->m = least(block, m - row);
        product->out = output_row(out, product->dtype, row, columns);
        product->x = in_place ? row_of(all, 0) : memory;
        int64_t grain = 1 + (1 << 16) / (all->k + 1);
        if (!in_place) ql_cpu_parallel(product->m, grain, quantize ? quantize_fp8_rows : convert_rows, all);
        status = kernel(product);
    }
    free(memory);
    return status;
}

/* Whether a product of bf16 pairs is quicker, and as good. */
static bool suits_bf16(const rows *all, int64_t m, const ql_weight *weight) {
    if (!has_bf16 || all->dtype != QL_BF16 || all->k % 2 || !kernels->bf16_suits(weight, m)) return false;
    const uint32_t least = ql_bf16_from_f32(BF16_LEAST);
    for (int64_t i = 0; i < m; i++) {
        const uint16_t *x = row_of(all, i);
        uint32_t small = 0;
        for (int64_t col = 0; col < all->k; col++) {
            uint32_t magnitude = x[col] & 0x7fffu;
            small |= (magnitude - 1 < least - 1); /* zero wraps to the top */
        }
        if (small) return false;
    }
    return true;
}

/* The product with FP8's quantized activations as pairs of bf16: `m` rows, few. */
static int fp8_pairs_product(ql_product *product, rows *all, int64_t m) {
    all->groups = (all->k + QL_FP8_GROUP_SIZE - 1) / QL_FP8_GROUP_SIZE;
    float *memory = malloc((size_t)(m * (all->k + 1 + all->groups)) * sizeof *memory);
    uint16_t *pairs = malloc((size_t)(m * all->k) * sizeof *pairs);
    int status = memory && pairs ? 0 : -1;
    if (!status) {
        all->values = memory;
        all->scales = memory + m * all->k;
        all->group_scales = all->scales + m;
        all->pairs = pairs;
        for (int code = 0; code < 256; code++) all->bf16_of[code] = ql_bf16_from_f32(ql_f32_from_e4m3((uint8_t)code));
        ql_cpu_parallel(m, 1 + (1 << 16) / (all->k + 1), quantize_fp8_pairs, all);
        product->m = m;
        product->x_bf16 = pairs;
        product->x_stride = all->k;
        product->row_scale = all->scales;
        product->group_scales = all->fp8->activation == QL_FP8_GROUP ? all->group_scales : NULL;
        status = kernels->bf16_linear(product);
    }
    free(memory);
    free(pairs);
    return status;
}

/* The columns in which a magnitude of x reaches the threshold; *columns is the caller's to free. */
static int find_outliers(int64_t **columns, int64_t *count, const rows *all, int64_t m) {
    *columns = NULL;
    *count = 0;
    float threshold = all->int8->threshold;
    if (!(threshold > 0)) return 0;
    float *row = malloc((size_t)(all->k + 1) * sizeof *row);
    bool *found = calloc((size_t)all->k + 1, sizeof *found);
    if (row && found) {
        for (int64_t i = 0; i < m; i++) {
            kernels->to_f32(row, row_of(all, i), all->dtype, all->k);
            for (int64_t col = 0; col < all->k; col++) found[col] |= fabsf(row[col]) >= threshold;
        }
        for (int64_t col = 0; col < all->k; col++) *count += found[col];
        *columns = malloc((size_t)(*count + 1) * sizeof **columns);
        for (int64_t col = 0, at = 0; *columns && col < all->k; col++)
            if (found[col]) (*columns)[at++] = col;
    }
    free(row);
    free(found);
    return *columns ? 0 : -1;
}

static int int8_product(void *out, rows *all, int64_t m, const ql_weight *weight, const float *bias) {
    int64_t *columns, block = least(m, ROW_BLOCK), k = all->k;
    if (find_outliers(&columns, &all->column_count, all, m)) return -1;
    all->columns = columns;
    all->single = m == 1;
    all->codes_stride = (k + CODE_ALIGNMENT - 1) / CODE_ALIGNMENT * CODE_ALIGNMENT;
    all->values = malloc((size_t)(block * (k + 1 + all->column_count)) * sizeof(float));
    all->codes = calloc((size_t)(block * all->codes_stride) + 1, 1);
    int status = all->values && all->codes ? 0 : -1;
    if (!status) {
        all->scales = all->values + block * k;
        all->outliers = all->scales + block;
    }
    for (int64_t row = 0; row < m && !status; row += block) {
        all->first = row;
        ql_int8_product product = {.out = output_row(out, all->dtype, row, weight->n),
                                   .dtype = all->dtype,
                                   .m = least(block, m - row),
                                   .codes = all->codes,
                                   .codes_stride = all->codes_stride,
                                   .x_absmax = all->scales,
                                   .columns = columns,
                                   .outliers = all->outliers,
                                   .outlier_count = all->column_count,
                                   .bias = bias,
                                   .weight = weight};
        ql_cpu_parallel(product.m, 1 + (1 << 16) / (k + 1), quantize_int8_rows, all);
        status = kernels->int8_linear(&product);
    }
    free(columns);
    free(all->values);
    free(all->codes);
    return status;
}

int ql_cpu_linear(void *out, const void *x, int64_t x_stride, ql_dtype dtype, int64_t m, const ql_weight *weight,
                  const float *bias) {
    pthread_once(&isa_chosen, choose_isa);
    if (m == 0 || weight->n == 0) return 0;
    rows all = {.x = x, .x_stride = x_stride, .dtype = dtype, .k = weight->k};
    if (weight->format == QL_FORMAT_INT8) {
        all.int8 = &weight->int8;
        return int8_product(out, &all, m, weight, bias);
    }
    ql_product product = {.out = out, .dtype = dtype, .x_stride = x_stride, .bias = bias, .weight = weight};
    if (quantizes_to_fp8(weight)) {
        all.fp8 = &weight->fp8;
        all.tensor_scale = weight->fp8.input_scale;
        if (weight->fp8.activation == QL_FP8_TENSOR) {
            float absmax;
            if (tensor_absmax(&absmax, &all, m)) return -1;
            all.tensor_scale = ql_fp8_scale(absmax);
        }
    }
    if (quantizes_to_fp8(weight) && has_bf16 && m <= BF16_FUSED_ROWS && kernels->bf16_suits(weight, m))
        return fp8_pairs_product(&product, &all, m);
    if (!quantizes_to_fp8(weight) && suits_bf16(&all, m, weight)) {
        product.m = m;
        product.x_bf16 = x;
        return kernels->bf16_linear(&product);
    }
    return float_product(kernels->linear, &product, &all, m, weight->n, quantizes_to_fp8(weight));
}

int ql_cpu_linear_grad(void *out, const void *g, int64_t g_stride, ql_dtype dtype, int64_t m, const ql_weight *weight) {
    pthread_once(&isa_chosen, choose_isa);
    if (m == 0 || weight->k == 0) return 0;
    rows all = {.x = g, .x_stride = g_stride, .dtype = dtype, .k = weight->n};
    ql_product product = {.out = out, .dtype = dtype, .x_stride = g_stride, .weight = weight};
    return float_product(kernels->grad, &product, &all, m, weight->k, false);
}

int ql_cpu_dequantize(void *out, ql_dtype dtype, const ql_weight *weight) {
    pthread_once(&isa_chosen, choose_isa);
    if (weight->n == 0 || weight->k == 0) return 0;
    return kernels->dequantize(out, dtype, weight);
}
