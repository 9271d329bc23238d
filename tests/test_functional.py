"""qlinear.functional where the C types do not see what came: tensors to write into, shapes, wrong arguments."""

import numpy as np
import pytest
import torch

import qlinear
from qlinear import functional


@pytest.fixture
def weight():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 8), (1, 8), (2, 1, 8), (2, 3, 8), (3, 2, 2, 8), (8,), (0, 8), (2, 0, 8)])
def test_int8_rows_of_any_shape_come_back(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    codes, stats, _ = functional.int8_vectorwise_quant(x)
    back = functional.int8_vectorwise_dequant(codes, stats)
    assert back.dtype == torch.float32
    exact = codes.double().reshape(-1, 8).numpy() * stats.double().numpy()[:, None] / 127
    assert back.shape == shape
    assert np.allclose(back.reshape(-1, 8).numpy(), exact, rtol=2**-22, atol=0)


@pytest.mark.parametrize("stats", [torch.ones(3), torch.ones(1), torch.ones(2, 2), torch.ones(0)])
def test_int8_stats_that_are_not_the_rows(stats):
    with pytest.raises(ValueError, match="stats must have one element for each row of A"):
        functional.int8_vectorwise_dequant(torch.zeros(2, 8, dtype=torch.int8), stats)


def test_what_is_written_into_is_returned(weight):
    packed, state = functional.quantize_4bit(weight)
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    made, other = functional.quantize_4bit(weight, absmax=absmax, out=out)
    assert made is out
    assert other.absmax is absmax
    assert torch.equal(out, packed)
    assert torch.equal(absmax, state.absmax)
    back = torch.empty_like(weight)
    assert functional.dequantize_4bit(packed, state, out=back) is back
    assert torch.equal(back, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quantize", [functional.quantize_4bit, functional.quantize_blockwise])
@pytest.mark.parametrize("wrong", ["out", "absmax"])
def test_nothing_is_written_where_one_of_two_does_not_fit(weight, quantize, wrong):
    codes, state = quantize(weight, blocksize=64)
    given = {"out": torch.full_like(codes, 7), "absmax": torch.full_like(state.absmax, 7)}
    given[wrong] = given[wrong][:-1]
    with pytest.raises(ValueError, match=f"{wrong} must be"):
        quantize(weight, blocksize=64, **given)
    assert all((tensor == 7).all() for tensor in given.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.quantize_4bit([1.0]), "A must be a torch.Tensor, got list"),
        (lambda: functional.quantize_4bit(torch.ones(2), quant_storage="int8"), "quant_storage must be a torch.dtype"),
        (lambda: functional.quantize_4bit(torch.ones(2), out=[0]), "out must be a torch.Tensor, got list"),
        (lambda: functional.dequantize_4bit(None), "A must be a torch.Tensor, got NoneType"),
        (lambda: functional.quantize_blockwise(np.ones(2)), "A must be a torch.Tensor, got ndarray"),
        (lambda: functional.dequantize_blockwise(None, absmax=torch.ones(1)), "A must be a torch.Tensor, got NoneType"),
        (lambda: functional.int8_vectorwise_quant(1.0), "A must be a torch.Tensor, got float"),
        (lambda: functional.int8_vectorwise_dequant(torch.ones(1, 2), 1.0), "stats must be a torch.Tensor, got float"),
        (lambda: functional.scaled_fp8_quant(None), "input must be a torch.Tensor, got NoneType"),
        (lambda: functional.matmul248([1.0], None, None, None, None, 4, 15), "input must be a torch.Tensor, got list"),
        (
            lambda: functional.matmul248(torch.ones(1, 8), None, None, None, None, 4, 15),
            "qweight must be a torch.Tensor",
        ),
        (
            lambda: qlinear.apply_fp8_linear(torch.ones(1, 8), None, None),
            "qweight must be a torch.Tensor, got NoneType",
        ),
        (
            lambda: qlinear.apply_fp8_linear(torch.ones(1, 8), torch.ones(8, 8), 1.0),
            "weight_scale must be a torch.Tensor",
        ),
    ],
)
def test_what_is_no_tensor_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_number_has_no_rows():
    with pytest.raises(ValueError, match=r"A must have the shape \[\.\.\., C\]"):
        functional.int8_vectorwise_quant(torch.tensor(1.0))
