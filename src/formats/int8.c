#include "int8.h"

enum { RUN = 256 }; /* values that are read as fp32 at a time: no row needs a buffer of its own length */

/* Magnitudes are compared as bits (ql_magnitude_bits): outliers are those in [limit, infinity]; NaN is above. */
static int32_t outlier_limit(float threshold) { return threshold > 0.0f ? ql_magnitude_bits(threshold) : INT32_MAX; }

static inline bool is_outlier(int32_t magnitude, int32_t limit) {
    return magnitude >= limit && magnitude <= 0x7f800000;
}

static int32_t run_most(int32_t most, const float *x, int64_t count, int32_t limit) {
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = ql_magnitude_bits(x[i]);
        int32_t counted = is_outlier(magnitude, limit) ? 0 : magnitude;
        most = counted > most ? counted : most;
    }
    return most;
}

/* What a row's values are multiplied by, in two steps that are one wherever 127 / absmax is finite. */
typedef struct row_factor {
    float lift, factor;
} row_factor;

/* False where all codes are 0: absmax is 0 or not finite. */
static bool row_factor_of(row_factor *row, float absmax) {
    if (!(absmax > 0.0f && isfinite(absmax))) return false;
    row->lift = absmax < 0x1p-100f ? 0x1p100f : 1.0f;
    row->factor = 127.0f / (absmax * row->lift);
    return true;
}

/* Adding 1.5 * 2^23 leaves the sum's last place at 1: the addition itself rounds half to even, and the low bits are the
 * integer. An outlier's product may be anything, so it is chosen away before that. */
static void run_codes(int8_t *codes, const float *x, int64_t count, int32_t limit, row_factor row) {
    for (int64_t i = 0; i < count; i++) {
        float inlier = is_outlier(ql_magnitude_bits(x[i]), limit) ? 0.0f : x[i];
        float shifted = inlier * row.lift * row.factor + 0x1.8p23f;
        codes[i] = (int8_t)((int32_t)ql_bits_from_f32(shifted) - 0x4b400000);
    }
}

void ql_int8_quantize_row(int8_t *codes, float *absmax, const float *x, int64_t k, float threshold) {
    int32_t limit = outlier_limit(threshold);
    row_factor row;
    *absmax = ql_f32_from_bits((uint32_t)run_most(0, x, k, limit));
    if (row_factor_of(&row, *absmax))
        run_codes(codes, x, k, limit, row);
    else
        for (int64_t i = 0; i < k; i++) codes[i] = 0; /* codes may be NULL where k is 0 */
}

static void quantize_strided_row(int8_t *codes, float *absmax, const ql_matrix *source, float threshold,
                                 int64_t index) {
    float run[RUN];
    int64_t k = source->cols;
    int32_t limit = outlier_limit(threshold), most = 0;
    for (int64_t col = 0; col < k; col += RUN) {
        int64_t count = k - col < RUN ? k - col : RUN;
        ql_matrix_run(run, source, index, col, count);
        most = run_most(most, run, count, limit);
    }
    row_factor row;
    *absmax = ql_f32_from_bits((uint32_t)most);
    if (!row_factor_of(&row, *absmax)) {
        for (int64_t i = 0; i < k; i++) codes[i] = 0; /* codes may be NULL where k is 0 */
        return;
    }
    for (int64_t col = 0; col < k; col += RUN) {
        int64_t count = k - col < RUN ? k - col : RUN;
        ql_matrix_run(run, source, index, col, count);
        run_codes(codes + col, run, count, limit, row);
    }
}

void ql_int8_quantize_rows(int8_t *codes, float *absmax, const ql_matrix *source, float threshold, int64_t row_begin,
                           int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row++)
        quantize_strided_row(codes + row * source->cols, absmax + row, source, threshold, row);
}

void ql_int8_find_outliers(bool *outlier, const ql_matrix *source, float threshold, int64_t col_begin,
                           int64_t col_end) {
    float run[RUN];
    int32_t limit = outlier_limit(threshold);
    memset(outlier + col_begin, 0, (size_t)(col_end - col_begin) * sizeof *outlier);
    for (int64_t col = col_begin; col < col_end; col += RUN) {
        int64_t count = col_end - col < RUN ? col_end - col : RUN;
        for (int64_t row = 0; row < source->rows; row++) {
            ql_matrix_run(run, source, row, col, count);
            for (int64_t i = 0; i < count; i++) outlier[col + i] |= is_outlier(ql_magnitude_bits(run[i]), limit);
        }
    }
}

void ql_int8_zero_columns(int8_t *codes, int64_t k, const int64_t *columns, int64_t count, int64_t row_begin,
                          int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row++)
        for (int64_t i = 0; i < count; i++) codes[row * k + columns[i]] = 0;
}
