"""Every kernel once or twice on small shapes, for cuda_sanitize.sh to watch. Prints how many calls it made; an error
ends it.

packed: products with packed weights, their packing, gradients and dequantizing. w8a8: products with 8-bit weights and
activations. quantize: quantizers, and codes from one form to another."""

import argparse
import itertools
import math
from fnmatch import fnmatch

import test_cuda_quantize as quantizers
import test_cuda_w8a8 as w8a8
import torch
from test_cuda_products import DTYPES, FORMATS, Oracle, fitting, problem
from w8a8_shapes import SHARED, WHOLE

from qlinear import _qlinear


def engine_of(kernel):
    """ql_wgmma_int4_f16_32: wgmma"""
    return kernel.split("_")[1]


def whole(kernel):
    """The parameter with which a kernel splits nothing: parts of K of mma; thread blocks of wgmma, of which 256 tokens
    take two."""
    return 1 + ("_256" in kernel)


def candidates(layer, dtype, m, options):
    """Kernels and parameters to run. Without splitting each kernel once."""
    found = _qlinear.candidates(0, *problem(layer, dtype), m)
    found = [one for one in found if not options.engines or engine_of(one[0]) in options.engines]
    found = [one for one in found if not any(fnmatch(one[0], pattern) for pattern in options.skip)]
    if options.unsplit:
        found = [(kernel, parameter if engine_of(kernel) == "decode" else whole(kernel)) for kernel, parameter in found]
    return list(dict.fromkeys(found))


def packed(name, options):
    form = FORMATS[name]
    # Nested absmax is for decode where K is whole batches of its blocks.
    N, K = fitting(form, 144, 512 if name.startswith("nf4") else 400)
    layer = form[0](N, K)
    check = (lambda x, out: None) if options.unchecked else Oracle(layer).check
    count, seen = 0, set()
    for dtype, m in itertools.product(DTYPES[:1] if options.once else DTYPES, (70, 9, 1)):
        x = torch.randn(m, K, device="cuda").to(dtype)
        found = candidates(layer, dtype, m, options)
        for kernel, parameter in [one for one in found if not options.once or one not in seen]:
            _qlinear.set_choice(0, *problem(layer, dtype), m, kernel, parameter)
            check(x, layer(x))
            count += 1
        _qlinear.set_choice(0, *problem(layer, dtype), m, None, 0)
        seen.update(found)
    x = torch.randn(3, K, device="cuda")
    check(x, layer(x))
    layer.engine().grad_input(torch.randn(3, N, device="cuda"))
    torch.cuda.synchronize()
    return count


def eight_bit(kind, options):
    """Odd sizes, which the base kernels take, then those that reach every kernel. Where x has one scale its rows meet
    in scratch, as blocks that share a tile do."""
    shapes = [(17, 130, 5), (100, 33, 3), *WHOLE] + ([] if options.unsplit else [*SHARED])
    if options.unsplit and kind == "tensor":
        shapes = [shape for shape in shapes if shape[2] == 1]
    shapes = [shape for shape in shapes if math.prod(shape) <= options.most]
    for K, N, M in shapes:
        layer = w8a8.make(kind, K, N, torch.randn(N, device="cuda"))
        for dtype in w8a8.DTYPES[:1] if options.once or M * N > 10000 else w8a8.DTYPES:
            x = w8a8.activations(M, K, dtype, outliers=min(6, K // 8))
            out = layer(x)
            if not options.unchecked:
                w8a8.check(layer, kind, x, out)
    layer = w8a8.make(kind, 264, 130)
    layer.engine().grad_input(torch.randn(3, 130, device="cuda"))
    layer.dequantize(torch.float16)
    torch.cuda.synchronize()
    return len(shapes)


def quantize():
    """Each test of its own, on few numbers."""
    quantizers.NUMBERS = {"normal": quantizers.normal}
    for function in quantizers.FUNCTIONS.values():
        for x in quantizers.layouts(torch.randn(66, 192).half()).values():
            function(x.cuda())
    for K, N in ((64, 2), (192, 34)):
        quantizers.test_eetq_pack_and_unpack(K, N)
    for bits in (2, 3, 4, 8):
        quantizers.test_gptq_codes(bits, (101, 130))
        quantizers.test_gptq_pack_act_order(bits, "gptq")
    for kind in (torch.float16, torch.float32):
        quantizers.test_awq_storages(64, kind)
    quantizers.test_awq_codes((101, 130))
    quantizers.test_quant_weights(True)
    quantizers.test_fp8_static(quantizers.normal, 0.01)
    quantizers.test_fp8_upper_bound(quantizers.normal, 0.5)
    quantizers.test_scaled_mm_is_that_of_the_cpu_within_rounding()
    quantizers.test_dequantize(quantizers.normal, "float16", 64, 4097)
    quantizers.test_absmax_mean(65537)
    torch.cuda.synchronize()
    return len(quantizers.FUNCTIONS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=["packed", "w8a8", "quantize"])
    parser.add_argument("--engines", nargs="+", help="of packed: of decode, wgmma and mma; all where it is not given")
    parser.add_argument("--skip", nargs="+", default=(), help="of packed: kernels, as patterns")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="of packed")
    parser.add_argument("--kinds", nargs="+", default=["int8", "token", "tensor", "group"], help="of w8a8")
    parser.add_argument("--most", type=int, default=1 << 62, help="of w8a8: no shape of more products")
    parser.add_argument("--once", action="store_true", help="fp16 alone; of packed each kernel for one number of rows")
    parser.add_argument("--unchecked", action="store_true", help="no result is compared, which torch's kernels do")
    parser.add_argument("--filled", action="store_true", help="no memory that torch gives holds anything from before")
    parser.add_argument("--unsplit", action="store_true", help="no product that blocks share by way of scratch")
    options = parser.parse_args()
    torch.manual_seed(0)
    # Then torch writes what it gives, scratch too.
    torch.use_deterministic_algorithms(options.filled, warn_only=True)
    count = 0
    if "packed" in options.subjects:
        for name in options.formats:
            count += packed(name, options)
            print(name, flush=True)
    if "w8a8" in options.subjects:
        for kind in options.kinds:
            count += eight_bit(kind, options)
            print(kind, flush=True)
    if "quantize" in options.subjects:
        count += quantize()
        print("quantize", flush=True)
    assert count
    print(count, "calls")


if __name__ == "__main__":
    main()
