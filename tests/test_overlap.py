"""Products that start while the kernel before them ends: what each reads is what the one before wrote."""

import itertools

import pytest
import torch
from torch import nn

import qlinear
from qlinear import _qlinear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")

DEPTH, ROUNDS = 12, 30
FORMATS = {"eetq": {}, "gptq": {}, "gptq-8": {"bits": 8}, "bitsandbytes-nf4": {}}


def test_the_switch_says_what_held():
    assert _qlinear.set_cuda_overlap(False) is True
    assert _qlinear.set_cuda_overlap(True) is False
    with pytest.raises(TypeError, match="allowed"):
        _qlinear.set_cuda_overlap(1)
    assert _qlinear.set_cuda_overlap(True) is True


def chain(name, widths):
    """Layers that feed each other, of alternating widths; the products keep their size."""
    torch.manual_seed(0)
    sizes = [widths[i % len(widths)] for i in range(DEPTH + 1)]
    layers = [nn.Linear(k, n, bias=True) for k, n in itertools.pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    model = nn.Sequential(*layers).half().cuda()
    qlinear.replace_linear(model, name.removesuffix("-8"), **FORMATS[name])
    return model


def act_order(model):
    """The same weights with the columns of their groups dealt out over K."""
    for i, layer in enumerate(model):
        state = layer.state_dict()
        generator = torch.Generator().manual_seed(i)
        state["g_idx"] = state["g_idx"].cpu()[torch.randperm(layer.in_features, generator=generator)].cuda()
        bias = state.pop("bias")
        model[i] = qlinear.QuantLinear.from_tensors(state, bias, bits=layer.bits, group_size=layer.groupsize)
    return model


def run_alone(model, x):
    _qlinear.set_cuda_overlap(False)
    try:
        out = model(x)
        torch.cuda.synchronize()
        return out
    finally:
        _qlinear.set_cuda_overlap(True)


def check(model, M):
    x = torch.randn(M, model[0].in_features, device="cuda").half()
    with torch.inference_mode():
        expected = run_alone(model, x)
        assert torch.isfinite(expected).all()
        for _ in range(ROUNDS):
            assert torch.equal(model(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(ROUNDS):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)
        # The graph reads x anew: another one, written by a kernel right before it.
        other = torch.randn_like(x)
        expected = run_alone(model, other)
        for _ in range(ROUNDS):
            x.copy_(other)
            graph.replay()
            assert torch.equal(out, expected)
            x.zero_()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 5, 16, 40, 200])
@pytest.mark.parametrize("name", FORMATS)
def test_a_chain_gives_the_bits_of_its_layers_one_by_one(name, M):
    check(chain(name, (1024, 2560)), M)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 5, 16, 40, 200])
def test_a_chain_with_act_order(M):
    check(act_order(chain("gptq", (1024, 2560))), M)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 16, 200])
def test_a_chain_of_shapes_that_no_tile_divides(M):
    check(chain("gptq", (1056, 488)), M)
