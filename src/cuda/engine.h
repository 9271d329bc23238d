/* The CUDA engine: products with a quantized weight whose tensors are on a GPU, in the checkpoint's own layout. Launches
 * on the stream given and does not wait; no allocation: scratch comes from the caller. The results are those of the CPU
 * engine within rounding, and the same bits for the same call. Each returns 0, or -1 with a sentence in message. */
#ifndef QL_CUDA_ENGINE_H
#define QL_CUDA_ENGINE_H

#include "../formats/weight.h"
#include "choose.h"
#include "w8a8.h"

/* A bias on the device: [n], stride elements apart, fp32, fp16 or bf16. */
typedef struct ql_cuda_bias {
    const void *data; /* NULL: none */
    ql_dtype dtype;
    int64_t stride;
} ql_cuda_bias;

/* A product: out[m][n] = x @ W^T + bias, as ql_cpu_linear; every pointer, also those of weight, is device memory. */
typedef struct ql_cuda_product {
    void *out;
    const void *x;
    int64_t x_stride, m;
    ql_dtype dtype; /* of x and out */
    const ql_weight *weight;
    ql_cuda_bias bias;
} ql_cuda_product;

/* Who runs it, how, and the product as those take it. */
typedef struct ql_cuda_product_plan {
    enum { QL_CUDA_PLAN_BASE, QL_CUDA_PLAN_PACKED, QL_CUDA_PLAN_W8A8 } kind; /* BASE: the base kernels alone */
    int64_t scratch_bytes; /* of device memory; -1 where they do not fit int64 */
    union {
        struct {
            ql_cuda_plan plan;
            ql_packed_params product;
        } packed;
        struct {
            ql_cuda_w8a8_plan plan;
            ql_cuda_w8a8 product;
        } w8a8;
    };
} ql_cuda_product_plan;

/* Plans a product whose pointers are all known. */
int ql_cuda_linear_plan(ql_cuda_product_plan *plan, const ql_cuda_place *place, const ql_cuda_product *product,
                        char message[QL_CUDA_MESSAGE]);

/* Launches the product by its plan, which takes in where scratch is. */
int ql_cuda_linear(const ql_cuda_place *place, const ql_cuda_product *product, ql_cuda_product_plan *plan,
                   void *scratch, char message[QL_CUDA_MESSAGE]);

/* out[m][k] = g @ W. */
int ql_cuda_linear_grad(const ql_cuda_place *place, void *out, const void *g, int64_t g_stride, ql_dtype dtype,
                        int64_t m, const ql_weight *weight, char message[QL_CUDA_MESSAGE]);

/* out = a contiguous copy of a strided tensor of fp32, fp16 or bf16, at most QL_COPY_DIMS dimensions. */
int ql_cuda_copy(const ql_cuda_place *place, void *out, const void *from, ql_dtype dtype, int ndim,
                 const int64_t *shape, const int64_t *stride, char message[QL_CUDA_MESSAGE]);

/* out[n][k] = W. */
int ql_cuda_dequantize(const ql_cuda_place *place, void *out, ql_dtype dtype, const ql_weight *weight,
                       char message[QL_CUDA_MESSAGE]);

#endif
