/* Which kernel multiplies with a packed weight: the one place that knows all engines of such kernels.
 *
 * The choice is what was set from outside (choices.h), or else the rule's: the first of the engines that take the product,
 * in the order that is best for its rows, with what that engine prefers. What no engine takes, and everything with
 * QLINEAR_KERNELS=base in the environment, is left to the base kernels. */
#ifndef QL_CUDA_CHOOSE_H
#define QL_CUDA_CHOOSE_H

#include "../../kernels/decode.h"
#include "../../kernels/params.h"
#include "../../kernels/streamk.h"
#include "choices.h"
#include "launch.h"

/* What choices know a product by. */
static inline ql_cuda_problem ql_cuda_problem_of(const ql_packed_params *params) {
    return (ql_cuda_problem){.n = params->n,
                             .k = params->k,
                             .group_size = params->groups == 1 ? params->k : params->group_size,
                             .m = params->m,
                             .code = params->code,
                             .x_type = params->x_type};
}

/* A product that an engine took: all of its launch but where x and scratch are. */
typedef struct ql_cuda_prepared {
    ql_cuda_kernel kernel;
    ql_cuda_grid grid;
    int64_t scratch_bytes; /* which may hold anything */
    int64_t flags_at;      /* in scratch, behind partial sums: flags that say which of them are there */
    union {
        ql_decode_params decode;
        ql_streamk_params streamk;
        ql_split_params split;
    };
} ql_cuda_prepared;

/* An engine: kernels of one design with their host side. Each has one of these in its header. */
typedef struct ql_cuda_product_engine {
    /* The most rows of x that it is meant for, where choose.c has no rule of its own; it takes more if candidates
     * says so. */
    int64_t most_rows;
    /* What it could run the problem with on this GPU, its own preference first, at most `room`; how many. 0: nothing, as for
     * a code or an architecture that it has no kernels for. Its answer is remembered; the others are called by each product
     * and may not be slow. */
    int (*candidates)(ql_cuda_choice *out, int room, const ql_cuda_device *device, const ql_cuda_problem *problem);
    /* Whether it can run this very product so: shapes, alignment of x, shared memory, scratch that fits int64. Never with
     * another engine's kernel, and with no parameter that its launch could not take. If so, *prepared says how. */
    bool (*prepare)(ql_cuda_prepared *prepared, const ql_cuda_device *device, const ql_packed_params *params,
                    ql_cuda_choice choice);
    /* Launches what was prepared, with x as aligned as it was then. 0, or -1 with a sentence in message. */
    int (*launch)(const ql_cuda_guard *guard, void *stream, ql_cuda_prepared *prepared, const void *x, void *scratch,
                  char message[QL_CUDA_MESSAGE]);
} ql_cuda_product_engine;

/* How a product will run: found once, so that scratch and launch agree whatever is set in between. */
typedef struct ql_cuda_plan {
    const ql_cuda_product_engine *engine; /* NULL: the base kernels; of what follows nothing counts then */
    int64_t arranged_bytes; /* of scratch, at its start: x laid out anew for an engine that does not take it as it is */
    int64_t scratch_bytes;
    ql_cuda_prepared prepared;
} ql_cuda_plan;

/* Plans a product on this GPU. */
void ql_cuda_choose(ql_cuda_plan *plan, const ql_cuda_device *device, const ql_packed_params *params);

/* Launches a product by its plan, which has an engine. 0, or -1 with a sentence in message. */
int ql_cuda_run(const ql_cuda_guard *guard, void *stream, ql_cuda_plan *plan, const ql_packed_params *params,
                void *scratch, char message[QL_CUDA_MESSAGE]);

enum { QL_CUDA_MOST_CANDIDATES = 64 };

/* Whether QLINEAR_KERNELS=base was in the environment. */
bool ql_cuda_base_wanted(void);

/* All choices for the problem on this GPU, the rule's own first; how many. */
int ql_cuda_candidates(ql_cuda_choice out[QL_CUDA_MOST_CANDIDATES], const ql_cuda_device *device,
                       const ql_cuda_problem *problem);

#endif
