/* The values of a float tensor in row-major order, whatever its strides: what the quantizers whose blocks run over the
 * flat array read with. */
#ifndef QL_FORMATS_VALUES_H
#define QL_FORMATS_VALUES_H

#include "run.h"

typedef struct ql_values {
    const void *data;
    ql_dtype dtype; /* fp32, fp16, bf16 or fp64 */
    int ndim;
    const int64_t *shape, *stride; /* [ndim], strides in elements */
} ql_values;

/* out[i] = fp32 of value begin + i, for i in [0, count). */
static inline void ql_values_run(float *out, const ql_values *values, int64_t begin, int64_t count) {
    int last = values->ndim - 1;
    ql_matrix row = {.data = values->data, .dtype = values->dtype, .rows = 1, .cols = 1, .col_stride = 1};
    if (last >= 0) row.cols = values->shape[last], row.col_stride = values->stride[last];
    while (count > 0) {
        int64_t outer = begin / row.cols, col = begin % row.cols, offset = 0;
        for (int i = last - 1; i >= 0; i--) {
            offset += outer % values->shape[i] * values->stride[i];
            outer /= values->shape[i];
        }
        row.data = (const char *)values->data + offset * (int64_t)ql_dtype_size(values->dtype);
        int64_t run = row.cols - col < count ? row.cols - col : count;
        ql_matrix_run(out, &row, 0, col, run);
        out += run, begin += run, count -= run;
    }
}

/* The largest magnitude of x[0, count) and `most`, as ql_magnitude_bits has them: NaN is the largest of all. */
static inline int32_t ql_run_magnitude(int32_t most, const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = ql_magnitude_bits(x[i]);
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

/* The largest magnitude of values [begin, begin + count), NaN where one is NaN; 0 of none. */
static inline float ql_values_absmax(const ql_values *values, int64_t begin, int64_t count) {
    enum { RUN = 256 };
    float run[RUN];
    int32_t most = 0;
    for (int64_t done = 0; done < count; done += RUN) {
        int64_t length = count - done < RUN ? count - done : RUN;
        ql_values_run(run, values, begin + done, length);
        most = ql_run_magnitude(most, run, length);
    }
    return ql_f32_from_bits((uint32_t)most);
}

#endif
