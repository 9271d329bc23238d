/* The GPTQ family's storage: quantizer, packing, the group index and the two ways to store zeros.
 *
 * Shapes: weight [n, k]; qweight int32 [ceil(k * bits / 32), n], a stream (bits.h) down each column; qzeros int32 [groups,
 * ceil(n * bits / 32)], a stream along each row; scales [groups, n]; g_idx [k]. W[row][col] = (q - z) * scales[g][row] with
 * g = g_idx[col]. Zeros are stored less one modulo 2^bits in v1 ("gptq"), as they are in v2 ("gptq_v2").
 *
 * The functions work on the ranges that they are given and write disjoint words for disjoint ranges, so that callers can
 * split them over threads. bits is 2, 3, 4 or 8 and group_size at least 1 everywhere. */
#ifndef QL_FORMATS_GPTQ_H
#define QL_FORMATS_GPTQ_H

#include "matrix.h"

#include <stdbool.h>
#include <stdint.h>

/* scales and zeros, fp32 [n, groups], for rows [begin, end) by the min-max rule of the GPTQ paper's code: the range of a
 * group includes 0; sym mirrors it (only where the minimum is below 0, as there) and puts the zero at 2^(bits-1); a
 * group of zeros gets the range [-1, 1]; scale = range / (2^bits - 1), zero = round_half_even(-min / scale). A NaN in a
 * group gives NaN. */
void ql_gptq_find_params(float *scales, float *zeros, const ql_matrix *weight, int64_t group_size, int bits, bool sym,
                         int64_t begin, int64_t end);

/* Columns [begin, end) of qweight from the same rows of weight; scales and zeros are floats [n, groups], g_idx is [k] in
 * [0, groups), or NULL for col / group_size. q = round_half_even((w + z * scale) / fp16(scale)) in fp32 with z rounded,
 * both clamped to [0, 2^bits - 1]: z * scale takes the scale as given and the division the one that is stored, as the
 * packers that wrote the checkpoints do. */
void ql_gptq_pack_weight(int32_t *qweight, const ql_matrix *weight, const ql_matrix *scales, const ql_matrix *zeros,
                         const int32_t *g_idx, int64_t group_size, int bits, int64_t begin, int64_t end);

/* Rows [begin, end) of qzeros and of the stored scales, fp16 [groups, n], from floats [n, groups]. zero_offset: 1 for v1,
 * 0 for v2. */
void ql_gptq_pack_params(int32_t *qzeros, uint16_t *stored_scales, const ql_matrix *scales, const ql_matrix *zeros,
                         int bits, int zero_offset, int64_t begin, int64_t end);

/* packed [ceil(rows * bits / 32), cols] from codes uint8 [rows, cols], none above 2^bits - 1; chunks [begin, end) of 32
 * rows of codes. */
void ql_gptq_pack_codes(int32_t *packed, const ql_matrix *codes, int bits, int64_t begin, int64_t end);

/* codes [count, packed->cols] from packed int32 [ceil(count * bits / 32), cols]; chunks as above. */
void ql_gptq_unpack_codes(uint8_t *codes, int64_t count, const ql_matrix *packed, int bits, int64_t begin, int64_t end);

/* stream [rows, cols] from int32 words of the planar layout ("gptq_p"), rows % bits == 0; chunks [begin, end) of `bits`
 * rows. There each 32 codes are split into planes, low bits first (3 = 2 + 1, one plane else), and a chunk holds plane
 * after plane. */
void ql_gptq_unplanar(int32_t *stream, const ql_matrix *planar, int bits, int64_t begin, int64_t end);

/* What a group index says. */
typedef enum ql_g_idx {
    QL_G_IDX_TRIVIAL,     /* col / group_size */
    QL_G_IDX_GENERAL,     /* anything else in range */
    QL_G_IDX_OUT_OF_RANGE /* an entry outside [-groups, groups) */
} ql_g_idx;

/* Reads g_idx, int32 or int64 [k] with the stride, into resolved [k]: negative entries count from the end, as the packers
 * that wrote them index; all zero, where k columns have several groups and the layer has just these, is what old writers
 * left without act-order, so trivial. Where an entry is out of range, *position tells the first. */
ql_g_idx ql_gptq_resolve_g_idx(int32_t *resolved, int64_t *position, const void *g_idx, ql_dtype dtype, int64_t stride,
                               int64_t k, int64_t groups, int64_t group_size);

/* Whether all n fields of every row of qzeros are 2^(bits-1) as stored: a symmetric layer with v2 zeros, whatever its
 * configuration calls them. The padding after field n is not looked at. */
bool ql_gptq_zeros_are_middle(const int32_t *qzeros, int64_t groups, int64_t n, int bits);

#endif
