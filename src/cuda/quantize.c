#include "quantize.h"

#include "../../kernels/params.h"
#include "../../kernels/quantize.h"
#include "../formats/dynamic_map.h"
#include "engine.h"

#include <string.h>

_Static_assert((int)QL_VALUE_F64 == (int)QL_F64, "the kernels number the dtypes as the host does");
_Static_assert((int)QL_SUM_CHUNK == (int)QL_MEAN_CHUNK && (int)QL_SUM_LANES == (int)QL_MEAN_LANES,
               "both add in the same order");
_Static_assert((int)QL_FLAT_NF4 == (int)QL_NF4 && (int)QL_FLAT_FP4 == (int)QL_FP4,
               "the kernels number the codes alike");
_Static_assert((int)QL_RULE_GPTQ == (int)QL_CUDA_GPTQ && (int)QL_RULE_GPTQ_SYMMETRIC == (int)QL_CUDA_GPTQ_SYMMETRIC &&
                   (int)QL_RULE_AWQ == (int)QL_CUDA_AWQ,
               "the kernels number the rules alike");

/* Blocks of kernels that go on by the grid's size: more than any GPU takes at once. */
enum { MOST_BLOCKS = 1 << 16 };

static ql_cuda_grid line(int64_t blocks, int threads) {
    return (ql_cuda_grid){.x = blocks < 1             ? 1
                               : blocks < MOST_BLOCKS ? blocks
                                                      : MOST_BLOCKS,
                          .y = 1,
                          .threads = threads};
}

static ql_cuda_grid plane(int64_t x, int64_t y, int threads) {
    return (ql_cuda_grid){.x = x < 1 ? 1 : x, .y = y < 1 ? 1 : y, .threads = threads};
}

static int run(const ql_cuda_place *place, ql_cuda_kernel kernel, ql_cuda_grid grid, const void *params,
               char message[QL_CUDA_MESSAGE]) {
    return ql_cuda_launch_alone(place, kernel, &grid, params, message);
}

/* A row a block, of as many threads as hold it with four runs each, but no more than `most`: where a row takes 1024 of them
 * only one fits a multiprocessor, and kernels that do much to a value rather read twice. */
static ql_cuda_grid row_grid(const ql_matrix *rows, int most) {
    int threads = 128;
    while (threads < most && (int64_t)threads * 4 * QL_RUN < rows->cols) threads *= 2;
    return line(rows->rows, threads);
}

static bool is_aligned(const void *data, int64_t stride, ql_dtype dtype) {
    return (uintptr_t)data % 16 == 0 && stride * (int64_t)ql_dtype_size(dtype) % 16 == 0;
}

static ql_source source_of(const ql_matrix *rows) {
    return (ql_source){
        .data = rows->data,
        .rows = rows->rows,
        .cols = rows->cols,
        .row_stride = rows->row_stride,
        .type = (int32_t)rows->dtype,
        .vector = is_aligned(rows->data, rows->row_stride, rows->dtype),
    };
}

static ql_strided strided_of(const ql_matrix *matrix) {
    return (ql_strided){matrix->data, matrix->row_stride, matrix->col_stride, (int32_t)matrix->dtype};
}

/* ---- layout ---- */

static int transpose(const ql_cuda_place *place, void *out, const void *from, ql_dtype dtype, const int64_t *shape,
                     const int64_t *stride, char message[QL_CUDA_MESSAGE]) {
    ql_transpose_params p = {.out = out,
                             .from = from,
                             .rows = shape[0],
                             .cols = shape[1],
                             .col_stride = stride[1],
                             .size = (int32_t)ql_dtype_size(dtype)};
    ql_cuda_grid grid =
        plane(ql_ceil_div(p.rows, QL_TRANSPOSE_TILE), ql_ceil_div(p.cols, QL_TRANSPOSE_TILE), QL_QUANTIZE_THREADS);
    return run(place, QL_KERNEL_ql_transpose, grid, &p, message);
}

int ql_cuda_lay_out(const ql_cuda_place *place, void *out, const void *from, ql_dtype dtype, int ndim,
                    const int64_t *shape, const int64_t *stride, char message[QL_CUDA_MESSAGE]) {
    if (ndim == 2 && stride[0] == 1 && dtype != QL_F64)
        return transpose(place, out, from, dtype, shape, stride, message);
    return ql_cuda_copy(place, out, from, dtype, ndim, shape, stride, message);
}

/* ---- a scale a row ---- */

static int row_absmax(const ql_cuda_place *place, float *absmax, const ql_matrix *rows, char message[QL_CUDA_MESSAGE]) {
    ql_activation_params p = {.x = rows->data,
                              .row_absmax = absmax,
                              .m = rows->rows,
                              .k = rows->cols,
                              .x_stride = rows->row_stride,
                              .x_type = (int32_t)rows->dtype};
    return run(place, QL_KERNEL_ql_row_absmax, line(rows->rows, QL_LINEAR_THREADS), &p, message);
}

int ql_cuda_eetq_quantize(const ql_cuda_place *place, uint8_t *packed, void *scales, ql_dtype scales_dtype,
                          const ql_matrix *rows, char message[QL_CUDA_MESSAGE]) {
    ql_rows_params p = {
        .codes = packed, .scales = scales, .source = source_of(rows), .scales_type = (int32_t)scales_dtype};
    return run(place, QL_KERNEL_ql_eetq_quantize, row_grid(rows, QL_ROW_THREADS / 2), &p, message);
}

int ql_cuda_eetq_codes(const ql_cuda_place *place, int8_t *codes, void *scales, ql_dtype scales_dtype,
                       const ql_matrix *rows, float *absmax, char message[QL_CUDA_MESSAGE]) {
    ql_rows_params p = {.codes = codes,
                        .scales = scales,
                        .source = source_of(rows),
                        .row_absmax = absmax,
                        .scales_type = (int32_t)scales_dtype};
    ql_cuda_grid grid =
        plane(ql_ceil_div(rows->cols, QL_EETQ_TILE_IN), ql_ceil_div(rows->rows, QL_EETQ_TILE_OUT), QL_QUANTIZE_THREADS);
    if (row_absmax(place, absmax, rows, message) < 0) return -1;
    return run(place, QL_KERNEL_ql_eetq_codes, grid, &p, message);
}

int ql_cuda_int8_quantize(const ql_cuda_place *place, int8_t *codes, float *absmax, const ql_matrix *rows,
                          float threshold, const uint8_t *outliers, char message[QL_CUDA_MESSAGE]) {
    ql_rows_params p = {
        .codes = codes, .scales = absmax, .source = source_of(rows), .outliers = outliers, .threshold = threshold};
    return run(place, QL_KERNEL_ql_int8_quantize, row_grid(rows, QL_ROW_THREADS), &p, message);
}

int ql_cuda_int8_outliers(const ql_cuda_place *place, uint8_t *outliers, const ql_matrix *rows, float threshold,
                          char message[QL_CUDA_MESSAGE]) {
    ql_activation_params p = {.x = rows->data,
                              .outliers = outliers,
                              .m = rows->rows,
                              .k = rows->cols,
                              .x_stride = rows->row_stride,
                              .x_type = (int32_t)rows->dtype,
                              .threshold = threshold};
    /* This one does not go on by the grid's size. */
    ql_cuda_grid grid = plane(ql_ceil_div(rows->cols, QL_OUTLIER_COLUMNS), 1, QL_LINEAR_THREADS);
    return run(place, QL_KERNEL_ql_find_outliers, grid, &p, message);
}

int ql_cuda_int8_columns(const ql_cuda_place *place, int64_t *columns, const uint8_t *outliers, int64_t cols,
                         char message[QL_CUDA_MESSAGE]) {
    ql_columns_params p = {.columns = columns, .flags = outliers, .count = cols};
    return run(place, QL_KERNEL_ql_list_columns, line(1, QL_ROW_THREADS), &p, message);
}

int ql_cuda_fp8_static(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows,
                       const ql_cuda_number *scale, char message[QL_CUDA_MESSAGE]) {
    ql_rows_params p = {.codes = codes,
                        .scales = scales,
                        .source = source_of(rows),
                        .mode = QL_ROW_STATIC,
                        .given = scale->value,
                        .given_scale = scale->data,
                        .given_type = (int32_t)scale->dtype};
    return run(place, QL_KERNEL_ql_fp8_quantize, row_grid(rows, QL_ROW_THREADS / 2), &p, message);
}

int ql_cuda_fp8_tensor(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows, float *absmax,
                       char message[QL_CUDA_MESSAGE]) {
    ql_rows_params p = {
        .codes = codes, .scales = scales, .source = source_of(rows), .mode = QL_ROW_TENSOR, .row_absmax = absmax};
    /* Each block takes the maximum of all rows first: no more blocks than a GPU has at once. */
    ql_cuda_grid grid = row_grid(rows, QL_ROW_THREADS / 2);
    if (grid.x > 1024) grid.x = 1024;
    if (row_absmax(place, absmax, rows, message) < 0) return -1;
    return run(place, QL_KERNEL_ql_fp8_quantize, grid, &p, message);
}

int ql_cuda_fp8_tokens(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows,
                       const ql_cuda_number *upper_bound, char message[QL_CUDA_MESSAGE]) {
    ql_rows_params p = {.codes = codes,
                        .scales = scales,
                        .source = source_of(rows),
                        .mode = QL_ROW_TOKEN,
                        .bound = upper_bound->value,
                        .upper_bound = upper_bound->data,
                        .bound_type = (int32_t)upper_bound->dtype,
                        .least_scale = 1.0f / (448.0f * 512.0f)};
    return run(place, QL_KERNEL_ql_fp8_quantize, row_grid(rows, QL_ROW_THREADS / 2), &p, message);
}

int ql_cuda_fp8_blocks(const ql_cuda_place *place, uint8_t *codes, float *scales, const ql_matrix *rows,
                       int64_t block_rows, char message[QL_CUDA_MESSAGE]) {
    ql_scaled_blocks_params p = {.codes = codes, .scales = scales, .source = source_of(rows)};
    int64_t across = ql_ceil_div(rows->cols, QL_SCALED_BLOCK);
    if (rows->rows == 0 || rows->cols == 0) return 0;
    if (block_rows == 1) {
        int64_t blocks = ql_ceil_div(rows->rows * across, QL_QUANTIZE_THREADS * QL_RUN / QL_SCALED_BLOCK);
        return run(place, QL_KERNEL_ql_fp8_groups, line(blocks, QL_QUANTIZE_THREADS), &p, message);
    }
    ql_cuda_grid grid = plane(across, ql_ceil_div(rows->rows, QL_SCALED_BLOCK), QL_TILE_THREADS);
    return run(place, QL_KERNEL_ql_fp8_blocks, grid, &p, message);
}

/* ---- blocks of a flat array ---- */

static int shift_of(int64_t blocksize) {
    int shift = 0;
    while (blocksize >> shift > 1) shift++;
    return shift;
}

/* Blocks of threads that encode `count` values at a time, eight a thread: where a block of values is more than a warp
 * takes at once, fewer would do. */
static ql_cuda_grid flat_grid(int64_t count) {
    return line(ql_ceil_div(count, QL_QUANTIZE_THREADS * QL_RUN), QL_QUANTIZE_THREADS);
}

/* The place of x, in [-1, 1], as the kernel computes it. */
static int cell_of(float x) { return (int)(ql_bits_from_f32(x * 32.0f + 0x1.8p23f) - 0x4b400000u) + 32; }

static void fill_cells(ql_cell *cells, ql_fourbit_type type) {
    int count, next = 0;
    const float *threshold = ql_fourbit_thresholds(type, &count);
    for (int place = 0; place < QL_CELLS; place++) {
        bool has_one = next < count && cell_of(threshold[next]) == place;
        cells[place] = (ql_cell){has_one ? threshold[next] : INFINITY, next};
        next += has_one;
    }
}

int ql_cuda_fourbit_quantize(const ql_cuda_place *place, uint8_t *packed, float *absmax, const void *x, ql_dtype dtype,
                             int64_t count, int64_t blocksize, ql_fourbit_type type, char message[QL_CUDA_MESSAGE]) {
    ql_flat_params p = {.out = packed,
                        .absmax = absmax,
                        .in = x,
                        .count = count,
                        .shift = shift_of(blocksize),
                        .type = (int32_t)dtype,
                        .vector = is_aligned(x, 0, dtype),
                        .code = (int32_t)type};
    fill_cells(p.cells, type);
    return count ? run(place, QL_KERNEL_ql_fourbit_quantize, flat_grid(count), &p, message) : 0;
}

int ql_cuda_fourbit_dequantize(const ql_cuda_place *place, void *out, ql_dtype dtype, const uint8_t *packed,
                               const float *absmax, const float *code, int64_t count, int64_t blocksize,
                               char message[QL_CUDA_MESSAGE]) {
    ql_flat_params p = {.out = out,
                        .absmax = (float *)(uintptr_t)absmax,
                        .in = packed,
                        .count = count,
                        .shift = shift_of(blocksize),
                        .type = (int32_t)dtype,
                        .vector = is_aligned(packed, 0, QL_U8),
                        .device_table = code};
    return count ? run(place, QL_KERNEL_ql_fourbit_dequantize, flat_grid(count), &p, message) : 0;
}

int ql_cuda_blockwise_quantize(const ql_cuda_place *place, uint8_t *codes, float *absmax, const void *x, ql_dtype dtype,
                               const float *map, int64_t count, int64_t blocksize, char message[QL_CUDA_MESSAGE]) {
    ql_flat_params p = {.out = codes,
                        .absmax = absmax,
                        .in = x,
                        .count = count,
                        .shift = shift_of(blocksize),
                        .type = (int32_t)dtype,
                        .vector = is_aligned(x, 0, dtype)};
    memcpy(p.map, map, sizeof p.map);
    return count ? run(place, QL_KERNEL_ql_blockwise_quantize, flat_grid(count), &p, message) : 0;
}

int ql_cuda_blockwise_dequantize(const ql_cuda_place *place, void *out, ql_dtype dtype, const uint8_t *codes,
                                 const float *absmax, const float *map, int64_t count, int64_t blocksize,
                                 char message[QL_CUDA_MESSAGE]) {
    ql_flat_params p = {.out = out,
                        .absmax = (float *)(uintptr_t)absmax,
                        .in = codes,
                        .count = count,
                        .shift = shift_of(blocksize),
                        .type = (int32_t)dtype,
                        .vector = is_aligned(codes, 0, QL_U8),
                        .device_table = map};
    return count ? run(place, QL_KERNEL_ql_blockwise_dequantize, flat_grid(count), &p, message) : 0;
}

int ql_cuda_mean(const ql_cuda_place *place, float *mean, double *sums, const float *values, int64_t count,
                 char message[QL_CUDA_MESSAGE]) {
    ql_mean_params p = {.mean = mean, .sums = sums, .values = values, .count = count};
    int64_t chunks = ql_ceil_div(count, QL_SUM_CHUNK);
    /* A block a chunk: this one does not go on by the grid's size. */
    if (chunks && run(place, QL_KERNEL_ql_sum_chunks, plane(chunks, 1, QL_SUM_LANES), &p, message) < 0) return -1;
    return run(place, QL_KERNEL_ql_mean, line(1, QL_SUM_LANES), &p, message);
}

/* ---- parameters by groups of columns ---- */

int ql_cuda_group_params(const ql_cuda_place *place, float *scales, float *zeros, const ql_matrix *rows,
                         int64_t group_size, int bits, ql_cuda_rule rule, char message[QL_CUDA_MESSAGE]) {
    ql_group_params p = {.scales = scales,
                         .zeros = zeros,
                         .source = source_of(rows),
                         .group_size = group_size,
                         .groups = ql_group_count(rows->cols, group_size),
                         .largest = (float)((1 << bits) - 1),
                         .rule = (int32_t)rule};
    /* Runs begin where groups do. */
    if (group_size % QL_RUN) p.source.vector = 0;
    int64_t lanes = group_size > QL_RUN * 16 ? 32 : ql_ceil_div(group_size, QL_RUN);
    int64_t blocks = ql_ceil_div(rows->rows * p.groups * lanes, QL_QUANTIZE_THREADS);
    return blocks ? run(place, QL_KERNEL_ql_find_group_params, line(blocks, QL_QUANTIZE_THREADS), &p, message) : 0;
}

int ql_cuda_encode(const ql_cuda_place *place, int32_t *words, int32_t *zero_words, uint16_t *stored_scales,
                   const ql_cuda_encoding *encoding, char message[QL_CUDA_MESSAGE]) {
    const ql_matrix *rows = &encoding->rows;
    ql_encode_params p = {
        .words = words,
        .zero_words = zero_words,
        .stored_scales = stored_scales,
        .source = source_of(rows),
        .scales = strided_of(&encoding->scales),
        .zeros = strided_of(&encoding->zeros),
        .index = encoding->g_idx,
        .index_stride = encoding->g_idx_stride,
        .index_wide = encoding->g_idx_dtype == QL_I64,
        .group_size = encoding->group_size,
        .groups = ql_group_count(rows->cols, encoding->group_size),
        .bits = encoding->bits,
        .zero_offset = encoding->zero_offset,
        .layout = encoding->is_awq ? QL_WORDS_AWQ : QL_WORDS_GPTQ,
    };
    if (rows->rows == 0 || rows->cols == 0) return 0;
    ql_cuda_grid tiles =
        plane(ql_ceil_div(rows->rows, QL_ENCODE_ROWS), ql_ceil_div(rows->cols, QL_ENCODE_COLS), QL_QUANTIZE_THREADS);
    if (run(place, QL_KERNEL_ql_group_encode, tiles, &p, message) < 0) return -1;
    int64_t blocks = ql_ceil_div(ql_ceil_div(rows->rows, 32) * p.groups, QL_QUANTIZE_THREADS);
    return run(place, QL_KERNEL_ql_group_store, line(blocks, QL_QUANTIZE_THREADS), &p, message);
}
