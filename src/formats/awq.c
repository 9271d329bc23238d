#include "awq.h"

#include "bits.h"

#include <math.h>

/* Code of row `row` (of n) and column `col` (of k) in some storage of the weight. */
typedef uint32_t (*code_at)(const ql_matrix *storage, int64_t row, int64_t col);

/* Word `word` of the GEMM storage's row `col`, for n rows of the weight. */
static inline uint32_t gather_word(code_at at, const ql_matrix *storage, int64_t n, int64_t col, int64_t word) {
    uint32_t packed = 0;
    int64_t first = word * QL_AWQ_NIBBLES;
    int64_t last = n - first < QL_AWQ_NIBBLES ? n : first + QL_AWQ_NIBBLES;
    for (int64_t row = first; row < last; row++) packed |= at(storage, row, col) << 4 * ql_awq_nibble(row);
    return packed;
}

static inline void gather(int32_t *packed, code_at at, const ql_matrix *storage, int64_t n, int64_t begin,
                          int64_t end) {
    int64_t words = ql_awq_words(n);
    for (int64_t col = begin; col < end; col++)
        for (int64_t word = 0; word < words; word++)
            packed[col * words + word] = (int32_t)gather_word(at, storage, n, col, word);
}

static uint32_t plain_code(const ql_matrix *codes, int64_t row, int64_t col) { return ql_matrix_u8(codes, col, row); }

void ql_awq_pack(int32_t *packed, const ql_matrix *codes, int64_t begin, int64_t end) {
    gather(packed, plain_code, codes, codes->cols, begin, end);
}

void ql_awq_unpack(uint8_t *codes, int64_t n, const ql_matrix *packed, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        for (int64_t col = 0; col < n; col++) {
            uint32_t word = (uint32_t)ql_matrix_i32(packed, row, col / QL_AWQ_NIBBLES);
            codes[row * n + col] = (uint8_t)(word >> 4 * ql_awq_nibble(col) & 15u);
        }
    }
}

/* Quantizes columns [first, last) of one row of the weight, adding each code to its word. */
static void quantize_group(int32_t *qweight, int32_t *qzero, uint16_t *scale_out, const ql_matrix *weight, int64_t row,
                           int64_t first, int64_t last) {
    int64_t words = ql_awq_words(weight->rows);
    int shift = 4 * ql_awq_nibble(row);
    float low = ql_matrix_f32(weight, row, first), high = low;
    for (int64_t col = first + 1; col < last; col++) {
        float value = ql_matrix_f32(weight, row, col);
        /* A NaN compares false with everything: taken once, it stays, and the scale tells of it. */
        if (value < low || isnan(value)) low = value;
        if (value > high || isnan(value)) high = value;
    }
    float range = high - low;
    float scale = (range < 1e-5f ? 1e-5f : range) / (float)QL_AWQ_MAX;
    uint32_t zero = ql_code_from_f32(-rintf(low / scale), QL_AWQ_MAX);
    float scale_zero = (float)zero * scale;
    float stored_scale = ql_f32_from_f16(ql_f16_from_f32(scale));
    *scale_out = ql_f16_from_f32(scale);
    *qzero = (int32_t)((uint32_t)*qzero | zero << shift);
    for (int64_t col = first; col < last; col++) {
        float code = rintf((ql_matrix_f32(weight, row, col) + scale_zero) / stored_scale);
        int32_t *word = &qweight[col * words + row / QL_AWQ_NIBBLES];
        *word = (int32_t)((uint32_t)*word | ql_code_from_f32(code, QL_AWQ_MAX) << shift);
    }
}

void ql_awq_quantize(int32_t *qweight, int32_t *qzeros, uint16_t *scales, const ql_matrix *weight, int64_t group_size,
                     int64_t begin, int64_t end) {
    int64_t n = weight->rows, k = weight->cols;
    int64_t words = ql_awq_words(n), groups = ql_group_count(k, group_size);
    for (int64_t word = begin; word < end; word++) {
        int64_t last_row = n - word * QL_AWQ_NIBBLES < QL_AWQ_NIBBLES ? n : (word + 1) * QL_AWQ_NIBBLES;
        for (int64_t group = 0; group < groups; group++) {
            int64_t first = group * group_size;
            int64_t last = k - first < group_size ? k : first + group_size;
            for (int64_t col = first; col < last; col++) qweight[col * words + word] = 0;
            qzeros[group * words + word] = 0;
            for (int64_t row = word * QL_AWQ_NIBBLES; row < last_row; row++)
                quantize_group(qweight, &qzeros[group * words + word], &scales[group * n + row], weight, row, first,
                               last);
        }
    }
}

static uint32_t gemv_code(const ql_matrix *gemv, int64_t row, int64_t col) {
    return (uint32_t)ql_matrix_i32(gemv, row, col / 8) >> 4 * (col % 8) & 15u;
}

/* Eight words of eight rows, one of each, are eight words of eight columns: a matrix of nibbles that is transposed, by
 * halves of 4, 2 and 1. */
static void turn_eight(int32_t *qweight, const ql_matrix *gemv, int64_t words, int64_t col, int64_t word) {
    static const uint32_t low[] = {0, 0x0f0f0f0fu, 0x00ff00ffu, 0, 0x0000ffffu};
    uint32_t eight[QL_AWQ_NIBBLES];
    for (int64_t row = 0; row < QL_AWQ_NIBBLES; row++)
        eight[ql_awq_nibble(row)] = (uint32_t)ql_matrix_i32(gemv, word * QL_AWQ_NIBBLES + row, col / QL_AWQ_NIBBLES);
    for (int half = 4; half > 0; half /= 2) {
        for (int i = 0; i < QL_AWQ_NIBBLES; i++) {
            if (i & half) continue;
            uint32_t changed = (eight[i] >> 4 * half ^ eight[i + half]) & low[half];
            eight[i + half] ^= changed;
            eight[i] ^= changed << 4 * half;
        }
    }
    for (int64_t i = 0; i < QL_AWQ_NIBBLES; i++) qweight[(col + i) * words + word] = (int32_t)eight[i];
}

void ql_awq_from_gemv_codes(int32_t *qweight, const ql_matrix *gemv, int64_t begin, int64_t end) {
    int64_t words = ql_awq_words(gemv->rows), whole = gemv->rows % QL_AWQ_NIBBLES ? begin : end;
    int64_t col = begin;
    for (; col < whole && (col % QL_AWQ_NIBBLES || whole - col < QL_AWQ_NIBBLES); col++)
        gather(qweight, gemv_code, gemv, gemv->rows, col, col + 1);
    /* By squares of 16 words, a cache line of each row and each column: rows lie so far apart that lines met again only
     * after a whole row are no longer there. */
    while (whole - col >= QL_AWQ_NIBBLES) {
        int64_t eights = (whole - col) / QL_AWQ_NIBBLES, last = col + QL_AWQ_NIBBLES * (eights < 16 ? eights : 16);
        for (int64_t first = 0; first < words; first += 16)
            for (int64_t at = col; at < last; at += QL_AWQ_NIBBLES)
                for (int64_t word = first; word < words && word < first + 16; word++)
                    turn_eight(qweight, gemv, words, at, word);
        col = last;
    }
    gather(qweight, gemv_code, gemv, gemv->rows, col, end);
}

void ql_awq_from_gemv_zeros(int32_t *qzeros, const ql_matrix *gemv, int64_t begin, int64_t end) {
    gather(qzeros, gemv_code, gemv, gemv->rows, begin, end);
}

static uint32_t gemv_fast_code(const ql_matrix *fast, int64_t row, int64_t col) {
    int64_t position = col / 64 * 64 + row % 4 * 16 + col % 64 / 32 * 8 + col % 8 / 2 * 2 + col % 2;
    const int16_t *words = fast->data;
    uint16_t word = (uint16_t)words[row / 4 * fast->row_stride + position * fast->col_stride];
    return (uint32_t)word >> 4 * (col % 32 / 8) & 15u;
}

void ql_awq_from_gemv_fast_codes(int32_t *qweight, const ql_matrix *fast, int64_t begin, int64_t end) {
    gather(qweight, gemv_fast_code, fast, fast->rows * 4, begin, end);
}

static uint32_t marlin_code(const ql_matrix *marlin, int64_t row, int64_t col) {
    int64_t word = row / 64 * 128 + row % 8 * 16 + col % 8 / 2 * 4 + row % 64 / 16;
    int64_t nibble = col % 2 * 4 + row % 16 / 8 * 2 + col % 16 / 8;
    return (uint32_t)ql_matrix_i32(marlin, col / 16, word) >> 4 * nibble & 15u;
}

void ql_awq_from_marlin_codes(int32_t *qweight, const ql_matrix *marlin, int64_t begin, int64_t end) {
    gather(qweight, marlin_code, marlin, marlin->cols / 2, begin, end);
}

int64_t ql_awq_marlin_scale_column(int64_t column, int64_t groups) {
    if (groups > 1) return column / 64 * 64 + column % 8 * 8 + column % 64 / 8;
    return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}
