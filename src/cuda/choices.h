/* What is chosen between, and choices that were set from outside, as autotune does: by device, packed weight, type of x and
 * rows of x. They go before the rule of choose.c. Looking one up takes no lock. */
#ifndef QL_CUDA_CHOICES_H
#define QL_CUDA_CHOICES_H

#include "library.h"

#include <stdint.h>

/* What is chosen for. */
typedef struct ql_cuda_problem {
    int64_t n, k, group_size; /* of the packed weight; group_size is k where it has one group */
    int64_t m;                /* rows of x */
    int32_t code, x_type;     /* QL_CODE_*, QL_VALUE_F16 or QL_VALUE_BF16 */
} ql_cuda_problem;

/* A kernel, and a number of its launch, whose meaning is the kernel's: blocks, splits of K, ... */
typedef struct ql_cuda_choice {
    ql_cuda_kernel kernel;
    int32_t parameter;
} ql_cuda_choice;

/* The rows that share a choice with m: the least of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... that is no less; 98304 at
 * most. */
int64_t ql_cuda_choice_bucket(int64_t m);

/* Whether a choice was set for the problem, and which. */
bool ql_cuda_choice_find(ql_cuda_choice *choice, int device, const ql_cuda_problem *problem);

/* Sets the choice for all rows of the problem's bucket; NULL takes it back. The caller has checked that the kernel can run
 * it. 0, or -1 with a sentence in message where there is no room for more problems. */
int ql_cuda_choice_set(int device, const ql_cuda_problem *problem, const ql_cuda_choice *choice,
                       char message[QL_CUDA_MESSAGE]);

#endif
