/* 8-bit activations by 8-bit weights: what the kernels that quantize activations leave for those that multiply. Plain C
 * for the host and the device.
 *
 * With codes read as e4m3 or as int8 and g = col / 128,
 *
 *   e4m3: out[m][row] = sum over g of (sum over col in g of x_codes[m][col] * codes[row][col])
 *                           * x_scales[m * x_token_stride + g * x_group_stride]
 *                           * w_scales[row / w_rows * w_row_stride + g * w_group_stride]
 *                       + bias[row]
 *   int8: out[m][row] = ((float)(sum over col of x_codes[m][col] * codes[row][col]) * (1 / 127) * x_scales[m]
 *                        + outlier[m][row]) * (w_scales[row] * (1 / 127)) + bias[row], factors in this order
 *
 * Sums are fp32 and int32; scales of int8 are the rows' absmax. The columns that `outliers` marks count in all rows by the
 * original activations, and no longer by their codes, which need not be zero there:
 *
 *   outlier[m][row] = sum over marked col of (x[m][col] - x_codes[m][col] * (x_scales[m] * (1 / 127))) * codes[row][col]
 *
 * Overlap: a product may read codes, w_scales and bias before griddepcontrol.wait, everything else after it. Whoever
 * writes weights in the same stream just before must launch without overlap. */
#ifndef QL_KERNELS_W8A8_H
#define QL_KERNELS_W8A8_H

#include <stdint.h>

enum { QL_W8A8_E4M3, QL_W8A8_INT8 };

enum {
    QL_W8A8_GROUP = 128, /* columns that have a scale of their own, and rows of a block of the weight */
    QL_W8A8_PITCH = 128  /* rows of x_codes start at multiples of this */
};

typedef struct ql_w8a8_params {
    void *out;                /* [m, n] contiguous, out_type */
    const uint8_t *x_codes;   /* [m, k], rows x_pitch apart, which are 0 from k on; aligned to QL_W8A8_PITCH */
    const float *x_scales;    /* x_token_stride: 0 or 1; x_group_stride: 0 or a multiple of 4 */
    const uint8_t *codes;     /* [n, k], rows row_stride apart */
    const float *w_scales;    /* any strides */
    const void *bias;         /* [n], bias_stride apart, bias_type, or NULL */
    const uint32_t *outliers; /* bit col % 32 of word col / 32, x_pitch / 32 words and a mark; or NULL: none */
    const void *x;            /* the activations [m, k], rows x_stride apart, x_type: read where outliers are marked */
    int64_t m, n, k, x_pitch, row_stride, x_stride, bias_stride;
    int64_t x_token_stride, x_group_stride, w_row_stride, w_group_stride;
    int64_t w_rows;   /* rows of the weight that share a scale: 1, QL_W8A8_GROUP, or n */
    int32_t promoted; /* e4m3: sums of each 128 columns are added in fp32, not in the tensor cores' accumulators */
    int32_t code;     /* QL_W8A8_E4M3 or QL_W8A8_INT8 */
    int32_t x_type, out_type, bias_type; /* QL_VALUE_* */
} ql_w8a8_params;

#endif
