/* Products of the layers that quantize their activations: FP8 and LLM.int8(). At most two launches, the second overlapping the
 * first, and no synchronization: what decides the outliers' columns stays on the device.
 *
 * Up to 8 rows, where a thread block can hold all of x (32,768 values), kernels/w8a8_decode.cu quantizes and multiplies; else
 * kernels/w8a8_quantize.cu or w8a8_rows.cu go first, and wgmma, decode or mma.sync multiply their codes. What none of
 * these takes, as a weight whose rows do not begin at multiples of 16 bytes, is left to the base kernels, after the quantizer:
 * they are slow. */
#ifndef QL_CUDA_W8A8_H
#define QL_CUDA_W8A8_H

#include "../../kernels/w8a8_quantize.h"
#include "../formats/weight.h"
#include "choices.h"
#include "launch.h"

typedef enum ql_cuda_w8a8_engine {
    QL_CUDA_W8A8_BASE, /* only the quantizer is launched: e4m3's rounded activations as fp32, int8's codes */
    QL_CUDA_W8A8_DECODE,
    QL_CUDA_W8A8_WGMMA,
    QL_CUDA_W8A8_MMA
} ql_cuda_w8a8_engine;

/* A product whose activations are not quantized yet: of `params` all but x_codes, x_scales, x_pitch and outliers is given. */
typedef struct ql_cuda_w8a8 {
    ql_w8a8_params params;
    bool fast; /* the weight's layout is one that params can tell */
    int mode;  /* QL_W8A8_TOKEN, ...; of int8 the first */
    float threshold, input_scale, upper_bound;
} ql_cuda_w8a8;

/* Found once, so that scratch and launch agree. */
typedef struct ql_cuda_w8a8_plan {
    ql_cuda_w8a8_engine engine;
    ql_cuda_choice
        choice; /* the engine's kernel; decode's parameter is the warps of a team + 32 * the blocks of a cluster */
    bool own;   /* of decode: no quantizer goes before */
    int64_t scales_at, outliers_at, meeting_at, product_at, scratch_bytes; /* codes or values at 0 */
} ql_cuda_w8a8_plan;

/* What product and quantizer take of a weight that quantizes its activations, of m rows of x. */
ql_cuda_w8a8 ql_cuda_w8a8_of(const ql_weight *weight);

/* base: as if there were base kernels only. scratch_bytes is -1 where they do not fit int64. */
ql_cuda_w8a8_plan ql_cuda_w8a8_choose(const ql_cuda_device *device, const ql_cuda_w8a8 *product, bool base);

/* Launches the plan on the stream; with QL_CUDA_W8A8_BASE the quantizer alone. *filled: the parameters with what the
 * quantizer makes. 0, or -1 with a sentence in message. */
int ql_cuda_w8a8_run(ql_w8a8_params *filled, const ql_cuda_guard *guard, void *stream, const ql_cuda_w8a8_plan *plan,
                     const ql_cuda_w8a8 *product, void *scratch, char message[QL_CUDA_MESSAGE]);

#endif
