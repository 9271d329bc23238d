"""FP8: e4m3 bytes against ml_dtypes, every quantization mode against an emulation in NumPy, and Fp8Linear and
fp8_matmul against float64 on the values that their bytes stand for."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear import _qlinear

F = np.float32
E4M3 = ml_dtypes.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = F(1) / F(448 * 512)
VALUES = np.arange(256).astype(np.uint8).view(E4M3).astype(F)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def codes(q):
    """The bytes of a float8 tensor."""
    return q.view(torch.uint8).numpy()


def encode(x):
    """fp32 -> e4m3 bytes: to nearest, ties to even, beyond 448 is 448."""
    with np.errstate(all="ignore"):
        return np.clip(x, F(-448), F(448)).astype(E4M3).view(np.uint8)


def same_codes(got, wanted):
    """Equal bytes, but that NaN may have either sign."""
    assert got.shape == wanted.shape
    nan = (wanted & 0x7F) == 0x7F
    assert np.array_equal((got & 0x7F) == 0x7F, nan)
    assert np.array_equal(got[~nan], wanted[~nan])


def same_floats(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted, F)
    assert got.dtype == F
    assert got.shape == wanted.shape
    assert np.array_equal(got, wanted, equal_nan=True)


def static_codes(values, scale=1.0):
    x = tensor(np.asarray(values, F).reshape(1, -1))
    q, used = _qlinear.fp8_quantize(x, torch.tensor([scale]), mode="static")
    assert used.tolist() == [F(scale)]
    assert q.dtype == torch.float8_e4m3fn
    return codes(q)[0]


# ---- the number format ----


def test_all_bytes_survive():
    same_codes(static_codes(VALUES), np.arange(256).astype(np.uint8))


def test_decode_all_bytes():
    layer = _qlinear.Fp8Linear(tensor(np.arange(256).astype(np.uint8).reshape(16, 16)), torch.ones(1))
    for dtype in DTYPES:
        got = layer.dequantize(name(dtype)).reshape(-1)
        assert got.dtype == dtype
        assert np.array_equal(got.float().numpy(), VALUES, equal_nan=True)


def test_golden():
    golden = {448: 0x7E, 449: 0x7E, 464: 0x7E, 465: 0x7E, 1e9: 0x7E, np.inf: 0x7E, -np.inf: 0xFE, 1: 0x38, -240: 0xF7}
    golden |= {0.3: 0x2A, 2**-9: 0x01, 2**-10: 0x00, 3 * 2**-10: 0x02, 1.0625: 0x38, 1.1875: 0x3A, 0: 0x00}
    assert static_codes(list(golden)).tolist() == list(golden.values())
    assert static_codes([-0.0]).tolist() == [0x80]
    assert (static_codes([np.nan]) & 0x7F).tolist() == [0x7F]


@pytest.mark.parametrize("sign", [1, -1])
def test_both_sides_of_every_tie(sign):
    """Midpoints of neighbouring codes, exact in fp32, take the even code; the next number on each side its own."""
    finite = VALUES[:0x7F]
    middle = (finite[:-1] + finite[1:]) / 2
    below, above = np.arange(0x7E), np.arange(1, 0x7F)
    bit = 0 if sign > 0 else 0x80
    assert np.array_equal(static_codes(sign * np.nextafter(middle, F(0))), below | bit)
    assert np.array_equal(static_codes(sign * middle), np.where(below % 2 == 0, below, above) | bit)
    assert np.array_equal(static_codes(sign * np.nextafter(middle, F(448))), above | bit)


# ---- scales and modes ----


def emulate(x, mode, bound=None):
    """x fp32 [R, C] -> (bytes, scale), by the formula of each mode."""
    R, C = x.shape
    bound = F(np.inf) if bound is None else F(bound)
    with np.errstate(all="ignore"):
        if mode == "tensor":
            absmax = np.abs(x).max(initial=F(0))
            scale = np.array([1 if absmax == 0 else absmax / F(448)], F)
            return encode(x * (F(1) / scale)), scale
        if mode == "token":
            absmax = np.minimum(np.abs(x).max(axis=1, keepdims=True, initial=F(0)), bound)
            scale = np.maximum(absmax / F(448), FLOOR)
            return encode(x / scale), scale
        rows = 1 if mode == "group" else 128
        scale = np.zeros((-(-R // rows), -(-C // 128)), F)
        q = np.zeros(x.shape, np.uint8)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128)
                absmax = np.abs(x[block]).max()
                scale[i, j] = 1 if absmax == 0 else absmax / F(448)
                q[block] = encode(x[block] / scale[i, j])
        return q, scale


def check_quantize(x, mode, **keywords):
    q, scale = _qlinear.fp8_quantize(x, mode=mode, **keywords)
    wanted_q, wanted_scale = emulate(x.to(torch.float32).numpy(), mode, keywords.get("scale_ub"))
    assert q.dtype == torch.float8_e4m3fn
    assert q.shape == x.shape
    same_floats(scale, wanted_scale)
    same_codes(codes(q), wanted_q)


MODES = ["tensor", "token", "group", "block"]


@st.composite
def matrices(draw):
    """A float matrix as a view: transposed, stepped, of any dtype and magnitude, with some rows and columns zero."""
    R, C = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([*DTYPES, torch.float64]))
    x = torch.randn(R, C * 2, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    x[: draw(st.integers(0, 3))] = 0
    x[:, : draw(st.integers(0, 257))] = 0
    x = x.to(dtype)[:, ::2] if draw(st.booleans()) else x.to(dtype)
    return x.t() if draw(st.booleans()) else x


@settings(max_examples=80, deadline=None)
@given(x=matrices(), mode=st.sampled_from(MODES))
def test_quantize_any_matrix(x, mode):
    check_quantize(x, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_large(mode, dtype):
    check_quantize((torch.randn(257, 1025, generator=torch.Generator().manual_seed(6)) * 3).to(dtype), mode)


def test_token_floor_and_bound():
    """The floor holds below an absmax of 1/512, the bound above its value; around both the scale changes over."""
    edge = F(1) / F(512)
    absmax = np.array(
        [0, 1e-30, np.nextafter(edge, F(0)), edge, np.nextafter(edge, F(1)), 1, 1199, 1200, 1201, 3e38], F
    )
    x = tensor(absmax[:, None] * np.array([[1, -0.3, 0]], F))
    check_quantize(x, "token")
    for bound in (1200.0, torch.tensor(1200.0), torch.tensor([1200.0]), 1200):
        q, scale = _qlinear.fp8_quantize(x, mode="token", scale_ub=bound)
        wanted_q, wanted_scale = emulate(x.numpy(), "token", 1200)
        same_floats(scale, wanted_scale)
        same_codes(codes(q), wanted_q)
    assert scale[:4].eq(4.359654212748865e-06).all()
    assert codes(q)[-1, 0] == 0x7E


@pytest.mark.parametrize(
    ("mode", "reciprocal"), [("static", True), ("tensor", True), ("token", False), ("group", False)]
)
def test_reciprocal_or_quotient(mode, reciprocal):
    """Values beside ties times a scale, where x * (1 / scale) and x / scale have different codes."""
    rng = np.random.default_rng(7)
    middle = ((VALUES[:0x7E] + VALUES[1:0x7F]) / 2)[8:]
    found = 0
    for _ in range(40):
        absmax = F(rng.uniform(1, 2))
        scale = absmax / F(448)
        x = np.append((middle * scale).astype(F), absmax)[None, :]
        product, quotient = encode(x * (F(1) / scale)), encode(x / scale)
        found += (product != quotient).sum()
        q, used = _qlinear.fp8_quantize(tensor(x), torch.tensor([scale]) if mode == "static" else None, mode=mode)
        assert used.reshape(-1)[0] == scale
        same_codes(codes(q), product if reciprocal else quotient)
    assert found > 20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zero(mode, dtype):
    for shape in [(1, 1), (3, 200), (0, 7), (4, 0)]:
        q, scale = _qlinear.fp8_quantize(torch.zeros(shape, dtype=dtype), mode=mode)
        assert (codes(q) == 0).all()
        assert scale.isfinite().all()
        assert scale.gt(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_unit(mode):
    x = torch.ones(130, 130)
    x[129, 3] = float("nan")
    q, scale = _qlinear.fp8_quantize(x, mode=mode)
    nan = (codes(q) & 0x7F) == 0x7F
    expected = {"tensor": np.s_[:, :], "token": np.s_[129:, :], "group": np.s_[129:, :128], "block": np.s_[128:, :128]}
    wanted = np.zeros((130, 130), bool)
    wanted[expected[mode]] = True
    assert np.array_equal(nan, wanted)
    assert scale.isnan().sum() == 1


def test_nan_in_x_is_in_every_product_of_its_tensor():
    codes, scale = _qlinear.fp8_quantize(torch.randn(6, 130), mode="tensor")
    layer = _qlinear.Fp8Linear(codes, scale, activation="tensor")
    for rows in (1, 3, 40):
        x = torch.ones(rows, 130)
        x[0, 3] = float("nan")
        assert layer(x).isnan().all()


def test_a_bound_does_not_hide_nan():
    q, scale = _qlinear.fp8_quantize(torch.tensor([[1.0, float("nan")]]), mode="token", scale_ub=2.0)
    assert scale.isnan().all()
    assert ((codes(q) & 0x7F) == 0x7F).all()


@pytest.mark.parametrize("mode", MODES)
def test_infinity_is_never_a_finite_number(mode):
    x = torch.ones(2, 4)
    x[0, 1] = float("inf")
    q, scale = _qlinear.fp8_quantize(x, mode=mode)
    assert scale.reshape(-1)[0] == float("inf")
    product = q.float()[0] * scale.reshape(-1)[0]
    assert product.isnan().all()
    if mode == "token":
        q, scale = _qlinear.fp8_quantize(x, mode=mode, scale_ub=448.0)
        assert q.float().tolist() == [[1, 448, 1, 1], [448] * 4]
        assert scale[0] == 1


@pytest.mark.parametrize("mode", ["tensor", "group", "block"])
@pytest.mark.parametrize("absmax", [1e-38, 1e-40, 1e-42, 1e-44, 1e-45])
def test_denormal_scales(mode, absmax):
    """As exact as the scale can be: where absmax / 448 itself underflows, the values are zero."""
    x = np.array([[1, -0.5, 0.25, 0, -0.0]], F) * F(absmax)
    q, scale = _qlinear.fp8_quantize(tensor(x), mode=mode)
    back = q.float().numpy().astype(np.float64) * np.float64(scale.reshape(-1)[0].item())
    step = 448 * 2.0**-149
    assert np.isfinite(back).all()
    assert np.all(np.abs(back - x) <= np.abs(x) / 16 + step)


@pytest.mark.parametrize("scale", [2.0**-149, 1e-40, 0.0])
def test_static_scales_at_the_end_of_fp32(scale):
    x = np.array([0, -0.0, 1, -1, scale, 3 * scale, np.nan], F)
    q = static_codes(x, scale)
    value = q.view(E4M3).astype(F)
    assert np.isnan(value[6])
    assert np.isfinite(value[:6]).all()
    assert np.array_equal(value[:2], [0, 0])
    if scale:
        assert value[2:6].tolist() == [448, -448, 1, 3]


def test_numpy_and_ml_dtypes():
    rng = np.random.default_rng(8)
    for dtype in (F, np.float16, ml_dtypes.bfloat16):
        x = rng.standard_normal((5, 130)).astype(dtype)
        q, scale = _qlinear.fp8_quantize(x, mode="group")
        assert isinstance(q, np.ndarray)
        assert q.dtype in (E4M3, np.uint8)
        wanted_q, wanted_scale = emulate(x.astype(F), "group")
        same_codes(q.view(np.uint8), wanted_q)
        same_floats(scale, wanted_scale)
        layer = _qlinear.Fp8Linear(q, np.ones(1, F))
        assert np.array_equal(layer.dequantize(), q.view(E4M3).astype(F))


# ---- the layer's weight ----


@pytest.fixture
def rng():
    return np.random.default_rng(9)


def random_bytes(rng, *shape):
    """Finite e4m3 bytes."""
    q = rng.integers(0, 256, shape).astype(np.uint8)
    q[(q & 0x7F) == 0x7F] = 0
    return q


def decode(q):
    return q.view(E4M3).astype(np.float64)


def random_scale(rng, *shape):
    return tensor(rng.uniform(0.001, 0.01, shape).astype(F))


def check_weight(layer, weight):
    """weight: float64, exact products of an e4m3 value and an fp32 scale."""
    assert np.array_equal(layer.dequantize().numpy(), weight.astype(F))
    assert torch.equal(layer.dequantize("bfloat16"), tensor(weight.astype(F)).bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 7), (200, 300), (1, 300)])
def test_one_scale(rng, shape, N, K):
    q, scale = random_bytes(rng, N, K), random_scale(rng, *shape)
    check_weight(_qlinear.Fp8Linear(tensor(q), scale), decode(q) * scale.double().numpy().item())


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1)])
@pytest.mark.parametrize(("N", "K"), [(2, 1), (5, 7), (200, 300), (128, 128)])
def test_channel_scales(rng, shape, N, K):
    q, scale = random_bytes(rng, N, K), random_scale(rng, N)
    layer = _qlinear.Fp8Linear(tensor(q), scale.reshape(shape))
    assert "weight_scale=channel" in repr(layer)
    check_weight(layer, decode(q) * scale.double().numpy()[:, None])


def expand_blocks(scale, N, K, block=(128, 128)):
    return np.repeat(np.repeat(scale.double().numpy(), block[0], 0), block[1], 1)[:N, :K]


@pytest.mark.parametrize(("N", "K"), [(128, 256), (200, 300), (129, 128), (1, 300), (300, 1), (257, 513)])
@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (0, 2), (3, 1)])
def test_block_scales_and_padded_grids(rng, N, K, extra):
    grid = -(-N // 128) + extra[0], -(-K // 128) + extra[1]
    if 1 in grid and N in grid:
        pytest.skip("a channel's scales by shape")
    q, scale = random_bytes(rng, N, K), random_scale(rng, *grid)
    check_weight(_qlinear.Fp8Linear(tensor(q), scale), decode(q) * expand_blocks(scale, N, K))


@pytest.mark.parametrize("block", [(1, 1), (1, 128), (64, 32), (7, 5), (1000, 1000)])
def test_other_block_sizes(rng, block):
    N, K = 70, 130
    q, scale = random_bytes(rng, N, K), random_scale(rng, -(-N // block[0]), -(-K // block[1]))
    layer = _qlinear.Fp8Linear(tensor(q), scale, block_size=block)
    check_weight(layer, decode(q) * expand_blocks(scale, N, K, block))


def test_a_row_of_scales_is_a_grid_where_blocks_are_meant(rng):
    """[1, N] with K = 128 * N: a scale a row, or a block each where activations come in groups or blocks have a size of
    their own."""
    N, K = 3, 384
    q, scale = random_bytes(rng, N, K), random_scale(rng, 1, N)
    rows, blocks = decode(q) * scale.double().numpy().T, decode(q) * expand_blocks(scale, N, K)
    check_weight(_qlinear.Fp8Linear(tensor(q), scale, block_size=(128, 128)), rows)
    check_weight(_qlinear.Fp8Linear(tensor(q), scale, activation="group"), blocks)
    check_weight(_qlinear.Fp8Linear(tensor(q), scale, block_size=(3, 128)), blocks)


SCALE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8]


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("shape", [(1,), (200,), (200, 1), (2, 3)])
def test_scale_dtypes(rng, dtype, shape):
    """uint8 is e8m0 by its bytes."""
    q, exponents = random_bytes(rng, 200, 300), rng.integers(100, 150, shape).astype(np.uint8)
    values = tensor(2.0 ** (exponents.astype(F) - 127))
    if dtype == torch.float16:
        values = tensor(rng.uniform(0.001, 0.01, shape).astype(F))
    scale = tensor(exponents) if dtype == torch.uint8 else values.to(dtype)
    exact = values if dtype == torch.uint8 else scale.float()
    expanded = expand_blocks(exact, 200, 300) if shape == (2, 3) else exact.double().numpy().reshape(-1, 1)
    check_weight(_qlinear.Fp8Linear(tensor(q), scale), decode(q) * expanded)


def test_e8m0_ends(rng):
    q = random_bytes(rng, 3, 16)
    layer = _qlinear.Fp8Linear(tensor(q), tensor(np.array([0, 1, 255], np.uint8)))
    got = layer.dequantize().double().numpy()
    assert np.array_equal(got[0], decode(q)[0] * 2.0**-127)
    assert np.array_equal(got[1], decode(q)[1] * 2.0**-126)
    assert np.isnan(got[2]).all()


def test_strided_scales(rng):
    q = random_bytes(rng, 200, 300)
    wide = random_scale(rng, 400, 6)
    for scale in (wide[:200, 2], wide[::2, 1:2], wide[:200, 3].reshape(1, 200)):
        layer = _qlinear.Fp8Linear(tensor(q), scale)
        check_weight(layer, decode(q) * scale.double().numpy().reshape(-1, 1))
    for scale in (wide[5:7, :3], wide[5:7, ::2], wide.t()[:2, :3]):
        check_weight(_qlinear.Fp8Linear(tensor(q), scale), decode(q) * expand_blocks(scale, 200, 300))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_weights_of_any_strides(rng, dtype):
    q = random_bytes(rng, 300, 202)
    whole = tensor(q).view(dtype)
    x = torch.randn(3, 300)
    for view, array in [(whole.t(), q.T), (whole[::3, 1::2], q[::3, 1::2]), (whole.t()[:, ::2], q.T[:, ::2])]:
        layer = _qlinear.Fp8Linear(view, torch.ones(1), activation="none")
        weight = decode(np.ascontiguousarray(array))
        check_weight(layer, weight)
        inputs = x[:, : weight.shape[1]]
        check_product(layer(inputs), inputs.double().numpy(), weight, torch.float32)


# ---- products ----


def check_product(got, x, weight, dtype, bias=None):
    """Elementwise: sums in fp32, one rounding of the output, and for bfloat16 one of the weight."""
    reference, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if bias is not None:
        reference, size = reference + bias.double().numpy(), size + np.abs(bias.double().numpy())
    half_ulp = torch.finfo(dtype).eps / 2
    factor = (weight.shape[1] + 8) * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0)
    bound = factor * size * (1 + half_ulp) + half_ulp * np.abs(reference) + torch.finfo(dtype).smallest_normal
    assert got.dtype == dtype
    assert got.shape == reference.shape
    assert np.all(np.abs(got.double().numpy() - reference) <= bound)


def quantized_input(x, activation, input_scale=None, bound=None):
    """What the product is made from: float64 of the activations' codes and scales."""
    x = x.float().numpy()
    if activation == "none":
        return x.astype(np.float64)
    if activation == "static":
        with np.errstate(all="ignore"):
            return decode(encode(x * (F(1) / F(input_scale)))) * np.float64(F(input_scale))
    q, scale = emulate(x, activation, bound)
    scale = scale.astype(np.float64)
    return decode(q) * (np.repeat(scale, 128, 1)[:, : x.shape[1]] if activation == "group" else scale)


ACTIVATIONS = ["none", "static", "tensor", "token", "group"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scope", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (33, 77), (130, 400)])
def test_layer_multiplies(rng, activation, scope, dtype, N, K):
    q, bias = random_bytes(rng, N, K), torch.randn(N)
    shape = {"tensor": (1,), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}[scope]
    scale = random_scale(rng, *shape)
    weight = decode(q) * (expand_blocks(scale, N, K) if scope == "block" else scale.double().numpy().reshape(-1, 1))
    keywords = {"input_scale": torch.tensor([0.01])} if activation == "static" else {}
    layer = _qlinear.Fp8Linear(tensor(q), scale, bias, activation=activation, **keywords)
    assert f"activation={activation}" in repr(layer)
    for M in (1, 2, 19):
        x = (tensor(rng.standard_normal((M, K)).astype(F)) * 2).to(dtype)
        x[M // 2] = 0
        check_product(layer(x), quantized_input(x, activation, 0.01), weight, dtype, bias)


@pytest.mark.parametrize("bound", [1.5, torch.tensor(1.5), torch.tensor([1.5]).bfloat16()])
def test_layer_bounds_the_scale(rng, bound):
    q, scale = random_bytes(rng, 20, 40), random_scale(rng, 20)
    layer = _qlinear.Fp8Linear(tensor(q), scale, input_scale_ub=bound)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(10)) * 2
    weight = decode(q) * scale.double().numpy()[:, None]
    check_product(layer(x), quantized_input(x, "token", bound=1.5), weight, torch.float32)


@pytest.mark.parametrize("activation", ["tensor", "token", "group"])
def test_layer_keeps_nan_in_its_row(rng, activation):
    layer = _qlinear.Fp8Linear(tensor(random_bytes(rng, 9, 200) & 0x7F), torch.ones(1), activation=activation)
    x = torch.ones(3, 200)
    x[1, 7] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all() or activation == "tensor"


def test_layer_sees_its_tensors_change(rng):
    q, scale = random_bytes(rng, 20, 40), random_scale(rng, 20)
    held, x = scale.clone(), torch.randn(3, 40)
    layer = _qlinear.Fp8Linear(tensor(q), held, activation="none")
    before = layer.dequantize()
    held.mul_(2)
    assert torch.equal(layer.dequantize(), before * 2)
    held.data = scale.repeat_interleave(2)[::2] * 4
    assert torch.equal(layer.dequantize(), before * 4)
    held.data = torch.ones(21)
    with pytest.raises(ValueError, match="weight_scale must have"):
        layer(x)
    held.data = scale
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_sees_scales_change_that_it_had_to_copy(rng, dtype):
    """In place, as load_state_dict changes a buffer."""
    q, scale, input_scale = random_bytes(rng, 20, 40), random_scale(rng, 20).bfloat16(), torch.ones(1, dtype=dtype)
    layer = _qlinear.Fp8Linear(tensor(q), scale, activation="static", input_scale=input_scale)
    x = torch.randn(3, 40)
    for factor in (1.0, 0.125):
        scale.mul_(0.5)
        input_scale.mul_(factor)
        weight = decode(q) * scale.double().numpy()[:, None]
        check_product(layer(x), quantized_input(x, "static", factor), weight, torch.float32)


# ---- fp8_matmul ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (3, 70, 33), (513, 40, 9), (0, 5, 4)])
@pytest.mark.parametrize("column_major", [False, True])
def test_matmul(rng, dtype, M, K, N, column_major):
    a, b = random_bytes(rng, M, K), random_bytes(rng, K, N)
    b_tensor = tensor(b.T).t() if column_major else tensor(b)
    bias = torch.randn(N)
    for shape_a, shape_b in [((1,), ()), ((M, 1), (N,)), ((M,), (1, N))]:
        scale_a, scale_b = random_scale(rng, *shape_a), random_scale(rng, *shape_b)
        x = decode(a) * scale_a.double().numpy().reshape(-1, 1)
        weight = decode(np.ascontiguousarray(b.T)) * scale_b.double().numpy().reshape(-1, 1)
        for dtype_of_bytes in (torch.uint8, torch.float8_e4m3fn):
            bytes_a, bytes_b = tensor(a).view(dtype_of_bytes), b_tensor.view(dtype_of_bytes)
            got = _qlinear.fp8_matmul(bytes_a, bytes_b, scale_a, scale_b, bias, dtype=name(dtype))
            # a * scale_a is one fp32 product more than the bound of a layer has.
            check_product(got, x, weight, dtype, bias)


def test_matmul_takes_strides_and_other_dtypes(rng):
    a, b = random_bytes(rng, 8, 60), random_bytes(rng, 30, 10)
    scale_a, scale_b = random_scale(rng, 8).half(), random_scale(rng, 20)[::2].double().bfloat16()
    bias = torch.randn(20, dtype=torch.float64)[::2]
    got = _qlinear.fp8_matmul(tensor(a)[::2, ::2], tensor(b), scale_a[::2], scale_b, bias, dtype="float32")
    x = decode(np.ascontiguousarray(a[::2, ::2])) * scale_a[::2].double().numpy()[:, None]
    check_product(got, x, decode(b).T * scale_b.double().numpy()[:, None], torch.float32, bias)


# ---- malformed input ----


def e4m3(*shape):
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


GOOD = {"weight": e4m3(4, 300), "weight_scale": torch.ones(1)}
BAD_LAYERS = [
    ({"weight": None}, TypeError, "weight must be a tensor"),
    ({"weight": torch.zeros(4, 300)}, TypeError, "weight must be float8_e4m3fn or uint8, got float32"),
    ({"weight": e4m3(4, 300).view(torch.float8_e5m2)}, TypeError, "weight must be float8_e4m3fn or uint8"),
    ({"weight": e4m3(1200)}, ValueError, "weight must have shape"),
    ({"weight": e4m3(4, 0)}, ValueError, "weight must have at least one row"),
    ({"weight": e4m3(0, 4)}, ValueError, "weight must have at least one row"),
    ({"weight_scale": None}, TypeError, "weight_scale must be a tensor"),
    ({"weight_scale": 1.0}, TypeError, "weight_scale must be a tensor"),
    ({"weight_scale": torch.ones(1, dtype=torch.int32)}, TypeError, "weight_scale must be float32"),
    ({"weight_scale": torch.ones(5)}, ValueError, "weight_scale must have one element"),
    ({"weight_scale": torch.ones(0)}, ValueError, "weight_scale must have one element"),
    ({"weight_scale": torch.ones(4, 2)}, ValueError, "weight_scale must have one element"),
    ({"weight_scale": torch.ones(1, 2)}, ValueError, "weight_scale must have one element"),
    ({"weight_scale": torch.ones(1, 1, 3)}, ValueError, "weight_scale must have one element"),
    ({"activation": "row"}, ValueError, "activation must be one of 'none', 'static'"),
    ({"activation": None}, TypeError, "activation must be a str"),
    ({"activation": "static"}, ValueError, "input_scale is missing"),
    ({"input_scale": torch.ones(1)}, ValueError, "input_scale is of activation 'static' only"),
    ({"activation": "static", "input_scale": torch.ones(2)}, ValueError, "input_scale must have one element"),
    ({"activation": "static", "input_scale": torch.ones(1).int()}, TypeError, "input_scale must be float32"),
    ({"activation": "static", "input_scale": 1.0}, TypeError, "input_scale must be a tensor"),
    ({"activation": "tensor", "input_scale_ub": 1.0}, ValueError, "input_scale_ub is of activation 'token' only"),
    ({"input_scale_ub": torch.ones(2)}, ValueError, "input_scale_ub must have one element"),
    ({"input_scale_ub": "1"}, TypeError, "input_scale_ub must be a tensor"),
    ({"input_scale_ub": -1.0}, ValueError, "input_scale_ub must be above 0"),
    ({"input_scale_ub": float("nan")}, ValueError, "input_scale_ub must be above 0"),
    ({"block_size": (0, 128)}, ValueError, "block_size must be two sizes"),
    ({"block_size": 128}, TypeError, "block_size must be a pair"),
    ({"block_size": (128.0, 128)}, TypeError, r"block_size\[0\] must be an int"),
    ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[4\]"),
    ({"scale": torch.ones(1)}, TypeError, "has no argument 'scale'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LAYERS)
def test_malformed_layers(change, error, message):
    _qlinear.Fp8Linear(**GOOD)
    with pytest.raises(error, match=message) as caught:
        _qlinear.Fp8Linear(**GOOD | change)
    assert caught.type is error


X = torch.ones(2, 3)
QUANTIZE = {"x": X, "mode": "token"}
BAD_QUANTIZE = [
    ({"mode": "row"}, ValueError, "mode must be one of 'static'"),
    ({"mode": 1}, TypeError, "mode must be a str"),
    ({"x": torch.ones(3)}, ValueError, "x must have shape"),
    ({"x": torch.ones(1, 2, 3)}, ValueError, "x must have shape"),
    ({"x": X.int()}, TypeError, "x must be float32"),
    ({"x": None}, TypeError, "x must be a tensor"),
    ({"scale": torch.ones(1)}, ValueError, "scale is of mode 'static' only"),
    ({"mode": "static"}, ValueError, "scale is missing"),
    ({"mode": "static", "scale": torch.ones(2)}, ValueError, "scale must have one element"),
    ({"mode": "static", "scale": 1.0}, TypeError, "scale must be a tensor"),
    ({"mode": "group", "scale_ub": 1.0}, ValueError, "scale_ub is of mode 'token' only"),
    ({"scale_ub": 0}, ValueError, "scale_ub must be above 0"),
    ({"scale_ub": torch.ones(2)}, ValueError, "scale_ub must have one element"),
    ({"scale_ub": True}, TypeError, "scale_ub must be a tensor"),
]
MATMUL = {"a": e4m3(3, 5), "b": e4m3(5, 7), "scale_a": torch.ones(1), "scale_b": torch.ones(1), "dtype": "float32"}
BAD_MATMUL = [
    ({"a": e4m3(5)}, ValueError, "a must have shape"),
    ({"a": torch.ones(3, 5)}, TypeError, "a must be float8_e4m3fn or uint8"),
    ({"a": e4m3(3, 6)}, ValueError, "a must have as many columns as b has rows, 5"),
    ({"b": e4m3(6, 7)}, ValueError, "a must have as many columns as b has rows, 6"),
    ({"b": e4m3(5, 0)}, ValueError, "b must have at least one row"),
    ({"b": torch.ones(5, 7).half()}, TypeError, "b must be float8_e4m3fn or uint8"),
    ({"scale_a": torch.ones(2)}, ValueError, "scale_a must have one element"),
    ({"scale_a": torch.ones(3, 3)}, ValueError, "scale_a must have one element"),
    ({"scale_a": 1.0}, TypeError, "scale_a must be a tensor"),
    ({"scale_b": torch.ones(5)}, ValueError, "scale_b must have one element"),
    ({"scale_b": torch.ones(7).double()}, TypeError, "scale_b must be float32"),
    ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[7\]"),
    ({"bias": torch.ones(7).int()}, TypeError, "bias must be float32"),
    ({"dtype": "float64"}, ValueError, "dtype must be one of"),
]


@pytest.mark.parametrize(
    ("function", "keywords", "error", "message"),
    [
        *[("fp8_quantize", QUANTIZE | change, *rest) for change, *rest in BAD_QUANTIZE],
        *[("fp8_matmul", MATMUL | change, *rest) for change, *rest in BAD_MATMUL],
        ("fp8_quantize", {"x": X}, TypeError, "fp8_quantize: mode is missing"),
        ("fp8_matmul", {k: v for k, v in MATMUL.items() if k != "dtype"}, TypeError, "fp8_matmul: dtype is missing"),
        ("fp8_matmul", {k: v for k, v in MATMUL.items() if k != "scale_b"}, TypeError, "scale_b is missing"),
    ],
)
def test_malformed_calls(function, keywords, error, message):
    with pytest.raises(error, match=message) as caught:
        getattr(_qlinear, function)(**keywords)
    assert caught.type is error
