"""get_linear: which layer comes of which weight, and the seeds' error texts."""

import pytest
import torch
from layer_cases import assert_same_state, inputs

import qlinear
from qlinear import get_linear

K, N = 128, 64

GPTQ_TEXT = "The passed weight is not `gptq` compatible, loader needs to be updated."
AWQ_TEXT = "The passed weight is not compatible with `awq`"


def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).half()


def bias():
    return torch.arange(N, dtype=torch.float32) / N


FLOATS = {
    None: qlinear.FastLinear,
    "eetq": qlinear.EETQLinear,
    "bitsandbytes": qlinear.Linear8bitLt,
    "bitsandbytes-nf4": qlinear.Linear4bit,
    "bitsandbytes-fp4": qlinear.Linear4bit,
}


@pytest.mark.parametrize(("quantize", "kind"), FLOATS.items())
def test_float_weights(quantize, kind):
    layer = get_linear(weight(), bias(), quantize)
    assert type(layer) is kind
    x = inputs(3, K, dtype=torch.float16) if quantize is None else inputs(3, K)
    if quantize is None:
        layer = layer.float()
        x = x.float()
    exact = torch.nn.functional.linear(x, weight().float(), bias())
    assert (layer(x) - exact).abs().max() < 0.2 * exact.abs().max()
    flipped = get_linear(weight().t().contiguous(), bias(), quantize, fan_in_fan_out=True)
    if quantize is not None:
        assert_same_state(flipped.state_dict(), layer.state_dict())
    assert get_linear(weight(), None, quantize).bias is None


def test_options_that_the_seeds_fix():
    int8 = get_linear(weight(), None, "bitsandbytes")
    assert int8.state.threshold == 6.0
    assert not int8.state.has_fp16_weights
    for name in ("nf4", "fp4"):
        layer = get_linear(weight(), None, f"bitsandbytes-{name}")
        assert layer.quant_type == name
        assert layer.compress_statistics
        assert layer.blocksize == 64
    fast = get_linear(weight(), bias(), None)
    assert not fast.weight.requires_grad
    assert not fast.bias.requires_grad


def gptq_tensors(group_size=32):
    layer = qlinear.QuantLinear.quantize(weight(), None, bits=4, group_size=group_size)
    return layer, (layer.qweight, layer.qzeros, layer.scales)


@pytest.mark.parametrize("g_idx", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_tuples(g_idx, group_size):
    made, tensors = gptq_tensors(group_size)
    order = made.g_idx if g_idx else None
    for exllama in (True, False):
        layer = get_linear((*tensors, order, 4, group_size, exllama), bias(), "gptq")
        assert type(layer) is qlinear.QuantLinear
        assert (layer.bits, layer.groupsize) == (4, group_size)
        assert layer.qweight.data_ptr() == tensors[0].data_ptr()
        assert torch.allclose(layer(inputs(2, K)), made(inputs(2, K)) + bias(), atol=1e-5)


def awq_tensors(group_size=32):
    layer = qlinear.AWQLinear.quantize(weight(), None, group_size=group_size)
    return layer, (layer.qweight, layer.qzeros, layer.scales)


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq_tuples(group_size):
    made, tensors = awq_tensors(group_size)
    layer = get_linear((*tensors, None, 4, group_size, False), bias(), "awq")
    assert type(layer) is qlinear.AWQLinear
    assert torch.allclose(layer(inputs(2, K)), made(inputs(2, K)) + bias(), atol=1e-5)
    with pytest.raises(NotImplementedError, match="4-bit"):
        get_linear((*tensors, None, 8, group_size, False), None, "awq")


@pytest.mark.parametrize(("quantize", "text"), [("gptq", GPTQ_TEXT), ("awq", AWQ_TEXT)])
@pytest.mark.parametrize("wrong", [torch.zeros(4, 4), (1, 2, 3), tuple(range(8)), None, {"weight": torch.zeros(1)}])
def test_incompatible_weights_have_the_seeds_texts(quantize, text, wrong):
    with pytest.raises(NotImplementedError) as error:
        get_linear(wrong, None, quantize)
    assert str(error.value) == text


@pytest.mark.parametrize("quantize", ["x", "", "hqq-4bit", "FP8", "fp16"])
def test_unknown_quantization(quantize):
    with pytest.raises(NotImplementedError) as error:
        get_linear(weight(), None, quantize)
    assert str(error.value) == f"Quantization `{quantize}` is not implemented yet."


def test_fan_in_fan_out_is_for_float_weights():
    _, tensors = gptq_tensors()
    with pytest.raises(ValueError, match="fan_in_fan_out"):
        get_linear((*tensors, None, 4, 32, False), None, "gptq", fan_in_fan_out=True)


@pytest.mark.parametrize("quantize", ["fp8", "fp8-kv"])
def test_fp8_by_keywords_and_by_the_loaders_triple(quantize):
    made = qlinear.Fp8Linear.quantize(weight(), None)
    static = torch.tensor(0.03)
    x = inputs(2, K)
    by_keyword = get_linear(made.weight, bias(), quantize, weight_scale=made.weight_scale, input_scale=None)
    assert type(by_keyword) is qlinear.Fp8Linear
    assert torch.allclose(by_keyword(x), made(x) + bias(), atol=1e-5)
    triple = get_linear((made.weight, static, made.weight_scale), bias(), quantize)
    by_keyword = get_linear(made.weight, bias(), quantize, weight_scale=made.weight_scale, input_scale=static)
    assert torch.equal(triple.input_scale, static)
    assert torch.equal(triple(x), by_keyword(x))
    with pytest.raises(NotImplementedError, match="weight, input_scale, weight_scale"):
        get_linear((made.weight, static), None, quantize)
    with pytest.raises(TypeError, match="weight_scale"):
        get_linear(made.weight, None, quantize)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        get_linear(weight(), None, quantize, weight_scale=made.weight_scale)


RAW = {
    "eetq": lambda: qlinear.EETQLinear(weight(), bias()),
    "gptq": lambda: qlinear.QuantLinear.quantize(weight(), bias(), bits=4, group_size=32),
    "awq": lambda: qlinear.AWQLinear.quantize(weight(), bias(), group_size=32),
    "bitsandbytes": lambda: qlinear.Linear8bitLt(weight(), bias(), False, threshold=6.0),
    "bitsandbytes-nf4": lambda: qlinear.Linear4bit(weight(), bias(), "nf4"),
    "bitsandbytes-fp4": lambda: qlinear.Linear4bit(weight(), bias(), "fp4"),
    "fp8": lambda: qlinear.Fp8Linear.quantize(weight(), bias()),
    None: lambda: qlinear.FastLinear(weight().float(), bias()),
}


@pytest.mark.parametrize(("quantize", "make"), RAW.items())
def test_raw_dicts_of_a_checkpoints_tensors(quantize, make):
    made = make()
    raw = dict(made.state_dict())
    layer = get_linear(raw, None, quantize)
    assert_same_state(layer.state_dict(), made.state_dict())
    assert torch.equal(layer(inputs(2, K)), made(inputs(2, K)))
    other = get_linear(raw, bias() + 1, quantize)
    assert torch.equal(other.bias, bias() + 1)


def test_raw_dicts_may_tell_bits_and_group_size():
    for names in (("bits", "group_size"), ("gptq_bits", "gptq_groupsize"), ("bits", "groupsize")):
        made = qlinear.QuantLinear.quantize(weight(), None, bits=8, group_size=32)
        raw = dict(made.state_dict()) | dict(zip(names, (torch.tensor(8), 32), strict=True))
        raw[names[0]] = 8
        layer = get_linear(raw, None, "gptq")
        assert (layer.bits, layer.groupsize) == (8, 32)


def test_fast_linear_loads_from_lorax_weights():
    class Weights:
        def get_tensor(self, name):
            return {"up.weight": torch.ones(3, 2), "up.bias": torch.zeros(3)}[name]

    layer = qlinear.FastLinear.load(None, "up", Weights(), True)
    assert layer.bias is not None
    assert layer(torch.ones(1, 2)).tolist() == [[2.0, 2.0, 2.0]]
    assert qlinear.FastLinear.load(None, "up", Weights(), False).bias is None
    assert "in_features=2, out_features=3" in repr(layer)
