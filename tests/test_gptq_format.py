"""GPTQ: bit streams, quantizer decision points, group indices, zero formats, the layer and its checks, against NumPy
written from the format alone."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import in_framework

from qlinear import _qlinear

BITS = [2, 3, 4, 8]


def unpack_stream(words, bits, count):
    """int32 [W, N] -> codes [count, N], by the definition: code k is bits [b * k, b * k + b) of a column."""
    bytes_ = np.ascontiguousarray(words.T).view(np.uint8)
    stream = np.unpackbits(bytes_, axis=1, bitorder="little")[:, : count * bits]
    return (stream.reshape(-1, count, bits) @ (1 << np.arange(bits))).T


def pack_stream(codes, bits):
    """codes [K, N] -> int32 [ceil(K * bits / 32), N]."""
    count, n = codes.shape
    stream = (codes.T[:, :, None].astype(np.int64) >> np.arange(bits) & 1).reshape(n, count * bits).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -count * bits % 32)))
    return np.ascontiguousarray(np.packbits(stream, axis=1, bitorder="little").view(np.int32).T)


def group_count(k, group_size):
    return 1 if group_size == -1 else -(-k // group_size)


def make_layer(bits, k, n, group_size, seed=0, dtype=np.float16, version="gptq"):
    """Random tensors of a layer with true zeros over their whole range, and its weight in float64."""
    rng = np.random.default_rng(seed)
    groups = group_count(k, group_size)
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = rng.integers(0, 2**bits, (groups, n))
    scales = (rng.uniform(0.5, 1.5, (groups, n)) * 0.01).astype(dtype)
    stored = (zeros - (version == "gptq")) % 2**bits
    tensors = {"qweight": pack_stream(codes, bits), "qzeros": pack_stream(stored.T, bits).T.copy(), "scales": scales}
    return tensors, codes, zeros


def reference_weight(codes, zeros, scales, groups):
    """float64 [N, K]; groups [K]."""
    return ((codes - zeros[groups]) * scales.astype(np.float64)[groups]).T


def trivial(k, group_size):
    return np.arange(k) // (k if group_size == -1 else group_size)


def half_ulp(reference, dtype):
    return 0.5 * np.spacing(np.abs(reference).astype(dtype)).astype(np.float64)


# ---- bit streams ----


def test_golden_words():
    codes = np.arange(8, dtype=np.uint8)[:, None]
    assert _qlinear.gptq_pack_codes(codes, bits=4).view(np.uint32).tolist() == [[0x76543210]]
    codes = (np.arange(32, dtype=np.uint8) % 8)[:, None]
    words = _qlinear.gptq_pack_codes(codes, bits=3).view(np.uint32)[:, 0].tolist()
    assert words == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)],
)
def test_golden_symmetric_zeros(bits, v1, v2):
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    scales, zeros = _qlinear.gptq_find_params(weight, bits=bits, group_size=8, sym=True)
    for zero_format, word in (("gptq", v1), ("gptq_v2", v2)):
        packed = _qlinear.gptq_pack(weight, scales, zeros, bits=bits, group_size=8, zero_format=zero_format)
        assert packed[1].shape == (2, bits)
        assert (packed[1].view(np.uint32) == word).all()


def test_golden_symmetric_zeros_3_bit():
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    scales, zeros = _qlinear.gptq_find_params(weight, bits=3, group_size=-1, sym=True)
    for zero_format, field in (("gptq", 3), ("gptq_v2", 4)):
        qzeros = _qlinear.gptq_pack(weight, scales, zeros, bits=3, group_size=-1, zero_format=zero_format)[1]
        assert (unpack_stream(qzeros.T, 3, 32) == field).all()


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 110), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_pack_codes_is_a_bijection(bits, k, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (k, n), dtype=np.uint8)
    packed = _qlinear.gptq_pack_codes(codes, bits=bits)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed, pack_stream(codes, bits))
    unpacked = _qlinear.gptq_unpack_codes(packed, bits=bits, count=k)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, codes)


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_whole_words_come_back(bits, chunks, n, seed):
    """The other direction: any words at all, where no bit of them is padding."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (chunks * bits, n)).astype(np.int32)
    codes = _qlinear.gptq_unpack_codes(words, bits=bits, count=chunks * 32)
    np.testing.assert_array_equal(_qlinear.gptq_pack_codes(codes, bits=bits), words)


@pytest.mark.parametrize("bits", BITS)
def test_strided_codes_and_words(bits):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**bits, (5, 2 * 70), dtype=np.uint8)[:, ::2].T
    packed = _qlinear.gptq_pack_codes(codes, bits=bits)
    np.testing.assert_array_equal(packed, pack_stream(codes, bits))
    across = packed.T.copy()
    np.testing.assert_array_equal(_qlinear.gptq_unpack_codes(across.T, bits=bits, count=70), codes)


@pytest.mark.parametrize("bits", BITS)
def test_unplanar(bits):
    """The planar layout, written plane by plane, gives the stream of the same codes."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 2**bits, (96, 5))
    planes, shift = [], 0
    for width in {3: (2, 1)}.get(bits, (bits,)):
        plane = codes >> shift & (1 << width) - 1
        shift += width
        per_word = 32 // width
        words = plane.reshape(3, width, per_word, 5) << (width * np.arange(per_word))[:, None]
        planes.append(words.sum(axis=2))
    planar = np.concatenate(planes, axis=1).reshape(3 * bits, 5).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(_qlinear.gptq_unplanar(planar, bits=bits), pack_stream(codes, bits))


# ---- the quantizer ----


def reference_params(weight, bits, group_size, sym):
    """Op by op in fp32, as the GPTQ paper's code takes them."""
    k = weight.shape[1]
    size = k if group_size == -1 else group_size
    scales, zeros = [], []
    for first in range(0, k, size):
        part = weight[:, first : first + size].astype(np.float32)
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        if sym:
            high = np.maximum(np.abs(low), high)
            low = np.where(low < 0, -high, low)
        both = (low == 0) & (high == 0)
        low, high = np.where(both, np.float32(-1), low), np.where(both, np.float32(1), high)
        scale = (high - low) / np.float32(2**bits - 1)
        scales.append(scale)
        zeros.append(np.full_like(scale, 2 ** (bits - 1)) if sym else np.round(-low / scale))
    return np.stack(scales, axis=1), np.stack(zeros, axis=1)


def reference_codes(weight, scales, zeros, groups, bits):
    """q [K, N]: fp32, z * scale with the scale as given, the quotient with the fp16 one."""
    product = (zeros.astype(np.float32) * scales.astype(np.float32))[:, groups]
    stored = scales.astype(np.float16).astype(np.float32)[:, groups]
    with np.errstate(all="ignore"):
        rounded = np.round((weight.astype(np.float32) + product) / stored)
    return np.clip(np.nan_to_num(rounded, nan=0), 0, 2**bits - 1).astype(np.int64).T


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (70, 32), (70, -1), (5, 100)])
def test_find_params(dtype, bits, sym, k, group_size):
    weight = np.random.default_rng(3).standard_normal((9, k)).astype(dtype)
    scales, zeros = _qlinear.gptq_find_params(weight, bits=bits, group_size=group_size, sym=sym)
    wanted = reference_params(weight, bits, min(group_size, k), sym)
    assert scales.dtype == zeros.dtype == np.float32
    np.testing.assert_array_equal(scales, wanted[0])
    np.testing.assert_array_equal(zeros, wanted[1])


def test_find_params_decision_points():
    rows = {
        # -(-1) / fp32(2 / 15) is just below 7.5.
        "of zeros": ([0, 0, 0, 0], 2 / 15, 7, 2 / 15, 8),
        "all positive: the range begins at 0": ([15, 3, 1, 2], 1, 0, 1, 8),
        "all negative: the range ends at 0": ([-15, -3, -1, -2], 1, 15, 2, 8),
        "tie 2.5 of the zero goes to 2": ([-2.5, 12.5, 0, 0], 1, 2, 25 / 15, 8),
        "tie 3.5 of the zero goes to 4": ([-3.5, 11.5, 0, 0], 1, 4, 23 / 15, 8),
    }
    for name, (values, scale, zero, sym_scale, sym_zero) in rows.items():
        weight = np.array([values], np.float32)
        for sym, wanted in ((False, (scale, zero)), (True, (sym_scale, sym_zero))):
            got = _qlinear.gptq_find_params(weight, bits=4, group_size=-1, sym=sym)
            assert (got[0][0, 0], got[1][0, 0]) == (np.float32(wanted[0]), wanted[1]), name


@pytest.mark.parametrize("position", [0, 3, 7])
def test_nan_reaches_the_scale_of_its_group_only(position):
    weight = np.ones((1, 16), np.float32)
    weight[0, position] = np.nan
    scales, _ = _qlinear.gptq_find_params(weight, bits=4, group_size=8)
    assert np.isnan(scales[0, 0])
    assert scales[0, 1] == np.float32(1 / 15)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (75, 32), (75, -1), (33, 7)])
def test_pack(bits, zero_format, k, group_size):
    rng = np.random.default_rng(4)
    n = 13
    weight = rng.standard_normal((n, 2 * k)).astype(np.float32)[:, ::2]
    scales, zeros = _qlinear.gptq_find_params(weight, bits=bits, group_size=group_size)
    groups = trivial(k, group_size)
    qweight, qzeros, stored = _qlinear.gptq_pack(
        weight, scales, zeros, bits=bits, group_size=group_size, zero_format=zero_format
    )
    np.testing.assert_array_equal(qweight, pack_stream(reference_codes(weight, scales, zeros, groups, bits), bits))
    fields = (zeros - (zero_format == "gptq")).astype(np.int64) % 2**bits
    np.testing.assert_array_equal(qzeros, pack_stream(fields, bits).T)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, scales.T.astype(np.float16))


def test_pack_rounds_half_to_even_and_clamps_to_the_field():
    """scale 1, zero 8: w + 8 is the quotient. What lies outside 0..15 must not touch the neighbours' bits."""
    values = [-8.5, -7.5, -6.5, -0.5, 0.5, 1.5, 6.5, 7.5, 1e9, -1e9, np.inf, -np.inf, 0, -9, 8, 3]
    wanted = [0, 0, 2, 8, 8, 10, 14, 15, 15, 0, 15, 0, 8, 0, 15, 11]
    one = np.ones((1, 1), np.float32)
    qweight, _, _ = _qlinear.gptq_pack(np.array([values], np.float32), one, 8 * one, bits=4, group_size=-1)
    assert unpack_stream(qweight, 4, 16)[:, 0].tolist() == wanted


def test_pack_multiplies_by_the_given_scale_and_divides_by_the_stored_one():
    """With zero 15 and a scale between two fp16 values the three other ways to mix them give other codes."""
    scale = np.float32(0.1)
    rounded = np.float32(np.float16(scale))
    weight = np.linspace(-15, 0, 4001).astype(np.float32)[None] * scale
    sum_as_given = weight + np.float32(15) * scale
    wanted = np.clip(np.round(sum_as_given / rounded), 0, 15)
    others = [np.round(sum_as_given / scale), np.round((weight + np.float32(15) * rounded) / rounded)]
    assert all((np.clip(other, 0, 15) != wanted).any() for other in others)
    qweight, _, _ = _qlinear.gptq_pack(
        weight, [[scale]] * np.ones((1, 1), np.float32), np.full((1, 1), 15.0), bits=4, group_size=-1
    )
    np.testing.assert_array_equal(unpack_stream(qweight, 4, 4001)[:, 0], wanted[0])


@pytest.mark.parametrize("bits", BITS)
def test_zero_0_wraps_in_v1_and_comes_back(bits):
    """True zeros of 0 are stored as the largest field, beside neighbours that keep theirs, and decode to 0."""
    n, k = 11, 32
    weight = np.random.default_rng(5).uniform(0.1, 1, (n, k)).astype(np.float32)
    weight[1::2] *= -1
    scales, zeros = _qlinear.gptq_find_params(weight, bits=bits, group_size=-1)
    assert set(zeros.ravel()) == {0, 2**bits - 1}
    qweight, qzeros, stored = _qlinear.gptq_pack(weight, scales, zeros, bits=bits, group_size=-1)
    fields = unpack_stream(qzeros.T, bits, n)[:, 0]
    assert fields.tolist() == [2**bits - 1 if row % 2 == 0 else 2**bits - 2 for row in range(n)]
    layer = _qlinear.QuantLinear(qweight, qzeros, stored, bits=bits, group_size=-1)
    assert layer.zero_format == "gptq"
    codes = reference_codes(weight, scales, zeros, trivial(k, -1), bits)
    reference = reference_weight(codes, zeros.T, stored, trivial(k, -1))
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))
    # A zero read as 2^bits or as a neighbour's would be off by the whole range, not by a step.
    assert np.abs(reference - weight).max() < 0.1 * 2.0 ** (4 - bits) + 0.01


def test_pack_clamps_zeros_to_the_field():
    zeros = np.array([[-3.0], [7.4], [99.0], [np.nan], [2.0]], np.float32)
    ones = np.ones((5, 1), np.float32)
    _, qzeros, _ = _qlinear.gptq_pack(
        np.ones((5, 8), np.float32), ones, zeros, bits=4, group_size=-1, zero_format="gptq_v2"
    )
    assert unpack_stream(qzeros.T, 4, 5)[:, 0].tolist() == [0, 7, 15, 0, 2]


def test_scale_0_makes_no_nan():
    """A scale that fp16 cannot hold divides by zero in the packer; the layer's weight is 0 there, not NaN."""
    tiny = np.full((2, 1), 1e-12, np.float32)
    weight = np.array([[0, 1e-12], [-1e-12, 1]], np.float32)
    packed = _qlinear.gptq_pack(weight, tiny, np.full((2, 1), 8.0, np.float32), bits=4, group_size=-1)
    assert (packed[2] == 0).all()
    layer = _qlinear.QuantLinear(*packed, bits=4, group_size=-1, in_features=2)
    np.testing.assert_array_equal(layer.dequantize(), np.zeros((2, 2)))


def test_pack_with_act_order():
    rng = np.random.default_rng(6)
    n, k, group_size = 10, 96, 32
    weight = rng.standard_normal((n, k)).astype(np.float32)
    order = rng.permutation(k)
    g_idx = trivial(k, group_size)[order]
    scales, zeros = _qlinear.gptq_find_params(
        weight[:, np.argsort(g_idx, kind="stable")], bits=4, group_size=group_size
    )
    wanted = pack_stream(reference_codes(weight, scales, zeros, g_idx, 4), 4)
    for index in (g_idx.astype(np.int32), g_idx.astype(np.int64), (g_idx - 3).astype(np.int32)):
        qweight, _, _ = _qlinear.gptq_pack(weight, scales, zeros, index, bits=4, group_size=group_size)
        np.testing.assert_array_equal(qweight, wanted)


# ---- the layer ----


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scales_dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("k", "n", "group_size"), [(64, 32, 32), (96, 17, -1), (77, 5, 20), (1, 1, 8), (257, 40, 128)])
def test_dequantize(bits, zero_format, scales_dtype, k, n, group_size):
    tensors, codes, zeros = make_layer(bits, k, n, group_size, dtype=scales_dtype, version=zero_format)
    layer = _qlinear.QuantLinear(**tensors, bits=bits, group_size=group_size, zero_format=zero_format, in_features=k)
    assert (layer.in_features, layer.out_features, layer.zero_format) == (k, n, zero_format)
    reference = reference_weight(codes, zeros, tensors["scales"], trivial(k, group_size))
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True])
def test_call(bits, dtype, act_order):
    k, n, group_size = 205, 51, 32
    tensors, codes, zeros = make_layer(bits, k, n, group_size, seed=7)
    groups = trivial(k, group_size)
    if act_order:
        groups = np.random.default_rng(8).permutation(groups)
        tensors["g_idx"] = groups.astype(np.int32)
    bias = torch.randn(n, dtype=torch.float16)
    torch_tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    layer = _qlinear.QuantLinear(**torch_tensors, bias=bias, bits=bits, group_size=group_size, in_features=k)
    assert ("act_order" in repr(layer)) == act_order
    weight = reference_weight(codes, zeros, tensors["scales"], groups)
    for m in (1, 5, 40):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        out = layer(x)
        assert out.dtype == dtype
        x64, b64 = x.double().numpy(), bias.double().numpy()
        reference = x64 @ weight.T + b64
        magnitude = np.abs(x64) @ np.abs(weight).T + np.abs(b64)
        # bf16 may round the weight once, by 2^-9 of it; sums of k products in fp32 err by less than (k + 8) * 2^-24.
        relative = (k + 8) * 2.0**-24 + (2.0**-9 if dtype == torch.bfloat16 else 0)
        numpy_dtype = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}.get(dtype, np.float32)
        bound = relative * magnitude + half_ulp(reference, numpy_dtype) * 1.01
        assert (np.abs(out.double().numpy() - reference) <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_zero_format_auto(bits):
    """v2 if and only if all stored fields of all rows are the middle; what pads a row's last word does not count."""
    k, n = 64, 9
    tensors, _, _ = make_layer(bits, k, n, 32)
    middle = np.full((n, 2), 2 ** (bits - 1))
    cases = {"gptq_v2": [middle], "gptq": [middle - 1]}
    for row, group in ((0, 0), (n - 1, 1)):
        one_off = middle.copy()
        one_off[row, group] -= 1
        cases["gptq"].append(one_off)
    for wanted, fields in cases.items():
        for field in fields:
            qzeros = pack_stream(field, bits).T.copy()
            spare = 32 * qzeros.shape[1] - n * bits
            qzeros[:, -1] |= np.int32(-1) << np.int32(32 - spare)
            layer = _qlinear.QuantLinear(
                tensors["qweight"], qzeros, tensors["scales"], bits=bits, group_size=32, in_features=k
            )
            assert layer.zero_format == wanted
    layer = _qlinear.QuantLinear(
        tensors["qweight"], qzeros, tensors["scales"], bits=bits, group_size=32, zero_format="gptq_v2"
    )
    assert layer.zero_format == "gptq_v2"


def g_idx_cases():
    k, group_size = 64, 16
    rng = np.random.default_rng(9)
    plain = trivial(k, group_size)
    mixed = rng.permutation(plain)
    reverse = np.ascontiguousarray(mixed[::-1])
    return {
        "trivial": (plain.astype(np.int32), plain, False),
        "empty": (np.empty(0, np.int32), plain, False),
        "all zero": (np.zeros(k, np.int32), plain, False),
        "trivial by negative entries": ((plain - 4).astype(np.int32), plain, False),
        "unsorted": (mixed.astype(np.int32), mixed, True),
        "unsorted, int64": (mixed.astype(np.int64), mixed, True),
        "negative": (np.where(rng.random(k) < 0.5, mixed, mixed - 4).astype(np.int32), mixed, True),
        "strided": (reverse.astype(np.int32)[::-1], mixed, True),
        "sorted, but uneven": (np.sort(rng.integers(0, 4, k)).astype(np.int32), None, True),
        "all in the last group": (np.full(k, 3, np.int32), np.full(k, 3), True),
    }


@pytest.mark.parametrize("case", g_idx_cases())
def test_g_idx(case):
    g_idx, groups, act_order = g_idx_cases()[case]
    groups = g_idx if groups is None else groups
    tensors, codes, zeros = make_layer(4, 64, 24, 16)
    layer = _qlinear.QuantLinear(**tensors, g_idx=g_idx, bits=4, group_size=16)
    assert ("act_order" in repr(layer)) == act_order
    reference = reference_weight(codes, zeros, tensors["scales"], groups)
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))
    # What is indexed with was checked at construction; later changes of the caller's array cannot reach it.
    g_idx[...] = 2**30
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


def test_one_group_with_act_order_is_plain():
    tensors, codes, zeros = make_layer(4, 64, 24, -1)
    layer = _qlinear.QuantLinear(**tensors, g_idx=np.zeros(64, np.int32), bits=4, group_size=-1)
    assert "act_order" not in repr(layer)
    reference = reference_weight(codes, zeros, tensors["scales"], np.zeros(64, int))
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


def test_in_features_from_g_idx():
    """3-bit rows that hold 42 codes, of which g_idx tells 40."""
    tensors, codes, zeros = make_layer(3, 40, 8, 20)
    assert _qlinear.QuantLinear(**tensors, bits=3, group_size=21).in_features == 42
    layer = _qlinear.QuantLinear(**tensors, g_idx=trivial(40, 20).astype(np.int32), bits=3, group_size=20)
    assert layer.in_features == 40
    reference = reference_weight(codes, zeros, tensors["scales"], trivial(40, 20))
    np.testing.assert_array_equal(layer.dequantize(), reference.astype(np.float32))


@pytest.mark.parametrize(("k", "n"), [(32, 0), (0, 8)])
def test_empty(k, n):
    qweight = np.zeros((k // 8, n), np.int32)
    groups = k // 32
    layer = _qlinear.QuantLinear(
        qweight, np.zeros((groups, n // 8), np.int32), np.zeros((groups, n), np.float16), bits=4, group_size=32
    )
    assert layer.dequantize().shape == (n, k)
    assert (layer(np.ones((3, k), np.float32)) == 0).all()


def test_replaced_storage_binds_anew():
    """g_idx and the zeros' format follow the tensors; a replacement that does not fit leaves the layer as it was."""
    first, codes, zeros = make_layer(4, 64, 24, 16)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in first.items()}
    mixed = np.random.default_rng(10).permutation(trivial(64, 16)).astype(np.int32)
    g_idx = torch.from_numpy(trivial(64, 16).astype(np.int32))
    layer = _qlinear.QuantLinear(**tensors, g_idx=g_idx, bits=4, group_size=16)
    before = layer.dequantize()
    np.testing.assert_array_equal(before, reference_weight(codes, zeros, first["scales"], trivial(64, 16)).astype("f4"))
    plain = g_idx.data
    g_idx.data = torch.from_numpy(mixed)
    np.testing.assert_array_equal(
        layer.dequantize(), reference_weight(codes, zeros, first["scales"], mixed).astype(np.float32)
    )
    g_idx.data = torch.full((64,), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"g_idx must be in \[-4, 4\), got 4 at position 0"):
        layer.dequantize()
    g_idx.data = plain
    assert torch.equal(layer.dequantize(), before)
    tensors["qzeros"].data = torch.full((4, 3), 0x88888888 - 2**32, dtype=torch.int32)
    wanted = reference_weight(codes, np.full((4, 24), 8), first["scales"], trivial(64, 16))
    np.testing.assert_array_equal(layer.dequantize(), wanted.astype(np.float32))
    assert layer.zero_format == "gptq_v2"


# ---- what is refused ----


def layer_arguments():
    tensors, _, _ = make_layer(4, 64, 24, 16)
    return {**tensors, "bits": 4, "group_size": 16}


def out_of_range(value, position, dtype=np.int32):
    g_idx = trivial(64, 16).astype(dtype)
    g_idx[position] = value
    return g_idx


WRONG_LAYERS = {
    "qweight missing": ({"qweight": None}, TypeError, "qweight must be a tensor, got None"),
    "qweight no tensor": ({"qweight": [1, 2]}, TypeError, "qweight"),
    "qweight dtype": ({"qweight": np.zeros((8, 24), np.int64)}, TypeError, "qweight must be int32, got int64"),
    "qweight rank": ({"qweight": np.zeros(8, np.int32)}, ValueError, "qweight must have shape"),
    "qweight strides": ({"qweight": np.zeros((24, 8), np.int32).T}, ValueError, "qweight must be contiguous"),
    "qweight rows for in_features": ({"in_features": 72}, ValueError, "qweight must have 9 rows.*got 8"),
    "qzeros missing": ({"qzeros": None}, TypeError, "qzeros must be a tensor, got None"),
    "qzeros dtype": ({"qzeros": np.zeros((4, 3), np.uint8)}, TypeError, "qzeros must be int32, got uint8"),
    "qzeros width": ({"qzeros": np.zeros((4, 4), np.int32)}, ValueError, r"qzeros must have shape \[4, 3\]"),
    "qzeros groups": ({"qzeros": np.zeros((3, 3), np.int32)}, ValueError, r"qzeros must have shape \[4, 3\]"),
    "qzeros strides": ({"qzeros": np.zeros((3, 4), np.int32).T}, ValueError, "qzeros must be contiguous"),
    "scales missing": ({"scales": None}, TypeError, "scales must be a tensor, got None"),
    "scales dtype": ({"scales": np.zeros((4, 24), np.float64)}, TypeError, "scales must be float32.*got float64"),
    "scales groups": ({"scales": np.zeros((1, 24), np.float16)}, ValueError, r"scales must have shape \[4, 24\]"),
    "scales columns": ({"scales": np.zeros((4, 25), np.float16)}, ValueError, r"scales must have shape \[4, 24\]"),
    "scales strides": ({"scales": np.zeros((24, 4), np.float16).T}, ValueError, "scales must be contiguous"),
    "g_idx dtype": ({"g_idx": np.zeros(64, np.float32)}, TypeError, "g_idx must be int32 or int64, got float32"),
    "g_idx rank": ({"g_idx": np.zeros((64, 1), np.int32)}, ValueError, "g_idx must have shape"),
    "g_idx length": ({"g_idx": np.zeros(63, np.int32), "in_features": 64}, ValueError, r"g_idx must have shape \[64\]"),
    "g_idx length alone": ({"g_idx": np.zeros(80, np.int32)}, ValueError, "qweight must have 10 rows.*got 8"),
    "g_idx too large": ({"g_idx": out_of_range(4, 37)}, ValueError, r"g_idx .*got 4 at position 37"),
    "g_idx too negative": ({"g_idx": out_of_range(-5, 63)}, ValueError, r"g_idx .*got -5 at position 63"),
    "g_idx int64": ({"g_idx": out_of_range(2**32, 1, np.int64)}, ValueError, "g_idx .*got 4294967296 at position 1"),
    "bits value": ({"bits": 5}, ValueError, "bits must be 2, 3, 4 or 8, got 5"),
    "bits kind": ({"bits": "4"}, TypeError, "bits must be an int"),
    "group_size 0": ({"group_size": 0}, ValueError, "group_size must be -1 .* or at least 1, got 0"),
    "group_size -2": ({"group_size": -2}, ValueError, "group_size must be -1 .* or at least 1, got -2"),
    "group_size kind": ({"group_size": 16.0}, TypeError, "group_size must be an int"),
    "group_size other": ({"group_size": 32}, ValueError, r"qzeros must have shape \[2, 3\]"),
    "zero_format": ({"zero_format": "v3"}, ValueError, "zero_format must be one of 'auto', 'gptq', 'gptq_v2'"),
    "in_features 0": ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
    "in_features huge": ({"in_features": 2**63 - 1}, ValueError, "qweight must have"),
    "bias dtype": ({"bias": np.zeros(24, np.int32)}, TypeError, "bias"),
    "bias length": ({"bias": np.zeros(23, np.float32)}, ValueError, r"bias must have shape \[24\]"),
    "unknown argument": ({"groupsize": 16}, TypeError, "groupsize"),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_layer_refuses(case, framework):
    changed, error, message = WRONG_LAYERS[case]
    with pytest.raises(error, match=message):
        _qlinear.QuantLinear(**in_framework(framework, {**layer_arguments(), **changed}))


@pytest.mark.parametrize("missing", ["qweight", "qzeros", "scales", "bits", "group_size"])
def test_layer_requires(missing):
    arguments = layer_arguments()
    del arguments[missing]
    with pytest.raises(TypeError, match=f"{missing} is missing"):
        _qlinear.QuantLinear(**arguments)


def test_misaligned_words_are_refused():
    raw = np.zeros(8 * 24 * 4 + 1, np.uint8)
    qweight = raw[1:].view(np.int32).reshape(8, 24)
    with pytest.raises(ValueError, match="qweight: its data is not aligned"):
        _qlinear.QuantLinear(**{**layer_arguments(), "qweight": qweight})


WEIGHT = np.ones((6, 64), np.float32)
PARAMS = np.ones((6, 4), np.float32)
PACK = (WEIGHT, PARAMS, PARAMS)
FOUR_BY_16 = {"bits": 4, "group_size": 16}
THREE_WORDS = (np.zeros((3, 2), np.int32),)
WRONG_CALLS = [
    ("gptq_find_params", (WEIGHT,), {"bits": 6, "group_size": 16}, ValueError, "bits must be 2, 3, 4 or 8, got 6"),
    ("gptq_find_params", (WEIGHT,), {"bits": 4, "group_size": 0}, ValueError, "group_size"),
    ("gptq_find_params", (WEIGHT,), {"bits": 4}, TypeError, "group_size is missing"),
    ("gptq_find_params", (WEIGHT.astype(int),), FOUR_BY_16, TypeError, "weight must be float32"),
    ("gptq_find_params", (WEIGHT[0],), FOUR_BY_16, ValueError, "weight must have shape"),
    ("gptq_find_params", (WEIGHT,), {**FOUR_BY_16, "sym": 1}, TypeError, "sym must be True or False"),
    ("gptq_pack", PACK, {"group_size": 16}, TypeError, "bits is missing"),
    ("gptq_pack", PACK, {"bits": 4}, TypeError, "group_size is missing"),
    ("gptq_pack", PACK, {"bits": 4, "group_size": 32}, ValueError, r"scales .*shape \[6, 2\]"),
    ("gptq_pack", (WEIGHT, PARAMS, PARAMS.T), FOUR_BY_16, ValueError, r"zeros .*shape \[6, 4\]"),
    ("gptq_pack", (WEIGHT, PARAMS, PARAMS.astype(int)), FOUR_BY_16, TypeError, "zeros"),
    ("gptq_pack", (*PACK, np.full(64, 4, np.int32)), FOUR_BY_16, ValueError, r"g_idx .*got 4 at position 0"),
    ("gptq_pack", (*PACK, np.zeros(63, np.int32)), FOUR_BY_16, ValueError, r"g_idx must have shape \[64\]"),
    ("gptq_pack", PACK, {**FOUR_BY_16, "zero_format": "auto"}, ValueError, "zero_format must be one of 'gptq'"),
    ("gptq_pack_codes", (np.zeros((4, 4), np.int8),), {"bits": 4}, TypeError, "codes must be uint8, got int8"),
    ("gptq_pack_codes", (np.zeros(4, np.uint8),), {"bits": 4}, ValueError, "codes must have shape"),
    ("gptq_pack_codes", (np.diag([1, 8]).astype(np.uint8),), {"bits": 3}, ValueError, r"at most 7, got 8 at \[1, 1\]"),
    ("gptq_unpack_codes", THREE_WORDS, {"bits": 3, "count": 33}, ValueError, "packed must have shape"),
    ("gptq_unpack_codes", THREE_WORDS, {"bits": 3, "count": -1}, ValueError, "count must be at least"),
    ("gptq_unpack_codes", (np.zeros((3, 2), np.int16),), {"bits": 3, "count": 32}, TypeError, "packed must be int32"),
    ("gptq_unplanar", (np.zeros((4, 2), np.int32),), {"bits": 3}, ValueError, "packed must have a multiple of 3 rows"),
    ("gptq_unplanar", (np.zeros((3, 2), np.int64),), {"bits": 3}, TypeError, "packed must be int32, got int64"),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "error", "message"), WRONG_CALLS)
def test_function_refuses(function, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        getattr(_qlinear, function)(*args, **kwargs)


def test_results_come_in_the_callers_framework():
    weight = torch.randn(8, 64)
    scales, zeros = _qlinear.gptq_find_params(weight, bits=4, group_size=32)
    packed = _qlinear.gptq_pack(weight, scales, zeros, bits=4, group_size=32)
    assert all(isinstance(tensor, torch.Tensor) for tensor in (scales, zeros, *packed))
    assert [tensor.dtype for tensor in packed] == [torch.int32, torch.int32, torch.float16]


def test_a_part_may_have_the_columns_of_one_group_alone():
    """A g_idx of zeros stands for one left out only where the groups are those of the columns."""
    tensors, codes, zeros = make_layer(4, 128, 24, 32)
    part = {**tensors, "qweight": tensors["qweight"][:8]}
    layer = _qlinear.QuantLinear(**part, g_idx=np.zeros(64, np.int32), bits=4, group_size=32, zero_format="gptq")
    wanted = reference_weight(codes[:64], zeros, tensors["scales"], np.zeros(64, int))
    np.testing.assert_array_equal(layer.dequantize(), wanted.astype(np.float32))


def test_a_part_of_an_act_order_layer_keeps_all_groups():
    """Split along K for several devices, each part's g_idx counts in the groups of the whole."""
    torch.manual_seed(5)
    weight = torch.randn(32, 128)
    g_idx = (torch.randperm(128) // 32).to(torch.int32)
    scales, zeros = _qlinear.gptq_find_params(weight, bits=4, group_size=32)
    qweight, qzeros, scales = _qlinear.gptq_pack(weight, scales, zeros, g_idx, bits=4, group_size=32)
    whole = _qlinear.QuantLinear(qweight, qzeros, scales, g_idx, bits=4, group_size=32).dequantize()
    for first in (0, 64):
        part = _qlinear.QuantLinear(
            qweight[first // 8 : first // 8 + 8], qzeros, scales, g_idx[first : first + 64], bits=4, group_size=32
        )
        assert torch.equal(part.dequantize(), whole[:, first : first + 64])
