/* bitsandbytes' 8-bit blockwise quantization: a map of 256 fp32 values, and for each block of a flat tensor an absmax. Its
 * use here is double quantization: the absmax of a 4-bit tensor's blocks, kept in 8 bits.
 *
 * Of a block, in fp32: absmax = max |x|, xn = x * (1 / absmax), the code is the index of the value nearest to xn; a tie
 * between two goes the way of bitsandbytes' search on CUDA (ql_map_search says how). A value is map[code] * absmax.
 * Zeros, NaN and infinities are treated as in fourbit.h: xn of a block of zeros is NaN, its code 0, its values (-)0. */
#ifndef QL_FORMATS_DYNAMIC_MAP_H
#define QL_FORMATS_DYNAMIC_MAP_H

#include "values.h"

enum { QL_MAP_SIZE = 256 };

/* The dynamic map of bitsandbytes' create_dynamic_map, ascending, to the bit: decades 10^(i - max_exponent_bits + 1), each
 * cut into twice as many equal steps as the one below, and 0 and 1. Where total_bits < 8 the rest is zeros.
 * 2 <= total_bits <= 8; 1 <= max_exponent_bits < total_bits, and without a sign max_exponent_bits = total_bits - 1: only
 * then are there 2^total_bits values. -1 for other arguments, else 0. */
int ql_dynamic_map(float map[QL_MAP_SIZE], bool is_signed, int64_t max_exponent_bits, int64_t total_bits);

/* The code of xn in an ascending map: bisection from index 127 by steps 64, 32, ... 1 (strictly above goes up) to a pivot,
 * then the midpoint between the pivot and its neighbour on xn's side: beyond it the neighbour, on it the pivot. NaN
 * gives 0. */
uint8_t ql_map_search(const float *map, float xn);

/* Blocks [block_begin, block_end) of `count` values: codes [count], absmax [blocks]; map [256] ascending. */
void ql_blockwise_quantize(uint8_t *codes, float *absmax, const ql_values *x, const float *map, int64_t count,
                           int64_t blocksize, int64_t block_begin, int64_t block_end);

/* The inverse for any map of 256: out [count] in fp32, fp16 or bf16, rounded once. */
void ql_blockwise_dequantize(void *out, ql_dtype dtype, const uint8_t *codes, const float *absmax, const float *map,
                             int64_t count, int64_t blocksize, int64_t block_begin, int64_t block_end);

/* The mean that double quantization takes off the absmax: summed in fp64 in one order, whatever computes it, and rounded to
 * fp32 once. Chunks of QL_MEAN_CHUNK values are summed by QL_MEAN_LANES lanes, value i by lane i % QL_MEAN_LANES; then the
 * upper half of the lanes is added to the lower until one is left. The chunks' sums are summed in the same way. The sum of
 * one chunk's values, and the mean of `count` values by the sums of their chunks, NaN of none. */
enum { QL_MEAN_LANES = 256, QL_MEAN_CHUNK = 65536 };
double ql_chunk_sum(const float *values, int64_t count);
float ql_mean_of_sums(const double *sums, int64_t count);

#endif
