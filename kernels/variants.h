/* Every kernel by name: read by the kernels, by the host's table and by the tests. */
#ifndef QL_KERNELS_VARIANTS_H
#define QL_KERNELS_VARIANTS_H

/* Every list begins X(name, source, ...): source is the kernels/<source>.cu that has the kernel. */

/* X(name, source, transposed, tokens a thread): the base products: few tokens, many, gradient to the input. */
#define QL_LINEAR_VARIANTS(X)                                                                                          \
    X(ql_linear_few, linear, false, 2)                                                                                 \
    X(ql_linear_many, linear, false, 16)                                                                               \
    X(ql_linear_grad, linear, true, 16)

/* X(name, source, code): packed weights whose columns are in order as matrices. */
#define QL_DEQUANTIZE_VARIANTS(X)                                                                                      \
    X(ql_dequantize_int2, dequantize, QL_CODE_INT2)                                                                    \
    X(ql_dequantize_int3, dequantize, QL_CODE_INT3)                                                                    \
    X(ql_dequantize_int4, dequantize, QL_CODE_INT4)                                                                    \
    X(ql_dequantize_int8, dequantize, QL_CODE_INT8)                                                                    \
    X(ql_dequantize_table4, dequantize, QL_CODE_TABLE4)

/* X(name, source, code, type of x, wide, tokens a block): products with a packed weight on mma.sync. wide: fp16 x with
 * scales that are not fp16. Stages of 2 and 3 bit are twice as deep and leave no registers for 128 tokens. */
#define QL_MMA_INTEGERS(X, code, name, tokens)                                                                         \
    X(ql_mma_##name##_f16_##tokens, mma, code, QL_VALUE_F16, false, tokens)                                            \
    X(ql_mma_##name##_f16_wide_##tokens, mma, code, QL_VALUE_F16, true, tokens)                                        \
    X(ql_mma_##name##_bf16_##tokens, mma, code, QL_VALUE_BF16, false, tokens)
#define QL_MMA_TABLE(X, tokens)                                                                                        \
    X(ql_mma_table4_f16_##tokens, mma, QL_CODE_TABLE4, QL_VALUE_F16, false, tokens)                                    \
    X(ql_mma_table4_bf16_##tokens, mma, QL_CODE_TABLE4, QL_VALUE_BF16, false, tokens)
#define QL_MMA_VARIANTS(X)                                                                                             \
    QL_MMA_INTEGERS(X, QL_CODE_INT2, int2, 16)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT2, int2, 64)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT3, int3, 16)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT3, int3, 64)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT4, int4, 16)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT4, int4, 64)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT4, int4, 128)                                                                        \
    QL_MMA_INTEGERS(X, QL_CODE_INT8, int8, 16)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT8, int8, 64)                                                                         \
    QL_MMA_INTEGERS(X, QL_CODE_INT8, int8, 128)                                                                        \
    QL_MMA_TABLE(X, 16)                                                                                                \
    QL_MMA_TABLE(X, 64)                                                                                                \
    QL_MMA_TABLE(X, 128)

/* X(name, source, code, type of x, wide, rows of W a block, tokens a block, columns a stage, groups a stage): products with
 * a packed weight on wgmma. wide: scales are not of x's type; tiles of 16 tokens know both 16-bit types. groups: 4, 2: a group is a quarter or half of a stage; 1: it
 * is some stages; 0: it is all of K. Where rows and tokens are many a stage is no more columns than there is room for: of 2
 * and 3 bit, whose tiles of codes are 128 columns, half a tile. */
#define QL_WGMMA_TYPES(X, code, name, tile, rows, tokens, stage_k, groups)                                             \
    X(ql_wgmma_##name##_f16_##tile, wgmma, code, QL_VALUE_F16, false, rows, tokens, stage_k, groups)                   \
    X(ql_wgmma_##name##_bf16_##tile, wgmma, code, QL_VALUE_BF16, false, rows, tokens, stage_k, groups)
#define QL_WGMMA_SCALES(X, code, name, tile, rows, tokens, stage_k, groups)                                            \
    QL_WGMMA_TYPES(X, code, name, tile, rows, tokens, stage_k, groups)                                                 \
    X(ql_wgmma_##name##_f16_wide_##tile, wgmma, code, QL_VALUE_F16, true, rows, tokens, stage_k, groups)               \
    X(ql_wgmma_##name##_bf16_wide_##tile, wgmma, code, QL_VALUE_BF16, true, rows, tokens, stage_k, groups)
#define QL_WGMMA_INTEGERS(X, code, name)                                                                               \
    QL_WGMMA_TYPES(X, code, name, 16, 128, 16, 128, 1)                                                                 \
    QL_WGMMA_TYPES(X, code, name, 16_halves, 128, 16, 128, 2)                                                          \
    QL_WGMMA_SCALES(X, code, name, 32, 128, 32, 128, 1)                                                                \
    QL_WGMMA_SCALES(X, code, name, 32_halves, 128, 32, 128, 2)                                                         \
    QL_WGMMA_SCALES(X, code, name, 32_quarters, 128, 32, 128, 4)                                                       \
    QL_WGMMA_SCALES(X, code, name, 64, 128, 64, 128, 1)                                                                \
    QL_WGMMA_SCALES(X, code, name, 64_halves, 128, 64, 128, 2)                                                         \
    QL_WGMMA_SCALES(X, code, name, 64_quarters, 128, 64, 128, 4)                                                       \
    QL_WGMMA_SCALES(X, code, name, 128, 128, 128, 128, 1)                                                              \
    QL_WGMMA_SCALES(X, code, name, 128_halves, 128, 128, 128, 2)                                                       \
    QL_WGMMA_SCALES(X, code, name, 128_quarters, 128, 128, 128, 4)                                                     \
    QL_WGMMA_TYPES(X, code, name, 32_rows, 128, 32, 128, 0)                                                            \
    QL_WGMMA_TYPES(X, code, name, 64_rows, 128, 64, 128, 0)                                                            \
    QL_WGMMA_TYPES(X, code, name, 128_rows, 128, 128, 128, 0)                                                          \
    QL_WGMMA_SCALES(X, code, name, 256, 128, 256, 64, 1)                                                               \
    QL_WGMMA_SCALES(X, code, name, 256_halves, 128, 256, 64, 2)                                                        \
    QL_WGMMA_TYPES(X, code, name, 256_rows, 128, 256, 64, 0)
#define QL_WGMMA_TABLE(X, code, name)                                                                                  \
    QL_WGMMA_TYPES(X, code, name, 16, 128, 16, 128, 1)                                                                 \
    QL_WGMMA_TYPES(X, code, name, 16_halves, 128, 16, 128, 2)                                                          \
    QL_WGMMA_TYPES(X, code, name, 16_quarters, 128, 16, 128, 4)                                                        \
    QL_WGMMA_TYPES(X, code, name, 32, 128, 32, 128, 1)                                                                 \
    QL_WGMMA_TYPES(X, code, name, 32_halves, 128, 32, 128, 2)                                                          \
    QL_WGMMA_TYPES(X, code, name, 32_quarters, 128, 32, 128, 4)                                                        \
    QL_WGMMA_TYPES(X, code, name, 64, 128, 64, 128, 1)                                                                 \
    QL_WGMMA_TYPES(X, code, name, 64_halves, 128, 64, 128, 2)                                                          \
    QL_WGMMA_TYPES(X, code, name, 64_quarters, 128, 64, 128, 4)                                                        \
    QL_WGMMA_TYPES(X, code, name, 128, 128, 128, 128, 1)                                                               \
    QL_WGMMA_TYPES(X, code, name, 128_halves, 128, 128, 128, 2)                                                        \
    QL_WGMMA_TYPES(X, code, name, 128_quarters, 128, 128, 128, 4)                                                      \
    QL_WGMMA_TYPES(X, code, name, 256, 128, 256, 64, 1)                                                                \
    QL_WGMMA_TYPES(X, code, name, 256_halves, 128, 256, 64, 2)
#define QL_WGMMA_VARIANTS(X)                                                                                           \
    QL_WGMMA_INTEGERS(X, QL_CODE_INT2, int2)                                                                           \
    QL_WGMMA_INTEGERS(X, QL_CODE_INT3, int3)                                                                           \
    QL_WGMMA_INTEGERS(X, QL_CODE_INT4, int4)                                                                           \
    QL_WGMMA_INTEGERS(X, QL_CODE_INT8, int8)                                                                           \
    QL_WGMMA_TYPES(X, QL_CODE_INT8, int8, 16_rows, 128, 16, 128, 0)                                                    \
    QL_WGMMA_TABLE(X, QL_CODE_TABLE4, table4)

/* X(name, source, code, type of x, tokens, groups): products of up to `tokens` tokens. groups: of a batch of columns, 0
 * where one is all of K (decode.h). 16 tokens want more registers than there are with groups of 32, and with
 * 8 groups of 2 and 3 bit. 1 token: of double quantization alone (few_tokens.cuh). Threads, grid and shared memory: src/cuda/decode.c, cut(). */
#define QL_DECODE_TYPES(X, code, name, tokens, groups)                                                                 \
    X(ql_decode_##name##_f16_##tokens##_##groups, decode, code, QL_VALUE_F16, tokens, groups)                          \
    X(ql_decode_##name##_bf16_##tokens##_##groups, decode, code, QL_VALUE_BF16, tokens, groups)
#define QL_DECODE_TILES(X, code, name, groups)                                                                         \
    QL_DECODE_TYPES(X, code, name, 8, groups)                                                                          \
    QL_DECODE_TYPES(X, code, name, 16, groups)
#define QL_DECODE_GROUPS(X, code, name, groups)                                                                        \
    QL_DECODE_TYPES(X, code, name, 4, groups)                                                                          \
    QL_DECODE_TILES(X, code, name, groups)
#define QL_DECODE_VARIANTS(X)                                                                                          \
    QL_DECODE_TILES(X, QL_CODE_INT2, int2, 0)                                                                          \
    QL_DECODE_GROUPS(X, QL_CODE_INT2, int2, 4)                                                                         \
    QL_DECODE_TYPES(X, QL_CODE_INT2, int2, 4, 8)                                                                       \
    QL_DECODE_TYPES(X, QL_CODE_INT2, int2, 8, 8)                                                                       \
    QL_DECODE_TYPES(X, QL_CODE_INT2, int2, 4, 16)                                                                      \
    QL_DECODE_TYPES(X, QL_CODE_INT2, int2, 8, 16)                                                                      \
    QL_DECODE_TILES(X, QL_CODE_INT3, int3, 0)                                                                          \
    QL_DECODE_GROUPS(X, QL_CODE_INT3, int3, 4)                                                                         \
    QL_DECODE_TYPES(X, QL_CODE_INT3, int3, 4, 8)                                                                       \
    QL_DECODE_TYPES(X, QL_CODE_INT3, int3, 8, 8)                                                                       \
    QL_DECODE_TYPES(X, QL_CODE_INT3, int3, 4, 16)                                                                      \
    QL_DECODE_TYPES(X, QL_CODE_INT3, int3, 8, 16)                                                                      \
    QL_DECODE_TILES(X, QL_CODE_INT4, int4, 0)                                                                          \
    QL_DECODE_GROUPS(X, QL_CODE_INT4, int4, 4)                                                                         \
    QL_DECODE_GROUPS(X, QL_CODE_INT4, int4, 8)                                                                         \
    QL_DECODE_TYPES(X, QL_CODE_INT4, int4, 4, 16)                                                                      \
    QL_DECODE_TYPES(X, QL_CODE_INT4, int4, 8, 16)                                                                      \
    QL_DECODE_TILES(X, QL_CODE_INT8, int8, 0)                                                                          \
    QL_DECODE_GROUPS(X, QL_CODE_INT8, int8, 2)                                                                         \
    QL_DECODE_GROUPS(X, QL_CODE_INT8, int8, 4)                                                                         \
    QL_DECODE_TYPES(X, QL_CODE_INT8, int8, 4, 8)                                                                       \
    QL_DECODE_TYPES(X, QL_CODE_INT8, int8, 8, 8)                                                                       \
    QL_DECODE_TILES(X, QL_CODE_TABLE4, table4, 1)                                                                      \
    QL_DECODE_GROUPS(X, QL_CODE_TABLE4, table4, 2)                                                                     \
    QL_DECODE_GROUPS(X, QL_CODE_TABLE4, table4, 4)                                                                     \
    QL_DECODE_GROUPS(X, QL_CODE_TABLE4, table4, 8)                                                                     \
    QL_DECODE_TYPES(X, QL_CODE_TABLE4, table4, 4, 16)                                                                  \
    QL_DECODE_TYPES(X, QL_CODE_TABLE4, table4, 16, 16)                                                                 \
    QL_DECODE_TYPES(X, QL_CODE_TABLE4, table4, 1, 8)                                                                   \
    QL_DECODE_TYPES(X, QL_CODE_TABLE4, table4, 1, 16)

/* X(name, source, code, type of x, tokens, groups): those of them for columns in another order (cells.cuh), groups of 128. */
#define QL_DECODE_CELLS_TYPES(X, code, name, groups)                                                                   \
    X(ql_decode_##name##_f16_4_cells, decode, code, QL_VALUE_F16, 4, groups)                                           \
    X(ql_decode_##name##_f16_8_cells, decode, code, QL_VALUE_F16, 8, groups)                                           \
    X(ql_decode_##name##_bf16_4_cells, decode, code, QL_VALUE_BF16, 4, groups)                                         \
    X(ql_decode_##name##_bf16_8_cells, decode, code, QL_VALUE_BF16, 8, groups)
#define QL_DECODE_CELLS_VARIANTS(X)                                                                                    \
    QL_DECODE_CELLS_TYPES(X, QL_CODE_INT4, int4, 4)                                                                    \
    QL_DECODE_CELLS_TYPES(X, QL_CODE_INT8, int8, 2)

/* X(name, source, code, groups, tokens): products of up to `tokens` tokens of 8-bit weights and activations. groups: scales
 * change every 128 columns. */
#define QL_W8A8_DECODE_VARIANTS(X)                                                                                     \
    X(ql_w8a8_decode_e4m3_8, w8a8_decode, QL_W8A8_E4M3, false, 8)                                                      \
    X(ql_w8a8_decode_e4m3_16, w8a8_decode, QL_W8A8_E4M3, false, 16)                                                    \
    X(ql_w8a8_decode_groups_8, w8a8_decode, QL_W8A8_E4M3, true, 8)                                                     \
    X(ql_w8a8_decode_groups_16, w8a8_decode, QL_W8A8_E4M3, true, 16)                                                   \
    X(ql_w8a8_decode_int8_8, w8a8_decode, QL_W8A8_INT8, false, 8)                                                      \
    X(ql_w8a8_decode_int8_16, w8a8_decode, QL_W8A8_INT8, false, 16)

/* X(name, source, code, groups): products of any number of tokens of 8-bit weights and activations on mma.sync. */
#define QL_W8A8_MMA_VARIANTS(X)                                                                                        \
    X(ql_w8a8_mma_e4m3, w8a8_mma, QL_W8A8_E4M3, false)                                                                 \
    X(ql_w8a8_mma_groups, w8a8_mma, QL_W8A8_E4M3, true)                                                                \
    X(ql_w8a8_mma_int8, w8a8_mma, QL_W8A8_INT8, false)

/* X(name, source, mode, code, type): the quantizers of 16-bit activations whose rows a thread block can hold. */
#define QL_W8A8_ROWS_VARIANTS(X)                                                                                       \
    X(ql_w8a8_rows_tokens_f16, w8a8_rows, QL_W8A8_TOKEN, QL_W8A8_E4M3, QL_VALUE_F16)                                   \
    X(ql_w8a8_rows_tokens_bf16, w8a8_rows, QL_W8A8_TOKEN, QL_W8A8_E4M3, QL_VALUE_BF16)                                 \
    X(ql_w8a8_rows_groups_f16, w8a8_rows, QL_W8A8_GROUPS, QL_W8A8_E4M3, QL_VALUE_F16)                                  \
    X(ql_w8a8_rows_groups_bf16, w8a8_rows, QL_W8A8_GROUPS, QL_W8A8_E4M3, QL_VALUE_BF16)                                \
    X(ql_w8a8_rows_int8_f16, w8a8_rows, QL_W8A8_TOKEN, QL_W8A8_INT8, QL_VALUE_F16)                                     \
    X(ql_w8a8_rows_int8_bf16, w8a8_rows, QL_W8A8_TOKEN, QL_W8A8_INT8, QL_VALUE_BF16)

/* X(name, source, code, grouped, rows, tokens, in pairs, meeting, turned): 8-bit activations with an 8-bit weight on wgmma
 * (w8a8_wgmma.h). */
#define QL_W8A8_WGMMA_FEW(X, code, grouped, name)                                                                      \
    X(ql_w8a8_##name##_32, w8a8_wgmma, code, grouped, 128, 32, false, false, false)                                    \
    X(ql_w8a8_##name##_64, w8a8_wgmma, code, grouped, 128, 64, false, false, false)                                    \
    X(ql_w8a8_##name##_32_meet, w8a8_wgmma, code, grouped, 128, 32, false, true, false)                                \
    X(ql_w8a8_##name##_64_meet, w8a8_wgmma, code, grouped, 128, 64, false, true, false)
#define QL_W8A8_WGMMA_MANY(X, code, grouped, name, turned)                                                             \
    X(ql_w8a8_##name##_128, w8a8_wgmma, code, grouped, 128, 128, false, false, turned)                                 \
    X(ql_w8a8_##name##_128_pair, w8a8_wgmma, code, grouped, 128, 128, true, false, turned)                             \
    X(ql_w8a8_##name##_128_meet, w8a8_wgmma, code, grouped, 128, 128, false, true, turned)
#define QL_W8A8_WGMMA_MOST(X, code, name)                                                                              \
    X(ql_w8a8_##name##_256_pair, w8a8_wgmma, code, false, 128, 256, true, false, false)
#define QL_W8A8_WGMMA_VARIANTS(X)                                                                                      \
    QL_W8A8_WGMMA_FEW(X, QL_W8A8_E4M3, false, e4m3)                                                                    \
    QL_W8A8_WGMMA_FEW(X, QL_W8A8_E4M3, true, groups)                                                                   \
    QL_W8A8_WGMMA_FEW(X, QL_W8A8_INT8, false, int8)                                                                    \
    QL_W8A8_WGMMA_MANY(X, QL_W8A8_E4M3, false, e4m3, false)                                                            \
    QL_W8A8_WGMMA_MANY(X, QL_W8A8_E4M3, true, groups, true)                                                            \
    QL_W8A8_WGMMA_MANY(X, QL_W8A8_INT8, false, int8, false)                                                            \
    QL_W8A8_WGMMA_MOST(X, QL_W8A8_E4M3, e4m3)                                                                          \
    QL_W8A8_WGMMA_MOST(X, QL_W8A8_INT8, int8)                                                                          \
    X(ql_w8a8_groups_tall_pair, w8a8_wgmma, QL_W8A8_E4M3, true, 256, 128, true, false, true)

/* X(name, source, pieces): sums over GPUs, pieces that a thread has at a time: short ones want few registers, beside the
 * kernels before and after, long ones much on the way. */
#define QL_ALL_REDUCE_VARIANTS(X)                                                                                      \
    X(ql_all_reduce_1, all_reduce, 1)                                                                                  \
    X(ql_all_reduce_4, all_reduce, 4)

/* X(name, source): the kernels that have one form. */
#define QL_SINGLE_KERNELS(X)                                                                                           \
    X(ql_dequantize, linear)                                                                                           \
    X(ql_linear_int8, linear)                                                                                          \
    X(ql_find_outliers, activation)                                                                                    \
    X(ql_row_absmax, activation)                                                                                       \
    X(ql_copy, activation)                                                                                             \
    X(ql_w8a8_quantize, w8a8_quantize)                                                                                 \
    X(ql_arrange, arrange)                                                                                             \
    X(ql_arrange_ordered, arrange)                                                                                     \
    X(ql_arrange_rows, arrange)                                                                                        \
    X(ql_arrange_many, arrange)                                                                                        \
    X(ql_pack_codes, pack)                                                                                             \
    X(ql_pack_entries, pack)                                                                                           \
    X(ql_pack_order, pack)                                                                                             \
    X(ql_pack_places, pack)                                                                                            \
    X(ql_unpack_words, pack)                                                                                           \
    X(ql_unpack_entries, pack)

/* X(name, source): quantizers, and codes from one form to another. */
#define QL_QUANTIZE_KERNELS(X)                                                                                         \
    X(ql_eetq_quantize, quantize_rows)                                                                                 \
    X(ql_eetq_codes, quantize_rows)                                                                                    \
    X(ql_eetq_pack, quantize_rows)                                                                                     \
    X(ql_eetq_unpack, quantize_rows)                                                                                   \
    X(ql_int8_quantize, quantize_rows)                                                                                 \
    X(ql_list_columns, quantize_rows)                                                                                  \
    X(ql_fp8_quantize, quantize_rows)                                                                                  \
    X(ql_fp8_groups, quantize_rows)                                                                                    \
    X(ql_fp8_blocks, quantize_rows)                                                                                    \
    X(ql_transpose, quantize_rows)                                                                                     \
    X(ql_fourbit_quantize, quantize_blocks)                                                                            \
    X(ql_blockwise_quantize, quantize_blocks)                                                                          \
    X(ql_fourbit_dequantize, quantize_blocks)                                                                          \
    X(ql_blockwise_dequantize, quantize_blocks)                                                                        \
    X(ql_sum_chunks, quantize_blocks)                                                                                  \
    X(ql_mean, quantize_blocks)                                                                                        \
    X(ql_find_group_params, quantize_groups)                                                                           \
    X(ql_group_encode, quantize_groups)                                                                                \
    X(ql_group_store, quantize_groups)                                                                                 \
    X(ql_recode, recode)                                                                                               \
    X(ql_awq_gather, recode)                                                                                           \
    X(ql_awq_spread, recode)                                                                                           \
    X(ql_permute, recode)                                                                                              \
    X(ql_find_above, recode)

/* X(name, source, ...): all of them, in the order of the host's table. */
#define QL_KERNELS(X)                                                                                                  \
    QL_LINEAR_VARIANTS(X)                                                                                              \
    QL_DEQUANTIZE_VARIANTS(X)                                                                                          \
    QL_DECODE_VARIANTS(X)                                                                                              \
    QL_DECODE_CELLS_VARIANTS(X)                                                                                        \
    QL_MMA_VARIANTS(X)                                                                                                 \
    QL_WGMMA_VARIANTS(X)                                                                                               \
    QL_W8A8_DECODE_VARIANTS(X)                                                                                         \
    QL_W8A8_MMA_VARIANTS(X)                                                                                            \
    QL_W8A8_ROWS_VARIANTS(X)                                                                                           \
    QL_W8A8_WGMMA_VARIANTS(X)                                                                                          \
    QL_ALL_REDUCE_VARIANTS(X)                                                                                          \
    QL_SINGLE_KERNELS(X)                                                                                               \
    QL_QUANTIZE_KERNELS(X)

#endif
