"""AWQLinear: its constructor, and the four storages."""

import numpy as np
import pytest
import torch
from layer_cases import array, assert_close, assert_same_state, decode_awq, inputs

import qlinear
from qlinear import _qlinear

K, N, SIZE = 128, 64, 32


def gemm(K=K, N=N, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    groups = -(-K // size)
    q = torch.from_numpy(rng.integers(0, 16, (K, N), dtype=np.uint8))
    z = torch.from_numpy(rng.integers(0, 16, (groups, N), dtype=np.uint8))
    return _qlinear.awq_pack(q), _qlinear.awq_pack(z), torch.from_numpy(rng.uniform(0.01, 0.1, (groups, N))).half()


def codes(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 16, (K, N), dtype=np.uint8).astype(np.int64)


def check(layer, W):
    x = inputs(3, K)
    seen = array(x).astype(np.float64)
    assert_close(layer(x), seen @ W.T, np.abs(seen) @ np.abs(W).T, K)


def test_seed_constructor():
    tensors = gemm()
    layer = qlinear.AWQLinear(4, SIZE, *tensors, None)
    assert (layer.w_bit, layer.group_size, layer.in_features, layer.out_features) == (4, SIZE, K, N)
    assert layer.weight is layer.qweight
    assert layer.qweight.data_ptr() == tensors[0].data_ptr()
    assert list(layer.state_dict()) == ["qweight", "qzeros", "scales"]
    check(layer, decode_awq(layer.state_dict(), layer))
    whole = qlinear.AWQLinear(
        w_bit=4, group_size=-1, **dict(zip(("qweight", "qzeros", "scales"), gemm(size=K), strict=True)), bias=None
    )
    assert whole.group_size == K
    check(whole, decode_awq(whole.state_dict(), whole))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_input_is_kept(dtype):
    layer = qlinear.AWQLinear(4, SIZE, *gemm(), torch.randn(N))
    assert layer(inputs(2, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("w_bit", [2, 3, 8, 0])
def test_other_bits_are_not_implemented(w_bit):
    with pytest.raises(NotImplementedError, match="4-bit"):
        qlinear.AWQLinear(w_bit, SIZE, *gemm(), None)


def test_short_last_group():
    layer = qlinear.AWQLinear(4, 48, *gemm(size=48), None)
    check(layer, decode_awq(layer.state_dict(), layer))


def gemv(q, z, s):
    """q [K, N], z and s [G, N] -> the GEMV storage, groups of 32: zero words in fours."""
    groups = len(z)
    words = 4 * ((groups + 31) // 32)
    shifts = (4 * np.arange(8)).astype(np.uint32)
    qweight = (q.T.reshape(N, K // 8, 8).astype(np.uint32) << shifts).sum(-1, dtype=np.uint32)
    zeros = np.zeros((N, words * 8), np.uint32)
    zeros[:, :groups] = z.T
    scales = np.zeros((N, words * 8), np.float16)
    scales[:, :groups] = s.T
    qzeros = (zeros.reshape(N, words, 8) << shifts).sum(-1, dtype=np.uint32)
    return tuple(torch.from_numpy(a) for a in (qweight.view(np.int32), qzeros.view(np.int32), scales))


def gemv_fast(q, z, s):
    n, k = np.meshgrid(np.arange(N), np.arange(K), indexing="ij")
    column = 64 * (k // 64) + 16 * (n % 4) + 8 * ((k % 64) // 32) + 2 * ((k % 8) // 2) + (k & 1)
    words = np.zeros((N // 4, K), np.uint16)
    np.bitwise_or.at(words, (n // 4, column), (q.T << (4 * ((k % 32) // 8))).astype(np.uint16))
    rows = 32 * ((len(z) + 31) // 32)
    scales, products = np.zeros((rows, N), np.float16), np.zeros((rows, N), np.float16)
    scales[: len(s)] = s
    products[: len(z)] = -(s.astype(np.float32) * z).astype(np.float16)
    return torch.from_numpy(words.view(np.int16)), torch.from_numpy(products), torch.from_numpy(scales)


def marlin(q, s):
    n, k = np.meshgrid(np.arange(N), np.arange(K), indexing="ij")
    word = 128 * (n // 64) + 16 * (n % 8) + 4 * ((k % 8) // 2) + (n % 64) // 16
    nibble = 4 * (k & 1) + 2 * ((n % 16) // 8) + (k % 16) // 8
    words = np.zeros((K // 16, 2 * N), np.uint32)
    np.bitwise_or.at(words, (k // 16, word), q.T.astype(np.uint32) << (4 * nibble).astype(np.uint32))
    column = np.arange(N)
    stored = np.zeros_like(s)
    if len(s) > 1:
        stored[:, 64 * (column // 64) + 8 * (column % 8) + (column % 64) // 8] = s
    else:
        stored[:, 32 * (column // 32) + 8 * (column % 8 // 2) + 2 * ((column % 32) // 8) + (column & 1)] = s
    return torch.from_numpy(words.view(np.int32)), torch.from_numpy(stored)


def parts(groups, seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.01, 0.1, (groups, N)).astype(np.float16)
    return codes(seed), rng.integers(0, 16, (groups, N)).astype(np.int64), scales


def spread(values, size):
    return values[np.arange(K) // size]


def test_gemv_storage():
    q, z, s = parts(K // SIZE)
    layer = qlinear.AWQLinear(4, SIZE, *gemv(q, z, s), None)
    assert layer.qweight.shape == (K, N // 8)
    check(layer, ((q - spread(z, SIZE)) * spread(s.astype(np.float64), SIZE)).T)


def test_gemv_fast_storage():
    q, z, s = parts(K // SIZE)
    layer = qlinear.AWQLinear(4, SIZE, *gemv_fast(q, z, s), None)
    assert layer.qzeros.dtype == torch.float16
    products = -(s.astype(np.float32) * z).astype(np.float16)
    W = (q * spread(s.astype(np.float64), SIZE) + spread(products.astype(np.float64), SIZE)).T
    check(layer, W)
    assert np.array_equal(decode_awq(layer.state_dict(), layer), W)


@pytest.mark.parametrize("size", [SIZE, K])
def test_marlin_storage(size):
    q, _, s = parts(K // size)
    qweight, scales = marlin(q, s)
    layer = qlinear.AWQLinear(4, -1 if size == K else size, qweight, None, scales, None)
    check(layer, ((q - 8) * spread(s.astype(np.float64), size)).T)


@pytest.mark.parametrize("storage", ["gemv", "gemv_fast", "marlin"])
def test_other_storages_load_into_a_fresh_layer(storage):
    q, z, s = parts(K // SIZE)
    made = {"gemv": lambda: gemv(q, z, s), "gemv_fast": lambda: gemv_fast(q, z, s), "marlin": lambda: marlin(q, s)}
    tensors = made[storage]()
    qweight, qzeros, scales = tensors if len(tensors) == 3 else (tensors[0], None, tensors[1])
    expected = qlinear.AWQLinear(4, SIZE, qweight, qzeros, scales, None)
    state = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    state = {key: value for key, value in state.items() if value is not None}
    for device, assign in (("cpu", False), ("meta", True)):
        fresh = qlinear.AWQLinear.empty(K, N, False, group_size=SIZE, device=device)
        fresh.load_state_dict(state, assign=assign)
        assert_same_state(fresh.state_dict(), expected.state_dict())
        assert torch.equal(fresh(inputs(2, K)), expected(inputs(2, K)))


MALFORMED = {
    "qweight dtype": ({"qweight": torch.zeros(K, N // 8, dtype=torch.int64)}, TypeError),
    "qweight rank": ({"qweight": torch.zeros(K, dtype=torch.int32)}, ValueError),
    "qzeros dtype": ({"qzeros": torch.zeros(K // SIZE, N // 8, dtype=torch.int64)}, TypeError),
    "qzeros rows": ({"qzeros": torch.zeros(K // SIZE + 1, N // 8, dtype=torch.int32)}, ValueError),
    "scales dtype": ({"scales": torch.zeros(K // SIZE, N, dtype=torch.int32)}, TypeError),
    "scales columns": ({"scales": torch.zeros(K // SIZE, N + 8, dtype=torch.float16)}, ValueError),
    "scales none": ({"scales": None}, TypeError),
    "group size zero": ({"group_size": 0}, ValueError),
    "group size negative": ({"group_size": -3}, ValueError),
    "group size other": ({"group_size": 64}, ValueError),
    "bias shape": ({"bias": torch.zeros(N + 1)}, ValueError),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed(change):
    good = dict(zip(("qweight", "qzeros", "scales"), gemm(), strict=True)) | {
        "w_bit": 4,
        "group_size": SIZE,
        "bias": None,
    }
    qlinear.AWQLinear(**good)
    with pytest.raises(change[1]):
        qlinear.AWQLinear(**(good | change[0]))
