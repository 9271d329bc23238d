"""AWQ: nibble order, quantizer decision points, the GEMV, GEMVFast and Marlin storages, the layer and its checks,
against NumPy written from the formats alone."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import in_framework

from qlinear import _qlinear

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column ORDER[i] of its eight


def pack_gemm(codes):
    """codes [R, N] -> int32 [R, ceil(N / 8)]."""
    rows, n = codes.shape
    padded = np.pad(codes.astype(np.uint32), ((0, 0), (0, -n % 8))).reshape(rows, -(-n // 8), 8)
    return np.bitwise_or.reduce(padded[:, :, ORDER] << (4 * np.arange(8, dtype=np.uint32)), axis=2).view(np.int32)


def pack_natural(codes):
    """codes [R, C] with C % 8 == 0 -> int32 [R, C / 8], column 8c + j in nibble j."""
    nibbles = codes.astype(np.uint32).reshape(codes.shape[0], -1, 8) << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(nibbles, axis=2).view(np.int32)


def pack_gemv_fast(codes):
    """codes [N, K] -> int16 [N / 4, K], by the storage's own steps: in each 32 columns, columns go by eights to the
    four nibbles of a word, pairs together; four rows interleave in blocks of 64 columns."""
    n, k = codes.shape
    # [N, K/64, half, nibble, pair, odd]
    parts = codes.astype(np.uint16).reshape(n, k // 64, 2, 4, 4, 2)
    words = np.zeros((n, k // 64, 2, 4, 2), np.uint16)
    for nibble in range(4):
        words |= parts[:, :, :, nibble] << np.uint16(4 * nibble)
    rows = words.reshape(n // 4, 4, k // 64, 16).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(rows.reshape(n // 4, k)).view(np.int16)


def pack_marlin(codes):
    """codes [K, N] -> int32 [K / 16, 2N], by Marlin's fragments: a lane of mma.m16n8k16 holds rows 2t, 2t + 1, 2t + 8
    and 2t + 9 of column lane / 4 for t = lane % 4, for two blocks of 8 columns. A lane has a word for each of four such
    16 x 16 tiles, its nibbles interleaved 0 2 4 6 1 3 5 7."""
    k, n = codes.shape
    out = np.zeros((k // 16, 2 * n), np.uint32)
    for tile_n in range(n // 64):
        block = codes[:, 64 * tile_n : 64 * tile_n + 64].reshape(k // 16, 16, 4, 16)
        for lane in range(32):
            column, t = lane // 4, lane % 4
            rows = [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]
            for tile in range(4):
                values = [block[:, row, tile, column + 8 * half] for half in range(2) for row in rows]
                word = sum(values[source].astype(np.uint32) << np.uint32(4 * i) for i, source in enumerate(ORDER))
                out[:, 128 * tile_n + 4 * lane + tile] = word
    return out.view(np.int32)


def permute_marlin_scales(scales, one_group):
    if one_group:
        order = [2 * i + t for i in range(4) for t in [0, 1, 8, 9, 16, 17, 24, 25]]
    else:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    groups, n = scales.shape
    return scales.reshape(groups, -1, len(order))[:, :, order].reshape(groups, n).copy()


def group_columns(k, group_size):
    return max(k, 1) if group_size == -1 else group_size


def make_codes(k, n, group_size, seed=0, dtype=np.float16):
    """codes [K, N], zeros [G, N], scales [G, N]."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group_columns(k, group_size))
    codes = rng.integers(0, 16, (k, n))
    zeros = rng.integers(0, 16, (groups, n))
    return codes, zeros, (rng.uniform(0.5, 1.5, (groups, n)) * 0.01).astype(dtype)


def reference_weight(codes, zeros, scales, group_size):
    """float64 [N, K]."""
    groups = np.arange(len(codes)) // group_columns(len(codes), group_size)
    return ((codes - zeros[groups]) * scales.astype(np.float64)[groups]).T


# ---- the nibble order ----


def test_golden_word():
    assert _qlinear.awq_pack(np.arange(8, dtype=np.uint8)[None]).view(np.uint32).tolist() == [[0x75316420]]


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 41), st.integers(0, 2**32 - 1))
def test_pack_is_a_bijection(rows, n, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (rows, n), dtype=np.uint8)
    packed = _qlinear.awq_pack(codes)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed, pack_gemm(codes))
    unpacked = _qlinear.awq_unpack(packed, count=n)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, codes)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_whole_words_come_back(rows, words, seed):
    packed = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, words)).astype(np.int32)
    np.testing.assert_array_equal(_qlinear.awq_pack(_qlinear.awq_unpack(packed, count=8 * words)), packed)


def test_strided_codes_and_words():
    codes = np.random.default_rng(1).integers(0, 16, (24, 10), dtype=np.uint8)[:, ::2].T
    packed = _qlinear.awq_pack(codes)
    np.testing.assert_array_equal(packed, pack_gemm(codes))
    np.testing.assert_array_equal(_qlinear.awq_unpack(np.asfortranarray(packed), count=24), codes)


# ---- the quantizer ----


def reference_quantize(weight, group_size):
    """Op by op in fp32, as AutoAWQ takes them -> codes [K, N], zeros [G, N], scales fp16 [G, N]."""
    k = weight.shape[1]
    size = group_columns(k, group_size)
    codes, zeros, scales = [], [], []
    for first in range(0, k, size):
        part = weight[:, first : first + size].astype(np.float32)
        low, high = part.min(axis=1), part.max(axis=1)
        scale = np.maximum(high - low, np.float32(1e-5)) / np.float32(15)
        zero = np.clip(-np.round(low / scale), 0, 15)
        stored = scale.astype(np.float16)
        with np.errstate(over="ignore"):
            rounded = np.round((part + (zero * scale)[:, None]) / stored.astype(np.float32)[:, None])
        codes.append(np.clip(rounded, 0, 15).T)
        zeros.append(zero)
        scales.append(stored)
    return np.concatenate(codes), np.stack(zeros), np.stack(scales)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 128, 64), (13, 75, 32), (8, 75, -1), (1, 33, 100)])
def test_quantize(dtype, n, k, group_size):
    weight = np.random.default_rng(2).standard_normal((n, 2 * k)).astype(dtype)[:, ::2]
    codes, zeros, scales = reference_quantize(weight, group_size)
    qweight, qzeros, stored = _qlinear.awq_quantize(weight, group_size=group_size)
    np.testing.assert_array_equal(qweight, pack_gemm(codes))
    np.testing.assert_array_equal(qzeros, pack_gemm(zeros))
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, scales)


def test_quantize_decision_points():
    rows = {
        "ties of codes go to even": ([0, 15, 0.5, 1.5, 2.5, 14.5], 1, 0, [0, 15, 0, 2, 2, 14]),
        "tie 2.5 of the zero goes to 2": ([-2.5, 12.5, 0, 0.5, 1.5, 2], 1, 2, [0, 14, 2, 2, 4, 4]),
        "tie 3.5 of the zero goes to 4": ([-3.5, 11.5, 0, 0.5, 1.5, 2], 1, 4, [0, 15, 4, 4, 6, 6]),
        "all positive: the zero stays 0, codes saturate": ([30, 45, 30, 30, 40, 31], 1, 0, [15] * 6),
        "all negative: the zero stays 15, codes saturate": ([-30, -45, -30, -40, -31, -30], 1, 15, [0] * 6),
        "of zeros: the least range is 1e-5": ([0] * 6, 1e-5 / 15, 0, [0] * 6),
        "a range below the least": ([5e-6, 0, 0, 0, 0, 0], 1e-5 / 15, 0, [8, 0, 0, 0, 0, 0]),
    }
    for name, (values, scale, zero, wanted) in rows.items():
        qweight, qzeros, scales = _qlinear.awq_quantize(np.array([values], np.float32), group_size=-1)
        assert scales.tolist() == [[float(np.float16(scale))]], name
        assert _qlinear.awq_unpack(qzeros, count=1).tolist() == [[zero]], name
        assert _qlinear.awq_unpack(qweight, count=1)[:, 0].tolist() == wanted, name


def test_infinite_and_nan_weights_stay_in_their_column():
    weight = np.random.default_rng(3).standard_normal((16, 32)).astype(np.float32)
    clean = _qlinear.awq_quantize(weight, group_size=-1)
    weight[3, 5], weight[12, 7] = np.nan, np.inf
    dirty = _qlinear.awq_quantize(weight, group_size=-1)
    kept = np.setdiff1d(np.arange(16), [3, 12])
    for one, other in zip(clean[:2], dirty[:2], strict=True):
        unpacked = [_qlinear.awq_unpack(words, count=16) for words in (one, other)]
        np.testing.assert_array_equal(unpacked[0][:, kept], unpacked[1][:, kept])
    np.testing.assert_array_equal(clean[2][:, kept], dirty[2][:, kept])
    assert np.isnan(dirty[2][0, 3])
    assert np.isinf(dirty[2][0, 12])


# ---- the other storages ----


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "words"),
    [(16, 256, 128, 1), (13, 192, 64, 2), (8, 96, 32, 4), (9, 40, -1, 1), (8, 96, 8, 2), (136, 1288, 644, 1)],
)
def test_from_gemv(dtype, n, k, group_size, words):
    """zeros and scales come padded to multiples of the kernels' own, here with rubbish."""
    codes, zeros, scales = make_codes(k, n, group_size, dtype=dtype)
    spare = 8 * words - len(zeros)
    padded_zeros = np.pad(zeros, ((0, spare), (0, 0)), constant_values=9)
    padded_scales = np.pad(scales.astype(np.float32), ((0, spare), (0, 0)), constant_values=7).astype(dtype)
    got = _qlinear.awq_from_gemv(
        pack_natural(codes.T.copy()), pack_natural(padded_zeros.T.copy()), padded_scales.T.copy(), group_size=group_size
    )
    np.testing.assert_array_equal(got[0], pack_gemm(codes))
    np.testing.assert_array_equal(got[1], pack_gemm(zeros))
    assert got[2].dtype == dtype
    np.testing.assert_array_equal(got[2], scales)
    layer = _qlinear.AWQLinear(*got, group_size=group_size)
    reference = reference_weight(codes, zeros, scales, group_size)
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 256, 128), (12, 192, 64), (4, 64, -1), (20, 128, 48)])
def test_from_gemv_fast(dtype, n, k, group_size):
    """The zeros are products, rounded once to the scales' dtype: they stay these bits, and W = q * s + product."""
    codes, zeros, scales = make_codes(k, n, group_size, dtype=dtype)
    products = -(scales.astype(np.float32) * zeros).astype(dtype)
    spare = -len(zeros) % 8

    def pad(tensor):
        return np.pad(tensor.astype(np.float32), ((0, spare), (0, 0)), constant_values=3).astype(dtype)

    got = _qlinear.awq_from_gemv_fast(pack_gemv_fast(codes.T), pad(products), pad(scales), group_size=group_size)
    np.testing.assert_array_equal(got[0], pack_gemm(codes))
    assert got[1].dtype == got[2].dtype == dtype
    np.testing.assert_array_equal(got[1].view(np.uint16), products.view(np.uint16))
    np.testing.assert_array_equal(got[2].view(np.uint16), scales.view(np.uint16))
    groups = np.arange(k) // group_columns(k, group_size)
    reference = (codes * scales.astype(np.float64)[groups] + products.astype(np.float64)[groups]).T
    layer = _qlinear.AWQLinear(*got, group_size=group_size)
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(64, 256, 128), (192, 128, 64), (128, 48, -1), (64, 64, 64), (64, 80, 32)]
)
def test_from_marlin(n, k, group_size):
    codes, _, scales = make_codes(k, n, group_size)
    one_group = len(scales) == 1
    got = _qlinear.awq_from_marlin(pack_marlin(codes), permute_marlin_scales(scales, one_group), group_size=group_size)
    np.testing.assert_array_equal(got[0], pack_gemm(codes))
    assert (got[1].view(np.uint32) == 0x88888888).all()
    assert got[1].shape == (len(scales), n // 8)
    np.testing.assert_array_equal(got[2], scales)
    reference = reference_weight(codes, np.full_like(scales, 8, dtype=int), scales, group_size)
    layer = _qlinear.AWQLinear(*got, group_size=group_size)
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_conversions_are_bijections(blocks_n, blocks_k, seed):
    """Random words, of which no bit is padding: converted and stored again, they are the same."""
    rng = np.random.default_rng(seed)
    n, k = 64 * blocks_n, 64 * blocks_k
    ones = np.ones((8, n), np.float16)
    words = rng.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32)
    zeros = rng.integers(-(2**31), 2**31, (n, 1)).astype(np.int32)
    converted = _qlinear.awq_from_gemv(words, zeros, ones.T.copy(), group_size=8 * blocks_k)
    codes, true_zeros = (_qlinear.awq_unpack(packed, count=n) for packed in converted[:2])
    np.testing.assert_array_equal(pack_natural(codes.T.copy()), words)
    np.testing.assert_array_equal(pack_natural(true_zeros.T.copy()), zeros)
    halves = np.ascontiguousarray(words.view(np.int16).reshape(n // 4, k))
    codes = _qlinear.awq_unpack(_qlinear.awq_from_gemv_fast(halves, ones, ones, group_size=-1)[0], count=n)
    np.testing.assert_array_equal(pack_gemv_fast(codes.T), halves)
    tiles = words.reshape(k // 16, 2 * n)
    codes = _qlinear.awq_unpack(_qlinear.awq_from_marlin(tiles, ones[:1], group_size=-1)[0], count=n)
    np.testing.assert_array_equal(pack_marlin(codes), tiles)


# ---- the layer ----


@pytest.mark.parametrize("scales_dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("k", "n", "group_size"), [(64, 32, 32), (96, 17, -1), (77, 5, 20), (1, 1, 8), (257, 40, 128)])
def test_dequantize(scales_dtype, k, n, group_size):
    codes, zeros, scales = make_codes(k, n, group_size, dtype=scales_dtype)
    layer = _qlinear.AWQLinear(pack_gemm(codes), pack_gemm(zeros), scales, group_size=group_size)
    assert (layer.in_features, layer.out_features) == (k, n)
    reference = reference_weight(codes, zeros, scales, group_size)
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("n", [64, 51])
def test_call(dtype, products, n):
    k, group_size = 205, 32
    codes, zeros, scales = make_codes(k, n, group_size, seed=4)
    groups = np.arange(k) // group_size
    qzeros = pack_gemm(zeros)
    weight = reference_weight(codes, zeros, scales, group_size)
    if products:
        qzeros = -(scales.astype(np.float32) * zeros).astype(np.float16)
        weight = (codes * scales.astype(np.float64)[groups] + qzeros.astype(np.float64)[groups]).T
    bias = torch.randn(n, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    tensors = [torch.from_numpy(tensor) for tensor in (pack_gemm(codes), qzeros, scales)]
    layer = _qlinear.AWQLinear(*tensors, bias, group_size=group_size)
    numpy_dtype = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}.get(dtype, np.float32)
    for m in (1, 5, 40):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        out = layer(x)
        assert out.dtype == dtype
        x64, b64 = x.double().numpy(), bias.double().numpy()
        reference = x64 @ weight.T + b64
        # The products cancel against q * s, which the sum may take apart: its terms are what rounds.
        terms = np.abs(weight)
        if products:
            terms = (codes * scales.astype(np.float64)[groups] + np.abs(qzeros.astype(np.float64))[groups]).T
        magnitude = np.abs(x64) @ terms.T + np.abs(b64)
        # bf16 may round the weight once, by 2^-9 of it; sums of k products in fp32 err by less than (k + 8) * 2^-24.
        bound = (k + 8) * 2.0**-24 * magnitude + 0.505 * np.spacing(np.abs(reference).astype(numpy_dtype)).astype(float)
        if dtype == torch.bfloat16:
            bound += 2.0**-9 * (np.abs(x64) @ np.abs(weight).T)
        assert (np.abs(out.double().numpy() - reference) <= bound).all()


def test_nibbles_past_the_last_column_do_not_count():
    codes, zeros, scales = make_codes(32, 5, 16)
    layers = []
    for spare in (0, 0xA):
        words = [pack_gemm(np.pad(part, ((0, 0), (0, 3)), constant_values=spare)) for part in (codes, zeros)]
        layers.append(_qlinear.AWQLinear(*words, scales, group_size=16))
    x = np.random.default_rng(5).standard_normal((3, 32)).astype(np.float32)
    np.testing.assert_array_equal(layers[0].dequantize(), layers[1].dequantize())
    np.testing.assert_array_equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize(("k", "n"), [(32, 0), (0, 8)])
def test_empty(k, n):
    words = n // 8
    layer = _qlinear.AWQLinear(
        np.zeros((k, words), np.int32),
        np.zeros((k // 32, words), np.int32),
        np.zeros((k // 32, n), np.float16),
        group_size=32,
    )
    assert layer.dequantize().shape == (n, k)
    assert (layer(np.ones((3, k), np.float32)) == 0).all()


# ---- what is refused ----


def layer_arguments():
    codes, zeros, scales = make_codes(64, 24, 16)
    return {"qweight": pack_gemm(codes), "qzeros": pack_gemm(zeros), "scales": scales, "group_size": 16}


WRONG_LAYERS = {
    "qweight missing": ({"qweight": None}, TypeError, "qweight must be a tensor, got None"),
    "qweight dtype": ({"qweight": np.zeros((64, 3), np.int16)}, TypeError, "qweight must be int32, got int16"),
    "qweight rank": ({"qweight": np.zeros(64, np.int32)}, ValueError, "qweight must have shape"),
    "qweight width": ({"qweight": np.zeros((64, 4), np.int32)}, ValueError, r"qweight must have shape \[64, 3\]"),
    "qweight strides": ({"qweight": np.zeros((3, 64), np.int32).T}, ValueError, "qweight must be contiguous"),
    "qzeros missing": ({"qzeros": None}, TypeError, "qzeros must be a tensor, got None"),
    "qzeros dtype": ({"qzeros": np.zeros((4, 3), np.int64)}, TypeError, "qzeros must be int32 or float16, got int64"),
    "qzeros of another float": (
        {"qzeros": np.zeros((4, 24), np.float32)},
        TypeError,
        "qzeros must be int32 or float16, got float32",
    ),
    "qzeros width": ({"qzeros": np.zeros((4, 24), np.int32)}, ValueError, r"qzeros must have shape \[4, 3\]"),
    "qzeros products width": (
        {"qzeros": np.zeros((4, 3), np.float16)},
        ValueError,
        r"qzeros must have shape \[4, 24\]",
    ),
    "qzeros groups": ({"qzeros": np.zeros((5, 3), np.int32)}, ValueError, r"qzeros must have shape \[4, 3\]"),
    "qzeros strides": ({"qzeros": np.zeros((3, 4), np.int32).T}, ValueError, "qzeros must be contiguous"),
    "scales missing": ({"scales": None}, TypeError, "scales must be a tensor, got None"),
    "scales dtype": ({"scales": np.zeros((4, 24), np.int32)}, TypeError, "scales must be float32.*got int32"),
    "scales rank": ({"scales": np.zeros(24, np.float16)}, ValueError, "scales must have shape"),
    "scales groups": ({"scales": np.zeros((3, 24), np.float16)}, ValueError, r"scales must have shape \[4, 24\]"),
    "scales strides": ({"scales": np.zeros((24, 4), np.float16).T}, ValueError, "scales must be contiguous"),
    "group_size 0": ({"group_size": 0}, ValueError, "group_size must be -1 .* or at least 1, got 0"),
    "group_size kind": ({"group_size": "16"}, TypeError, "group_size must be an int"),
    "group_size other": ({"group_size": -1}, ValueError, r"scales must have shape \[1, 24\]"),
    "bias length": ({"bias": np.zeros(23, np.float32)}, ValueError, r"bias must have shape \[24\]"),
    "unknown argument": ({"w_bit": 4}, TypeError, "w_bit"),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_layer_refuses(case, framework):
    changed, error, message = WRONG_LAYERS[case]
    with pytest.raises(error, match=message):
        _qlinear.AWQLinear(**in_framework(framework, {**layer_arguments(), **changed}))


@pytest.mark.parametrize("missing", ["qweight", "qzeros", "scales", "group_size"])
def test_layer_requires(missing):
    arguments = layer_arguments()
    del arguments[missing]
    with pytest.raises(TypeError, match=f"{missing} is missing"):
        _qlinear.AWQLinear(**arguments)


GEMV = {
    "qweight": np.zeros((16, 8), np.int32),
    "qzeros": np.zeros((16, 1), np.int32),
    "scales": np.zeros((16, 8), np.float16),
    "group_size": 16,
}
FAST = {
    "qweight": np.zeros((4, 64), np.int16),
    "qzeros": np.zeros((8, 16), np.float16),
    "scales": np.zeros((8, 16), np.float16),
    "group_size": 16,
}
MARLIN = {"qweight": np.zeros((4, 128), np.int32), "scales": np.zeros((4, 64), np.float16), "group_size": 16}
WRONG_CALLS = [
    ("awq_quantize", {"weight": np.ones((4, 4), np.int32), "group_size": 2}, TypeError, "weight must be float32"),
    ("awq_quantize", {"weight": np.ones(4, np.float32), "group_size": 2}, ValueError, "weight must have shape"),
    ("awq_quantize", {"weight": np.ones((4, 4), np.float32), "group_size": -3}, ValueError, "group_size"),
    ("awq_quantize", {"weight": np.ones((4, 4), np.float32)}, TypeError, "group_size is missing"),
    ("awq_pack", {"codes": np.array([[1, 16]], np.uint8)}, ValueError, r"codes must be at most 15, got 16 at \[0, 1\]"),
    ("awq_pack", {"codes": np.ones((2, 2), np.int32)}, TypeError, "codes must be uint8, got int32"),
    ("awq_unpack", {"packed": np.ones((2, 2), np.int32), "count": 17}, ValueError, "packed must have shape"),
    ("awq_unpack", {"packed": np.ones((2, 2), np.int32), "count": -8}, ValueError, "count must be at least 0"),
    ("awq_unpack", {"packed": np.ones((2, 2), np.uint8), "count": 16}, TypeError, "packed must be int32"),
    ("awq_from_gemv", {**GEMV, "qweight": np.zeros((16, 8), np.int16)}, TypeError, "qweight must be int32"),
    ("awq_from_gemv", {**GEMV, "qzeros": np.zeros((16, 1), np.float16)}, TypeError, "qzeros must be int32"),
    ("awq_from_gemv", {**GEMV, "qzeros": np.zeros((15, 1), np.int32)}, ValueError, "qzeros must have shape"),
    (
        "awq_from_gemv",
        {**GEMV, "group_size": 4},
        ValueError,
        "qzeros must have at least 2 entries in dimension 1, got 1",
    ),
    ("awq_from_gemv", {**GEMV, "scales": np.zeros((16, 3), np.float16)}, ValueError, "scales must have at least 4"),
    ("awq_from_gemv", {**GEMV, "scales": np.zeros((8, 16), np.float16)}, ValueError, "scales must have shape"),
    ("awq_from_gemv_fast", {**FAST, "qweight": np.zeros((4, 64), np.int32)}, TypeError, "qweight must be int16"),
    ("awq_from_gemv_fast", {**FAST, "qweight": np.zeros((4, 96), np.int16)}, ValueError, "qweight .*multiple of 64"),
    ("awq_from_gemv_fast", {**FAST, "qzeros": np.zeros((8, 16), np.int32)}, TypeError, "qzeros must be float16"),
    (
        "awq_from_gemv_fast",
        {**FAST, "qzeros": np.zeros((3, 16), np.float16)},
        ValueError,
        "qzeros must have at least 4",
    ),
    ("awq_from_gemv_fast", {**FAST, "scales": np.zeros((8, 15), np.float16)}, ValueError, "scales must have shape"),
    ("awq_from_marlin", {**MARLIN, "qweight": np.zeros((4, 64), np.int32)}, ValueError, "qweight .*multiple of 128"),
    ("awq_from_marlin", {**MARLIN, "qweight": np.zeros((4, 128), np.uint8)}, TypeError, "qweight must be int32"),
    ("awq_from_marlin", {**MARLIN, "group_size": 32}, ValueError, r"scales must have shape \[2, 64\]"),
    ("awq_from_marlin", {**MARLIN, "scales": np.zeros((4, 64), np.uint8)}, TypeError, "scales must be float32"),
]


@pytest.mark.parametrize(("function", "kwargs", "error", "message"), WRONG_CALLS)
def test_function_refuses(function, kwargs, error, message):
    with pytest.raises(error, match=message):
        getattr(_qlinear, function)(**kwargs)


def test_results_come_in_the_callers_framework():
    packed = _qlinear.awq_quantize(torch.randn(16, 64), group_size=32)
    assert all(isinstance(tensor, torch.Tensor) for tensor in packed)
    assert [tensor.dtype for tensor in packed] == [torch.int32, torch.int32, torch.float16]
