/* What kernels take, as the host fills it and the device reads it: plain C for both, fixed-width types, 64-bit sizes. */
#ifndef QL_KERNELS_PARAMS_H
#define QL_KERNELS_PARAMS_H

#include "packed.h"

#include <stdint.h>

/* The floating types of values in memory; the numbers are ql_dtype's. Only what copies and quantizes takes F64. */
enum { QL_VALUE_F32 = 0, QL_VALUE_F16 = 1, QL_VALUE_BF16 = 2, QL_VALUE_F64 = 3 };

/* The formats; the numbers are ql_format's. */
enum {
    QL_WEIGHT_GPTQ,
    QL_WEIGHT_AWQ,
    QL_WEIGHT_EETQ,
    QL_WEIGHT_INT8,
    QL_WEIGHT_FOURBIT,
    QL_WEIGHT_FP8,
    QL_WEIGHT_PACKED
};

/* The outputs of a block of the base kernels, its threads, and the tokens that each variant gives it. */
enum { QL_LINEAR_OUTPUTS = 64, QL_LINEAR_THREADS = 256, QL_LINEAR_FEW = 8, QL_LINEAR_MANY = 64, QL_LINEAR_INT8 = 16 };

/* A product with a weight of any format, its transpose, or the weight itself; fields of other formats are not read. The
 * formulas are those of formats/weight.h. Grid: ceil(outputs / QL_LINEAR_OUTPUTS) by ceil(m / tokens of the variant). */
typedef struct ql_linear_params {
    void *out;        /* [m, outputs] contiguous, out_type */
    const void *x;    /* [m, inner], rows x_stride apart, x_type */
    const void *bias; /* [n], bias_stride apart, bias_type, or NULL */
    int64_t m, n, k, x_stride, bias_stride;
    int32_t format, x_type, out_type, bias_type, scales_type;
    const void *codes;         /* qweight, CB, the packed nibbles, the e4m3 bytes, the tiles of packed.h */
    const void *zeros;         /* GPTQ, AWQ, packed */
    const void *zero_products; /* AWQ */
    const void *scales;        /* scales, SCB, absmax */
    const int32_t *index;      /* GPTQ: g_idx or NULL; packed: column col is column index[col] there, or NULL */
    const float *table;        /* 4 bit: code [16] */
    const uint8_t *nested;     /* 4 bit: the codes of absmax, or NULL */
    const float *nested_table;
    int64_t group_size; /* also 4 bit's blocksize */
    int64_t groups;     /* GPTQ, packed */
    int64_t nested_blocksize;
    int64_t row_stride, col_stride, block_n, block_k, scale_stride; /* FP8 */
    float offset;                                                   /* 4 bit: of nested absmax */
    int32_t bits, zero_offset;                                      /* GPTQ */
    int32_t code;                                                   /* packed: QL_CODE_* */
    const uint8_t *x_codes;                                         /* INT8: [m, k], rows x_pitch apart */
    const float *row_absmax;                                        /* INT8: [m] */
    const uint32_t *outliers;                                       /* INT8: a bit a column (w8a8.h), or NULL */
    int64_t x_pitch;
} ql_linear_params;

/* Columns that a block looks for outliers in. */
enum { QL_OUTLIER_COLUMNS = 32 };

/* A matrix of which the largest magnitudes and the outliers are looked for: [m, k], rows x_stride apart, x_type. */
typedef struct ql_activation_params {
    const void *x;
    float *row_absmax; /* [m] */
    uint8_t *outliers; /* [k] */
    int64_t m, k, x_stride;
    int32_t x_type;
    float threshold;
} ql_activation_params;

/* The outputs of a block of the mma.sync product and its threads. */
enum { QL_MMA_ROWS = 128, QL_MMA_THREADS = 256, QL_MMA_BUDGET = 80 * 1024, QL_MMA_TABLE_BYTES = 64 };

/* The columns of a stage: a tile, or two where tiles are short. Its bytes: x, then codes. How many stages a block holds: as
 * many as fit what GPUs of compute capability 8.6 let it have, but no more than help. */
#define QL_MMA_STAGE_K(code) (QL_TILE_K(code) < 64 ? 64 : QL_TILE_K(code))
#define QL_MMA_STAGE_BYTES(code, tokens)                                                                               \
    ((tokens) * QL_MMA_STAGE_K(code) * 2 +                                                                             \
     QL_MMA_ROWS / 16 * (QL_MMA_STAGE_K(code) / QL_TILE_K(code)) * QL_TILE_BYTES(code))
#define QL_MMA_STAGES(code, tokens)                                                                                    \
    (QL_MMA_BUDGET / QL_MMA_STAGE_BYTES(code, tokens) > 8 ? 8 : QL_MMA_BUDGET / QL_MMA_STAGE_BYTES(code, tokens))

/* A product whose K is split over blocks: tiles are numbered along n first, and split s of tile t is block t * splits + s.
 * x: 16-byte aligned rows of which each starts at a multiple of 8 elements. */
typedef struct ql_split_params {
    ql_packed_params product;
    float *partial;  /* scratch: what each split but the last of a tile has summed */
    uint64_t *flags; /* scratch: [tiles][splits - 1], with anything in it; nonce: that part of partial is there */
    uint64_t nonce;  /* of this launch */
    int32_t splits;
} ql_split_params;

/* A checkpoint's tensors and the sections that they are packed into, or out of; what a format lacks is NULL. */
typedef struct ql_pack_params {
    void *words;          /* qweight, EETQ's weight, the packed nibbles of 4 bit */
    int32_t *zeros;       /* qzeros */
    void *scales;         /* scales, absmax, or the bytes of nested absmax */
    const int32_t *g_idx; /* [k], where columns are sorted */
    void *codes;          /* the sections */
    void *packed_scales;
    uint8_t *packed_zeros;
    int32_t *order, *inverse;
    int32_t *word_tail, *zero_tail; /* the words that codes fill in part */
    int64_t n, k, group_size, groups;
    int32_t format, code, scale_size, zero_offset; /* format: of the checkpoint; scale_size: in bytes */
} ql_pack_params;

/* ROWS: at a time, of ql_arrange_many. */
enum { QL_ARRANGE_THREADS = 512, QL_ARRANGE_ALIGNMENT = 256, QL_ARRANGE_ROWS = 4 };

/* What a row of x takes in shared memory: whole lines. */
#define QL_ARRANGED_ROW_BYTES(columns) (((columns) + 63) / 64 * 128)

/* x of 16 bit in the columns' order of a packed weight: out[m][j] = x[m][order[j]], or x[m][j] without an order; zeros from
 * k up to out_stride, a multiple of 8. Grid and shared memory: src/cuda/arrange.c. ql_arrange_rows takes k of 16 bits. */
typedef struct ql_arrange_params {
    void *out; /* [m, out_stride], 16-byte aligned */
    const void *x;
    const int32_t *order, *inverse; /* [k] in [0, k), inverse[order[j]] = j, 16-byte aligned; or NULL */
    int64_t m, k, x_stride, out_stride;
    int32_t two_rows; /* of ql_arrange_rows: whether there is room for two */
} ql_arrange_params;

enum { QL_COPY_DIMS = 16 };

/* A strided tensor of `count` elements, to be laid out without gaps; fp64 becomes fp32. */
typedef struct ql_copy_params {
    void *out;
    const void *from;
    int64_t shape[QL_COPY_DIMS], stride[QL_COPY_DIMS], count;
    int32_t ndim, type;
} ql_copy_params;

#endif
