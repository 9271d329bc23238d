#include "engine.h"

#include "../../kernels/params.h"

_Static_assert((int)QL_WEIGHT_GPTQ == (int)QL_FORMAT_GPTQ && (int)QL_WEIGHT_AWQ == (int)QL_FORMAT_AWQ &&
                   (int)QL_WEIGHT_EETQ == (int)QL_FORMAT_EETQ && (int)QL_WEIGHT_INT8 == (int)QL_FORMAT_INT8 &&
                   (int)QL_WEIGHT_FOURBIT == (int)QL_FORMAT_FOURBIT && (int)QL_WEIGHT_FP8 == (int)QL_FORMAT_FP8 &&
                   (int)QL_WEIGHT_PACKED == (int)QL_FORMAT_PACKED,
               "the kernels number the formats as the host does");
_Static_assert((int)QL_VALUE_F32 == (int)QL_F32 && (int)QL_VALUE_F16 == (int)QL_F16 &&
                   (int)QL_VALUE_BF16 == (int)QL_BF16,
               "the kernels number the dtypes as the host does");

/* The part of the parameters that the weight gives. */
static ql_linear_params params_of(const ql_weight *weight) {
    ql_linear_params p = {.n = weight->n, .k = weight->k, .format = (int32_t)weight->format};
    switch (weight->format) {
    case QL_FORMAT_GPTQ:
        p.codes = weight->gptq.qweight;
        p.zeros = weight->gptq.qzeros;
        p.scales = weight->gptq.scales;
        p.scales_type = (int32_t)weight->gptq.scales_dtype;
        p.index = weight->gptq.g_idx;
        p.group_size = weight->gptq.group_size;
        p.groups = weight->gptq.groups;
        p.bits = weight->gptq.bits;
        p.zero_offset = weight->gptq.zero_offset;
        break;
    case QL_FORMAT_AWQ:
        p.codes = weight->awq.qweight;
        p.zeros = weight->awq.qzeros;
        p.zero_products = weight->awq.zero_products;
        p.scales = weight->awq.scales;
        p.scales_type = (int32_t)weight->awq.scales_dtype;
        p.group_size = weight->awq.group_size;
        break;
    case QL_FORMAT_EETQ:
        p.codes = weight->eetq.weight;
        p.scales = weight->eetq.scales;
        p.scales_type = (int32_t)weight->eetq.scales_dtype;
        break;
    case QL_FORMAT_INT8:
        p.codes = weight->int8.codes;
        p.scales = weight->int8.absmax;
        break;
    case QL_FORMAT_FOURBIT:
        p.codes = weight->fourbit.packed;
        p.table = weight->fourbit.code;
        p.scales = weight->fourbit.absmax;
        p.nested = weight->fourbit.nested;
        p.nested_table = weight->fourbit.nested_code;
        p.offset = weight->fourbit.offset;
        p.group_size = weight->fourbit.blocksize;
        p.nested_blocksize = weight->fourbit.nested_blocksize;
        break;
    case QL_FORMAT_FP8:
        p.codes = weight->fp8.weight;
        p.scales = weight->fp8.scale;
        p.row_stride = weight->fp8.row_stride;
        p.col_stride = weight->fp8.col_stride;
        p.block_n = weight->fp8.block_n;
        p.block_k = weight->fp8.block_k;
        p.scale_stride = weight->fp8.scale_stride;
        break;
    case QL_FORMAT_PACKED: {
        const ql_packed *packed = &weight->packed;
        p.codes = packed->codes;
        p.zeros = packed->zeros;
        p.scales = packed->nested_table ? packed->nested_absmax : packed->scales;
        p.scales_type = (int32_t)packed->spec.scales_dtype;
        p.index = packed->inverse;
        p.table = packed->table;
        p.nested = packed->nested_table ? packed->scales : NULL;
        p.nested_table = packed->nested_table;
        p.offset = packed->spec.nested_offset;
        p.group_size = packed->spec.group_size;
        p.groups = packed->spec.groups;
        p.nested_blocksize = packed->spec.nested_blocksize;
        p.code = packed->spec.code;
        break;
    }
    }
    return p;
}

static bool quantizes_activations(const ql_weight *weight) {
    return weight->format == QL_FORMAT_INT8 ||
           (weight->format == QL_FORMAT_FP8 && weight->fp8.activation != QL_FP8_NONE);
}

/* A launch reaches at most this many blocks along m; longer inputs take several. */
enum { MOST_GRID_M = 65535 };

static int launch_products(const ql_cuda_guard *guard, void *stream, ql_cuda_kernel kernel, ql_linear_params p,
                           int64_t outputs, int64_t tokens, char message[QL_CUDA_MESSAGE]) {
    int64_t m = p.m, most = MOST_GRID_M * tokens;
    int64_t x_bytes = p.x_stride * (p.x_type == QL_VALUE_F32 ? 4 : 2),
            out_bytes = outputs * (p.out_type == QL_VALUE_F32 ? 4 : 2);
    for (int64_t done = 0; done < m; done += most) {
        p.m = m - done < most ? m - done : most;
        ql_cuda_grid grid = {.x = ql_ceil_div(outputs, QL_LINEAR_OUTPUTS),
                             .y = ql_ceil_div(p.m, tokens),
                             .threads = QL_LINEAR_THREADS,
                             .overlaps = true};
        if (ql_cuda_launch(guard, kernel, stream, &grid, &p, message) < 0) return -1;
        p.x = (const char *)p.x + most * x_bytes;
        p.out = (char *)p.out + most * out_bytes;
        if (!p.x_codes) continue;
        p.x_codes += most * p.x_pitch;
        p.row_absmax += most;
    }
    return 0;
}

/* A thread an element, up to more blocks than any GPU takes at once: the kernels go on by the grid's size. */
static ql_cuda_grid elements_of(int64_t count) {
    const int64_t blocks = ql_ceil_div(count, QL_LINEAR_THREADS), most = 65536;
    return (ql_cuda_grid){.x = blocks < most ? blocks : most, .y = 1, .threads = QL_LINEAR_THREADS};
}

static ql_linear_params product_params(const ql_cuda_product *product) {
    ql_linear_params p = params_of(product->weight);
    p.out = product->out;
    p.x = product->x;
    p.m = product->m;
    p.x_stride = product->x_stride;
    p.x_type = p.out_type = (int32_t)product->dtype;
    p.bias = product->bias.data;
    p.bias_type = (int32_t)product->bias.dtype;
    p.bias_stride = product->bias.stride;
    return p;
}

/* What the kernels made for packed weights take. */
static ql_packed_params packed_params(const ql_cuda_product *product) {
    const ql_packed *packed = &product->weight->packed;
    return (ql_packed_params){
        .out = product->out,
        .x = product->x,
        .bias = product->bias.data,
        .codes = packed->codes,
        .scales = packed->scales,
        .zeros = packed->zeros,
        .table = packed->table,
        .nested_table = packed->nested_table,
        .nested_absmax = packed->nested_absmax,
        .order = packed->order,
        .inverse = packed->inverse,
        .m = product->m,
        .n = product->weight->n,
        .k = product->weight->k,
        .x_stride = product->x_stride,
        .bias_stride = product->bias.stride,
        .group_size = packed->spec.group_size,
        .groups = packed->spec.groups,
        .nested_blocksize = packed->spec.nested_blocksize,
        .nested_offset = packed->spec.nested_offset,
        .code = packed->spec.code,
        .scales_type = (int32_t)packed->spec.scales_dtype,
        .bias_type = (int32_t)product->bias.dtype,
        .x_type = (int32_t)product->dtype,
        .out_type = (int32_t)product->dtype,
    };
}

/* A layer's product before its activations are quantized. */
static ql_cuda_w8a8 w8a8_of(const ql_cuda_product *product) {
    ql_cuda_w8a8 result = ql_cuda_w8a8_of(product->weight);
    result.params.out = product->out;
    result.params.x = product->x;
    result.params.m = product->m;
    result.params.x_stride = product->x_stride;
    result.params.x_type = result.params.out_type = (int32_t)product->dtype;
    result.params.bias = product->bias.data;
    result.params.bias_type = (int32_t)product->bias.dtype;
    result.params.bias_stride = product->bias.stride;
    return result;
}

static int launch_base(const ql_cuda_guard *guard, void *stream, const ql_linear_params *p,
                       char message[QL_CUDA_MESSAGE]) {
    const bool few = p->m <= QL_LINEAR_FEW;
    return launch_products(guard, stream, few ? QL_KERNEL_ql_linear_few : QL_KERNEL_ql_linear_many, *p, p->n,
                           few ? QL_LINEAR_FEW : QL_LINEAR_MANY, message);
}

static int launch_w8a8(const ql_cuda_guard *guard, void *stream, const ql_cuda_product *product,
                       ql_cuda_product_plan *plan, void *scratch, char message[QL_CUDA_MESSAGE]) {
    ql_w8a8_params filled;
    if (ql_cuda_w8a8_run(&filled, guard, stream, &plan->w8a8.plan, &plan->w8a8.product, scratch, message) < 0)
        return -1;
    if (plan->w8a8.plan.engine != QL_CUDA_W8A8_BASE) return 0;
    ql_linear_params p = product_params(product);
    if (product->weight->format == QL_FORMAT_INT8) {
        p.x_codes = filled.x_codes;
        p.x_pitch = filled.x_pitch;
        p.row_absmax = filled.x_scales;
        p.outliers = filled.outliers;
        return launch_products(guard, stream, QL_KERNEL_ql_linear_int8, p, p.n, QL_LINEAR_INT8, message);
    }
    p.x = scratch;
    p.x_type = QL_VALUE_F32;
    p.x_stride = p.k;
    return launch_base(guard, stream, &p, message);
}

int ql_cuda_linear_plan(ql_cuda_product_plan *plan, const ql_cuda_place *place, const ql_cuda_product *product,
                        char message[QL_CUDA_MESSAGE]) {
    plan->kind = QL_CUDA_PLAN_BASE;
    plan->scratch_bytes = 0;
    const bool is_packed = product->weight->format == QL_FORMAT_PACKED;
    if (!is_packed && !quantizes_activations(product->weight)) return 0;
    const ql_cuda_device *device = ql_cuda_device_get(place->device, message);
    if (!device) return -1;
    if (is_packed) {
        plan->packed.product = packed_params(product);
        ql_cuda_choose(&plan->packed.plan, device, &plan->packed.product);
        if (!plan->packed.plan.engine) return 0;
        plan->kind = QL_CUDA_PLAN_PACKED;
        plan->scratch_bytes = plan->packed.plan.scratch_bytes;
    } else {
        plan->w8a8.product = w8a8_of(product);
        plan->w8a8.plan = ql_cuda_w8a8_choose(device, &plan->w8a8.product, ql_cuda_base_wanted());
        plan->kind = QL_CUDA_PLAN_W8A8;
        plan->scratch_bytes = plan->w8a8.plan.scratch_bytes;
    }
    return 0;
}

static int launch_plan(const ql_cuda_guard *guard, void *stream, const ql_cuda_product *product,
                       ql_cuda_product_plan *plan, void *scratch, char message[QL_CUDA_MESSAGE]) {
    if (plan->kind == QL_CUDA_PLAN_PACKED)
        return ql_cuda_run(guard, stream, &plan->packed.plan, &plan->packed.product, scratch, message);
    if (plan->kind == QL_CUDA_PLAN_W8A8) return launch_w8a8(guard, stream, product, plan, scratch, message);
    const ql_linear_params p = product_params(product);
    return launch_base(guard, stream, &p, message);
}

int ql_cuda_linear(const ql_cuda_place *place, const ql_cuda_product *product, ql_cuda_product_plan *plan,
                   void *scratch, char message[QL_CUDA_MESSAGE]) {
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    const int result = launch_plan(&guard, place->stream, product, plan, scratch, message);
    ql_cuda_leave(&guard);
    return result;
}

int ql_cuda_linear_grad(const ql_cuda_place *place, void *out, const void *g, int64_t g_stride, ql_dtype dtype,
                        int64_t m, const ql_weight *weight, char message[QL_CUDA_MESSAGE]) {
    ql_linear_params p = params_of(weight);
    p.out = out;
    p.x = g;
    p.m = m;
    p.x_stride = g_stride;
    p.x_type = p.out_type = (int32_t)dtype;
    ql_cuda_guard guard;
    if (ql_cuda_enter(&guard, place->device, message) < 0) return -1;
    int result = launch_products(&guard, place->stream, QL_KERNEL_ql_linear_grad, p, p.k, QL_LINEAR_MANY, message);
    ql_cuda_leave(&guard);
    return result;
}

int ql_cuda_copy(const ql_cuda_place *place, void *out, const void *from, ql_dtype dtype, int ndim,
                 const int64_t *shape, const int64_t *stride, char message[QL_CUDA_MESSAGE]) {
    ql_copy_params p = {.out = out, .from = from, .type = (int32_t)dtype, .ndim = ndim, .count = 1};
    for (int i = 0; i < ndim; i++) {
        p.shape[i] = shape[i];
        p.stride[i] = stride[i];
        p.count *= shape[i];
    }
    if (p.count == 0) return 0;
    const ql_cuda_grid grid = elements_of(p.count);
    return ql_cuda_launch_alone(place, QL_KERNEL_ql_copy, &grid, &p, message);
}

/* By code: who makes a matrix of a packed weight whose columns are in order. */
#define ENTRY(name, source, code) [code] = QL_KERNEL_##name,
static const ql_cuda_kernel dequantizers[QL_CODE_COUNT] = {QL_DEQUANTIZE_VARIANTS(ENTRY)};
#undef ENTRY

int ql_cuda_dequantize(const ql_cuda_place *place, void *out, ql_dtype dtype, const ql_weight *weight,
                       char message[QL_CUDA_MESSAGE]) {
    ql_linear_params p = params_of(weight);
    p.out = out;
    p.out_type = (int32_t)dtype;
    if (weight->n == 0) return 0;
    ql_cuda_kernel kernel = QL_KERNEL_ql_dequantize;
    int64_t threads = weight->n * weight->k;
    if (weight->format == QL_FORMAT_PACKED && !weight->packed.inverse && !ql_cuda_base_wanted()) {
        const int code = weight->packed.spec.code;
        kernel = dequantizers[code];
        threads = 32 * ql_ceil_div(weight->n, QL_STRIP) * ql_ceil_div(weight->k, QL_TILE_K(code)); /* a warp a tile */
    }
    const ql_cuda_grid grid = elements_of(threads);
    return ql_cuda_launch_alone(place, kernel, &grid, &p, message);
}
