"""Which kernel runs a packed product: the table's, or the one that was set. On a driver without a GPU (fake_cuda.c)."""

import itertools
import os
import shutil

import ml_dtypes
import numpy as np
import packed_forms
import packed_layers
import pytest
import torch
from fake_cuda import ExchangeArray
from test_cuda_build import LISTED

from qlinear import _qlinear

ARCHITECTURES = _qlinear.cuda_info()["architectures"]

pytestmark = [
    pytest.mark.skipif("sm_90a" not in ARCHITECTURES, reason="built without kernels for compute capability 9.0"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler"),
]

K, N, GROUP = 512, 256, 128
PROBLEM = ("int4", N, K, GROUP, "float16")
BASE = {"ql_linear_few", "ql_linear_many"}
CODES = ("int2", "int3", "int4", "int8", "table4")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


def layer_of_zeros(k=K, act_order=False, bits=4):
    """GPTQ on the CPU."""
    g_idx = (np.arange(k, dtype=np.int32) * 7 % k // GROUP).astype(np.int32) if act_order else None
    return _qlinear.QuantLinear(
        np.zeros((k * bits // 32, N), np.int32),
        np.zeros((k // GROUP, N * bits // 32), np.int32),
        np.ones((k // GROUP, N), np.float16),
        g_idx,
        bits=bits,
        group_size=GROUP,
        zero_format="gptq",
    )


def packed_layer(k=K, act_order=False, bits=4):
    """Packed on the CPU and said to lie on GPU 0."""
    packed, spec = layer_of_zeros(k, act_order, bits).pack()
    return _qlinear.PackedLinear(ExchangeArray(packed), spec)


def launched(driver, layer, rows, dtype=np.float16):
    """The names of the kernels that a product of so many rows launches."""
    before = len(driver.launches())
    layer(ExchangeArray(np.ones((rows, layer.in_features), dtype)))
    return [call.kernel.decode() for call in driver.launches()[before:]]


def default_of(rows):
    return _qlinear.candidates(0, *PROBLEM, rows)[0][0]


# ---- run in a process of their own ----


def defaults(driver):
    layer = packed_layer()
    return [(launched(driver, layer, rows)[-1], default_of(rows)) for rows in ROWS]


def chosen(driver, rows):
    """For each candidate: the kernel that runs, in its bucket, beyond it, and for another weight."""
    layer, other = packed_layer(), packed_layer(2 * K)
    bucket = _qlinear.choice_bucket(rows)
    untouched = launched(driver, layer, bucket + 1), launched(driver, other, rows)
    seen = []
    for kernel, parameter in _qlinear.candidates(0, *PROBLEM, rows):
        _qlinear.set_choice(0, *PROBLEM, rows, kernel, parameter)
        seen.append((kernel, launched(driver, layer, rows)[-1], launched(driver, layer, bucket)[-1]))
        assert (launched(driver, layer, bucket + 1), launched(driver, other, rows)) == untouched
    _qlinear.set_choice(0, *PROBLEM, rows, None, 0)
    return seen, launched(driver, layer, rows)[-1], default_of(rows)


def set_elsewhere(driver):
    """What runs on GPU 1, and for fp16, where another candidate is in force on GPU 0, and for bf16."""
    driver.devices(2, 9, 0)
    layer, rows = packed_layer(), 64
    packed, spec = layer_of_zeros().pack()
    twin = _qlinear.PackedLinear(ExchangeArray(packed, 1), spec)
    kernel = next(kernel for kernel, _ in _qlinear.candidates(0, *PROBLEM, rows) if kernel != default_of(rows))
    parameter = dict(_qlinear.candidates(0, *PROBLEM, rows))[kernel]
    _qlinear.set_choice(0, *PROBLEM[:-1], "bfloat16", rows, kernel.replace("_f16", "_bf16"), parameter)
    of_another_dtype = launched(driver, layer, rows)[-1]
    _qlinear.set_choice(0, *PROBLEM, rows, kernel, parameter)
    before = len(driver.launches())
    twin(ExchangeArray(np.ones((rows, K), np.float16), 1))
    of_another_gpu = driver.launches()[before:][-1].kernel.decode()
    return of_another_dtype, of_another_gpu, launched(driver, layer, rows)[-1], kernel, default_of(rows)


def refused(driver):
    of_other = _qlinear.candidates(0, "int8", N, K, K, "float16", 1)[0][0]
    messages = []
    for kernel in ("", "ql_none", "ql_copy", of_other):
        try:
            _qlinear.set_choice(0, *PROBLEM, 1, kernel, 0)
        except ValueError as error:
            messages.append(str(error))
    return messages, launched(driver, packed_layer(), 1)[-1], default_of(1)


def senseless(driver, parameter):
    kernel, _ = _qlinear.candidates(0, *PROBLEM, 16)[-1]
    _qlinear.set_choice(0, *PROBLEM, 16, kernel, parameter)
    return launched(driver, packed_layer(), 16), default_of(16), kernel


def wish_for_base(driver):
    os.environ["QLINEAR_KERNELS"] = "base"
    return launched(driver, packed_layer(), 1) + launched(driver, packed_layer(), 100)


def floats(driver):
    return launched(driver, packed_layer(), 1, np.float32), _qlinear.candidates(0, *PROBLEM[:-1], "float32", 1)


def ordered(driver, rows, k=K):
    return launched(driver, packed_layer(k, act_order=True), rows)


def counts(driver, dtype):
    return {
        (code, rows): len(set(_qlinear.candidates(0, code, 4096, 4096, 64, dtype, rows)))
        for code in CODES
        for rows in ROWS
    }


def too_many(driver):
    kernel, parameter = _qlinear.candidates(0, *PROBLEM, 1)[0]
    for n in range(1, 5000):
        try:
            _qlinear.set_choice(0, "int4", 16 * n, K, GROUP, "float16", 1, kernel, parameter)
        except ValueError as error:
            return n, str(error), launched(driver, packed_layer(), 1)[-1]
    return None


def forms():
    """(code, group size, a layer on the CPU) of each form that is tested on a GPU, made of random bits."""
    random, N, K = np.random.default_rng(0), packed_forms.N, packed_forms.K
    for bits, size, scales in packed_forms.GPTQ:
        layer, *_ = packed_layers.make_gptq(random, N, K, bits, size, getattr(torch, scales), False, "gptq")
        yield f"int{bits}", K if size == -1 else size, layer
    for size, nested in packed_forms.FOURBIT:
        layer, _ = packed_layers.make_fourbit(random, N, packed_forms.columns(size, nested), size, 256 if nested else 0)
        yield "table4", size, layer


def kernels_tried(driver):
    """The names of all kernels that the candidates of the forms launch, and few rows of columns in another order, which
    test_cuda_products has for itself."""
    tried = set()
    for bits, dtype, rows in itertools.product((4, 8), (np.float16, ml_dtypes.bfloat16), (3, 8)):
        tried.update(launched(driver, packed_layer(act_order=True, bits=bits), rows, dtype))
    for code, size, layer in forms():
        packed, spec = layer.pack()
        N, K, layer = layer.out_features, layer.in_features, _qlinear.PackedLinear(ExchangeArray(packed.numpy()), spec)
        for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
            for rows in packed_forms.ROWS:
                x = ExchangeArray(np.zeros((rows, K), dtype))
                for candidate in _qlinear.candidates(0, code, N, K, size, name, rows):
                    _qlinear.set_choice(0, code, N, K, size, name, rows, *candidate)
                    driver.forget()
                    layer(x)
                    tried.update(call.kernel.decode() for call in driver.launches())
    return tried


# ---- tests ----


def test_the_tables_choice_is_the_first_candidate(server):
    for ran, first in server.run(defaults):
        assert ran == first


@pytest.mark.parametrize("rows", [1, 7, 16, 33, 200])
def test_what_is_set_runs_in_its_bucket_alone(server, rows):
    seen, afterwards, default = server.run(chosen, rows)
    assert len(seen) >= 2
    for kernel, ran, ran_at_the_end in seen:
        assert ran == ran_at_the_end == kernel
    assert afterwards == default


def test_kernels_that_cannot_are_refused(server):
    messages, ran, default = server.run(refused)
    assert len(messages) == 4
    assert all(message.startswith("kernel must be one that runs such a product on GPU 0, got ") for message in messages)
    assert ran == default


@pytest.mark.parametrize("parameter", [-(2**31), -1, 0, 12345, 2**31 - 1])
def test_a_senseless_parameter_does_no_harm(server, parameter):
    ran, default, kernel = server.run(senseless, parameter)
    assert ran[-1] in (default, kernel)


def test_the_base_kernels_can_be_forced(server):
    assert set(server.run(wish_for_base)) == BASE


def test_fp32_is_left_to_the_base_kernels(server):
    assert server.run(floats) == (["ql_linear_few"], [])


@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_act_order_is_no_reason_for_the_base_kernels(server, rows):
    assert not BASE & set(server.run(ordered, rows))


def test_a_choice_is_for_its_gpu_and_its_dtype(server):
    of_another_dtype, of_another_gpu, own, kernel, default = server.run(set_elsewhere)
    assert of_another_dtype == of_another_gpu == default
    assert own == kernel != default


def test_numbers_of_rows_that_share_a_choice():
    """Powers of two, from 16 on those between them as well, up to the most."""
    buckets = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    assert sorted({_qlinear.choice_bucket(m) for m in range(1, 129)}) == buckets
    for m in range(1, 129):
        assert _qlinear.choice_bucket(m) == min(bucket for bucket in buckets if bucket >= m)
    assert [_qlinear.choice_bucket(m) for m in (98304, 98305, 2**62)] == [98304] * 3


def test_rows_are_put_in_order_in_shared_memory_where_they_fit(server):
    assert "ql_arrange_ordered" in server.run(ordered, 64)
    assert "ql_arrange_rows" in server.run(ordered, 600)
    assert "ql_arrange_many" in server.run(ordered, 2048)
    longer = server.run(ordered, 64, 2**17)
    assert "ql_arrange" in longer
    assert not (BASE | {"ql_arrange_ordered"}) & set(longer)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_few_columns_are_put_in_order_by_the_product_itself(server, rows):
    (kernel,) = server.run(ordered, rows)
    assert kernel.startswith("ql_decode_int4_")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_there_is_something_to_try(server, dtype):
    few = {place: count for place, count in server.run(counts, dtype).items() if count < 8}
    assert few == {}


def test_there_is_an_end_to_choices(server):
    count, message, ran = server.run(too_many)
    assert 4000 < count <= 4097
    assert message == "there is no room for more than 4096 choices."
    assert ran not in BASE


def test_the_forms_that_others_test_reach_every_kernel(server):
    wanted = {name for name, source in LISTED if source in ("decode", "mma", "wgmma")}
    assert wanted - server.run(kernels_tried) == set()
