/* What the 4-bit type and bitsandbytes' quantizers check: flat tensors and block sizes. */
#ifndef QL_LAYERS_BLOCKS_H
#define QL_LAYERS_BLOCKS_H

#include "layer.h"

static const ql_dtype taken_f32[] = {QL_F32}, taken_u8[] = {QL_U8};

/* A contiguous tensor of one dtype and `count` elements in any shape. */
static inline int check_flat(const ql_tensor *tensor, const char *name, const ql_dtype *dtype, int64_t count) {
    if (ql_check_dtype(tensor, name, 1, dtype) < 0 || ql_check_contiguous(tensor, name) < 0) return -1;
    if (ql_tensor_numel(tensor) == count) return 0;
    char got[256];
    PyErr_Format(PyExc_ValueError, "%s must have %lld elements, got %s", name, (long long)count,
                 ql_tensor_describe(tensor, got, sizeof got));
    return -1;
}

/* The largest is one that engines can shift by and count within in 32 bits; formats go to 4096. */
static inline int check_blocksize(int64_t blocksize, const char *name) {
    if (blocksize >= 32 && blocksize <= 1 << 30 && (blocksize & (blocksize - 1)) == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s must be a power of two, at least 32 and at most 2^30, got %lld", name,
                 (long long)blocksize);
    return -1;
}

#endif
