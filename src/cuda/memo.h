/* What engines preferred for the problems that they were asked about last: a model asks the same again and again, and an
 * engine that weighs all its kernels takes longer than all else that a call does. No lock: who meets a writer asks anew. */
#ifndef QL_CUDA_MEMO_H
#define QL_CUDA_MEMO_H

#include "choices.h"

/* Who remembers, the `engine` below: those of choose.c by their place in its list, and from these numbers on the two that
 * are beside them, which add what else their answers depend on. */
enum { QL_CUDA_MEMO_W8A8_DECODE = 64, QL_CUDA_MEMO_W8A8_WGMMA = 72 };

/* Whether the answer of this engine, below 256, for this device and problem, is known; *found: whether there was a
 * choice, and *choice which. */
bool ql_cuda_memo_find(bool *found, ql_cuda_choice *choice, int engine, int device, const ql_cuda_problem *problem);

void ql_cuda_memo_keep(bool found, ql_cuda_choice choice, int engine, int device, const ql_cuda_problem *problem);

#endif
