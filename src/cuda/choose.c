#include "choose.h"

#include "mma.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* In the order of preference among those meant for the rows at hand. */
static const ql_cuda_product_engine *const engines[] = {&ql_cuda_mma, NULL};

static bool base_wanted;
static pthread_once_t wish_read = PTHREAD_ONCE_INIT;

static void read_wish(void) {
    const char *wish = getenv("QLINEAR_KERNELS");
    base_wanted = wish && strcmp(wish, "base") == 0;
}

static ql_cuda_problem problem_of(const ql_packed_params *params) {
    return (ql_cuda_problem){.n = params->n,
                             .k = params->k,
                             .group_size = params->groups == 1 ? params->k : params->group_size,
                             .m = params->m,
                             .code = params->code,
                             .x_type = params->x_type};
}

static bool has_candidate(const ql_cuda_product_engine *engine, const ql_cuda_device *device,
                          const ql_cuda_problem *problem, ql_cuda_choice choice) {
    ql_cuda_choice found[QL_CUDA_MOST_CANDIDATES];
    int count = engine->candidates(found, QL_CUDA_MOST_CANDIDATES, device, problem);
    for (int i = 0; i < count; i++)
        if (found[i].kernel == choice.kernel) return true;
    return false;
}

/* A plan with an engine, or with none where it does not take the product. */
static ql_cuda_plan plan_with(const ql_cuda_product_engine *engine, const ql_cuda_device *device,
                              const ql_packed_params *params, ql_cuda_choice choice) {
    ql_cuda_plan plan = {0};
    if (!engine->takes(device, params, choice)) return plan;
    plan.scratch_bytes = engine->scratch(device, params, choice);
    plan.choice = choice;
    if (plan.scratch_bytes >= 0) plan.engine = engine;
    return plan;
}

ql_cuda_plan ql_cuda_choose(const ql_cuda_device *device, const ql_packed_params *params) {
    ql_cuda_plan plan = {0};
    pthread_once(&wish_read, read_wish);
    if (base_wanted || params->x_type == QL_VALUE_F32) return plan;
    const ql_cuda_problem problem = problem_of(params);
    ql_cuda_choice choice;
    if (ql_cuda_choice_find(&choice, device->ordinal, &problem))
        for (int i = 0; engines[i] && !plan.engine; i++)
            if (has_candidate(engines[i], device, &problem, choice))
                plan = plan_with(engines[i], device, params, choice);
    for (int i = 0; engines[i] && !plan.engine; i++)
        if (problem.m <= engines[i]->most_rows && engines[i]->candidates(&choice, 1, device, &problem) > 0)
            plan = plan_with(engines[i], device, params, choice);
    return plan;
}

int ql_cuda_candidates(ql_cuda_choice out[QL_CUDA_MOST_CANDIDATES], const ql_cuda_device *device,
                       const ql_cuda_problem *problem) {
    int count = 0;
    if (problem->x_type == QL_VALUE_F32) return 0;
    for (int meant = 1; meant >= 0; meant--)
        for (int i = 0; engines[i]; i++)
            if ((problem->m <= engines[i]->most_rows) == meant)
                count += engines[i]->candidates(out + count, QL_CUDA_MOST_CANDIDATES - count, device, problem);
    return count;
}
