#include "eetq.h"

/* The scale of channel `row` before it is rounded to its stored dtype. */
static float channel_scale(const ql_matrix *source, int64_t row) {
    float run[QL_EETQ_TILE];
    int32_t most = 0;
    for (int64_t k = 0; k < source->cols; k += QL_EETQ_TILE) {
        int64_t count = source->cols - k < QL_EETQ_TILE ? source->cols - k : QL_EETQ_TILE;
        ql_matrix_run(run, source, row, k, count);
        for (int64_t i = 0; i < count; i++) {
            int32_t magnitude = ql_magnitude_bits(run[i]);
            most = magnitude > most ? magnitude : most;
        }
    }
    float absmax = ql_f32_from_bits((uint32_t)most);
    return isfinite(absmax) ? absmax * (1.0f / 128.0f) : NAN;
}

/* roundf, clamped. The clamp comes first, which changes nothing as its ends are whole, and leaves a value that an int
 * holds: the fraction is then exact, and no library call keeps the loop from being vectorized. NaN (of 0 / 0) fails the
 * first comparison and becomes 127, as the format has it. */
static inline int8_t code_of(float weight, float scale) {
    float quotient = weight / scale;
    quotient = quotient < 127.0f ? quotient : 127.0f;
    quotient = quotient > -128.0f ? quotient : -128.0f;
    int32_t whole = (int32_t)quotient;
    float fraction = quotient - (float)whole;
    return (int8_t)(whole + (fraction >= 0.5f) - (fraction <= -0.5f));
}

static void quantize_run(int8_t *codes, const ql_matrix *source, int64_t row, int64_t k, int64_t count, float scale) {
    float run[QL_EETQ_TILE];
    ql_matrix_run(run, source, row, k, count);
    for (int64_t i = 0; i < count; i++) codes[i] = code_of(run[i], scale);
}

/* The byte of code q is q + 128: its sign bit flipped. */
static inline uint8_t byte_of(int8_t code) { return (uint8_t)((uint8_t)code ^ 0x80u); }

static inline int8_t code_from(uint8_t byte) {
    int value = byte ^ 0x80u;
    return (int8_t)(value - ((value & 0x80) << 1));
}

/* 64 codes of one channel to the 64 bytes that they are within a tile. */
static void pack_run(uint8_t *bytes, const int8_t *codes) {
    for (int block = 0; block < QL_EETQ_TILE; block += 16)
        for (int i = 0; i < 8; i++) {
            bytes[block + 2 * i] = byte_of(codes[block + i]);
            bytes[block + 2 * i + 1] = byte_of(codes[block + 8 + i]);
        }
}

void ql_eetq_quantize(uint8_t *packed, void *scales, ql_dtype scales_dtype, const ql_matrix *source, int64_t pair_begin,
                      int64_t pair_end) {
    int8_t codes[QL_EETQ_TILE];
    for (int64_t n = 2 * pair_begin; n < 2 * pair_end; n++) {
        float scale = channel_scale(source, n);
        for (int64_t k = 0; k < source->cols; k += QL_EETQ_TILE) {
            quantize_run(codes, source, n, k, QL_EETQ_TILE, scale);
            pack_run(packed + ql_eetq_offset(k, n, source->cols), codes);
        }
        ql_f32_store(scales, scales_dtype, n, scale);
    }
}

void ql_eetq_codes(int8_t *codes, void *scales, ql_dtype scales_dtype, const ql_matrix *source, int64_t row_begin,
                   int64_t row_end) {
    int8_t run[QL_EETQ_TILE];
    for (int64_t n = row_begin; n < row_end; n++) {
        float scale = channel_scale(source, n);
        for (int64_t k = 0; k < source->cols; k += QL_EETQ_TILE) {
            int64_t count = source->cols - k < QL_EETQ_TILE ? source->cols - k : QL_EETQ_TILE;
            quantize_run(run, source, n, k, count, scale);
            for (int64_t i = 0; i < count; i++) codes[(k + i) * source->rows + n] = run[i];
        }
        ql_f32_store(scales, scales_dtype, n, scale);
    }
}

/* Tiles in the outer loop here and below: the pairs of a range share the cache lines of the row-major codes. */
void ql_eetq_pack(uint8_t *packed, const int8_t *codes, int64_t in_stride, int64_t out_stride, int64_t in_features,
                  int64_t pair_begin, int64_t pair_end) {
    int8_t run[QL_EETQ_TILE];
    for (int64_t k = 0; k < in_features; k += QL_EETQ_TILE)
        for (int64_t n = 2 * pair_begin; n < 2 * pair_end; n++) {
            for (int64_t i = 0; i < QL_EETQ_TILE; i++) run[i] = codes[(k + i) * in_stride + n * out_stride];
            pack_run(packed + ql_eetq_offset(k, n, in_features), run);
        }
}

void ql_eetq_unpack(int8_t *codes, const uint8_t *packed, int64_t in_features, int64_t out_features, int64_t pair_begin,
                    int64_t pair_end) {
    for (int64_t k = 0; k < in_features; k += QL_EETQ_TILE)
        for (int64_t n = 2 * pair_begin; n < 2 * pair_end; n++) {
            const uint8_t *bytes = packed + ql_eetq_offset(k, n, in_features);
            for (int64_t i = 0; i < QL_EETQ_TILE; i++)
                codes[(k + i) * out_features + n] = code_from(bytes[(i & 48) + ((i & 7) << 1 | (i >> 3 & 1))]);
        }
}
