"""EETQ: the quantizer's decision points, the tile layout and the layer, against NumPy written from the format alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear import _qlinear

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def reference_codes(weight):
    """weight fp32 [N, K] -> (q int64 [N, K], un-rounded fp32 scales [N]). Half away from zero is exact in fp64."""
    scale = np.abs(weight).max(axis=1, initial=np.float32(0)) * np.float32(1 / 128)
    scale = np.where(np.isfinite(scale), scale, np.float32(np.nan)).astype(np.float32)
    with np.errstate(all="ignore"):
        quotient = (weight / scale[:, None]).astype(np.float64)
    rounded = np.copysign(np.floor(np.abs(quotient) + 0.5), quotient)
    rounded[np.isnan(quotient)] = 127
    return np.clip(rounded, -128, 127).astype(np.int64), scale


def reference_tiles(codes):
    """int8 [K, N] -> bytes, by the steps that EETQ takes: permute rows, transpose, interleave two columns in tiles of
    64 rows, add 128, swap the middle bytes of each word."""
    k, n = codes.shape
    rows = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    columns = codes.reshape(k // 16, 16, n)[:, rows].reshape(k, n).T
    tiles = columns.reshape(n // 2, 2, k // 64, 64).transpose(0, 2, 1, 3)
    stored = (tiles.astype(np.int64) + 128).astype(np.uint8)
    return stored.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)


def stored_bytes(packed):
    return packed.numpy().view(np.uint8).reshape(-1)


def random_weight(n, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)).to(dtype)


# ---- golden vectors ----


def test_golden_tile():
    codes = torch.zeros(64, 2, dtype=torch.int8)
    codes[:16, 0] = torch.arange(16)
    codes[:, 1] = -1
    stored = stored_bytes(_qlinear.eetq_pack(codes))
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert stored[:16].tolist() == [128 + code for code in order]
    assert stored[16:64].tolist() == [128] * 48
    assert stored[64:].tolist() == [127] * 64


def test_every_code_and_offset():
    """The closed form of the offsets, byte by byte, with all 256 codes."""
    k_size, n_size = 192, 10
    codes = torch.randint(-128, 128, (k_size, n_size), dtype=torch.int8)
    codes.view(-1)[:256] = torch.arange(-128, 128).to(torch.int8)
    stored = stored_bytes(_qlinear.eetq_pack(codes))
    for k in range(k_size):
        for n in range(n_size):
            offset = (n >> 1) * 2 * k_size + (k >> 6) * 128 + (n & 1) * 64 + (k & 48)
            offset += ((k & 7) << 1) | ((k >> 3) & 1)
            assert stored[offset] == (int(codes[k, n]) + 128) & 255


# ---- decision points of the quantizer ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_ties_and_ends(dtype):
    """With max |w| = 128 the scale is 1, and each half-integer is a tie: half away from zero, +128 clipped to 127."""
    wanted, values = [], []
    for code in range(-128, 128):
        values += [float(code)]
        wanted += [code]
    for whole in range(128):
        if dtype == torch.bfloat16 and whole >= 64:
            break  # half-integers from 64 up are not bf16 numbers
        values += [whole + 0.5, -whole - 0.5]
        wanted += [min(whole + 1, 127), -whole - 1]
    values += [128.0, -128.0, -0.0]
    wanted += [127, -128, 0]
    weight = torch.tensor([values], dtype=dtype)
    assert torch.equal(weight.double(), torch.tensor([values], dtype=torch.float64))
    codes, scales = _qlinear.eetq_codes(weight)
    assert scales.tolist() == [1.0]
    assert codes[:, 0].tolist() == wanted


def test_just_below_a_tie():
    """floor(|v| + 0.5) in fp32 would round these up."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    below_127 = np.nextafter(np.float32(126.5), np.float32(0))
    codes, _ = _qlinear.eetq_codes(np.array([[128, below, -below, below_127, -below_127]], np.float32))
    assert codes[:, 0].tolist() == [127, 0, 0, 126, -126]


def test_division_is_by_the_unrounded_scale():
    """A channel whose code differs when it is divided by the stored fp16 scale."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((64, 256)).astype(np.float16)
    codes, scales = _qlinear.eetq_codes(weight)
    wanted, scale = reference_codes(weight.astype(np.float32))
    stored = scale.astype(np.float16).astype(np.float64)
    with_stored = np.clip(np.rint(weight.astype(np.float64) / stored[:, None]), -128, 127)
    assert (with_stored != wanted).any()
    assert np.array_equal(codes.T, wanted)
    assert np.array_equal(scales, scale.astype(np.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_channel(dtype):
    weight = random_weight(4, 64, dtype)
    weight[1] = 0
    weight[2] = -0.0
    codes, scales = _qlinear.eetq_codes(weight)
    assert codes[:, 1:3].unique().tolist() == [127]
    assert scales[1:3].tolist() == [0, 0]
    layer = _qlinear.EETQLinear(*_qlinear.eetq_quantize(weight))
    assert not layer.dequantize()[1:3].any()


def test_scale_that_underflows_fp16():
    """The channel is lost by its stored scale; its codes are those of the scale before rounding."""
    weight = torch.full((2, 64), 2.0**-19, dtype=torch.float16)
    weight[:, ::2] *= -1
    codes, scales = _qlinear.eetq_codes(weight)
    assert scales.tolist() == [0, 0]
    assert codes[:2, 0].tolist() == [-128, 127]


@pytest.mark.parametrize("least", [1e-38, 1e-42, 1e-45])
def test_denormal_channel(least):
    weight = np.array([[least, -least, 0, least / 2]], np.float32)
    codes, scales = _qlinear.eetq_codes(weight)
    wanted, scale = reference_codes(weight)
    assert np.array_equal(codes.T, wanted)
    assert np.array_equal(scales, scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_channel(dtype, bad):
    """Its scale is NaN, so that nothing finite can come of it; its neighbours are as they were."""
    weight = random_weight(4, 128, dtype)
    clean, clean_scales = _qlinear.eetq_codes(weight)
    weight[2, 70] = bad
    codes, scales = _qlinear.eetq_codes(weight)
    others = [0, 1, 3]
    assert scales.isnan().tolist() == [False, False, True, False]
    assert torch.equal(codes[:, others], clean[:, others])
    assert torch.equal(scales[others], clean_scales[others])
    dense = _qlinear.EETQLinear(*_qlinear.eetq_quantize(weight)).dequantize()
    assert dense[2].isnan().all()
    assert dense[others].isfinite().all()


def test_fp64_beyond_fp32_is_not_finite():
    _, scales = _qlinear.eetq_codes(np.array([[1e300, 1.0], [2.0, 1.0]]))
    assert scales.dtype == np.float32
    assert np.isnan(scales[0])
    assert scales[1] == 2.0 / 128


# ---- the quantizer at large ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(2, 64), (34, 128), (200, 192), (66, 4096)])
def test_quantize(n, k, dtype):
    weight = random_weight(n, k, dtype)
    wanted, scale = reference_codes(weight.float().numpy())
    packed, scales = _qlinear.eetq_quantize(weight)
    assert packed.dtype == torch.int8
    assert packed.shape == (k, n)
    assert scales.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(scales, torch.from_numpy(scale).to(scales.dtype))
    assert np.array_equal(stored_bytes(packed), reference_tiles(wanted.T))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (5, 65), (129, 63), (0, 5), (4, 0)])
def test_codes_of_any_shape(n, k):
    weight = random_weight(n, k, torch.float32)
    codes, scales = _qlinear.eetq_codes(weight)
    wanted, scale = reference_codes(weight.numpy())
    assert codes.shape == (k, n)
    assert scales.shape == (n,)
    assert np.array_equal(codes.numpy().T, wanted)
    assert np.array_equal(scales.numpy(), scale)


@pytest.mark.parametrize("view", ["transposed", "steps", "reversed", "broadcast", "readonly"])
def test_strides(view):
    rng = np.random.default_rng(1)
    weight = {
        "transposed": lambda: rng.standard_normal((128, 12)).astype(np.float16).T,
        "steps": lambda: rng.standard_normal((24, 384)).astype(np.float16)[::2, ::3],
        "reversed": lambda: rng.standard_normal((12, 128)).astype(np.float16)[::-1, ::-1],
        "broadcast": lambda: np.broadcast_to(rng.standard_normal(128).astype(np.float16), (12, 128)),
        "readonly": lambda: rng.standard_normal((12, 128)).astype(np.float16),
    }[view]()
    if view == "readonly":
        weight.flags.writeable = False
    for quantize in (_qlinear.eetq_quantize, _qlinear.eetq_codes):
        codes, scales = quantize(weight)
        plain_codes, plain_scales = quantize(weight.copy())
        assert np.array_equal(codes, plain_codes)
        assert np.array_equal(scales, plain_scales)


# ---- tiles ----

shapes = st.tuples(st.integers(0, 5).map(lambda tiles: 64 * tiles), st.integers(0, 40).map(lambda pairs: 2 * pairs))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 2**32 - 1), transposed=st.booleans())
def test_pack_is_a_bijection(shape, seed, transposed):
    codes = np.random.default_rng(seed).integers(-128, 128, shape[::-1] if transposed else shape).astype(np.int8)
    if transposed:
        codes = codes.T
    packed = _qlinear.eetq_pack(codes)
    assert packed.shape == shape
    assert packed.flags.c_contiguous
    assert np.array_equal(packed.view(np.uint8).reshape(-1), reference_tiles(codes))
    assert np.array_equal(_qlinear.eetq_unpack(packed), codes)
    assert np.array_equal(_qlinear.eetq_pack(_qlinear.eetq_unpack(codes.copy())), codes)


# ---- the layer ----


@pytest.mark.parametrize("scales_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype, scales_dtype):
    codes = torch.randint(-128, 128, (128, 34), dtype=torch.int8)
    scales = (torch.rand(34) / 64).to(scales_dtype)
    layer = _qlinear.EETQLinear(_qlinear.eetq_pack(codes), scales)
    wanted = (codes.T.double() * scales.double()[:, None]).float()
    assert torch.equal(layer.dequantize(str(dtype).removeprefix("torch.")), wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 70])
def test_product(dtype, m):
    k, n = 320, 66
    weight, scales = _qlinear.eetq_quantize(random_weight(n, k, torch.float16))
    bias = torch.randn(n)
    x = torch.randn(m, k).to(dtype)
    layer = _qlinear.EETQLinear(weight, scales, bias)
    dense = _qlinear.eetq_unpack(weight).T.double().numpy() * scales.double().numpy()[:, None]
    xs = x.double().numpy()
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == (m, n)
    wanted = xs @ dense.T + bias.double().numpy()
    rounding = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-20
    bound = rounding * (np.abs(xs) @ np.abs(dense).T + bias.abs().double().numpy())
    half_ulp = np.abs(wanted) * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert (np.abs(out.double().numpy() - wanted) <= bound + half_ulp).all()


def test_layer_describes_itself():
    weight, scales = _qlinear.eetq_quantize(random_weight(6, 128, torch.float16))
    layer = _qlinear.EETQLinear(weight, scales)
    assert (layer.in_features, layer.out_features, layer.nbytes) == (128, 6, 128 * 6 + 2 * 6)
    assert repr(layer) == "EETQLinear(in_features=128, out_features=6, bias=False)"
    assert _qlinear.EETQLinear(weight, weight_scales=scales, bias=torch.zeros(6)).nbytes == 128 * 6 + 12 + 24


# ---- malformed arguments ----


def good():
    return torch.zeros(64, 4, dtype=torch.int8), torch.ones(4, dtype=torch.float16)


MALFORMED_LAYER = [
    (lambda w, s: (None, s), TypeError, "weight must be a tensor"),
    (lambda w, s: (w, None), TypeError, "weight_scales must be a tensor"),
    (lambda w, s: ([[1]], s), TypeError, "weight must be a tensor"),
    (lambda w, s: (w.float(), s), TypeError, "weight must be int8, got float32"),
    (lambda w, s: (w.view(torch.uint8), s), TypeError, "weight must be int8, got uint8"),
    (lambda w, s: (w[0], s), ValueError, "weight must have shape"),
    (lambda w, s: (w[None], s), ValueError, "weight must have shape"),
    (lambda w, s: (w[:48].contiguous(), s), ValueError, "weight has in_features 48"),
    (lambda w, s: (w[:, :3].contiguous(), s[:3]), ValueError, "weight has in_features 64 and out_features 3"),
    (lambda w, s: (w[:0], s), ValueError, "weight has in_features 0"),
    (lambda w, s: (torch.zeros(4, 64, dtype=torch.int8).T, s), ValueError, "weight must be contiguous"),
    (lambda w, s: (torch.zeros(64, 8, dtype=torch.int8)[:, ::2], s), ValueError, "weight must be contiguous"),
    (lambda w, s: (w, s.to(torch.int8)), TypeError, "weight_scales must be"),
    (lambda w, s: (w, s.double()), TypeError, "weight_scales must be"),
    (lambda w, s: (w, s[:3]), ValueError, "weight_scales must have shape"),
    (lambda w, s: (w, s[None]), ValueError, "weight_scales must have shape"),
    (lambda w, s: (w, torch.ones(8)[::2]), ValueError, "weight_scales must be contiguous"),
    (lambda w, s: (w, s, torch.zeros(3)), ValueError, "bias must have shape"),
    (lambda w, s: (w, s, torch.zeros(4, dtype=torch.int32)), TypeError, "bias must be"),
    (lambda w, s: (w,), TypeError, "EETQLinear: weight_scales is missing"),
    (lambda w, s: (w, s, None, 1), TypeError, "EETQLinear takes at most 3"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MALFORMED_LAYER)
def test_malformed_layer(arguments, error, message):
    with pytest.raises(error, match=message):
        _qlinear.EETQLinear(*arguments(*good()))


MALFORMED_CALLS = [
    (_qlinear.eetq_quantize, lambda: torch.zeros(2, 64, dtype=torch.int8), TypeError, "weight must be"),
    (_qlinear.eetq_quantize, lambda: torch.zeros(64), ValueError, "weight must have shape"),
    (_qlinear.eetq_quantize, lambda: torch.zeros(2, 2, 64), ValueError, "weight must have shape"),
    (_qlinear.eetq_quantize, lambda: torch.zeros(3, 64), ValueError, "weight has in_features 64 and out_features 3"),
    (_qlinear.eetq_quantize, lambda: torch.zeros(2, 65), ValueError, "weight has in_features 65"),
    (_qlinear.eetq_quantize, lambda: None, TypeError, "weight must be a tensor"),
    (_qlinear.eetq_codes, lambda: torch.zeros(2, 3, dtype=torch.int32), TypeError, "weight must be"),
    (_qlinear.eetq_codes, lambda: torch.zeros(2, 3, dtype=torch.complex64), TypeError, "weight has a dtype"),
    (_qlinear.eetq_codes, lambda: torch.zeros(2), ValueError, "weight must have shape"),
    (_qlinear.eetq_pack, lambda: torch.zeros(64, 2, dtype=torch.uint8), TypeError, "codes must be int8, got uint8"),
    (_qlinear.eetq_pack, lambda: torch.zeros(64, 3, dtype=torch.int8), ValueError, "codes has in_features 64"),
    (_qlinear.eetq_pack, lambda: torch.zeros(32, 2, dtype=torch.int8), ValueError, "codes has in_features 32"),
    (_qlinear.eetq_pack, lambda: torch.zeros(128, dtype=torch.int8), ValueError, "codes must have shape"),
    (_qlinear.eetq_unpack, lambda: torch.zeros(64, 2), TypeError, "weight must be int8"),
    (_qlinear.eetq_unpack, lambda: torch.zeros(63, 2, dtype=torch.int8), ValueError, "weight has in_features 63"),
    (_qlinear.eetq_unpack, lambda: torch.zeros(2, 64, dtype=torch.int8).T, ValueError, "weight must be contiguous"),
]


@pytest.mark.parametrize(("function", "argument", "error", "message"), MALFORMED_CALLS)
def test_malformed_calls(function, argument, error, message):
    with pytest.raises(error, match=message):
        function(argument())


def test_unknown_keyword():
    with pytest.raises(TypeError, match="eetq_quantize has no argument 'scale'"):
        _qlinear.eetq_quantize(torch.zeros(2, 64), scale=1)
