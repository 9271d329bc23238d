"""EETQLinear and EETQ's functions."""

import numpy as np
import pytest
import torch
from layer_cases import array, assert_close, decode_eetq, inputs

import qlinear
from qlinear import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizes_as_fp16(dtype):
    weight = (torch.randn(32, 128) / 8).to(dtype)
    layer = qlinear.EETQLinear(weight, None)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == (128, 32)
    assert layer.weight_scales.dtype == torch.float16
    assert layer.scale is layer.weight_scales
    assert list(layer.state_dict()) == ["weight", "weight_scales"]
    half = array(weight.half()).astype(np.float32)
    scale = np.abs(half).max(1) / np.float32(128)
    assert np.array_equal(array(layer.scale), scale.astype(np.float16))
    ratio = half / scale[:, None]
    q = np.clip(np.trunc(ratio + np.copysign(0.5, ratio)), -128, 127)
    assert np.array_equal(
        decode_eetq(layer.state_dict(), layer), q * scale.astype(np.float16).astype(np.float64)[:, None]
    )


@pytest.mark.parametrize(("n", "k"), [(32, 63), (32, 96), (31, 64), (2, 1)])
def test_shapes_that_the_format_cannot_hold(n, k):
    with pytest.raises(ValueError, match=r"64|2|even|multiple"):
        qlinear.EETQLinear(torch.randn(n, k), None)


def test_quant_weights():
    weight = torch.randn(128, 32).half()
    processed, scales = functional.quant_weights(weight, torch.int8, False)
    layer = qlinear.EETQLinear(weight.t(), None)
    assert torch.equal(processed, layer.weight)
    assert torch.equal(scales, layer.weight_scales)
    codes, again, scales = functional.quant_weights(weight, torch.int8, True)
    assert torch.equal(again, processed)
    assert torch.equal(functional.preprocess_weights(codes), processed)
    assert torch.allclose(codes.float() * scales.float(), weight.float(), atol=float(scales.max()) * 1.01)
    full = functional.quant_weights(weight.float())
    assert full[1].dtype == torch.float32
    with pytest.raises(NotImplementedError, match="quint4x2"):
        functional.quant_weights(weight, torch.quint4x2)
    with pytest.raises(NotImplementedError, match="4-bit"):
        functional.preprocess_weights(codes, is_int4=True)
    with pytest.raises(TypeError, match="quant_type"):
        functional.quant_weights(weight, torch.int32)
    with pytest.raises(ValueError, match="weight"):
        functional.quant_weights(weight[0])


@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128), (128,)])
def test_w8_a16_gemm(shape):
    layer = qlinear.EETQLinear(torch.randn(32, 128), None)
    x = inputs(*shape, dtype=torch.float16).requires_grad_()
    out = functional.w8_a16_gemm(x, layer.weight, layer.weight_scales)
    W = decode_eetq(layer.state_dict(), layer)
    a = array(x).astype(np.float64)
    assert_close(out.detach(), a @ W.T, np.abs(a) @ np.abs(W).T, 128)
    out.sum().backward()
    assert torch.allclose(x.grad[..., 0].float(), torch.tensor(W[:, 0].sum()).float(), rtol=1e-2, atol=1e-2)


def test_from_tensors_holds_the_files_tensors():
    made = qlinear.EETQLinear(torch.randn(32, 128), torch.randn(32))
    tensors = dict(made.state_dict())
    layer = qlinear.EETQLinear.from_tensors(tensors)
    assert layer.weight.data_ptr() == tensors["weight"].data_ptr()
    assert torch.equal(layer(inputs(2, 128)), made(inputs(2, 128)))
    with pytest.raises(TypeError):
        qlinear.EETQLinear.from_tensors(tensors | {"weight": tensors["weight"].float()})
    with pytest.raises(ValueError, match="weight_scales"):
        qlinear.EETQLinear.from_tensors(tensors | {"weight_scales": tensors["weight_scales"][:-1]})
