/* What quantizes the activations of an 8-bit layer takes. Plain C for the host and the device; the formulas are those of
 * formats/fp8.h and formats/int8.h, to the bit. */
#ifndef QL_KERNELS_W8A8_QUANTIZE_H
#define QL_KERNELS_W8A8_QUANTIZE_H

#include "w8a8.h"

/* What has a scale of its own: all of x, by a scale that is given or by its absmax, a row, 128 columns of a row. */
enum { QL_W8A8_STATIC, QL_W8A8_TENSOR, QL_W8A8_TOKEN, QL_W8A8_GROUPS };

/* Threads of a block, at most; runs of eight values that a thread of w8a8_rows.cu holds; the columns of a block that looks for outliers; the most blocks that find the absmax of a
 * tensor together. */
enum { QL_W8A8_ROW_THREADS = 1024, QL_W8A8_ROW_RUNS = 4, QL_W8A8_OUTLIER_COLUMNS = 64, QL_W8A8_TENSOR_BLOCKS = 128 };

/* ql_w8a8_quantize: blocks [0, row_blocks) take rows, or with QL_W8A8_GROUPS groups of 128 columns, those after them
 * QL_W8A8_OUTLIER_COLUMNS columns of the mask each. Blocks of QL_W8A8_TENSOR meet in scratch: block b leaves its absmax and
 * the launch's nonce for each block, which clears what it has read; so scratch may hold anything before.
 *
 * ql_w8a8_rows_*: row_blocks blocks. With a mask there is one before them: it clears the mask and leaves the nonce in its mark,
 * the 8 bytes after it, for which rows that have outliers wait. The product sets the mark to 0, so that the launch may be
 * repeated as it is. */
typedef struct ql_w8a8_quantize_params {
    uint8_t *codes;     /* [m, pitch], 0 from k on */
    float *values;      /* e4m3: [m, k], what the codes stand for, in place of codes; or NULL */
    float *scales;      /* [1]; [m]; groups: [ceil(k / 128), group_stride] */
    uint32_t *outliers; /* [pitch / 32] and a mark, or NULL */
    const void *x;      /* [m, k], rows x_stride apart, x_type */
    uint64_t *marks;    /* [row_blocks, row_blocks] by reader */
    uint32_t *absmax;   /* likewise: bits of a magnitude */
    uint64_t nonce;     /* not 0 */
    int64_t m, k, pitch, x_stride, group_stride;
    int32_t row_blocks, code, mode, x_type;
    int32_t vector;    /* rows of x begin at multiples of 16 bytes */
    float threshold;   /* int8; 0: no outliers */
    float input_scale; /* QL_W8A8_STATIC */
    float upper_bound; /* QL_W8A8_TOKEN */
    float least_scale; /* QL_W8A8_TOKEN */
} ql_w8a8_quantize_params;

#endif
