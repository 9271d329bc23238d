"""LLM.int8(): the row quantizer's decision points, and the product against its definition in fp64 on the same codes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear import _qlinear

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def reference_rows(x, threshold):
    """x fp32 [R, C] -> (codes int64 [R, C], absmax fp32 [R], outlier columns): fp32 arithmetic, half to even."""
    magnitude = np.abs(x)
    outlier = magnitude >= np.float32(threshold) if threshold > 0 else np.zeros(x.shape, bool)
    absmax = np.where(outlier, np.float32(0), magnitude).max(axis=1, initial=np.float32(0))
    with np.errstate(all="ignore"):
        scaled = np.where(outlier, np.float32(0), x) * (np.float32(127) / absmax)[:, None]
    codes = np.rint(np.where(np.isfinite(scaled), scaled, 0)).astype(np.int64)
    codes[(absmax == 0) | ~np.isfinite(absmax)] = 0
    columns = np.flatnonzero(outlier.any(axis=0))
    if len(x) > 1:
        codes[:, columns] = 0
    return codes, absmax, columns


def check_quantize(x, threshold):
    """x: a torch tensor [R, C]."""
    codes, absmax, columns = _qlinear.int8_quantize(x, threshold=threshold)
    wanted_codes, wanted_absmax, wanted_columns = reference_rows(x.float().numpy(), threshold)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert absmax.dtype == torch.float32
    assert absmax.shape == x.shape[:1]
    assert np.array_equal(codes.numpy(), wanted_codes)
    assert np.array_equal(absmax.numpy(), wanted_absmax, equal_nan=True)
    if threshold > 0:
        assert columns.dtype == torch.int64
        assert columns.shape == wanted_columns.shape
        assert np.array_equal(columns.numpy(), wanted_columns)
    else:
        assert columns is None


# ---- decision points of the quantizer ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even(dtype):
    """With absmax 127 the factor is 1, and each half-integer is a tie."""
    halves = [whole + 0.5 for whole in range(64 if dtype == torch.bfloat16 else 127)]
    values = [127.0, *halves, *[-half for half in halves], -0.0]
    codes, absmax, _ = _qlinear.int8_quantize(torch.tensor([values], dtype=dtype))
    assert absmax.tolist() == [127.0]
    assert codes[0].tolist() == [int(np.rint(value)) for value in values]


def test_the_factor_is_rounded_before_the_product():
    """Codes that a * 127 / absmax, or the product unrounded, would give otherwise."""
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((400, 512)).astype(np.float32) * 8) / 8
    wanted, absmax, _ = reference_rows(x, 0)
    other = np.rint(x.astype(np.float64) * 127 / absmax.astype(np.float64)[:, None])
    assert (other != wanted).any()
    check_quantize(torch.from_numpy(x), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_an_outlier(dtype):
    """|a| >= 6 is out, the number before 6 is in and is the absmax."""
    below = torch.nextafter(torch.tensor(6.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    x = torch.tensor([[1.0, 6.0, -6.0, below, -below, 7.0]], dtype=dtype)
    codes, absmax, columns = _qlinear.int8_quantize(x, threshold=6.0)
    assert columns.tolist() == [1, 2, 5]
    assert absmax.tolist() == [below]
    assert codes[0, 1:].tolist() == [0, 0, 127, -127, 0]


def test_a_threshold_that_the_dtype_does_not_have():
    """The comparison is in fp32: 6.0001 is no fp16 number, and 6.0 is below it."""
    x = torch.tensor([[6.0, 6.00390625, 1.0]], dtype=torch.float16)
    _, absmax, columns = _qlinear.int8_quantize(x, threshold=6.0001)
    assert columns.tolist() == [1]
    assert absmax.tolist() == [6.0]


def test_columns_of_several_rows():
    """An outlier zeroes its column in all rows; each absmax still counts what was zeroed."""
    x = torch.tensor([[1.0, 5.0, 2.0], [1.0, 7.0, 2.0], [1.0, 0.5, 2.0]])
    codes, absmax, columns = _qlinear.int8_quantize(x, threshold=6.0)
    assert columns.tolist() == [1]
    assert absmax.tolist() == [5.0, 2.0, 2.0]
    assert codes.tolist() == [[25, 0, 51], [64, 0, 127], [64, 0, 127]]
    alone = _qlinear.int8_quantize(x[:1], threshold=6.0)
    assert alone[0].tolist() == [[25, 127, 51]]
    assert alone[2].tolist() == []


def test_zero_rows():
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, 2.0, 3.0]])
    for threshold in (0.0, 6.0):
        codes, absmax, _ = _qlinear.int8_quantize(x, threshold=threshold)
        assert absmax[0] == 0
        assert not codes[0].any()
        assert codes[1].tolist() == [42, 85, 127]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    x = torch.tensor([[1, 2, float("nan")], [float("inf"), 2, 1], [-float("inf"), 0, 0], [1, 2, 3]], dtype=dtype)
    codes, absmax, _ = _qlinear.int8_quantize(x)
    assert absmax.isnan().tolist() == [True, False, False, False]
    assert absmax[1:].tolist() == [float("inf"), float("inf"), 3.0]
    assert not codes[:3].any()
    assert codes[3].tolist() == [42, 85, 127]
    codes, absmax, columns = _qlinear.int8_quantize(x, threshold=6.0)
    assert columns.tolist() == [0]
    assert absmax.isnan().tolist() == [True, False, False, False]
    assert absmax[1:].tolist() == [2.0, 0.0, 3.0]
    assert codes.tolist() == [[0, 0, 0], [0, 127, 64], [0, 0, 0], [0, 85, 127]]


@pytest.mark.parametrize("unit", [2.0**-149, 2.0**-133, 2.0**-120, 2.0**-100])
def test_tiny_rows(unit):
    """127 / absmax is infinite for the first ones."""
    steps = torch.arange(-127, 128, dtype=torch.float64)
    codes, absmax, _ = _qlinear.int8_quantize((steps * unit).float()[None])
    assert absmax.tolist() == [127 * unit]
    assert codes[0].tolist() == steps.tolist()


def test_bfloat16_beyond_fp16():
    x = torch.tensor([[1e5, -(2.0**127), 2.0**126]], dtype=torch.bfloat16)
    check_quantize(x, 0.0)
    check_quantize(x, 1e30)
    assert _qlinear.int8_quantize(x)[0].tolist() == [[0, -127, 64]]


# ---- the quantizer at large ----


@pytest.mark.parametrize("threshold", [0.0, 6.0, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 255), (70, 2051), (3, 256), (0, 8), (5, 0), (0, 0)])
def test_quantize(shape, dtype, threshold):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2
    check_quantize(x.to(dtype), threshold)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 600),
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([0.0, 0.5, 3.0, 6.0]),
    transposed=st.booleans(),
    step=st.integers(1, 3),
)
def test_quantize_any_strides(rows, cols, seed, threshold, transposed, step):
    x = torch.randn((cols, rows) if transposed else (rows, cols), generator=torch.Generator().manual_seed(seed)) * 2
    x = (x.T if transposed else x)[::step, ::step]
    check_quantize(x, threshold)
    check_quantize(x.half(), threshold)


def test_more_than_a_thousand_outlier_columns():
    x = torch.full((3, 3000), 0.5)
    x[1, ::2] = 8.0
    codes, absmax, columns = _qlinear.int8_quantize(x, threshold=6.0)
    assert columns.tolist() == list(range(0, 3000, 2))
    assert not codes[:, ::2].any()
    assert (codes[:, 1::2] == 127).all()
    assert absmax.tolist() == [0.5, 0.5, 0.5]


# ---- the product ----


def product_and_bound(x, CB, SCB, bias, threshold):
    """formats: C32 * rowStat * colStat / 127^2 + bias + sub_x @ (sub_CB * SCB / 127)^T in fp64, from the codes that the
    quantizer must give; and how far an output may lie from it. int8 products are exact, their scaling is a few fp32
    roundings; the outlier columns are a dot product whose weight may be rounded once to a 16 bit dtype."""
    values = x.double().numpy()
    codes, absmax, columns = reference_rows(x.float().numpy(), threshold)
    weight = CB.double().numpy()
    scale = SCB.double().numpy()
    with np.errstate(invalid="ignore"):
        inliers = (codes @ CB.long().numpy().T) * absmax.astype(np.float64)[:, None] * scale / 127**2
        dense = weight[:, columns] * scale[:, None] / 127
        outliers = values[:, columns] @ dense.T
        sizes = np.abs(values[:, columns]) @ np.abs(dense).T
        offset = 0 if bias is None else bias.double().numpy()
        wanted = inliers + outliers + offset
        unit = (
            2.0**-24 * (8 + len(columns))
            + {torch.float32: 0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[x.dtype]
        )
        bound = 2.0**-21 * (np.abs(inliers) + np.abs(offset)) + unit * sizes
        bound += np.abs(wanted) * torch.finfo(x.dtype).eps / 2 + torch.finfo(x.dtype).smallest_normal
    return wanted, bound


def check_product(x, CB, SCB, bias=None, threshold=0.0):
    out = _qlinear.Linear8bitLt(CB, SCB, bias, threshold=threshold)(x)
    assert out.dtype == x.dtype
    assert out.shape == (len(x), len(CB))
    wanted, bound = product_and_bound(x, CB, SCB, bias, threshold)
    got = out.double().numpy()
    finite = np.isfinite(wanted)
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    assert np.array_equal(got[~finite], wanted[~finite], equal_nan=True)
    assert (np.abs(got[finite] - wanted[finite]) <= bound[finite]).all()


def random_layer(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    CB, SCB, _ = _qlinear.int8_quantize(torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator))
    return CB, SCB, torch.randn(n, generator=generator)


@pytest.mark.parametrize("threshold", [0.0, 6.0, 2.0, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 5, 33])
@pytest.mark.parametrize(("n", "k"), [(7, 33), (96, 256), (65, 515)])
def test_product(n, k, m, dtype, threshold):
    """6.0 leaves some columns outliers, 2.0 most, 1e-6 every one."""
    CB, SCB, bias = random_layer(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 1.5
    x[0, ::16] *= 5
    x[-1, 3] = 100.0
    check_product(x.to(dtype), CB, SCB, bias, threshold)
    check_product(x.to(dtype), CB, SCB, None, threshold)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_zero_rows(dtype):
    CB, SCB, bias = random_layer(20, 64)
    SCB[3], CB[3] = 0, 0
    x = torch.randn(4, 64).to(dtype)
    x[1] = 0
    for threshold in (0.0, 1.0):
        check_product(x, CB, SCB, bias, threshold)
        out = _qlinear.Linear8bitLt(CB, SCB, bias, threshold=threshold)(x)
        assert torch.equal(out[1], bias.to(dtype))
        assert (out[:, 3] == bias[3].to(dtype)).all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4])
def test_product_of_what_is_not_finite(m, dtype, bad, threshold):
    """NaN makes its row NaN; so does an infinity without a threshold. With one it is an outlier: infinite where its
    weight is not 0. Other rows never know of it."""
    CB, SCB, bias = random_layer(40, 96)
    CB[5, 9] = 0
    x = torch.randn(m, 96).to(dtype)
    x[m // 2, 9] = bad
    check_product(x, CB, SCB, bias, threshold)
    out = _qlinear.Linear8bitLt(CB, SCB, bias, threshold=threshold)(x)
    others = [row for row in range(m) if row != m // 2]
    assert out[others].isfinite().all()
    if bad != bad or threshold == 0.0:
        assert out[m // 2].isnan().all()
    else:
        assert not out[m // 2].isfinite().any()


def test_weight_that_is_not_finite():
    CB, SCB, _ = _qlinear.int8_quantize(torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]]))
    out = _qlinear.Linear8bitLt(CB, SCB)(torch.ones(2, 2))
    assert out[:, :2].isnan().all()
    assert out[:, 2].isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, 6.0, 5e4])
def test_product_beyond_fp16(threshold):
    """bitsandbytes goes by way of fp16, where these are infinite."""
    CB, SCB, bias = random_layer(24, 64)
    x = (torch.randn(3, 64) * 1e5).bfloat16()
    check_product(x, CB, SCB, bias, threshold)


def test_product_with_a_thousand_outlier_columns():
    CB, SCB, bias = random_layer(33, 2048)
    x = torch.randn(5, 2048)
    x[2, :1500] += 20
    check_product(x, CB, SCB, bias, 6.0)


def test_sums_beyond_int32():
    k = 140_000
    assert 127 * 127 * k > 2**31
    CB = torch.full((2, k), 127, dtype=torch.int8)
    CB[1] = -127
    layer = _qlinear.Linear8bitLt(CB, torch.ones(2))
    out = layer(torch.ones(3, k))
    assert torch.allclose(out, torch.tensor([float(k), -float(k)]).expand(3, 2), rtol=1e-6)


def test_minus_128_in_a_checkpoint():
    """No quantizer of this format writes it, converted files hold it."""
    CB = torch.full((3, 70), -128, dtype=torch.int8)
    check_product(torch.randn(4, 70), CB, torch.rand(3), None, 0.0)
    check_product(torch.full((2, 70), -1.0), CB, torch.rand(3), None, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_and_gradient(dtype):
    CB, SCB, _ = random_layer(30, 77)
    layer = _qlinear.Linear8bitLt(CB, SCB, threshold=6.0)
    wanted = CB.double() * SCB.double()[:, None] / 127
    dense = layer.dequantize(str(dtype).removeprefix("torch."))
    half_ulp = torch.finfo(dtype).eps / 2
    assert dense.dtype == dtype
    assert ((dense.double() - wanted).abs() <= wanted.abs() * (half_ulp + 2.0**-22)).all()
    grad = torch.randn(5, 30).to(dtype)
    got = layer.grad_input(grad).double()
    exact = grad.double() @ wanted
    weight_rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10 if dtype == torch.float16 else 2.0**-20
    bound = weight_rounding * (grad.double().abs() @ wanted.abs()) + exact.abs() * half_ulp
    assert ((got - exact).abs() <= bound).all()


def test_layer_describes_itself():
    CB, SCB, bias = random_layer(6, 10)
    layer = _qlinear.Linear8bitLt(CB, SCB, bias, threshold=6.0)
    assert (layer.in_features, layer.out_features, layer.nbytes) == (10, 6, 60 + 24 + 24)
    assert repr(layer) == "Linear8bitLt(in_features=10, out_features=6, threshold=6, bias=True)"


# ---- malformed arguments ----


def good():
    return torch.zeros(4, 6, dtype=torch.int8), torch.ones(4)


MALFORMED_LAYER = [
    (lambda c, s: (None, s), {}, TypeError, "CB must be a tensor"),
    (lambda c, s: (c, None), {}, TypeError, "SCB must be a tensor"),
    (lambda c, s: ("CB", s), {}, TypeError, "CB must be a tensor"),
    (lambda c, s: (c.float(), s), {}, TypeError, "CB must be int8, got float32"),
    (lambda c, s: (c.view(torch.uint8), s), {}, TypeError, "CB must be int8, got uint8"),
    (lambda c, s: (c[0], s), {}, ValueError, "CB must have shape"),
    (lambda c, s: (c.T, s), {}, ValueError, "CB must be contiguous"),
    (lambda c, s: (c[:, :3], s), {}, ValueError, "CB must be contiguous"),
    (lambda c, s: (c[:, :0], s), {}, ValueError, "CB has in_features 0"),
    (lambda c, s: (c, s.half()), {}, TypeError, "SCB must be float32, got float16"),
    (lambda c, s: (c, s[:3]), {}, ValueError, "SCB must have shape"),
    (lambda c, s: (c, s[:, None]), {}, ValueError, "SCB must have shape"),
    (lambda c, s: (c, torch.ones(8)[::2]), {}, ValueError, "SCB must be contiguous"),
    (lambda c, s: (c, s, torch.ones(6)), {}, ValueError, "bias must have shape"),
    (lambda c, s: (c, s, torch.ones(4, dtype=torch.int8)), {}, TypeError, "bias must be"),
    (lambda c, s: (c, s, None, 6.0), {}, TypeError, "Linear8bitLt takes at most 3"),
    (lambda c, s: (c,), {}, TypeError, "Linear8bitLt: SCB is missing"),
    (lambda c, s: (c, s), {"threshold": -1.0}, ValueError, "threshold must be 0 or a positive"),
    (lambda c, s: (c, s), {"threshold": float("nan")}, ValueError, "threshold must be"),
    (lambda c, s: (c, s), {"threshold": float("inf")}, ValueError, "threshold must be"),
    (lambda c, s: (c, s), {"threshold": 1e39}, ValueError, "threshold must be"),
    (lambda c, s: (c, s), {"threshold": 1e-60}, ValueError, "threshold must be"),
    (lambda c, s: (c, s), {"threshold": "6"}, TypeError, "threshold must be a float"),
    (lambda c, s: (c, s), {"index": None}, TypeError, "Linear8bitLt has no argument 'index'"),
]


@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), MALFORMED_LAYER)
def test_malformed_layer(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        _qlinear.Linear8bitLt(*arguments(*good()), **keywords)


MALFORMED_CALLS = [
    (lambda: torch.zeros(2, 3, dtype=torch.int8), {}, TypeError, "x must be"),
    (lambda: torch.zeros(2, 3, dtype=torch.float64), {}, TypeError, "x must be"),
    (lambda: torch.zeros(3), {}, ValueError, "x must have shape"),
    (lambda: torch.zeros(2, 2, 3), {}, ValueError, "x must have shape"),
    (lambda: None, {}, TypeError, "x must be a tensor"),
    (lambda: torch.zeros(2, 3), {"threshold": -0.5}, ValueError, "threshold must be"),
    (lambda: torch.zeros(2, 3), {"threshold": None}, TypeError, "threshold must be a float"),
]


@pytest.mark.parametrize(("argument", "keywords", "error", "message"), MALFORMED_CALLS)
def test_malformed_calls(argument, keywords, error, message):
    with pytest.raises(error, match=message):
        _qlinear.int8_quantize(argument(), **keywords)


def test_the_threshold_is_a_keyword():
    with pytest.raises(TypeError, match="int8_quantize takes at most 1"):
        _qlinear.int8_quantize(torch.zeros(2, 3), 6.0)


@pytest.mark.parametrize(("x", "error"), [(torch.zeros(2, 5), ValueError), (torch.zeros(2, 6).double(), TypeError)])
def test_call_with_a_wrong_x(x, error):
    with pytest.raises(error, match=r"^x must"):
        _qlinear.Linear8bitLt(*good())(x)
