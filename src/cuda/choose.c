#include "choose.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static bool base_wanted;
static pthread_once_t wish_read = PTHREAD_ONCE_INIT;

static void read_wish(void) {
    const char *wish = getenv("QLINEAR_KERNELS");
    base_wanted = wish && strcmp(wish, "base") == 0;
}

int64_t ql_cuda_packed_scratch(int64_t m, const ql_weight *weight) {
    (void)m, (void)weight;
    return 0;
}

int ql_cuda_packed_linear(const ql_cuda_guard *guard, void *stream, const ql_packed_params *params, void *scratch,
                          char message[QL_CUDA_MESSAGE]) {
    (void)guard, (void)stream, (void)params, (void)scratch, (void)message;
    pthread_once(&wish_read, read_wish);
    return QL_CUDA_BASE;
}
