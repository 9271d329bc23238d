/* bitsandbytes' 4-bit codes, NF4 and FP4.
 *
 * A tensor is flattened row-major and cut into blocks of `blocksize` values, a power of two of at least 32; the last block
 * may be short. Of a block, in fp32: absmax = max |x|, xn = x * (1 / absmax), and the code of xn is decided as
 * bitsandbytes decides on CUDA: strictly above a threshold is the upper code, so a tie takes the lower magnitude's code
 * (NF4: the lower code). Value 2i is the high nibble of byte i, value 2i + 1 the low one; the nibble left over by an odd
 * count is the code of 0. A block's value is code * absmax, one fp32 product.
 *
 * A block of zeros has absmax 0, so xn = 0 * infinity = NaN, above no threshold: code 0, which absmax 0 makes (-)0 again.
 * NaN makes absmax NaN, and the block's values NaN. An infinity makes absmax infinite and its block's values infinite or
 * NaN: nothing that was not finite comes out as a finite number. */
#ifndef QL_FORMATS_FOURBIT_H
#define QL_FORMATS_FOURBIT_H

#include "values.h"

typedef enum ql_fourbit_type { QL_NF4, QL_FP4 } ql_fourbit_type;

/* The 16 values, by bit pattern: NF4's ascend, FP4's are 0 and 7 magnitudes in no order and then their negatives. FP4's
 * 8 is 0, as in the code that checkpoints carry. */
const float *ql_fourbit_code(ql_fourbit_type type);

/* The thresholds between neighbouring values, ascending: NF4's 15, and the 7 of FP4's magnitudes. */
const float *ql_fourbit_thresholds(ql_fourbit_type type, int *count);

/* Blocks [block_begin, block_end) of `count` values: packed [(count + 1) / 2], absmax [blocks]. */
void ql_fourbit_quantize(uint8_t *packed, float *absmax, const ql_values *x, int64_t count, int64_t blocksize,
                         ql_fourbit_type type, int64_t block_begin, int64_t block_end);

/* The inverse for any code of 16 values: out [count] in fp32, fp16 or bf16, rounded once. */
void ql_fourbit_dequantize(void *out, ql_dtype dtype, const uint8_t *packed, const float *absmax, const float *code,
                           int64_t count, int64_t blocksize, int64_t block_begin, int64_t block_end);

#endif
