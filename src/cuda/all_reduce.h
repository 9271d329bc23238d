/* Sums of tensors that lie on several GPUs of a host, a process each (kernels/all_reduce.cu): the inbox that each of them
 * has, opened by all others, and the launch. Every function returns 0, or -1 with a sentence in message. */
#ifndef QL_CUDA_ALL_REDUCE_H
#define QL_CUDA_ALL_REDUCE_H

#include "../../kernels/all_reduce.h"
#include "../formats/dtype.h"
#include "launch.h"

/* One of `parts` GPUs that sum up what they have. */
typedef struct ql_cuda_reducer {
    int device, rank, parts;
    int64_t place;                       /* the most bytes that a sum has */
    uint64_t boxes[QL_ALL_REDUCE_PARTS]; /* of each rank, 0 while it is not open */
    void *stream, *done;                 /* of the last sum, and an event after it; done is NULL before there was one */
} ql_cuda_reducer;

/* Memory and event of the reducer, whose device, rank and parts are set and whose other fields are 0; handle: for the other
 * processes. After a failure, too, ql_cuda_reducer_close. */
int ql_cuda_reducer_make(ql_cuda_reducer *reducer, ql_cu_ipc_handle *handle, char message[QL_CUDA_MESSAGE]);

/* Opens the others' inboxes (handles [parts], its own is not read) and leaves a greeting in each. Waits for them. */
int ql_cuda_reducer_connect(ql_cuda_reducer *reducer, const ql_cu_ipc_handle *handles, char message[QL_CUDA_MESSAGE]);

/* Fails where not all others' greetings are in the own inbox; empties it, after which, in all processes, there may be
 * sums. */
int ql_cuda_reducer_check(const ql_cuda_reducer *reducer, char message[QL_CUDA_MESSAGE]);

/* Waits for what runs and gives everything back. No other process may write here any more. */
void ql_cuda_reducer_close(ql_cuda_reducer *reducer);

/* x becomes the sum of all GPUs' x, each of which asks for the same sums in the same order; in fp32, in the order of ranks,
 * rounded once. x: contiguous, fp32, fp16 or bf16, at least one byte and at most `place`. Launches, and does not wait.
 * Sums on several streams follow each other, but for those of a graph and those beside it. */
int ql_cuda_all_reduce(ql_cuda_reducer *reducer, void *x, int64_t bytes, ql_dtype dtype, void *stream,
                       char message[QL_CUDA_MESSAGE]);

#endif
