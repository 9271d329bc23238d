"""Every kernel for packed weights once or twice on small shapes, with its packing, gradient and dequantizing: what
cuda_sanitize.sh watches. Prints how many products it ran; an error ends it."""

import torch
from test_cuda_products import DTYPES, FORMATS, Oracle, fitting, problem

from qlinear import _qlinear


def main():
    torch.manual_seed(0)
    count = 0
    for name, form in FORMATS.items():
        N, K = fitting(form, 144, 400)
        layer = form[0](N, K)
        oracle = Oracle(layer)
        for dtype in DTYPES:
            for m in (1, 9, 21, 70):
                x = torch.randn(m, K, device="cuda").to(dtype)
                for candidate in _qlinear.candidates(0, *problem(layer, dtype), m):
                    _qlinear.set_choice(0, *problem(layer, dtype), m, *candidate)
                    oracle.check(x, layer(x))
                    count += 1
                _qlinear.set_choice(0, *problem(layer, dtype), m, None, 0)
        x = torch.randn(3, K, device="cuda")
        oracle.check(x, layer(x))
        layer.engine().grad_input(torch.randn(3, N, device="cuda"))
        torch.cuda.synchronize()
        print(name, flush=True)
    print(count, "products")


if __name__ == "__main__":
    main()
