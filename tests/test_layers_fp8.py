"""Fp8Linear, apply_fp8_linear and the FP8 functions: scales, activation modes, names."""

import numpy as np
import pytest
import torch
from layer_cases import array, assert_close, assert_same_state, decode_fp8, inputs

import qlinear
from qlinear import functional, ops

K, N = 200, 136


def codes(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator).mul(40).clamp(-448, 448).to(torch.float8_e4m3fn)


def random(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-3


SCALES = {
    "scalar": lambda: random(1).reshape(()),
    "[1]": lambda: random(1),
    "[1, 1]": lambda: random(1, 1),
    "[N]": lambda: random(N),
    "[N, 1]": lambda: random(N, 1),
    "[1, N]": lambda: random(1, N),
    "[N, 1] bf16": lambda: random(N, 1).bfloat16(),
    "blocks": lambda: random(2, 2),
    "blocks bf16": lambda: random(2, 2).bfloat16(),
}
if hasattr(torch, "float8_e8m0fnu"):
    SCALES["blocks e8m0"] = lambda: torch.tensor([[2.0**-8, 2.0**-9], [2.0**-10, 2.0**-7]]).to(torch.float8_e8m0fnu)


def dequantized(weight, scale):
    scale = array(scale.float()).astype(np.float64)
    W = array(weight).astype(np.float64)
    if scale.shape == (2, 2):
        return W * scale.repeat(128, 0)[:N].repeat(128, 1)[:, :K]
    return W * scale.reshape(-1, 1)


def seen(x, mode):
    """x as the product sees it: codes times scales, by the formulas, in float32 as the quantizers are."""
    a = array(x).astype(np.float32)
    if mode == "token":
        scale = np.maximum(np.abs(a).max(1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
        return a, scale
    groups = -(-K // 128)
    padded = np.pad(a, ((0, 0), (0, groups * 128 - K))).reshape(len(a), groups, 128)
    absmax = np.abs(padded).max(2)
    scale = np.where(absmax > 0, absmax, 1) / np.float32(448)
    return a, scale.repeat(128, 1)[:, :K]


def check_quantized(out, x, W, mode):
    """Bounds the distance to the product of the unquantized x by half a step of e4m3 for each of its entries."""
    a, scale = seen(x, mode)
    a = a.astype(np.float64)
    step = np.maximum(np.abs(a) * 2.0**-4, scale * 2.0**-10) * 1.001
    slack = step @ np.abs(W).T + 1e-5 * np.abs(a) @ np.abs(W).T
    assert (np.abs(array(out) - a @ W.T) <= slack).all()


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("bias", [True, False])
def test_weight_scales(scale, bias):
    weight, scale = codes(), scale()
    bias = torch.randn(N) if bias else None
    W = dequantized(weight, scale)
    offset = 0 if bias is None else array(bias).astype(np.float64)
    x = inputs(5, K)
    a = array(x).astype(np.float64)
    layer = qlinear.Fp8Linear(weight, bias, scale, None, activation="none")
    assert_close(layer(x), a @ W.T + offset, np.abs(a) @ np.abs(W).T + np.abs(offset), K)
    dynamic = qlinear.Fp8Linear(weight, bias, scale, None)
    mode = "group" if scale.shape == (2, 2) else "token"
    assert f"activation={mode}" in repr(dynamic)
    check_quantized(dynamic(x) - (0 if bias is None else bias), x, W, mode)
    assert np.array_equal(array(layer.dequantize(torch.float32)), W.astype(np.float32))


def test_seed_attributes():
    weight, scale, bias = codes(), random(N), torch.randn(N)
    layer = qlinear.Fp8Linear(weight, bias, scale, None)
    assert layer.qweight.shape == (K, N)
    assert layer.qweight.data_ptr() == weight.data_ptr()
    assert layer.qbias is layer.bias
    assert layer.dtype == torch.float8_e4m3fn
    assert layer.input_scale is None
    x = inputs(3, K)
    assert torch.equal(qlinear.apply_fp8_linear(x, layer.qweight, layer.weight_scale, qbias=layer.qbias), layer(x))
    assert torch.equal(qlinear.apply_fp8_linear(x, weight.t(), scale.view(1, -1), None, None, bias), layer(x))


def test_static_activation():
    scale = torch.tensor(0.02)
    layer = qlinear.Fp8Linear(codes(), None, random(N), scale)
    assert "activation=static" in repr(layer)
    x = inputs(4, K)
    q, _ = functional.scaled_fp8_quant(x, scale)
    a = array(q).astype(np.float64) * float(scale)
    W = decode_fp8(layer.state_dict(), layer)
    assert_close(layer(x), a @ W.T, np.abs(a) @ np.abs(W).T, K)
    assert torch.equal(qlinear.apply_fp8_linear(x, layer.qweight, layer.weight_scale, scale), layer(x))
    with pytest.raises(ValueError, match="input_scale"):
        qlinear.Fp8Linear(codes(), None, random(N), None, activation="static")


def test_upper_bound_of_the_activation_scale():
    x = inputs(4, K) * 10
    layer = qlinear.Fp8Linear(codes(), None, random(N), None, input_scale_ub=3.0)
    ub = torch.tensor(3.0)
    q, scale = functional.scaled_fp8_quant(x, scale_ub=ub, use_per_token_if_dynamic=True)
    assert scale.max() <= 3.0 / 448 * 1.0001
    a = array(q).astype(np.float64) * array(scale)
    W = decode_fp8(layer.state_dict(), layer)
    assert_close(layer(x), a @ W.T, np.abs(a) @ np.abs(W).T, K)
    assert torch.equal(qlinear.apply_fp8_linear(x, layer.qweight, layer.weight_scale, input_scale_ub=ub), layer(x))
    assert "input_scale_ub" not in layer.state_dict()


def test_uint8_bytes_are_a_weight():
    weight, scale = codes(), random(N)
    x = inputs(2, K)
    as_bytes = qlinear.Fp8Linear(weight.view(torch.uint8), None, scale, None)
    assert torch.equal(as_bytes(x), qlinear.Fp8Linear(weight, None, scale, None)(x))
    fresh = qlinear.Fp8Linear.empty(K, N, False, device="cpu")
    fresh.load_state_dict(as_bytes.state_dict())
    assert fresh.weight.dtype == torch.uint8
    assert torch.equal(fresh(x), as_bytes(x))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("key", ["weight_scale", "weight_scale_inv"])
def test_any_scale_loads_into_a_fresh_layer(scale, key):
    state = {"weight": codes(), key: scale(), "input_scale": torch.tensor([0.5])}
    made = qlinear.Fp8Linear.from_tensors(state)
    assert set(made.state_dict()) == set(state)
    for device, assign in (("cpu", False), ("meta", True)):
        fresh = qlinear.Fp8Linear.empty(K, N, False, device=device)
        fresh.load_state_dict(state, assign=assign)
        assert_same_state(fresh.state_dict(), made.state_dict())
        assert torch.equal(fresh(inputs(2, K)), made(inputs(2, K)))
        fresh.load_state_dict({"weight": state["weight"], "weight_scale": random(1)}, assign=assign)
        assert fresh.input_scale is None
        assert list(fresh.state_dict()) == ["weight", "weight_scale"]


def test_quantize_is_per_channel_and_zero_safe():
    weight = torch.randn(8, 64)
    weight[3] = 0
    weight[4] *= 1e-38
    layer = qlinear.Fp8Linear.quantize(weight, None)
    assert layer.weight_scale.shape == (8, 1)
    assert torch.isfinite(layer.dequantize(torch.float32)).all()
    rows = [0, 1, 2, 5, 6, 7]
    absmax = weight[rows].abs().amax(1, keepdim=True)
    assert torch.equal(layer.weight_scale[rows], absmax / 448)
    assert (layer.dequantize(torch.float32)[rows] - weight[rows]).abs().max() <= absmax.max() * 2**-4
    assert not layer(inputs(2, 64))[:, 3].any()


MALFORMED = {
    "weight float": ({"weight": torch.zeros(N, K)}, TypeError),
    "weight rank": ({"weight": torch.zeros(N, dtype=torch.uint8)}, ValueError),
    "weight none": ({"weight": None}, TypeError),
    "scale none": ({"weight_scale": None}, TypeError),
    "scale dtype": ({"weight_scale": torch.ones(N, dtype=torch.int32)}, TypeError),
    "scale shape": ({"weight_scale": torch.ones(N + 1)}, ValueError),
    "scale grid": ({"weight_scale": torch.ones(1, 3)}, ValueError),
    "input scale shape": ({"input_scale": torch.ones(2)}, ValueError),
    "activation": ({"activation": "row"}, ValueError),
    "bias": ({"bias": torch.zeros(3)}, ValueError),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed(change):
    good = {"weight": codes(), "bias": None, "weight_scale": torch.ones(N), "input_scale": None}
    qlinear.Fp8Linear(**good)
    with pytest.raises(change[1]):
        qlinear.Fp8Linear(**(good | change[0]))


# Functions


def test_scaled_fp8_quant_modes():
    x = inputs(5, K)
    x[2] = 0
    q, scale = functional.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 1)
    assert scale[2].item() == pytest.approx(1 / (448 * 512), rel=1e-6)
    assert torch.allclose(scale[:2], x[:2].abs().amax(1, keepdim=True) / 448)
    assert (q.float() * scale - x).abs().max() <= x.abs().max() * 2**-4
    q, scale = functional.scaled_fp8_quant(x)
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx((x.abs().max() / 448).item(), rel=1e-6)
    given = torch.tensor([0.5])
    q, scale = functional.scaled_fp8_quant(x * 1000, given)
    assert torch.equal(scale, given)
    assert torch.equal(q.float(), (x * 1000 / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_scaled_fp8_quant_padding_and_output():
    x = inputs(5, K)
    q, _ = functional.scaled_fp8_quant(x)
    padded, _ = functional.scaled_fp8_quant(x, num_token_padding=17)
    assert padded.shape == (17, K)
    assert torch.equal(padded[:5].float(), q.float())
    assert not padded[5:].float().any()
    out = torch.empty(5, K, dtype=torch.float8_e4m3fn)
    assert functional.scaled_fp8_quant(x, output=out)[0] is out
    assert torch.equal(out.float(), q.float())
    with pytest.raises(ValueError, match="2-D"):
        functional.scaled_fp8_quant(x[0])
    with pytest.raises(ValueError, match="scale_ub"):
        functional.scaled_fp8_quant(x, scale_ub=torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_scaled_mm(dtype, per):
    a, b = codes(1)[:7], codes(2)
    scale_a, scale_b = (random(1), random(1)) if per == "tensor" else (random(7, 1), random(1, N))
    bias = torch.randn(N).to(dtype)
    out = functional.scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, bias=bias)
    assert out.dtype == dtype
    A = array(a).astype(np.float64) * array(scale_a).reshape(-1, 1)
    B = array(b).astype(np.float64) * array(scale_b).reshape(-1, 1)
    offset = array(bias).astype(np.float64)
    assert_close(out, A @ B.T + offset, np.abs(A) @ np.abs(B).T + np.abs(offset), K)
    with pytest.raises(TypeError, match="out_dtype"):
        functional.scaled_mm(a, b.t(), scale_a, scale_b, torch.float64)


def test_bytes_of_e8m0_as_fp32():
    """What a GPU reads in place of them."""
    values = ops.from_e8m0(torch.arange(256, dtype=torch.uint8).view(16, 16))
    assert values.shape == (16, 16)
    assert values.flatten()[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[15, 15].isnan()
