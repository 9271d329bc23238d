/* What the quantizers and repackers take. Plain C for the host and the device; QL_VALUE_* name floating types. */
#ifndef QL_KERNELS_QUANTIZE_H
#define QL_KERNELS_QUANTIZE_H

#include <stdint.h>

/* Threads of a block: of most; at most, where a block has a row; where it has a block of 128 by 128. */
enum { QL_QUANTIZE_THREADS = 256, QL_ROW_THREADS = 1024, QL_TILE_THREADS = 512 };

/* Values that a thread takes at a time. */
enum { QL_RUN = 8 };

/* A float matrix whose rows are contiguous. `vector`: QL_RUN values from any column that is a multiple of QL_RUN can be
 * loaded at once, as every row begins at a multiple of 16 bytes. */
typedef struct ql_source {
    const void *data;
    int64_t rows, cols, row_stride;
    int32_t type, vector;
} ql_source;

/* A matrix of 2- or 4-byte elements whose columns are contiguous, to be written by rows. Blocks of QL_TRANSPOSE_TILE
 * square. */
enum { QL_TRANSPOSE_TILE = 64 };
typedef struct ql_transpose_params {
    void *out;        /* [rows, cols] contiguous */
    const void *from; /* element (row, col) at row + col * col_stride */
    int64_t rows, cols, col_stride;
    int32_t size;
} ql_transpose_params;

/* A row a block; each goes on by the grid's size. formats/eetq.h, int8.h and fp8.h have the formulas. */
enum { QL_ROW_STATIC, QL_ROW_TENSOR, QL_ROW_TOKEN };
typedef struct ql_rows_params {
    void *codes;
    void *scales; /* EETQ: [rows] of scales_type; INT8: absmax fp32 [rows]; FP8: fp32 [1] or [rows] */
    ql_source source;
    const uint8_t *outliers; /* INT8: [cols], 1 in columns to be zeroed, or NULL */
    const float *row_absmax; /* EETQ's plain codes, FP8's mode TENSOR: [rows] */
    const void *given_scale; /* FP8's mode STATIC: one of given_type, or NULL for given */
    const void *upper_bound; /* FP8's mode TOKEN: likewise, of bound_type */
    float given, bound;      /* where the pointers are NULL */
    float threshold;         /* INT8; 0: none */
    float least_scale;       /* FP8's mode TOKEN */
    int32_t scales_type, mode, given_type, bound_type;
} ql_rows_params;

/* EETQ's plain codes [in_features, out_features] and its packed bytes. */
enum { QL_EETQ_TILE_IN = 64, QL_EETQ_TILE_OUT = 64 };
typedef struct ql_retile_params {
    uint8_t *out;
    const uint8_t *from;
    int64_t in_features, out_features, in_stride, out_stride; /* strides of plain codes that are read */
} ql_retile_params;

/* columns: the indices of the flags that are set, ascending. One block. */
typedef struct ql_columns_params {
    int64_t *columns;
    const uint8_t *flags;
    int64_t count;
} ql_columns_params;

/* Scales of groups of 128 columns, or of blocks of 128 by 128, fp32 [ceil(rows / block_rows), ceil(cols / 128)]. */
enum { QL_SCALED_BLOCK = 128 };
typedef struct ql_scaled_blocks_params {
    uint8_t *codes; /* [rows, cols] */
    float *scales;
    ql_source source;
} ql_scaled_blocks_params;

/* What decides the 4-bit code of a value x in [-1, 1] (NF4) or [0, 1] (FP4's magnitudes): of the grid of 1 / 32 the place
 * nearest to x, cell_of(x) = 32 + 32 x rounded half to even, has at most one threshold whose own place it is. x is above
 * `below` thresholds, and above one more where it is above `threshold` (infinite where the place has none). */
enum { QL_CELLS = 65 };
typedef struct ql_cell {
    float threshold;
    int32_t below;
} ql_cell;

/* A flat array in blocks of 2^shift values, each with an absmax; codes of 4 bits by cells, of 8 bits by a map. */
enum { QL_FLAT_NF4, QL_FLAT_FP4 };
typedef struct ql_flat_params {
    void *out;      /* codes, or values of `type` where codes are decoded */
    float *absmax;  /* [blocks] */
    const void *in; /* values of `type`, or codes */
    int64_t count;
    int32_t shift, type, vector, code;
    const float *device_table; /* to decode: [16] or [256] */
    ql_cell cells[QL_CELLS];
    float map[256];
} ql_flat_params;

/* The mean of `count` values in an order that is the same everywhere: dynamic_map.h has it. A block a chunk, then one. */
enum { QL_SUM_LANES = 256, QL_SUM_CHUNK = 65536 };
typedef struct ql_mean_params {
    float *mean;
    double *sums; /* [chunks] */
    const float *values;
    int64_t count;
} ql_mean_params;

/* Parameters of groups of columns, fp32 [rows, groups], by the rule of GPTQ (formats/gptq.h), mirrored or not, or AWQ. */
enum { QL_RULE_GPTQ, QL_RULE_GPTQ_SYMMETRIC, QL_RULE_AWQ };
typedef struct ql_group_params {
    float *scales, *zeros;
    ql_source source;
    int64_t group_size, groups;
    float largest; /* code */
    int32_t rule;
} ql_group_params;

/* A matrix of floats with any strides; type may be QL_VALUE_F64. */
typedef struct ql_strided {
    const void *data;
    int64_t row_stride, col_stride;
    int32_t type;
} ql_strided;

/* Codes of a weight by given parameters, in GPTQ's words down each column or AWQ's along each row; and the parameters as
 * they are stored beside them. Blocks of QL_ENCODE_ROWS by QL_ENCODE_COLS. */
enum { QL_WORDS_GPTQ, QL_WORDS_AWQ };
enum { QL_ENCODE_ROWS = 64, QL_ENCODE_COLS = 128 };
typedef struct ql_encode_params {
    int32_t *words, *zero_words;
    uint16_t *stored_scales; /* fp16 [groups, rows] */
    ql_source source;
    ql_strided scales, zeros; /* [rows, groups] */
    const void *index;        /* [cols], the group of each, or NULL: col / group_size */
    int64_t index_stride, group_size, groups;
    int32_t index_wide; /* int64 */
    int32_t bits, zero_offset, layout;
} ql_encode_params;

/* One form of codes to another, cols contiguous in what is written. `count`: rows of codes. */
enum { QL_RECODE_PACK, QL_RECODE_UNPACK, QL_RECODE_UNPLANAR };
typedef struct ql_recode_params {
    void *out;
    const void *from;
    int64_t count, cols, row_stride, col_stride;
    int32_t bits, mode;
} ql_recode_params;

/* Words of AWQ's GEMM storage, out [cols, ceil(rows / 8)], from the codes of another: formats/awq.h has their layouts.
 * EIGHTS is code 8 everywhere, Marlin's zero. */
enum { QL_AWQ_PLAIN, QL_AWQ_GEMV, QL_AWQ_GEMV_FAST, QL_AWQ_MARLIN, QL_AWQ_EIGHTS };
typedef struct ql_gather_params {
    int32_t *out;
    const void *from;
    int64_t rows, cols, row_stride, col_stride;
    int32_t storage;
} ql_gather_params;

/* Codes uint8 [rows, cols] of words in AWQ's order. */
typedef struct ql_spread_params {
    uint8_t *out;
    const int32_t *from;
    int64_t rows, cols, row_stride, col_stride;
} ql_spread_params;

/* out [rows, cols] contiguous of 2- or 4-byte elements; `marlin`: columns in Marlin's order of scales. */
typedef struct ql_permute_params {
    void *out;
    const void *from;
    int64_t rows, cols, row_stride, col_stride;
    int32_t size, marlin;
} ql_permute_params;

/* first[block]: row * cols + col of the first code above `largest` that the block found, or -1. */
enum { QL_ABOVE_BLOCKS = 512 };
typedef struct ql_above_params {
    int64_t *first;
    const uint8_t *codes;
    int64_t rows, cols, row_stride, col_stride;
    int32_t largest;
} ql_above_params;

#endif
