#include "dynamic_map.h"

#include <stdlib.h>

enum { RUN = 256 };

/* Point `index` of `count` equal steps from 0.1 to 1, as torch.linspace computes it in fp32: from the nearer end, product
 * and sum fused. A map that differs from bitsandbytes' in a last place would give other bytes at ties. */
static float linspace_point(int64_t index, int64_t count) {
    float start = 0.1f, end = 1.0f;
    float step = (end - start) / (float)(count - 1);
    if (index < count / 2) return fmaf(step, (float)index, start);
    return fmaf(-step, (float)(count - 1 - index), end);
}

/* Appends scale * the means of neighbours among points + 1 points, with both signs if wanted; the new length. */
static int append_decade(float *map, int length, float scale, int64_t means, bool is_signed) {
    for (int64_t i = 0; i < means; i++) {
        float mean = (linspace_point(i, means + 1) + linspace_point(i + 1, means + 1)) / 2.0f;
        map[length++] = scale * mean;
        if (is_signed) map[length++] = -scale * mean;
    }
    return length;
}

static int compare_floats(const void *left, const void *right) {
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

int ql_dynamic_map(float map[QL_MAP_SIZE], bool is_signed, int64_t max_exponent_bits, int64_t total_bits) {
    if (total_bits < 2 || total_bits > 8 || max_exponent_bits < 1 || max_exponent_bits >= total_bits) return -1;
    int64_t fraction_bits = total_bits - 1 - max_exponent_bits;
    if (!is_signed && fraction_bits != 0) return -1;
    memset(map, 0, QL_MAP_SIZE * sizeof *map);
    int length = 0;
    for (int64_t i = 0; i < max_exponent_bits; i++) {
        float scale = (float)pow(10.0, (double)(i - max_exponent_bits + 1));
        int64_t means = (int64_t)1 << (i + fraction_bits + (is_signed ? 0 : 1));
        length = append_decade(map, length, scale, means, is_signed);
    }
    /* What is left of the codes cuts the highest decade once more. */
    length = append_decade(map, length, 1.0f, ((int64_t)1 << fraction_bits) - 1, is_signed);
    map[length] = 1.0f;
    qsort(map, QL_MAP_SIZE, sizeof *map, compare_floats);
    return 0;
}

uint8_t ql_map_search(const float *map, float xn) {
    int pivot = 127, lower = 0, upper = 255;
    for (int step = 64; step > 0; step /= 2) {
        if (xn > map[pivot]) {
            lower = pivot;
            pivot += step;
        } else {
            upper = pivot;
            pivot -= step;
        }
    }
    if (xn > map[pivot]) return (uint8_t)(xn > (map[upper] + map[pivot]) * 0.5f ? upper : pivot);
    return (uint8_t)(xn < (map[lower] + map[pivot]) * 0.5f ? lower : pivot);
}

void ql_blockwise_quantize(uint8_t *codes, float *absmax, const ql_values *x, const float *map, int64_t count,
                           int64_t blocksize, int64_t block_begin, int64_t block_end) {
    float run[RUN];
    for (int64_t block = block_begin; block < block_end; block++) {
        int64_t begin = block * blocksize;
        int64_t end = count - begin < blocksize ? count : begin + blocksize;
        absmax[block] = ql_values_absmax(x, begin, end - begin);
        float inverse = 1.0f / absmax[block];
        for (int64_t i = begin; i < end; i += RUN) {
            int64_t length = end - i < RUN ? end - i : RUN;
            ql_values_run(run, x, i, length);
            for (int64_t j = 0; j < length; j++) codes[i + j] = ql_map_search(map, run[j] * inverse);
        }
    }
}

void ql_blockwise_dequantize(void *out, ql_dtype dtype, const uint8_t *codes, const float *absmax, const float *map,
                             int64_t count, int64_t blocksize, int64_t block_begin, int64_t block_end) {
    for (int64_t block = block_begin; block < block_end; block++) {
        int64_t begin = block * blocksize;
        int64_t end = count - begin < blocksize ? count : begin + blocksize;
        for (int64_t i = begin; i < end; i++) ql_f32_store(out, dtype, i, map[codes[i]] * absmax[block]);
    }
}

/* The lanes' sum, in halves. */
static double fold(double *lane) {
    for (int half = QL_MEAN_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

double ql_chunk_sum(const float *values, int64_t count) {
    double lane[QL_MEAN_LANES] = {0};
    for (int64_t i = 0; i < count; i += QL_MEAN_LANES) {
        int64_t length = count - i < QL_MEAN_LANES ? count - i : QL_MEAN_LANES;
        for (int64_t j = 0; j < length; j++) lane[j] += (double)values[i + j];
    }
    return fold(lane);
}

float ql_mean_of_sums(const double *sums, int64_t count) {
    double lane[QL_MEAN_LANES] = {0};
    for (int64_t i = 0; i < ql_group_count(count, QL_MEAN_CHUNK); i++) lane[i % QL_MEAN_LANES] += sums[i];
    return (float)(fold(lane) / (double)count);
}
