#include "arrange.h"

#include "../../kernels/params.h"

enum { PIECE = 8, PIECE_BYTES = 16, MOST_COLUMNS = 65536, MOST_BLOCKS = 4 /* a multiprocessor */ };

/* Beside a product on an H200, us: 256 rows of 8192 columns by two blocks a row 5.5, by blocks that have some rows each 6.9, four
 * rows at a time 9; 256 rows of 14336 columns 9.0, 7.2 and 12.8; 512 of 4096 columns -, 4.8 and 5.6; 1024 rows of 8192
 * columns -, 12.9 and 11.5. */
enum { MOST_PARTS = 512, MANY_ROWS = 1024 };

int64_t ql_cuda_arranged_stride(int64_t k) { return (k + PIECE - 1) / PIECE * PIECE; }

int64_t ql_cuda_arranged_bytes(int64_t m, int64_t k) {
    int64_t bytes;
    if (__builtin_mul_overflow(m, ql_cuda_arranged_stride(k) * 2, &bytes) ||
        __builtin_add_overflow(bytes, QL_ARRANGE_ALIGNMENT - 1, &bytes))
        return -1;
    return bytes - bytes % QL_ARRANGE_ALIGNMENT;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Four rows at a time, two blocks a multiprocessor; false where these have no room. */
static bool lay_many(ql_cuda_grid *grid, const ql_arrange_params *p, const ql_cuda_properties *gpu) {
    const int64_t bytes = QL_ARRANGE_ROWS * p->out_stride * 2;
    if (bytes > gpu->shared_bytes) return false;
    grid->shared_bytes = (int)bytes;
    grid->x = least(ql_ceil_div(p->m, QL_ARRANGE_ROWS), 2 * (int64_t)gpu->multiprocessors);
    return true;
}

/* A row a block, or several blocks; false where there are too many of them, or a row does not fit. */
static bool lay_ordered(ql_cuda_grid *grid, const ql_arrange_params *p, const ql_cuda_properties *gpu) {
    const int64_t parts = ql_ceil_div(p->out_stride / PIECE, QL_ARRANGE_THREADS),
                  bytes = QL_ARRANGED_ROW_BYTES(p->out_stride);
    if (p->m > MOST_PARTS / parts || bytes > gpu->shared_bytes) return false;
    /* Few blocks are quicker if a multiprocessor has room for one, or two, as each asks for more than half of its shared memory, or
     * near half. */
    const int64_t blocks = p->m * parts, all = gpu->multiprocessors, sixteenth = gpu->shared_bytes / 16;
    const bool is_few = blocks <= (parts <= 2 ? all : all / 2);
    const int64_t asked = is_few ? 9 * sixteenth : blocks <= 2 * all ? 7 * sixteenth : 0;
    grid->shared_bytes = (int)(bytes < asked ? asked : bytes);
    grid->x = p->m;
    grid->y = parts;
    return true;
}

/* Some rows a block, of which two lie in shared memory if there is room; false where none does. */
static bool lay_rows(ql_cuda_grid *grid, ql_arrange_params *p, const ql_cuda_properties *gpu) {
    const int64_t row = QL_ARRANGED_ROW_BYTES(p->out_stride), room = gpu->shared_bytes;
    const int64_t places = ql_ceil_div(p->out_stride / PIECE, QL_ARRANGE_THREADS) * QL_ARRANGE_THREADS * PIECE_BYTES;
    p->two_rows = places + 2 * row <= room;
    const int64_t bytes = places + (p->two_rows + 1) * row;
    if (p->out_stride > MOST_COLUMNS || bytes > room) return false;
    grid->shared_bytes = (int)bytes;
    grid->x = least(p->m, least(room / bytes, MOST_BLOCKS) * gpu->multiprocessors);
    return true;
}

int ql_cuda_arrange(const ql_cuda_guard *guard, void *stream, void *out, const ql_packed_params *params,
                    char message[QL_CUDA_MESSAGE]) {
    ql_arrange_params p = {.out = out,
                           .x = params->x,
                           .order = params->order,
                           .inverse = params->inverse,
                           .m = params->m,
                           .k = params->k,
                           .x_stride = params->x_stride,
                           .out_stride = ql_cuda_arranged_stride(params->k)};
    ql_cuda_grid grid = {.y = 1, .threads = QL_ARRANGE_THREADS, .overlaps = true};
    if (p.order && p.m >= MANY_ROWS && lay_many(&grid, &p, guard->properties))
        return ql_cuda_launch(guard, QL_KERNEL_ql_arrange_many, stream, &grid, &p, message);
    if (p.order && lay_ordered(&grid, &p, guard->properties))
        return ql_cuda_launch(guard, QL_KERNEL_ql_arrange_ordered, stream, &grid, &p, message);
    if (p.order && lay_rows(&grid, &p, guard->properties))
        return ql_cuda_launch(guard, QL_KERNEL_ql_arrange_rows, stream, &grid, &p, message);
    grid.x = least(ql_ceil_div(p.m * (p.out_stride / PIECE), QL_ARRANGE_THREADS), 65536);
    return ql_cuda_launch(guard, QL_KERNEL_ql_arrange, stream, &grid, &p, message);
}
