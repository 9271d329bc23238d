/* Parallel loops on the OpenMP runtime that the process already has (torch's libgomp), found at run time: nothing is
 * linked. Serial where there is none, and in a child forked after a parallel loop ran, where that runtime hangs. */
#ifndef QL_CPU_THREADS_H
#define QL_CPU_THREADS_H

#include <stdint.h>

/* Calls body(context, begin, end) so that the ranges cover [0, count) exactly once, each of at most `grain` items
 * (the last may be shorter). Ranges run on several threads in any order; the calls return before this does. */
void ql_cpu_parallel(int64_t count, int64_t grain, void (*body)(void *context, int64_t begin, int64_t end),
                     void *context);

/* How many threads a loop may use now (torch.set_num_threads changes it). */
int ql_cpu_thread_count(void);

/* The runtime in use: its file's name, or "none". */
const char *ql_cpu_thread_runtime(void);

#endif
