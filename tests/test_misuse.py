"""What a layer does with what it cannot have: it says so at once, and in words, or it stays what it was."""

import json

import pytest
import torch
from layer_cases import CASES, PACKED_CASES, K, N, assert_close, assert_same_state, inputs, make
from torch import nn

import qlinear

pytestmark = pytest.mark.usefixtures("packed_if_the_case_is")
every_case = pytest.mark.parametrize("case", CASES + PACKED_CASES, ids=repr)


@every_case
def test_a_bias_that_is_a_parameter_becomes_a_frozen_buffer(case):
    layer, bias = make(case), nn.Parameter(torch.arange(N, dtype=torch.float32))
    layer.bias = bias
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in make(case).named_parameters()]
    assert list(layer.state_dict()) == list(make(case).state_dict())
    assert "bias=True" in repr(layer)
    x = inputs(3, K)
    assert_close(layer(x), *case.reference(layer, x), K)
    assert torch.equal(layer.bias, bias)
    assert not layer.bias.requires_grad


@every_case
def test_a_state_that_no_layer_has_is_refused_when_it_is_loaded(case):
    layer = make(case)
    state = layer.state_dict()
    for key in ("weight", "qweight"):
        if key in state:
            state[key] = torch.zeros(state[key].shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"weight.*float64"):
        nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()})


@every_case
def test_a_state_with_something_else_than_tensors_is_refused(case):
    layer = make(case)
    for key in layer.state_dict():
        with pytest.raises((RuntimeError, ValueError), match=rf"{key}.*(list|\[1.0\])"):
            layer.load_state_dict(layer.state_dict() | {key: [1.0]})


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_weights_without_data_multiply_nothing(case, wants_gradient):
    layer = make(case).to("meta")
    with pytest.raises(ValueError, match="is on the meta device"):
        layer(inputs(3, K).requires_grad_(wants_gradient))
    assert layer(inputs(3, K).to("meta")).shape == (3, N)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_tensors_that_are_missing_or_none_are_named(case):
    layer = make(case)
    state = layer.state_dict()
    for key in state.keys() & {"weight", "weight_scales", "qweight", "scales", "SCB", "weight_scale", "weight.absmax"}:
        lacking = {name: tensor for name, tensor in state.items() if name != key}
        with pytest.raises(ValueError, match=rf"tensors must have .*{key}.*, got .*bias"):
            type(layer).from_tensors(lacking)
        with pytest.raises(TypeError, match=rf"{key} must be a torch.Tensor, got list"):
            type(layer).from_tensors(state | {key: [1.0]})
    with pytest.raises(TypeError, match=r"bias must be a torch.Tensor, got list"):
        type(layer).from_tensors(state, [1.0])


def test_a_float_weight_that_is_missing_or_none_is_named():
    with pytest.raises(ValueError, match="tensors must have weight, got none"):
        qlinear.get_linear({}, None, None)
    with pytest.raises(TypeError, match="weight must be a torch.Tensor, got NoneType"):
        qlinear.get_linear(None, None, None)


def test_packing_a_layer_whose_bias_does_not_fit_changes_nothing():
    layer = qlinear.QuantLinear.new(4, 32, K, N, True)
    linear = nn.Linear(K, N)
    linear.bias = nn.Parameter(torch.zeros(N - 1))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    scales = torch.ones(N, K // 32)
    with pytest.raises(ValueError, match="bias must have the shape"):
        layer.pack(linear, scales, scales)
    with pytest.raises(TypeError, match=r"scales must be a torch.Tensor, got float"):
        layer.pack(nn.Linear(K, N), 1.0, scales)
    assert layer.zero_format == "auto"
    assert_same_state(layer.state_dict(), before)


# LLM.int8() with weights that learn


def learning(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return qlinear.Linear8bitLt(torch.randn(N, K, generator=generator).to(dtype), None)


def test_weights_that_learn_without_data_multiply_nothing():
    with pytest.raises(ValueError, match="is on the meta device"):
        learning().to("meta")(inputs(3, K))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_learn_still_do_after_loading_another_dtype(assign):
    layer, other = learning(), learning(torch.float16)
    weight = layer.weight
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert layer.weight.requires_grad
    assert layer.weight.dtype == (torch.float16 if assign else torch.float32)
    assert assign or layer.weight is weight
    assert torch.equal(layer.weight.float(), other.weight.float())
    layer(inputs(3, K)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_weights_that_learn_are_no_weight_in_a_dtype_without_products():
    layer = learning()
    assert torch.equal(layer.dequantize(torch.float16), layer.weight.half())
    for dtype in (torch.int8, torch.float64, "float16"):
        with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, got"):
            layer.dequantize(dtype)


# The 4-bit layers' numbers, which are JSON


def nf4_with(**changes):
    """A layer's state with other numbers; ... takes one away."""
    state = qlinear.Linear4bit(torch.randn(N, K), None, "nf4").state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    numbers = json.loads(bytes(state[key].tolist())) | changes
    text = json.dumps({name: value for name, value in numbers.items() if value is not ...})
    return state | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nested_blocksize": ...}, "missing.*nested_blocksize"),
        ({"nested_dtype": ...}, "missing.*nested_dtype"),
        ({"nested_offset": ...}, "nested_offset go together"),
        ({"nested_blocksize": ..., "nested_dtype": ..., "nested_offset": ...}, "nested_offset go together"),
        ({"nested_offset": None}, "nested_offset must be a number, got None"),
        ({"nested_offset": "far"}, "nested_offset must be a number, got 'far'"),
        ({"nested_offset": 10**400}, "nested_offset must be a number"),
        ({"nested_blocksize": 10**30}, "nested_blocksize is out of range"),
        ({"blocksize": 10**30}, "blocksize is out of range"),
        ({"shape": None}, "shape|size mismatch"),
        ({"shape": 6144}, "shape|size mismatch"),
        ({"shape": [48.0, 128.5]}, "shape|size mismatch"),
    ],
)
def test_numbers_that_no_4_bit_layer_has_are_refused(changes, said):
    state = nf4_with(**changes)
    with pytest.raises(ValueError, match=said):
        qlinear.Linear4bit.from_tensors(state)
    layer = qlinear.Linear4bit(torch.randn(N, K), None, "nf4")
    with pytest.raises(RuntimeError, match=said):
        layer.load_state_dict(state)


def test_nested_tensors_without_the_others_are_refused():
    state = nf4_with()
    del state["weight.nested_quant_map"]
    with pytest.raises(ValueError, match="go together"):
        qlinear.Linear4bit.from_tensors(state)


# A layer's tensors in two files, which are loaded one after the other with strict=False


def act_order():
    """A GPTQ layer whose inputs lie in other groups than their neighbours."""
    layer = make(next(case for case in CASES if case.name == "gptq4-g32"))
    layer.g_idx = layer.g_idx.flip(0)
    return layer


def blockwise():
    codes = torch.arange(4 * N * K).remainder(120).to(torch.uint8).view(torch.float8_e4m3fn).view(4 * N, K)
    return qlinear.Fp8Linear(codes, None, torch.tensor([[1.0], [2.0]]), None, activation="none")


PIECES = {
    "gptq": (act_order, lambda: qlinear.QuantLinear.empty(K, N, group_size=32, zero_format="gptq", device="cpu")),
    "fp8-blocks": (blockwise, lambda: qlinear.Fp8Linear.empty(K, 4 * N, False, device="cpu", activation="none")),
    "fp8-static": (
        lambda: make(next(case for case in CASES if case.name == "fp8-static")),
        lambda: qlinear.Fp8Linear.empty(K, N, device="cpu"),
    ),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_a_layer_that_comes_in_pieces(name, assign):
    layer = PIECES[name][0]()
    state = layer.state_dict()
    keys, x = sorted(state), inputs(3, K)
    tried = 0
    for first in (set(keys[:count]) for count in range(1, len(keys))):
        for pieces in ((first, state.keys() - first), (state.keys() - first, first)):
            fresh = PIECES[name][1]()
            for piece in pieces:
                fresh.load_state_dict({key: state[key].clone() for key in piece}, strict=False, assign=assign)
            assert_same_state(fresh.state_dict(), state)
            assert torch.equal(fresh(x), layer(x))
            tried += 1
    assert tried >= 2
