"""Linear8bitLt and Linear4bit: bitsandbytes' files, states and functions."""

import json
import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch
from layer_cases import array, assert_close, assert_same_state, decode_fourbit, exact, inputs

import qlinear
from qlinear import functional
from qlinear.layers import bnb

K, N = 96, 40


def weight(dtype=torch.float16, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


# LLM.int8()


def test_int8_tensors_are_bitsandbytes():
    w = weight()
    layer = qlinear.Linear8bitLt(w, None, has_fp16_weights=False, threshold=6.0)
    absmax = array(w).astype(np.float32).__abs__().max(1)
    assert np.array_equal(array(layer.SCB), absmax)
    assert np.array_equal(
        array(layer.weight), np.rint(array(w).astype(np.float32) * (np.float32(127) / absmax)[:, None])
    )
    state = layer.state_dict()
    assert list(state) == ["weight", "SCB", "weight_format"]
    assert (state["weight_format"].dtype, state["weight_format"].shape, state["weight_format"].item()) == (
        torch.uint8,
        (),
        0,
    )
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert not layer.weight.requires_grad


def test_int8_state_is_a_view():
    layer = qlinear.Linear8bitLt(weight(), torch.zeros(N), False, False, 6.0, index=3)
    assert layer.index == 3
    state = layer.state
    assert state.CB.data_ptr() == layer.weight.data_ptr()
    assert state.SCB is layer.SCB
    assert state.threshold == 6.0
    assert not state.has_fp16_weights
    assert state.use_pool
    assert state.CxB is None
    x = inputs(4, K) * 3
    with_outliers = layer(x)
    state.threshold = 0.0
    assert layer.threshold == 0.0
    assert not state.use_pool
    assert not torch.equal(layer(x), with_outliers)
    assert torch.equal(layer(x), qlinear.Linear8bitLt(weight(), torch.zeros(N), False)(x))
    with pytest.raises(ValueError, match="threshold"):
        state.threshold = -1.0
    layer.init_8bit_state()


def test_int8_defaults_and_refusals():
    layer = qlinear.Linear8bitLt(weight(torch.float32), None)
    assert layer.state.has_fp16_weights
    assert layer.state.threshold == 0.0
    assert layer.state.CB is None
    assert layer.state.SCB is None
    with pytest.raises(ValueError, match="memory_efficient_backward"):
        qlinear.Linear8bitLt(weight(), None, memory_efficient_backward=True)
    with pytest.raises(ValueError, match="threshold"):
        qlinear.Linear8bitLt(weight(), None, False, threshold=float("nan"))


@pytest.mark.parametrize("value", [1, 2, 3])
def test_int8_other_weight_formats_are_refused(value):
    layer = qlinear.Linear8bitLt(weight(), None, has_fp16_weights=False)
    state = layer.state_dict() | {"weight_format": torch.tensor(value, dtype=torch.uint8)}
    fresh = qlinear.Linear8bitLt.empty(K, N, False, device="cpu")
    with pytest.raises(ValueError, match="weight_format"):
        fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="weight_format"):
        qlinear.Linear8bitLt.from_tensors(state)
    with pytest.raises(ValueError, match="weight_format"):
        fresh.load_state_dict(state | {"weight_format": "col_turing"})


def test_int8_files_without_weight_format():
    layer = qlinear.Linear8bitLt(weight(), None, has_fp16_weights=False)
    state = layer.state_dict()
    for old in ({k: v for k, v in state.items() if k != "weight_format"}, state | {"weight_format": "row"}):
        fresh = qlinear.Linear8bitLt.empty(K, N, False, threshold=0.0, device="cpu")
        fresh.load_state_dict(old)
        assert_same_state(fresh.state_dict(), state)
        assert torch.equal(fresh(inputs(2, K)), layer(inputs(2, K)))


def test_int8_kinds_do_not_mix():
    quantized = qlinear.Linear8bitLt(weight(), None, has_fp16_weights=False)
    floating = qlinear.Linear8bitLt(weight(), None)
    with pytest.raises(RuntimeError, match="float weight cannot load int8"):
        floating.load_state_dict(quantized.state_dict())
    with pytest.raises(RuntimeError, match="int8 weight cannot load"):
        quantized.load_state_dict(floating.state_dict())


def test_int8_float_weight_learns():
    w = weight(torch.float32)
    layer = qlinear.Linear8bitLt(w, torch.randn(N), threshold=6.0)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight.requires_grad
    x = inputs(2, 3, K).requires_grad_()
    frozen = qlinear.Linear8bitLt(w, layer.bias, has_fp16_weights=False, threshold=6.0)
    assert torch.equal(layer(x), frozen(x))
    grad = inputs(2, 3, N, seed=4)
    layer(x).backward(grad)
    assert torch.allclose(layer.weight.grad, torch.einsum("abn,abk->nk", grad, x.detach()), atol=1e-4)
    assert torch.allclose(x.grad, grad @ frozen.dequantize(torch.float32), atol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.equal(layer(x), frozen(x))
    assert layer.half().weight.dtype == torch.float16
    assert torch.equal(layer.dequantize(), layer.weight)


def test_deprecation_is_logged_once(caplog):
    bnb.warn_deprecate_bnb.cache_clear()
    with caplog.at_level(logging.WARNING, logger="qlinear"):
        qlinear.warn_deprecate_bnb()
        qlinear.warn_deprecate_bnb()
    assert [record.message for record in caplog.records if "eetq" in record.message] == [caplog.records[0].message]


def test_vectorwise_functions():
    x = inputs(2, 5, K, dtype=torch.float16)
    codes, stats, outliers = functional.int8_vectorwise_quant(x)
    assert codes.shape == x.shape
    assert outliers is None
    back = functional.int8_vectorwise_dequant(codes.reshape(-1, K), stats)
    assert (back - x.reshape(-1, K).float()).abs().max() <= stats.max() / 127 * 0.5001
    x[0, 0, 7] = 100.0
    _, _, outliers = functional.int8_vectorwise_quant(x, threshold=50.0)
    assert outliers.tolist() == [7]


# 4 bit


def bnb_state(quant_type, w, blocksize, nested):
    """The state dict as bitsandbytes writes it, key by key, from its functions' parts."""
    packed, state = functional.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    numbers = {"quant_type": quant_type, "blocksize": blocksize, "dtype": str(w.dtype)[6:], "shape": list(w.shape)}
    tensors = {"weight": packed, "weight.absmax": state.absmax, "weight.quant_map": state.code}
    if nested:
        tensors |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
        numbers |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": state.offset.item()}
    marker = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
    return OrderedDict(tensors | {f"weight.quant_state.bitsandbytes__{quant_type}": marker})


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_4bit_state_dict_is_bitsandbytes(quant_type, nested, blocksize):
    w = weight()
    layer = qlinear.Linear4bit(w, None, quant_type, blocksize=blocksize, compress_statistics=nested)
    expected = bnb_state(quant_type, w, blocksize, nested)
    assert_same_state(layer.state_dict(), expected)
    for other in ("nf4", "fp4"):
        fresh = qlinear.Linear4bit.empty(K, N, False, quant_type=other, device="cpu")
        fresh.load_state_dict(expected)
        assert_same_state(fresh.state_dict(), expected)
        assert (fresh.quant_type, fresh.blocksize, fresh.compress_statistics) == (quant_type, blocksize, nested)
        assert torch.equal(fresh(inputs(2, K)), layer(inputs(2, K)))


def test_4bit_defaults_are_the_seeds():
    layer = qlinear.Linear4bit(weight(), None, "nf4")
    assert layer.weight.shape == (N * K // 2, 1)
    assert layer.weight.dtype == torch.uint8
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert not layer.weight.requires_grad
    assert (layer.blocksize, layer.compress_statistics, layer.compute_dtype) == (64, True, None)
    with pytest.raises(NotImplementedError, match="int4"):
        qlinear.Linear4bit(weight(), None, "int4")


def test_4bit_odd_sizes():
    w = torch.randn(7, 9)
    layer = qlinear.Linear4bit(w, None, "nf4", blocksize=32)
    W = decode_fourbit(layer.state_dict(), layer)
    x = inputs(3, 9)
    assert_close(layer(x), array(x) @ W.T, np.abs(array(x)) @ np.abs(W).T, 9)
    assert np.abs(W - array(w)).max() < 0.5


def test_4bit_quant_state():
    layer = qlinear.Linear4bit(weight(), None, "fp4")
    state = layer.quant_state
    assert state.nested
    assert state.absmax is layer.absmax
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == ((N, K), torch.float16, 64, "fp4")
    packed = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    own = layer.state_dict()
    assert {"weight", *packed} == set(own)
    for key, value in packed.items():
        assert exact(value, own[key]), key
    again = functional.QuantState.from_dict(packed, device="cpu")
    assert again.as_dict() == {**state.as_dict(), **{k: v for k, v in again.as_dict().items() if torch.is_tensor(v)}}
    assert torch.equal(functional.dequantize_4bit(layer.weight, state), layer.dequantize(torch.float16))
    assert torch.equal(functional.dequantize_4bit(layer.weight, again), layer.dequantize(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4bit_compute_dtype(dtype):
    layer = qlinear.Linear4bit(weight(), torch.randn(N), "nf4", compute_dtype=dtype)
    plain = qlinear.Linear4bit(weight(), layer.bias, "nf4")
    x = inputs(3, K, dtype=torch.float16)
    assert torch.equal(layer(x), plain(x.to(dtype)).to(torch.float16))
    with pytest.raises(TypeError, match="compute_dtype"):
        qlinear.Linear4bit(weight(), None, "nf4", compute_dtype=torch.float64)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_4bit_quant_storage(storage):
    layer = qlinear.Linear4bit(weight(), None, "nf4", quant_storage=storage)
    plain = qlinear.Linear4bit(weight(), None, "nf4")
    assert layer.weight.shape == (N * K // 2 // storage.itemsize, 1)
    assert layer.quant_storage == storage
    assert torch.equal(layer.weight.view(torch.uint8).flatten(), plain.weight.flatten())
    x = inputs(2, K)
    assert torch.equal(layer.half().float()(x), plain(x))
    saved = layer.state_dict()
    fresh = qlinear.Linear4bit.empty(K, N, False, device="cpu")
    fresh.load_state_dict(saved)
    assert_same_state(fresh.state_dict(), saved)
    assert torch.equal(fresh(x), plain(x))


def json_tensor(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


NUMBERS = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [N, K]}
WRONG_STATES = {
    "not json": "{",
    "not an object": [1],
    "unknown field": NUMBERS | {"extra": 1},
    "no blocksize": {k: v for k, v in NUMBERS.items() if k != "blocksize"},
    "blocksize of another kind": NUMBERS | {"blocksize": "64"},
    "blocksize zero": NUMBERS | {"blocksize": 0},
    "another type": NUMBERS | {"quant_type": "int4"},
    "another dtype": NUMBERS | {"dtype": "int8"},
    "another shape": NUMBERS | {"shape": [N, K + 1]},
    "no shape": NUMBERS | {"shape": 5},
    "nested without tensors": NUMBERS | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1},
}


@pytest.mark.parametrize("numbers", WRONG_STATES.values(), ids=WRONG_STATES)
def test_4bit_hostile_quant_states(numbers):
    state = bnb_state("nf4", weight(), 64, False)
    state["weight.quant_state.bitsandbytes__nf4"] = json_tensor(numbers)
    fresh = qlinear.Linear4bit.empty(K, N, False, device="cpu")
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(RuntimeError, match="weight"):
        fresh.load_state_dict(state)
    assert_same_state(fresh.state_dict(), before)


def test_4bit_tensors_of_another_size_are_refused():
    state = bnb_state("nf4", weight(), 64, False)
    for key in ("weight.absmax", "weight.quant_map", "weight"):
        with pytest.raises(ValueError, match=r"absmax|code|quant_map|weight"):
            qlinear.Linear4bit.from_tensors(state | {key: state[key][:-1]})
    two = state | {"weight.quant_state.bitsandbytes__fp4": state["weight.quant_state.bitsandbytes__nf4"]}
    with pytest.raises(ValueError, match="exactly one"):
        qlinear.Linear4bit.from_tensors(two)
    with pytest.raises(RuntimeError, match="exactly one"):
        qlinear.Linear4bit.empty(K, N, False, device="cpu").load_state_dict(two)


# Functions


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
def test_4bit_functions(quant_type, dtype, nested):
    x = inputs(3, 5, 67).to(dtype)
    packed, state = functional.quantize_4bit(x, blocksize=64, compress_statistics=nested, quant_type=quant_type)
    assert packed.shape == ((x.numel() + 1) // 2, 1)
    back = functional.dequantize_4bit(packed, state)
    assert back.dtype == dtype
    assert back.shape == x.shape
    assert (back - x).abs().max() <= 0.25 * x.abs().max()
    named = {"nf4": (functional.quantize_nf4, functional.dequantize_nf4)}
    named["fp4"] = (functional.quantize_fp4, functional.dequantize_fp4)
    quantize, dequantize = named[quant_type]
    again, again_state = quantize(x, blocksize=64, compress_statistics=nested)
    assert torch.equal(again, packed)
    assert torch.equal(dequantize(again, again_state), back)
    if not nested:
        out = torch.empty_like(x)
        result = functional.dequantize_4bit(packed, absmax=state.absmax, out=out, blocksize=64, quant_type=quant_type)
        assert result is out
        assert torch.equal(out, back)


@pytest.mark.parametrize("nested", [True, False])
def test_blockwise_functions(nested):
    x = inputs(7, 300)
    codes, state = functional.quantize_blockwise(x, blocksize=256, nested=nested)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    back = functional.dequantize_blockwise(codes, state)
    assert back.dtype == x.dtype
    assert (back - x).abs().max() < 0.05 * x.abs().max()
    if not nested:
        by_parts = functional.dequantize_blockwise(codes, absmax=state.absmax, code=state.code, blocksize=256)
        assert torch.equal(by_parts, back)
    with pytest.raises(ValueError, match="exactly one"):
        functional.dequantize_blockwise(codes)


def test_dynamic_map():
    code = functional.create_dynamic_map()
    assert code.shape == (256,)
    assert (code.diff() > 0).all()
    golden = {0: -0.99296874, 1: -0.97890627, 31: -0.55703127, 64: -0.09859375, 127: 0.0, 128: 5.5e-07, 255: 1.0}
    for index, value in golden.items():
        assert code[index].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(40, 96), (3, 33)])
def test_searched_absmax_leave_less_error(quant_type, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    w[1, :32] = 0
    plain, searched = (
        qlinear.Linear4bit(w, None, quant_type, blocksize=32, compress_statistics=False, search_scales=search)
        for search in (False, True)
    )
    error, least = ((layer.dequantize() - w).square().sum() for layer in (plain, searched))
    assert least < 0.95 * error
    # A searched absmax is none of the largest magnitudes everywhere, and codes are those nearest to it.
    assert (searched.absmax != plain.absmax).any()
    code = searched.quant_map[:16]
    flat = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 32)).reshape(-1, 32)
    distance = (flat[..., None] - code * searched.absmax[:, None, None]).abs().amin(-1)
    padded = torch.nn.functional.pad((searched.dequantize() - w).reshape(-1), (0, -w.numel() % 32)).reshape(-1, 32)
    assert torch.allclose(padded.abs()[:-1], distance[:-1], atol=1e-6)


def test_searched_absmax_of_what_is_no_number():
    w = torch.randn(4, 64)
    w[1, 3], w[2, 40] = torch.nan, torch.inf
    dense = qlinear.Linear4bit(w, None, "fp4", compress_statistics=False, search_scales=True).dequantize()
    assert not torch.isfinite(dense[1]).all()
    assert not torch.isfinite(dense[2]).all()
    assert torch.isfinite(dense[[0, 3]]).all()
