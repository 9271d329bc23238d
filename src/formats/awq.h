/* AWQ's storages, 4 bit: the quantizer, the packing of the GEMM storage, and exact conversions of the others to it.
 *
 * GEMM storage: qweight int32 [k, words], qzeros int32 [groups, words], scales [groups, n] with words = ceil(n / 8);
 * column 8c + j of a row is nibble inv[j] of word c, inv = {0, 4, 1, 5, 2, 6, 3, 7}. W[row][col] = (q - z) * s with the
 * true zero. Nibbles past column n are 0.
 *
 * The functions work on the ranges that they are given and write disjoint words for disjoint ranges. */
#ifndef QL_FORMATS_AWQ_H
#define QL_FORMATS_AWQ_H

#include "matrix.h"

#include <stdint.h>

enum { QL_AWQ_NIBBLES = 8, QL_AWQ_MAX = 15 };

/* Words of a row of n codes. */
static inline int64_t ql_awq_words(int64_t n) { return n / QL_AWQ_NIBBLES + (n % QL_AWQ_NIBBLES != 0); }

/* The nibble of its word that a column lies in. */
static inline int ql_awq_nibble(int64_t column) {
    int j = (int)(column % QL_AWQ_NIBBLES);
    return j / 2 + j % 2 * 4;
}

/* packed [rows, words] from codes uint8 [rows, n], none above 15; rows [begin, end). */
void ql_awq_pack(int32_t *packed, const ql_matrix *codes, int64_t begin, int64_t end);

/* codes [rows, n] from packed int32 [rows, words]; rows [begin, end). */
void ql_awq_unpack(uint8_t *codes, int64_t n, const ql_matrix *packed, int64_t begin, int64_t end);

/* qweight [k, words], qzeros [groups, words] and fp16 scales [groups, n] from weight, floats [n, k]; words [begin, end) of
 * each. Per group in fp32: s = max(max - min, 1e-5) / 15, z = clamp(-round_half_even(min / s), 0, 15),
 * q = clamp(round_half_even((w + z * s) / fp16(s)), 0, 15). The range need not include 0: AWQ's rule, under which a group
 * of one sign far from 0 saturates. */
void ql_awq_quantize(int32_t *qweight, int32_t *qzeros, uint16_t *scales, const ql_matrix *weight, int64_t group_size,
                     int64_t begin, int64_t end);

/* ---- codes of other storages, to rows [begin, end) of the GEMM storage's qweight [k, words] ---- */

/* GEMV: qweight int32 [n, k / 8], column 8c + j in nibble j of word c. */
void ql_awq_from_gemv_codes(int32_t *qweight, const ql_matrix *gemv, int64_t begin, int64_t end);

/* GEMVFast: qweight int16 [n / 4, k], k a multiple of 64, four rows interleaved in blocks of 64 columns. */
void ql_awq_from_gemv_fast_codes(int32_t *qweight, const ql_matrix *fast, int64_t begin, int64_t end);

/* Marlin: qweight int32 [k / 16, 2n], n a multiple of 64, in tiles of 16 x 64; its zero is 8 everywhere. */
void ql_awq_from_marlin_codes(int32_t *qweight, const ql_matrix *marlin, int64_t begin, int64_t end);

/* ---- their parameters ---- */

/* qzeros [groups, words] from GEMV's int32 [n, >= ceil(groups / 8)], group 8c + j in nibble j of word c. */
void ql_awq_from_gemv_zeros(int32_t *qzeros, const ql_matrix *gemv, int64_t begin, int64_t end);

/* Element (group, column) of Marlin's scales is stored in row `group` at this column: permuted inside each 64 columns
 * where there are several groups, inside each 32 where there is one. */
int64_t ql_awq_marlin_scale_column(int64_t column, int64_t groups);

#endif
