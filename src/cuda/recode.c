#include "recode.h"

#include "../../kernels/quantize.h"

_Static_assert((int)QL_CUDA_PLAIN == (int)QL_AWQ_PLAIN && (int)QL_CUDA_GEMV == (int)QL_AWQ_GEMV &&
                   (int)QL_CUDA_GEMV_FAST == (int)QL_AWQ_GEMV_FAST && (int)QL_CUDA_MARLIN == (int)QL_AWQ_MARLIN &&
                   (int)QL_CUDA_EIGHTS == (int)QL_AWQ_EIGHTS,
               "the kernels number the storages alike");
_Static_assert((int)QL_CUDA_FOUND == (int)QL_ABOVE_BLOCKS, "an entry a block");

static int run(const ql_cuda_place *place, ql_cuda_kernel kernel, int64_t x, int64_t y, const void *params,
               char message[QL_CUDA_MESSAGE]) {
    const ql_cuda_grid grid = {.x = x, .y = y, .threads = QL_QUANTIZE_THREADS};
    return ql_cuda_launch_alone(place, kernel, &grid, params, message);
}

/* A thread an item, up to more blocks than any GPU takes at once; nothing where there is no item. */
static int run_items(const ql_cuda_place *place, ql_cuda_kernel kernel, int64_t items, const void *params,
                     char message[QL_CUDA_MESSAGE]) {
    int64_t blocks = ql_ceil_div(items, QL_QUANTIZE_THREADS), most = 1 << 16;
    return items ? run(place, kernel, blocks < most ? blocks : most, 1, params, message) : 0;
}

static int retile(const ql_cuda_place *place, ql_cuda_kernel kernel, const ql_retile_params *p,
                  char message[QL_CUDA_MESSAGE]) {
    if (p->in_features == 0 || p->out_features == 0) return 0;
    return run(place, kernel, p->in_features / QL_EETQ_TILE_IN, ql_ceil_div(p->out_features, QL_EETQ_TILE_OUT), p,
               message);
}

int ql_cuda_eetq_pack(const ql_cuda_place *place, uint8_t *packed, const ql_matrix *codes,
                      char message[QL_CUDA_MESSAGE]) {
    ql_retile_params p = {packed, codes->data, codes->rows, codes->cols, codes->row_stride, codes->col_stride};
    return retile(place, QL_KERNEL_ql_eetq_pack, &p, message);
}

int ql_cuda_eetq_unpack(const ql_cuda_place *place, int8_t *codes, const uint8_t *packed, int64_t in_features,
                        int64_t out_features, char message[QL_CUDA_MESSAGE]) {
    ql_retile_params p = {(uint8_t *)codes, packed, in_features, out_features, out_features, 1};
    return retile(place, QL_KERNEL_ql_eetq_unpack, &p, message);
}

static int recode(const ql_cuda_place *place, void *out, int64_t count, const ql_matrix *from, int bits, int mode,
                  char message[QL_CUDA_MESSAGE]) {
    ql_recode_params p = {.out = out,
                          .from = from->data,
                          .count = count,
                          .cols = from->cols,
                          .row_stride = from->row_stride,
                          .col_stride = from->col_stride,
                          .bits = bits,
                          .mode = mode};
    return run_items(place, QL_KERNEL_ql_recode, ql_ceil_div(count, 32) * from->cols, &p, message);
}

int ql_cuda_gptq_pack_codes(const ql_cuda_place *place, int32_t *packed, const ql_matrix *codes, int bits,
                            char message[QL_CUDA_MESSAGE]) {
    return recode(place, packed, codes->rows, codes, bits, QL_RECODE_PACK, message);
}

int ql_cuda_gptq_unpack_codes(const ql_cuda_place *place, uint8_t *codes, int64_t count, const ql_matrix *packed,
                              int bits, char message[QL_CUDA_MESSAGE]) {
    return recode(place, codes, count, packed, bits, QL_RECODE_UNPACK, message);
}

int ql_cuda_gptq_unplanar(const ql_cuda_place *place, int32_t *stream, const ql_matrix *planar, int bits,
                          char message[QL_CUDA_MESSAGE]) {
    return recode(place, stream, planar->rows / bits * 32, planar, bits, QL_RECODE_UNPLANAR, message);
}

int ql_cuda_awq_gather(const ql_cuda_place *place, int32_t *words, ql_cuda_storage storage, const ql_matrix *from,
                       int64_t n, int64_t k, char message[QL_CUDA_MESSAGE]) {
    ql_gather_params p = {.out = words, .rows = n, .cols = k, .storage = (int32_t)storage};
    if (from) {
        p.from = from->data;
        p.row_stride = from->row_stride;
        p.col_stride = from->col_stride;
    }
    return run_items(place, QL_KERNEL_ql_awq_gather, k * ql_ceil_div(n, 8), &p, message);
}

int ql_cuda_awq_pack(const ql_cuda_place *place, int32_t *packed, const ql_matrix *codes,
                     char message[QL_CUDA_MESSAGE]) {
    return ql_cuda_awq_gather(place, packed, QL_CUDA_PLAIN, codes, codes->cols, codes->rows, message);
}

int ql_cuda_awq_unpack(const ql_cuda_place *place, uint8_t *codes, int64_t n, const ql_matrix *packed,
                       char message[QL_CUDA_MESSAGE]) {
    ql_spread_params p = {codes, packed->data, packed->rows, n, packed->row_stride, packed->col_stride};
    return run_items(place, QL_KERNEL_ql_awq_spread, packed->rows * n, &p, message);
}

int ql_cuda_awq_params(const ql_cuda_place *place, void *out, int64_t rows, int64_t cols, const ql_matrix *from,
                       bool marlin, char message[QL_CUDA_MESSAGE]) {
    ql_permute_params p = {.out = out,
                           .from = from->data,
                           .rows = rows,
                           .cols = cols,
                           .row_stride = from->row_stride,
                           .col_stride = from->col_stride,
                           .size = (int32_t)ql_dtype_size(from->dtype),
                           .marlin = marlin};
    return run_items(place, QL_KERNEL_ql_permute, rows * cols, &p, message);
}

int ql_cuda_find_above(const ql_cuda_place *place, int64_t *first, const ql_matrix *codes, int largest,
                       char message[QL_CUDA_MESSAGE]) {
    ql_above_params p = {first, codes->data, codes->rows, codes->cols, codes->row_stride, codes->col_stride, largest};
    return run(place, QL_KERNEL_ql_find_above, QL_CUDA_FOUND, 1, &p, message);
}
