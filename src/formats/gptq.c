#include "gptq.h"

#include "bits.h"

#include <math.h>

void ql_gptq_find_params(float *scales, float *zeros, const ql_matrix *weight, int64_t group_size, int bits, bool sym,
                         int64_t begin, int64_t end) {
    int64_t k = weight->cols;
    int64_t groups = ql_group_count(k, group_size);
    float largest = (float)ql_code_mask(bits);
    for (int64_t row = begin; row < end; row++) {
        for (int64_t group = 0; group < groups; group++) {
            int64_t first = group * group_size;
            int64_t last = k - first < group_size ? k : first + group_size;
            float low = 0.0f, high = 0.0f;
            for (int64_t col = first; col < last; col++) {
                float value = ql_matrix_f32(weight, row, col);
                /* A NaN must survive: it compares false with everything, so it is taken once and never replaced. */
                if (value < low || isnan(value)) low = value;
                if (value > high || isnan(value)) high = value;
            }
            if (sym) {
                if (-low > high) high = -low;
                if (low < 0.0f) low = -high;
            }
            if (low == 0.0f && high == 0.0f) {
                low = -1.0f;
                high = 1.0f;
            }
            float scale = (high - low) / largest;
            scales[row * groups + group] = scale;
            zeros[row * groups + group] = sym ? (largest + 1.0f) / 2.0f : rintf(-low / scale);
        }
    }
}

static void store_chunk(int32_t *packed, int64_t stride, const int32_t *words, int64_t count) {
    for (int64_t word = 0; word < count; word++) packed[word * stride] = words[word];
}

static int64_t codes_in_chunk(int64_t chunk, int64_t count) {
    int64_t left = count - chunk * QL_CHUNK;
    return left < QL_CHUNK ? left : QL_CHUNK;
}

void ql_gptq_pack_weight(int32_t *qweight, const ql_matrix *weight, const ql_matrix *scales, const ql_matrix *zeros,
                         const int32_t *g_idx, int64_t group_size, int bits, int64_t begin, int64_t end) {
    int64_t n = weight->rows, k = weight->cols;
    uint32_t mask = ql_code_mask(bits);
    /* Chunk by chunk over the rows: reads run along rows of the weight and writes along rows of qweight. */
    for (int64_t chunk = 0; chunk < ql_group_count(k, QL_CHUNK); chunk++) {
        int64_t count = codes_in_chunk(chunk, k);
        for (int64_t row = begin; row < end; row++) {
            int32_t words[QL_MAX_CODE_BITS] = {0};
            int64_t group = -1;
            float scale_zero = 0.0f, stored_scale = 0.0f;
            for (int64_t i = 0; i < count; i++) {
                int64_t col = chunk * QL_CHUNK + i;
                int64_t group_here = g_idx ? g_idx[col] : col / group_size;
                if (group_here != group) {
                    group = group_here;
                    float scale = ql_matrix_f32(scales, row, group);
                    float zero = (float)ql_code_from_f32(rintf(ql_matrix_f32(zeros, row, group)), mask);
                    scale_zero = zero * scale;
                    stored_scale = ql_f32_from_f16(ql_f16_from_f32(scale));
                }
                float code = rintf((ql_matrix_f32(weight, row, col) + scale_zero) / stored_scale);
                ql_code_put(words, 1, bits, i, ql_code_from_f32(code, mask));
            }
            store_chunk(qweight + chunk * bits * n + row, n, words, ql_code_words(count, bits));
        }
    }
}

void ql_gptq_pack_params(int32_t *qzeros, uint16_t *stored_scales, const ql_matrix *scales, const ql_matrix *zeros,
                         int bits, int zero_offset, int64_t begin, int64_t end) {
    int64_t n = scales->rows;
    int64_t words = ql_code_words(n, bits);
    uint32_t mask = ql_code_mask(bits);
    for (int64_t group = begin; group < end; group++) {
        int32_t *row = qzeros + group * words;
        for (int64_t word = 0; word < words; word++) row[word] = 0;
        for (int64_t col = 0; col < n; col++) {
            uint32_t zero = ql_code_from_f32(rintf(ql_matrix_f32(zeros, col, group)), mask);
            ql_code_put(row, 1, bits, col, (zero - (uint32_t)zero_offset) & mask);
            stored_scales[group * n + col] = ql_f16_from_f32(ql_matrix_f32(scales, col, group));
        }
    }
}

void ql_gptq_pack_codes(int32_t *packed, const ql_matrix *codes, int bits, int64_t begin, int64_t end) {
    int64_t n = codes->cols;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t count = codes_in_chunk(chunk, codes->rows);
        for (int64_t col = 0; col < n; col++) {
            int32_t words[QL_MAX_CODE_BITS] = {0};
            for (int64_t i = 0; i < count; i++)
                ql_code_put(words, 1, bits, i, ql_matrix_u8(codes, chunk * QL_CHUNK + i, col));
            store_chunk(packed + chunk * bits * n + col, n, words, ql_code_words(count, bits));
        }
    }
}

void ql_gptq_unpack_codes(uint8_t *codes, int64_t count, const ql_matrix *packed, int bits, int64_t begin,
                          int64_t end) {
    int64_t n = packed->cols;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t here = codes_in_chunk(chunk, count);
        for (int64_t col = 0; col < n; col++) {
            int32_t words[QL_MAX_CODE_BITS];
            for (int64_t word = 0; word < ql_code_words(here, bits); word++)
                words[word] = ql_matrix_i32(packed, chunk * bits + word, col);
            for (int64_t i = 0; i < here; i++)
                codes[(chunk * QL_CHUNK + i) * n + col] = (uint8_t)ql_code_get(words, 1, bits, i);
        }
    }
}

void ql_gptq_unplanar(int32_t *stream, const ql_matrix *planar, int bits, int64_t begin, int64_t end) {
    int64_t n = planar->cols;
    int low_bits = bits == 3 ? 2 : bits;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        for (int64_t col = 0; col < n; col++) {
            int32_t planes[QL_MAX_CODE_BITS], words[QL_MAX_CODE_BITS] = {0};
            for (int64_t word = 0; word < bits; word++) planes[word] = ql_matrix_i32(planar, chunk * bits + word, col);
            for (int64_t i = 0; i < QL_CHUNK; i++) {
                uint32_t code = ql_code_get(planes, 1, low_bits, i);
                if (bits > low_bits) code |= ql_code_get(planes + low_bits, 1, bits - low_bits, i) << low_bits;
                ql_code_put(words, 1, bits, i, code);
            }
            store_chunk(stream + chunk * bits * n + col, n, words, bits);
        }
    }
}

ql_g_idx ql_gptq_resolve_g_idx(int32_t *resolved, int64_t *position, const void *g_idx, ql_dtype dtype, int64_t stride,
                               int64_t k, int64_t groups, int64_t group_size) {
    bool all_zero = true, trivial = true;
    for (int64_t col = 0; col < k; col++) {
        int64_t group =
            dtype == QL_I64 ? ((const int64_t *)g_idx)[col * stride] : ((const int32_t *)g_idx)[col * stride];
        if (group < -groups || group >= groups) {
            *position = col;
            return QL_G_IDX_OUT_OF_RANGE;
        }
        all_zero = all_zero && group == 0;
        if (group < 0) group += groups;
        trivial = trivial && group == col / group_size;
        resolved[col] = (int32_t)group;
    }
    bool is_left_out = all_zero && groups == ql_group_count(k, group_size);
    return trivial || is_left_out ? QL_G_IDX_TRIVIAL : QL_G_IDX_GENERAL;
}

bool ql_gptq_zeros_are_middle(const int32_t *qzeros, int64_t groups, int64_t n, int bits) {
    int64_t words = ql_code_words(n, bits);
    uint32_t middle = 1u << (bits - 1);
    if (n == 0) return true; /* groups of no zeros may be any number */
    for (int64_t group = 0; group < groups; group++)
        for (int64_t col = 0; col < n; col++)
            if (ql_code_get(qzeros + group * words, 1, bits, col) != middle) return false;
    return true;
}
