"""Every kernel for packed weights once or twice on small shapes, with its packing, gradient and dequantizing: what
cuda_sanitize.sh watches. Prints how many products it ran; an error ends it."""

import argparse

import torch
from test_cuda_products import DTYPES, FORMATS, Oracle, fitting, problem

from qlinear import _qlinear


def engine_of(kernel):
    """ql_wgmma_int4_f16_32: wgmma"""
    return kernel.split("_")[1]


def candidates(layer, dtype, m, options):
    """Kernels and parameters to run. Without splitting each kernel once, with the parameter that splits nothing: blocks
    of wgmma, parts of K of mma."""
    found = _qlinear.candidates(0, *problem(layer, dtype), m)
    found = [one for one in found if not options.engines or engine_of(one[0]) in options.engines]
    if options.unsplit:
        found = [(kernel, parameter if engine_of(kernel) == "decode" else 1) for kernel, parameter in found]
    return list(dict.fromkeys(found))


def products(name, options):
    form = FORMATS[name]
    N, K = fitting(form, 144, 400)
    layer = form[0](N, K)
    oracle = Oracle(layer)
    count = 0
    for dtype in DTYPES:
        for m in (1, 9, 21, 70):
            x = torch.randn(m, K, device="cuda").to(dtype)
            for kernel, parameter in candidates(layer, dtype, m, options):
                _qlinear.set_choice(0, *problem(layer, dtype), m, kernel, parameter)
                oracle.check(x, layer(x))
                count += 1
            _qlinear.set_choice(0, *problem(layer, dtype), m, None, 0)
    x = torch.randn(3, K, device="cuda")
    oracle.check(x, layer(x))
    layer.engine().grad_input(torch.randn(3, N, device="cuda"))
    torch.cuda.synchronize()
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", help="of decode, wgmma and mma; all where it is not given")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--unsplit", action="store_true", help="no product that blocks share by way of scratch")
    options = parser.parse_args()
    torch.manual_seed(0)
    count = 0
    for name in options.formats:
        count += products(name, options)
        print(name, flush=True)
    assert count
    print(count, "products")


if __name__ == "__main__":
    main()
