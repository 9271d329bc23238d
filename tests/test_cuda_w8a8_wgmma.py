"""FP8 and LLM.int8() with many rows on a GPU: sizes whose tiles are whole, split along K, done in waves, shared by
the members of a cluster, against float64."""

import pytest
import torch
from test_cuda_w8a8 import (  # noqa: F401
    DTYPES,
    KINDS,
    UNIT,
    activations,
    check,
    cores_error,
    dense,
    make,
    pytestmark,
    quantize_fp8,
    quantize_int8,
    sums_of,
)
from w8a8_shapes import SHARED, WHOLE

# (K, N): few tiles and much K, as many as multiprocessors and a little more, some waves, ragged everywhere.
SIZES = ((14336, 512), (4096, 6144), (1024, 17000), (528, 40001), (8192, 2568))
ROWS = (17, 40, 70, 129, 250, 300, 600)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_many_rows(kind, size):
    K, N = size
    layer = make(kind, K, N, torch.randn(N, device="cuda").half())
    W = dense(layer, kind)
    for i, M in enumerate(ROWS):
        dtype = (torch.float16, torch.bfloat16)[i % 2]
        x = activations(M, K, dtype, outliers=(6, 40, 0)[i % 3])
        seen = quantize_int8(x, layer.threshold) if kind.startswith("int8") else quantize_fp8(x, layer, kind)
        out = layer(x)
        reference, magnitude = seen @ W.t() + layer.bias.double(), seen.abs() @ W.abs().t()
        bound = (K + 8) * 2.0**-24 * magnitude + UNIT[dtype] * reference.abs() + 2.0**-25
        if not kind.startswith("int8"):
            bound += cores_error(seen, W, reference, sums_of(kind, K))
        wrong = ~((out.double() - reference).abs() <= bound)
        assert not wrong.any(), f"{M} rows: {int(wrong.sum())} of {wrong.numel()}, first {wrong.nonzero()[0].tolist()}"
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("shape", WHOLE + SHARED, ids=str)
def test_every_kernel(kind, shape):
    K, N, M = shape
    layer = make(kind, K, N, torch.randn(N, device="cuda").half())
    for dtype in DTYPES:
        x = activations(M, K, dtype)
        out = layer(x)
        check(layer, kind, x, out)
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("M", [64, 300])
def test_promoted_sums_of_every_scale(M):
    """Sums in fp32 with scales that do not change along K: the kernels of groups."""
    for kind in ("token", "tensor", "static"):
        layer = make(kind, 4096, 2048)
        layer.promoted = True
        x = activations(M, 4096, torch.float32)
        seen, W = quantize_fp8(x, layer, kind), dense(layer, kind)
        error = (layer(x).double() - seen @ W.t()).abs() / (seen.abs() @ W.abs().t())
        assert error.max() < 2.0**-14


def test_weights_of_every_step_of_16_columns():
    for K in (16, 112, 144, 1040):
        for kind in ("token", "group", "int8"):
            layer = make(kind, K, 264)
            for M in (18, 130):
                x = activations(M, K, torch.float16, outliers=3)
                seen = quantize_int8(x, layer.threshold) if kind == "int8" else quantize_fp8(x, layer, kind)
                W = dense(layer, kind)
                reference, magnitude = seen @ W.t(), seen.abs() @ W.abs().t()
                assert ((layer(x).double() - reference).abs() <= 2.0**-10 * magnitude + 2.0**-25).all()
