/* ql_weight_at: each format's definition, one element at a time. Nothing here is meant to be fast. */
#include "weight.h"

#include "number.h"
#include "packed.h"

static const int awq_nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

/* Code `index` of a stream whose consecutive words lie `stride` apart. */
static uint32_t stream_code(const int32_t *words, int64_t stride, int bits, int64_t index) {
    int64_t bit = bits * index;
    int offset = (int)(bit & 31);
    uint32_t value = (uint32_t)words[(bit >> 5) * stride] >> offset;
    if (offset + bits > 32) value |= (uint32_t)words[((bit >> 5) + 1) * stride] << (32 - offset);
    return value & ((1u << bits) - 1u);
}

static float gptq_at(const ql_gptq *gptq, int64_t n, int64_t row, int64_t col) {
    int64_t group = gptq->g_idx ? gptq->g_idx[col] : col / gptq->group_size;
    int64_t zero_words = (n * gptq->bits + 31) / 32;
    uint32_t code = stream_code(gptq->qweight + row, n, gptq->bits, col);
    uint32_t zero = stream_code(gptq->qzeros + group * zero_words, 1, gptq->bits, row) + (uint32_t)gptq->zero_offset;
    zero &= (1u << gptq->bits) - 1u;
    float scale = ql_f32_load(gptq->scales, gptq->scales_dtype, group * n + row);
    return ((float)code - (float)zero) * scale;
}

static float awq_at(const ql_awq *awq, int64_t n, int64_t row, int64_t col) {
    int64_t words = (n + 7) / 8;
    int64_t group = col / awq->group_size;
    int shift = 4 * awq_nibble[row % 8];
    float code = (float)((uint32_t)awq->qweight[col * words + row / 8] >> shift & 15u);
    float scale = ql_f32_load(awq->scales, awq->scales_dtype, group * n + row);
    /* Products of a float code and a 16-bit scale are exact in fp32, so fmaf only tells what an fp32 scale gives. */
    if (awq->zero_products)
        return fmaf(code, scale, ql_f32_load(awq->zero_products, awq->scales_dtype, group * n + row));
    return (code - (float)((uint32_t)awq->qzeros[group * words + row / 8] >> shift & 15u)) * scale;
}

static float eetq_at(const ql_eetq *eetq, int64_t k, int64_t row, int64_t col) {
    int64_t offset =
        (row >> 1) * 2 * k + (col >> 6) * 128 + (row & 1) * 64 + (col & 48) + (((col & 7) << 1) | ((col >> 3) & 1));
    return (float)((int)eetq->weight[offset] - 128) * ql_f32_load(eetq->scales, eetq->scales_dtype, row);
}

static float fourbit_at(const ql_fourbit *fourbit, int64_t index) {
    int64_t block = index / fourbit->blocksize;
    uint8_t byte = fourbit->packed[index / 2];
    float absmax = fourbit->nested ? fourbit->nested_code[fourbit->nested[block]] *
                                             fourbit->absmax[block / fourbit->nested_blocksize] +
                                         fourbit->offset
                                   : fourbit->absmax[block];
    return fourbit->code[index % 2 ? byte & 15 : byte >> 4] * absmax;
}

static float fp8_at(const ql_fp8 *fp8, int64_t row, int64_t col) {
    float scale = fp8->scale[row / fp8->block_n * fp8->scale_stride + col / fp8->block_k];
    return ql_f32_from_e4m3(fp8->weight[row * fp8->row_stride + col * fp8->col_stride]) * scale;
}

float ql_weight_at(const ql_weight *weight, int64_t row, int64_t col) {
    switch (weight->format) {
    case QL_FORMAT_GPTQ: return gptq_at(&weight->gptq, weight->n, row, col);
    case QL_FORMAT_AWQ: return awq_at(&weight->awq, weight->n, row, col);
    case QL_FORMAT_EETQ: return eetq_at(&weight->eetq, weight->k, row, col);
    case QL_FORMAT_INT8:
        return (float)weight->int8.codes[row * weight->k + col] * weight->int8.absmax[row] * (1.0f / 127.0f);
    case QL_FORMAT_FOURBIT: return fourbit_at(&weight->fourbit, row * weight->k + col);
    case QL_FORMAT_FP8: return fp8_at(&weight->fp8, row, col);
    case QL_FORMAT_PACKED: return ql_packed_at(weight, row, col);
    }
    return NAN;
}
