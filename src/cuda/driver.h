/* The CUDA driver, opened at run time: nothing is linked, importing calls nothing. The first caller of ql_cuda_open
 * loads libcuda.so.1 and calls cuInit; until then a process can fork freely. */
#ifndef QL_CUDA_DRIVER_H
#define QL_CUDA_DRIVER_H

#include "driver_abi.h"

#include <stdbool.h>

/* Room for one sentence that says what is missing. */
enum { QL_CUDA_MESSAGE = 320 };

typedef struct ql_cuda_driver {
#define QL_CU_FIELD(field, symbol, version, parameters) ql_cu_result(*field) parameters;
    QL_CU_FUNCTIONS(QL_CU_FIELD)
#undef QL_CU_FIELD
    char path[256]; /* of the library's file */
    int version;    /* 1000 * major + 10 * minor of the newest CUDA that the driver knows */
} ql_cuda_driver;

/* The driver, loaded but perhaps not initialized, or NULL with a sentence in message. Never calls cuInit. */
const ql_cuda_driver *ql_cuda_load(char message[QL_CUDA_MESSAGE]);

/* The driver after cuInit, or NULL with a sentence in message: no driver, one too old, no GPU, or a process that was
 * forked after cuInit, where the driver does not work. */
const ql_cuda_driver *ql_cuda_open(char message[QL_CUDA_MESSAGE]);

/* Whether cuInit has been called here. */
bool ql_cuda_initialized(void);

/* Whether this process was forked from one that had called cuInit: the driver does not work here. */
bool ql_cuda_forked(void);

/* The driver's own words for a result; never NULL. */
const char *ql_cuda_error(const ql_cuda_driver *driver, ql_cu_result result);

#endif
