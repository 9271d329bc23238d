/* Which kernel multiplies with a packed weight: the one place that knows all engines of such kernels.
 *
 * The choice is what was set from outside (choices.h), or else the table's: the first of the engines that take the product,
 * in the order that is best for its rows, with what that engine prefers. What no engine takes, and everything with
 * QLINEAR_KERNELS=base in the environment, is left to the base kernels. */
#ifndef QL_CUDA_CHOOSE_H
#define QL_CUDA_CHOOSE_H

#include "../../kernels/params.h"
#include "choices.h"
#include "launch.h"

/* An engine: kernels of one design with their host side. Each has one of these in its header. None of the functions but
 * launch may be slow: each call asks them. */
typedef struct ql_cuda_product_engine {
    /* The most rows of x that it is meant for, where the table of choose.c does not say more; it takes more if candidates
     * says so. */
    int64_t most_rows;
    /* What it could run the problem with on this GPU, its own preference first, at most `room`; how many. 0: nothing, as for
     * a code or an architecture that it has no kernels for. */
    int (*candidates)(ql_cuda_choice *out, int room, const ql_cuda_device *device, const ql_cuda_problem *problem);
    /* Whether it can run this very product so: shapes, alignment of x, shared memory. Never with another engine's kernel,
     * and with no parameter that its launch could not take. */
    bool (*takes)(const ql_cuda_device *device, const ql_packed_params *params, ql_cuda_choice choice);
    /* Bytes of scratch for it, which may hold anything; -1 where they do not fit int64. */
    int64_t (*scratch)(const ql_cuda_device *device, const ql_packed_params *params, ql_cuda_choice choice);
    /* Launches it on the stream. 0, or -1 with a sentence in message. */
    int (*launch)(const ql_cuda_guard *guard, void *stream, const ql_packed_params *params, ql_cuda_choice choice,
                  void *scratch, char message[QL_CUDA_MESSAGE]);
} ql_cuda_product_engine;

/* How a product will run: found once, so that scratch and launch agree whatever is set in between. */
typedef struct ql_cuda_plan {
    const ql_cuda_product_engine *engine; /* NULL: the base kernels */
    ql_cuda_choice choice;
    int64_t arranged_bytes; /* of scratch, at its start: x laid out anew for an engine that does not take it as it is */
    int64_t scratch_bytes;
} ql_cuda_plan;

/* The plan for a product on this GPU, of which out, bias and their types are not looked at. */
ql_cuda_plan ql_cuda_choose(const ql_cuda_device *device, const ql_packed_params *params);

/* Launches a product by its plan, which has an engine. 0, or -1 with a sentence in message. */
int ql_cuda_run(const ql_cuda_guard *guard, void *stream, const ql_cuda_plan *plan, const ql_packed_params *params,
                void *scratch, char message[QL_CUDA_MESSAGE]);

enum { QL_CUDA_MOST_CANDIDATES = 64 };

/* Whether QLINEAR_KERNELS=base was in the environment. */
bool ql_cuda_base_wanted(void);

/* All choices for the problem on this GPU, the table's own first; how many. */
int ql_cuda_candidates(ql_cuda_choice out[QL_CUDA_MOST_CANDIDATES], const ql_cuda_device *device,
                       const ql_cuda_problem *problem);

#endif
