"""torch's default device is where tensors without a device of their own go: none of ours, which go with the weights."""

import pytest
import torch
from layer_cases import CASES, K, N, assert_same_state, inputs, make

import qlinear.quantizing
from qlinear import functional
from qlinear.shards import Shards

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.fixture
def elsewhere():
    """Whatever goes to the default device has no data there."""
    with torch.device("meta"):
        yield


@every_case
def test_layers_are_made_where_their_weights_are(case, request):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 8
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1))
    here, x = case.make(weight, bias), inputs(3, K)
    request.getfixturevalue("elsewhere")
    layer = case.make(weight, bias)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    assert_same_state(layer.state_dict(), here.state_dict())
    assert torch.equal(layer(x), here(x))
    state = layer.state_dict()
    layer.load_state_dict(state)
    assert torch.equal(layer(x), here(x))


@pytest.mark.parametrize("name", ["gptq", "awq", "bitsandbytes-nf4"])
def test_searched_scales(name, request):
    weight = torch.randn(N, K)
    make = {
        "gptq": lambda: qlinear.QuantLinear.quantize(weight, None, search_scales=True),
        "awq": lambda: qlinear.AWQLinear.quantize(weight, None, search_scales=True),
        "bitsandbytes-nf4": lambda: qlinear.Linear4bit(weight, None, "nf4", search_scales=True),
    }[name]
    here = make().state_dict()
    request.getfixturevalue("elsewhere")
    assert_same_state(make().state_dict(), here)


def test_a_bound_that_is_a_number(request):
    layer, x = make(next(case for case in CASES if case.name == "fp8-token")), inputs(3, K)
    request.getfixturevalue("elsewhere")
    bounded = qlinear.Fp8Linear(layer.weight, None, layer.weight_scale, None, input_scale_ub=0.5)
    assert bounded(x).device.type == "cpu"
    assert qlinear.apply_fp8_linear(x, layer.qweight, layer.weight_scale, input_scale_ub=0.5).device.type == "cpu"


def test_functions(request):
    x = inputs(4, 64)
    request.getfixturevalue("elsewhere")
    for quantize, dequantize in (
        (functional.quantize_4bit, functional.dequantize_4bit),
        (functional.quantize_blockwise, functional.dequantize_blockwise),
    ):
        codes, state = quantize(x)
        assert dequantize(codes, state).device.type == "cpu"
    codes, state = functional.quantize_4bit(x, compress_statistics=True)
    back = functional.QuantState.from_dict(state.as_dict(packed=True))
    assert torch.equal(functional.dequantize_4bit(codes, back), functional.dequantize_4bit(codes, state))
    codes, state = functional.quantize_blockwise(x)
    assert functional.dequantize_blockwise(codes, absmax=state.absmax).device.type == "cpu"


def saved(tmp_path, *layers):
    model = torch.nn.ModuleDict(dict(zip("abcdef", layers, strict=False)))
    qlinear.save_pretrained(model, tmp_path / "source")
    return tmp_path / "source"


def same_files(left, right):
    left, right = Shards(left), Shards(right)
    assert_same_state({name: left.tensor(name) for name in left}, {name: right.tensor(name) for name in right})


@pytest.mark.parametrize("to", qlinear.quantizing.FORMATS)
def test_whole_checkpoints_are_quantized_alike(tmp_path, request, to):
    source = saved(tmp_path, torch.nn.Linear(128, 64))
    qlinear.quantize_checkpoint(source, tmp_path / "here", to)
    request.getfixturevalue("elsewhere")
    qlinear.quantize_checkpoint(source, tmp_path / "made", to)
    same_files(tmp_path / "here", tmp_path / "made")


@pytest.mark.parametrize(
    ("case", "to"),
    [
        ("gptq4-g32", "gptq_v2"), ("gptq4-g32", "awq"), ("awq", "gptq"), ("eetq", "gptq"), ("eetq", "int8"),
        ("int8-t2.5", "int8"),
    ],
)  # fmt: skip
def test_whole_checkpoints_are_converted_alike(tmp_path, request, case, to):
    source = saved(tmp_path, make(next(one for one in CASES if one.name == case)))
    qlinear.convert_checkpoint(source, tmp_path / "here", to)
    request.getfixturevalue("elsewhere")
    qlinear.convert_checkpoint(source, tmp_path / "made", to)
    same_files(tmp_path / "here", tmp_path / "made")
