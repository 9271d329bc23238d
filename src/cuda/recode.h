/* Codes from one form to another on the GPU, nothing rounded; as the functions of the same names of formats/, whose layouts
 * these are. Matrices may have any strides; `rows` and `cols` name the weight's output and input channels. Each launches on
 * the place's stream and returns 0, or -1 with a sentence in message. */
#ifndef QL_CUDA_RECODE_H
#define QL_CUDA_RECODE_H

#include "../formats/matrix.h"
#include "launch.h"

/* EETQ: plain int8 codes [in, out] of any strides to the packed bytes, and the inverse, row-major. */
int ql_cuda_eetq_pack(const ql_cuda_place *place, uint8_t *packed, const ql_matrix *codes,
                      char message[QL_CUDA_MESSAGE]);
int ql_cuda_eetq_unpack(const ql_cuda_place *place, int8_t *codes, const uint8_t *packed, int64_t in_features,
                        int64_t out_features, char message[QL_CUDA_MESSAGE]);

/* GPTQ: codes uint8 [count, cols] to and from int32 words [ceil(count * bits / 32), cols]; words of the planar layout. */
int ql_cuda_gptq_pack_codes(const ql_cuda_place *place, int32_t *packed, const ql_matrix *codes, int bits,
                            char message[QL_CUDA_MESSAGE]);
int ql_cuda_gptq_unpack_codes(const ql_cuda_place *place, uint8_t *codes, int64_t count, const ql_matrix *packed,
                              int bits, char message[QL_CUDA_MESSAGE]);
int ql_cuda_gptq_unplanar(const ql_cuda_place *place, int32_t *stream, const ql_matrix *planar, int bits,
                          char message[QL_CUDA_MESSAGE]);

/* AWQ: codes uint8 [rows, n] to words [rows, ceil(n / 8)], and the inverse. */
int ql_cuda_awq_pack(const ql_cuda_place *place, int32_t *packed, const ql_matrix *codes,
                     char message[QL_CUDA_MESSAGE]);
int ql_cuda_awq_unpack(const ql_cuda_place *place, uint8_t *codes, int64_t n, const ql_matrix *packed,
                       char message[QL_CUDA_MESSAGE]);

/* Words [k, ceil(n / 8)] of the GEMM storage from another's codes; of its zeros k is the number of groups. EIGHTS takes no
 * matrix: every code is 8. */
typedef enum ql_cuda_storage {
    QL_CUDA_PLAIN,
    QL_CUDA_GEMV,
    QL_CUDA_GEMV_FAST,
    QL_CUDA_MARLIN,
    QL_CUDA_EIGHTS
} ql_cuda_storage;
int ql_cuda_awq_gather(const ql_cuda_place *place, int32_t *words, ql_cuda_storage storage, const ql_matrix *from,
                       int64_t n, int64_t k, char message[QL_CUDA_MESSAGE]);

/* out [rows, cols] contiguous, of 2 or 4 bytes: elements of `from`; marlin: whose columns are in Marlin's order. */
int ql_cuda_awq_params(const ql_cuda_place *place, void *out, int64_t rows, int64_t cols, const ql_matrix *from,
                       bool marlin, char message[QL_CUDA_MESSAGE]);

/* first[i], of QL_CUDA_FOUND: the least row * cols + col among some codes that are above `largest`, or -1. The least of
 * those that are not -1 is the first of all. */
enum { QL_CUDA_FOUND = 512 };
int ql_cuda_find_above(const ql_cuda_place *place, int64_t *first, const ql_matrix *codes, int largest,
                       char message[QL_CUDA_MESSAGE]);

#endif
