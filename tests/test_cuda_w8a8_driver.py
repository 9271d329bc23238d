"""What a product with 8-bit activations asks of the driver, seen by a driver without a GPU: one or two launches, of
which the second overlaps the first, and nothing else."""

import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from fake_cuda import ExchangeArray
from test_cuda_build import LISTED
from w8a8_shapes import SHARED, WHOLE

from qlinear import _qlinear

pytestmark = [
    pytest.mark.skipif(not _qlinear.cuda_info()["built"], reason="built without CUDA kernels"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler"),
]


def make(kind, K, N):
    if kind.startswith("int8"):
        codes, absmax = np.ones((N, K), np.int8), np.ones(N, np.float32)
        threshold = 0.0 if kind == "int8-0" else 6.0
        return _qlinear.Linear8bitLt(ExchangeArray(codes), ExchangeArray(absmax), threshold=threshold)
    weight, options = np.zeros((N, K), np.uint8), {}
    scale = np.ones((-(-N // 128), -(-K // 128)) if kind == "group" else (N, 1), np.float32)
    if kind == "static":
        options["input_scale"] = ExchangeArray(np.ones(1, np.float32))
    return _qlinear.Fp8Linear(ExchangeArray(weight), ExchangeArray(scale), activation=kind, **options)


def calls_of(driver, kind, K, N, rows, dtype):
    """The driver's functions that a second call of the layer uses, and its launches."""
    layer, x = make(kind, K, N), ExchangeArray(np.ones((rows, K), dtype))
    layer(x)
    driver.forget()
    layer(x)
    launches = [
        (call.kernel.decode(), list(call.grid), list(call.block), call.shared_bytes, call.cluster, call.overlaps)
        for call in driver.launches()
    ]
    return driver.functions(), launches


KINDS = ("int8", "int8-0", "token", "tensor", "static", "group")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(4096, 6144), (14336, 4096), (28672, 512), (128, 64), (100, 33)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_at_most_two_launches_that_overlap(server, kind, size, dtype):
    for rows in (1, 2, 4, 8, 16, 17, 100, 1000):
        functions, launches = server.run(calls_of, kind, *size, rows, dtype)
        waits = [name for name in functions if "Synchronize" in name or "Memcpy" in name]
        assert waits == []
        assert 1 <= len(launches) <= 2, (rows, launches)
        for _, grid, block, shared_bytes, cluster, overlaps in launches:
            assert overlaps
            assert grid[0] >= 1
            assert 32 <= block[0] <= 1024
            assert shared_bytes <= 232448
            assert grid[0] % max(cluster, 1) == 0
        if len(launches) == 2:
            assert launches[0][0].startswith(("ql_w8a8_quantize", "ql_w8a8_rows_"))


def launches_of(driver, kinds, K, N, rows):
    """The launches of a layer of each kind, of the first call and of the second."""
    found = []
    for kind in kinds:
        layer = make(kind, K, N)
        for dtype in (np.float16, np.float32):
            x = ExchangeArray(np.ones((rows, K), dtype))
            for _ in range(2):
                driver.forget()
                layer(x)
                found.append(
                    [(call.kernel, list(call.grid), call.shared_bytes, call.cluster) for call in driver.launches()]
                )
    return found


@pytest.mark.parametrize("rows", [1, 5, 12, 16, 40, 300, 2000])
def test_what_is_remembered_is_of_this_product_alone(server, rows):
    """Layers that differ in nothing but their kind, all in one process, run as each does in a process of its own."""
    together = server.run(launches_of, KINDS, 4096, 6144, rows)
    alone = [launches for kind in KINDS for launches in server.run(launches_of, (kind,), 4096, 6144, rows)]
    assert together == alone
    assert together[::2] == together[1::2]


def test_few_rows_are_one_launch(server):
    for kind in KINDS:
        _, launches = server.run(calls_of, kind, 4096, 6144, 1, np.float16)
        assert [name.startswith("ql_w8a8_decode") for name, *_ in launches] == [True]


def test_odd_rows_of_the_weight_are_left_to_the_base_kernels(server):
    assert server.run(calls_of, "int8", 100, 33, 5, np.float16)[1][1][0] == "ql_linear_int8"
    assert server.run(calls_of, "token", 100, 33, 5, np.float16)[1][1][0] == "ql_linear_few"


def test_a_weight_with_fewer_rows_than_a_block_has_its_kernel_of_blocks(server):
    if "sm_90a" not in _qlinear.cuda_info()["architectures"]:
        pytest.skip("not compiled for sm_90a")
    for rows, N in ((40, 96), (300, 96), (40, 160)):
        launches = server.run(calls_of, "group", 512, N, rows, np.float16)[1]
        assert dict(LISTED)[launches[-1][0]] == "w8a8_wgmma", (rows, N)


def kernels_reached(driver, wish=""):
    """The names of all that products of the shapes launch."""
    os.environ["QLINEAR_KERNELS"] = wish
    reached = set()
    for kind in ("int8", "token", "group"):
        for K, N, rows in WHOLE + SHARED:
            layer = make(kind, K, N)
            for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
                driver.forget()
                layer(ExchangeArray(np.zeros((rows, K), dtype)))
                reached.update(call.kernel.decode() for call in driver.launches())
    return reached


@pytest.mark.skipif("sm_90a" not in _qlinear.cuda_info()["architectures"], reason="not compiled for sm_90a")
def test_the_shapes_that_others_test_reach_every_kernel(server):
    """With wgmma and, as on other GPUs, without it."""
    reached = server.run(kernels_reached) | server.run(kernels_reached, "mma")
    wanted = {name for name, source in LISTED if source.startswith("w8a8")}
    assert wanted - reached == set()
