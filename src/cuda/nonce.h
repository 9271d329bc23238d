/* Numbers that tell one launch's marks in scratch memory from whatever the memory held before. */
#ifndef QL_CUDA_NONCE_H
#define QL_CUDA_NONCE_H

#include <stdint.h>

/* A number that no launch of this process had, and that memory holds by chance once in 2^64; never 0. */
uint64_t ql_cuda_nonce(void);

#endif
