/* EETQ's int8 weight: one scale an output channel, and bytes interleaved in the order that its kernels read.
 *
 * A checkpoint's `weight` is declared int8 [K, N] (K = in_features, N = out_features), but its bytes are tiled:
 * channels go in pairs of 2K bytes, a pair in tiles of 64 inputs, a tile is the 64 bytes of the even channel and then
 * those of the odd one, and each 16 inputs lie in the order 0, 8, 1, 9, ... 7, 15. A byte is the code plus 128. Hence
 * K % 64 == 0 and N % 2 == 0. This is the layout of files written on sm_75 to sm_89, the only ones there are.
 *
 * The quantizer, per output channel, in fp32: m = max |w|, s = m / 128 (128, not 127), q = w / s rounded half away from
 * zero and clamped to [-128, 127], so that +m becomes 127 and -m becomes -128. Division is by s itself; what is stored
 * is s rounded to scales_dtype. What follows from the format:
 *   - a zero channel has 0 / 0 everywhere: q = 127, with scale 0;
 *   - an fp16 scale below 2^-25 (m < 2^-18) is stored as 0, and the channel is lost though its codes are not.
 * A channel with NaN or infinity in it has no meaning in the format; it gets scale NaN (and q = 127), so that what was
 * not finite cannot come out as a finite number. */
#ifndef QL_FORMATS_EETQ_H
#define QL_FORMATS_EETQ_H

#include "run.h"

enum { QL_EETQ_TILE = 64 }; /* inputs that a tile holds of each of two channels */

/* Where code [k, n] lies, of a weight with `in_features` inputs. */
static inline int64_t ql_eetq_offset(int64_t k, int64_t n, int64_t in_features) {
    return (n >> 1) * 2 * in_features + (k >> 6) * 128 + (n & 1) * 64 + (k & 48) + ((k & 7) << 1 | (k >> 3 & 1));
}

/* Each function below does one range of its work, touches no other output, and may run beside other ranges. */

/* Quantizes the channels of pairs [pair_begin, pair_end) into packed (the [K, N] bytes) and scales [N].
 * source: [N, K] of a float dtype. */
void ql_eetq_quantize(uint8_t *packed, void *scales, ql_dtype scales_dtype, const ql_matrix *source, int64_t pair_begin,
                      int64_t pair_end);

/* Quantizes channels [row_begin, row_end) into plain codes, [K, N] row-major; any K and N. */
void ql_eetq_codes(int8_t *codes, void *scales, ql_dtype scales_dtype, const ql_matrix *source, int64_t row_begin,
                   int64_t row_end);

/* Codes [K, N], in_stride and out_stride elements apart along K and N, to the packed bytes of pairs [begin, end). */
void ql_eetq_pack(uint8_t *packed, const int8_t *codes, int64_t in_stride, int64_t out_stride, int64_t in_features,
                  int64_t pair_begin, int64_t pair_end);

/* The inverse: codes [K, N] row-major. */
void ql_eetq_unpack(int8_t *codes, const uint8_t *packed, int64_t in_features, int64_t out_features, int64_t pair_begin,
                    int64_t pair_end);

#endif
