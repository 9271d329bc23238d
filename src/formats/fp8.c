#include "fp8.h"

#include "values.h"

enum { RUN = 256 };

float ql_fp8_token_scale(float absmax, float upper_bound) {
    /* Comparisons with NaN are false: written so that NaN falls through, which fminf and fmaxf would drop. */
    float bounded = absmax > upper_bound ? upper_bound : absmax;
    float scale = bounded / QL_E4M3_MAX;
    float least = 1.0f / (QL_E4M3_MAX * 512.0f);
    return scale < least ? least : scale;
}

float ql_fp8_scale(float absmax) {
    float scale = absmax / QL_E4M3_MAX;
    return scale == 0.0f ? 1.0f : scale;
}

float ql_fp8_absmax(const float *x, int64_t k) { return ql_f32_from_bits((uint32_t)ql_run_magnitude(0, x, k)); }

static void encode_products(uint8_t *codes, const float *x, int64_t k, float factor) {
    for (int64_t i = 0; i < k; i++) codes[i] = ql_e4m3_from_f32(x[i] * factor);
}

static void encode_quotients(uint8_t *codes, const float *x, int64_t k, float scale) {
    for (int64_t i = 0; i < k; i++) codes[i] = ql_e4m3_from_f32(x[i] / scale);
}

void ql_fp8_quantize_row(uint8_t *codes, const float *x, int64_t k, float scale, bool reciprocal) {
    float inverse = 1.0f / scale;
    if (scale == 0.0f)
        encode_products(codes, x, k, 0.0f);
    else if (reciprocal && isfinite(inverse))
        encode_products(codes, x, k, inverse);
    else
        encode_quotients(codes, x, k, scale);
}

static int32_t matrix_magnitude(int32_t most, const ql_matrix *x, int64_t row, int64_t col, int64_t count) {
    float run[RUN];
    for (int64_t done = 0; done < count; done += RUN) {
        int64_t length = count - done < RUN ? count - done : RUN;
        ql_matrix_run(run, x, row, col + done, length);
        most = ql_run_magnitude(most, run, length);
    }
    return most;
}

static void encode_run(uint8_t *codes, const ql_matrix *x, int64_t row, int64_t col, int64_t count, float scale,
                       bool reciprocal) {
    float run[RUN];
    for (int64_t done = 0; done < count; done += RUN) {
        int64_t length = count - done < RUN ? count - done : RUN;
        ql_matrix_run(run, x, row, col + done, length);
        ql_fp8_quantize_row(codes + row * x->cols + col + done, run, length, scale, reciprocal);
    }
}

void ql_fp8_absmax_rows(float *absmax, const ql_matrix *x, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row++)
        absmax[row] = ql_f32_from_bits((uint32_t)matrix_magnitude(0, x, row, 0, x->cols));
}

void ql_fp8_quantize_rows(uint8_t *codes, const ql_matrix *x, const float *scales, int64_t scale_stride,
                          bool reciprocal, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row++)
        encode_run(codes, x, row, 0, x->cols, scales[row * scale_stride], reciprocal);
}

void ql_fp8_quantize_blocks(uint8_t *codes, float *scales, const ql_matrix *x, int64_t block_rows, int64_t block_begin,
                            int64_t block_end) {
    int64_t across = ql_group_count(x->cols, QL_FP8_GROUP_SIZE);
    for (int64_t block = block_begin; block < block_end; block++) {
        int64_t row_begin = block * block_rows;
        int64_t row_end = x->rows - row_begin < block_rows ? x->rows : row_begin + block_rows;
        for (int64_t group = 0; group < across; group++) {
            int64_t col = group * QL_FP8_GROUP_SIZE;
            int64_t count = x->cols - col < QL_FP8_GROUP_SIZE ? x->cols - col : QL_FP8_GROUP_SIZE;
            int32_t most = 0;
            for (int64_t row = row_begin; row < row_end; row++) most = matrix_magnitude(most, x, row, col, count);
            float scale = ql_fp8_scale(ql_f32_from_bits((uint32_t)most));
            scales[block * across + group] = scale;
            for (int64_t row = row_begin; row < row_end; row++) encode_run(codes, x, row, col, count, scale, false);
        }
    }
}
