#include "choose.h"

#include "arrange.h"
#include "decode.h"
#include "memo.h"
#include "mma.h"
#include "wgmma.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* In the order of preference among those meant for the rows at hand. */
static const ql_cuda_product_engine *const engines[] = {&ql_cuda_decode, &ql_cuda_wgmma, &ql_cuda_mma, NULL};

/* The most rows for which the decode kernels beat wgmma: x is spread over ever larger clusters as K grows, and a table's values
 * are looked up anew for each. An H200's us, decode / wgmma: 4 bit, 9 rows 4096x6144 8.5 / 8.7, 4096x28672 21.2 / 21.8,
 * 8192x10240 17.0 / 17.2, 12 rows 20 / 17.2, 8192x57344 82 / 74, 16 rows 4096x6144 8.8 / 8.7, of bf16 10.6 / 8.9, 4096x28672
 * 25.1 / 21.9, of 8 rows 28672x8192 36 / 37; 3 and 2 bit, 16 rows 4096x6144 9.7 / 8.5, 9.2 / 8.0; 8 bit, 16 rows 4096x6144
 * 10.2 / 11.1, 4096x28672 33.2 / 34.0, one group 33.1 / 32.4; NF4 double, 9 rows 8192x10240 26.4 / 21.8, of 8 rows 28672x8192
 * 46 / 51; groups of 32, 4096x28672, of 8 and 16 rows 4 bit 26 / 29 and 42 / 29, NF4 double 30 / 36 and 39 / 36, 8 bit 34 / 39
 * and 51 / 39. Groups that wgmma does not take are decode's as long as there are kernels. */
static int64_t decode_rows(const ql_cuda_problem *problem) {
    const int64_t k = problem->k;
    const int64_t group = problem->group_size < k ? problem->group_size : 64;
    const bool is_half = problem->x_type == QL_VALUE_F16, is_wide = problem->n > 16384;
    if (group != 32 && group != 64 && group % 128) return ql_cuda_decode.most_rows;
    if (problem->code == QL_CODE_TABLE4 || group == 32 || k > 8192) return 8;
    if (problem->code == QL_CODE_INT8) return k > 4096 || (is_wide && problem->group_size >= k) ? 12 : 16;
    if (problem->code != QL_CODE_INT4 || !is_half || k > 4096) return 8;
    return is_wide ? 12 : 16;
}

/* Whether the problem is given to this engine, if it takes it. */
static bool is_meant(int engine, const ql_cuda_device *device, const ql_cuda_problem *problem) {
    const bool beside_wgmma = engines[engine] == &ql_cuda_decode && device->properties.major == 9;
    return problem->m <= (beside_wgmma ? decode_rows(problem) : engines[engine]->most_rows);
}

static bool base_wanted;
static pthread_once_t wish_read = PTHREAD_ONCE_INIT;

static void read_wish(void) {
    const char *wish = getenv("QLINEAR_KERNELS");
    base_wanted = wish && strcmp(wish, "base") == 0;
}

bool ql_cuda_base_wanted(void) {
    pthread_once(&wish_read, read_wish);
    return base_wanted;
}

/* Whether the engine can run the problem by its own rule, and with what. */
static bool preferred(ql_cuda_choice *choice, int engine, const ql_cuda_device *device,
                      const ql_cuda_problem *problem) {
    bool found;
    if (ql_cuda_memo_find(&found, choice, engine, device->ordinal, problem)) return found;
    found = engines[engine]->candidates(choice, 1, device, problem) > 0;
    ql_cuda_memo_keep(found, *choice, engine, device->ordinal, problem);
    return found;
}

/* Scratch is aligned to more than any engine asks for, so any such address stands for it. */
static ql_packed_params arranged(const ql_packed_params *params) {
    ql_packed_params result = *params;
    result.x = (const void *)(uintptr_t)QL_ARRANGE_ALIGNMENT;
    result.x_stride = ql_cuda_arranged_stride(params->k);
    result.order = result.inverse = NULL;
    return result;
}

/* Plans the product with an engine; false where that does not take it, with x as it is or arranged. */
static bool plan_with(ql_cuda_plan *plan, const ql_cuda_product_engine *engine, const ql_cuda_device *device,
                      const ql_packed_params *params, ql_cuda_choice choice) {
    plan->arranged_bytes = 0;
    if (!engine->prepare(&plan->prepared, device, params, choice)) {
        const ql_packed_params taken = arranged(params);
        plan->arranged_bytes = ql_cuda_arranged_bytes(params->m, params->k);
        if (plan->arranged_bytes < 0 || !engine->prepare(&plan->prepared, device, &taken, choice)) return false;
    }
    if (__builtin_add_overflow(plan->arranged_bytes, plan->prepared.scratch_bytes, &plan->scratch_bytes)) return false;
    plan->engine = engine;
    return true;
}

void ql_cuda_choose(ql_cuda_plan *plan, const ql_cuda_device *device, const ql_packed_params *params) {
    plan->engine = NULL;
    if (ql_cuda_base_wanted() || params->x_type == QL_VALUE_F32) return;
    const ql_cuda_problem problem = ql_cuda_problem_of(params);
    ql_cuda_choice choice = {0};
    if (ql_cuda_choice_find(&choice, device->ordinal, &problem))
        for (int i = 0; engines[i]; i++)
            if (plan_with(plan, engines[i], device, params, choice)) return;
    for (int i = 0; engines[i]; i++)
        if (is_meant(i, device, &problem) && preferred(&choice, i, device, &problem) &&
            plan_with(plan, engines[i], device, params, choice))
            return;
}

int ql_cuda_run(const ql_cuda_guard *guard, void *stream, ql_cuda_plan *plan, const ql_packed_params *params,
                void *scratch, char message[QL_CUDA_MESSAGE]) {
    if (!plan->arranged_bytes) return plan->engine->launch(guard, stream, &plan->prepared, params->x, scratch, message);
    if (ql_cuda_arrange(guard, stream, scratch, params, message) < 0) return -1;
    return plan->engine->launch(guard, stream, &plan->prepared, scratch, (char *)scratch + plan->arranged_bytes,
                                message);
}

int ql_cuda_candidates(ql_cuda_choice out[QL_CUDA_MOST_CANDIDATES], const ql_cuda_device *device,
                       const ql_cuda_problem *problem) {
    int count = 0;
    if (ql_cuda_base_wanted() || problem->x_type == QL_VALUE_F32) return 0;
    for (int meant = 1; meant >= 0; meant--)
        for (int i = 0; engines[i]; i++)
            if (is_meant(i, device, problem) == meant)
                count += engines[i]->candidates(out + count, QL_CUDA_MOST_CANDIDATES - count, device, problem);
    return count;
}
