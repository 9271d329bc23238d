#include "fourbit.h"

enum { RUN = 256 }; /* values encoded at a time, even */

static const float nf4_code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

static const float fp4_code[16] = {
    0.0f, 0.0625f / 12.0f,  8.0f / 12.0f,  1.0f,  4.0f / 12.0f,  0.5f,  2.0f / 12.0f,  0.25f,
    0.0f, -0.0625f / 12.0f, -8.0f / 12.0f, -1.0f, -4.0f / 12.0f, -0.5f, -2.0f / 12.0f, -0.25f,
};

/* Thresholds between neighbours, ascending, by the decimals of bitsandbytes' kernel. NF4's are midpoints, but four of them
 * (0, 8, 12, 14) are ties between two floats, which the decimal decides and not the rounding of the sum: they must not be
 * computed. FP4's differ from the midpoints in the last places. */
static const float nf4_threshold[15] = {
    -0.8480964004993439f,  -0.6106329262256622f,   -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f,   0.2035212516784668f,
    0.2920137718319893f,   0.3893125355243683f,    0.5016634166240692f,  0.6427869200706482f,   0.8614784181118011f,
};

static const float fp4_threshold[7] = {
    0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f,
};

/* FP4's bit patterns by ascending magnitude. */
static const uint8_t fp4_ascending[8] = {0, 1, 6, 7, 4, 5, 2, 3};

const float *ql_fourbit_code(ql_fourbit_type type) { return type == QL_NF4 ? nf4_code : fp4_code; }

const float *ql_fourbit_thresholds(ql_fourbit_type type, int *count) {
    *count = type == QL_NF4 ? 15 : 7;
    return type == QL_NF4 ? nf4_threshold : fp4_threshold;
}

/* nibbles[i] = the code of x[i] * inverse. The thresholds are the outer loop: then the inner one is a compare and an
 * addition that vectorize, where a search would branch at each value. */
static void encode_nf4(uint8_t *nibbles, float *x, int64_t count, float inverse) {
    memset(nibbles, 0, (size_t)count);
    for (int64_t i = 0; i < count; i++) x[i] *= inverse;
    for (int t = 0; t < 15; t++)
        for (int64_t i = 0; i < count; i++) nibbles[i] = (uint8_t)(nibbles[i] + (x[i] > nf4_threshold[t]));
}

static void encode_fp4(uint8_t *nibbles, float *x, int64_t count, float inverse) {
    memset(nibbles, 0, (size_t)count);
    for (int64_t i = 0; i < count; i++) x[i] *= inverse;
    for (int t = 0; t < 7; t++)
        for (int64_t i = 0; i < count; i++) nibbles[i] = (uint8_t)(nibbles[i] + (fabsf(x[i]) > fp4_threshold[t]));
    for (int64_t i = 0; i < count; i++) nibbles[i] = (uint8_t)(fp4_ascending[nibbles[i]] | (x[i] < 0.0f) << 3);
}

void ql_fourbit_quantize(uint8_t *packed, float *absmax, const ql_values *x, int64_t count, int64_t blocksize,
                         ql_fourbit_type type, int64_t block_begin, int64_t block_end) {
    float run[RUN];
    uint8_t nibbles[RUN];
    for (int64_t block = block_begin; block < block_end; block++) {
        int64_t begin = block * blocksize;
        int64_t end = count - begin < blocksize ? count : begin + blocksize;
        absmax[block] = ql_values_absmax(x, begin, end - begin);
        float inverse = 1.0f / absmax[block];
        for (int64_t i = begin; i < end; i += RUN) {
            int64_t length = end - i < RUN ? end - i : RUN;
            ql_values_run(run, x, i, length);
            if (length % 2) run[length++] = 0.0f;
            if (type == QL_NF4)
                encode_nf4(nibbles, run, length, inverse);
            else
                encode_fp4(nibbles, run, length, inverse);
            for (int64_t j = 0; j < length / 2; j++)
                packed[i / 2 + j] = (uint8_t)(nibbles[2 * j] << 4 | nibbles[2 * j + 1]);
        }
    }
}

static inline uint8_t nibble_at(const uint8_t *packed, int64_t index) {
    return index % 2 ? packed[index / 2] & 15u : packed[index / 2] >> 4;
}

/* A block has 16 different values: they are multiplied and rounded once a block, not once an element. */
static void decode_f32(float *out, const uint8_t *packed, const float *code, float absmax, int64_t begin, int64_t end) {
    float value[16];
    for (int q = 0; q < 16; q++) value[q] = code[q] * absmax;
    for (int64_t i = begin; i < end; i++) out[i] = value[nibble_at(packed, i)];
}

static void decode_16(uint16_t *out, ql_dtype dtype, const uint8_t *packed, const float *code, float absmax,
                      int64_t begin, int64_t end) {
    uint16_t value[16];
    for (int q = 0; q < 16; q++) ql_f32_store(value, dtype, q, code[q] * absmax);
    for (int64_t i = begin; i < end; i++) out[i] = value[nibble_at(packed, i)];
}

void ql_fourbit_dequantize(void *out, ql_dtype dtype, const uint8_t *packed, const float *absmax, const float *code,
                           int64_t count, int64_t blocksize, int64_t block_begin, int64_t block_end) {
    for (int64_t block = block_begin; block < block_end; block++) {
        int64_t begin = block * blocksize;
        int64_t end = count - begin < blocksize ? count : begin + blocksize;
        if (dtype == QL_F32)
            decode_f32(out, packed, code, absmax[block], begin, end);
        else
            decode_16(out, dtype, packed, code, absmax[block], begin, end);
    }
}
