"""The CUDA engine against float64 on dequantized weights, the CPU's bits, and the ways a call can reach a GPU."""

import copy
import threading

import numpy
import pytest
import torch
from layer_cases import CASES, FP_DTYPES

from qlinear import _qlinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=CASES, ids=repr)
def case(request):
    return request.param


def make(case, K=256, N=192, dtype=torch.float16, bias=True):
    torch.manual_seed(K * 131 + N)
    weight = (torch.randn(N, K) / K**0.5).to(dtype)
    return case.make(weight, torch.randn(N).to(dtype) if bias else None)


def check(case, layer, x, out):
    """Every element within fp32's summing error of |x| @ |W|, and half a unit of the output."""
    reference, magnitude = case.reference(copy.deepcopy(layer).cpu(), x.cpu())
    reference, magnitude = torch.from_numpy(reference), torch.from_numpy(magnitude)
    bound = (x.shape[-1] + 8) * 2.0**-24 * magnitude + UNIT[x.dtype] * reference.abs() + 2.0**-25
    assert out.device.type == "cuda"
    assert out.dtype == x.dtype
    assert ((out.cpu().double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FP_DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 5, 8, 9, 70, 130])
def test_product(case, dtype, M):
    layer = make(case).cuda()
    x = torch.randn(M, 256, device="cuda").to(dtype)
    out = layer(x)
    assert torch.equal(out, layer(x))
    if M == 0:
        assert out.shape == (0, 192)
    else:
        check(case, layer, x, out)


def test_quantized_from_a_gpu_has_the_bits_of_the_cpu(case):
    torch.manual_seed(1)
    weight, bias = torch.randn(64, 128).half(), torch.randn(64).half()
    expected = case.make(weight, bias).state_dict()
    made = case.make(weight.cuda(), bias.cuda())
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu().reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)), (
            name
        )
    assert made(torch.randn(2, 128, device="cuda")).device.type == "cuda"


def test_dequantize_has_the_bits_of_the_cpu(case):
    layer = make(case)
    for dtype in FP_DTYPES:
        expected = layer.cpu().dequantize(dtype)
        assert torch.equal(layer.cuda().dequantize(dtype).cpu(), expected)


@pytest.mark.parametrize("dtype", FP_DTYPES, ids=str)
def test_gradient(case, dtype):
    layer = make(case).cuda()
    x = torch.randn(7, 256, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(7, 192, device="cuda").to(dtype)
    layer(x).backward(grad)
    W = layer.dequantize(torch.float32).double()
    reference, magnitude = grad.double() @ W, grad.double().abs() @ W.abs()
    bound = (192 + 8) * 2.0**-24 * magnitude + UNIT[dtype] * reference.abs() + 2.0**-25
    assert ((x.grad.double() - reference).abs() <= bound).all()


def test_captured_graph_as_the_first_call(case):
    layer = make(case).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    layer.engine()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(3, 256, device="cuda") * (1 + 9 * seed))
        graph.replay()
        assert torch.equal(out, layer(x))


def test_side_stream_and_cold_thread(case):
    layer = make(case).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    torch.cuda.synchronize()
    results = []

    def run():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results.append(layer(x))
        stream.synchronize()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


def test_state_dict_survives_the_move(case):
    layer = make(case)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    after = layer.cuda().state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].cpu().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_devices_must_agree(case):
    layer = make(case).cuda()
    with pytest.raises(ValueError, match="x is on the CPU, but .* is on cuda:0"):
        layer(torch.randn(3, 256))


def test_strided_input(case):
    layer = make(case).cuda()
    x = torch.randn(4, 5, 512, device="cuda", dtype=torch.float16)
    for view in (x[..., ::2], x[..., :256], x.transpose(0, 1)[..., :256]):
        assert torch.equal(layer(view), layer(view.contiguous()))


@pytest.mark.slow
def test_more_than_two_to_the_31_outputs():
    layer = make(CASES[0], K=64, N=65536)
    layer = layer.cuda()
    x = torch.randn(33000, 64, device="cuda", dtype=torch.float16)
    out = layer(x)
    assert torch.equal(out[-3:], layer(x[-64:])[-3:])


def test_arrays_of_frameworks_without_the_exchange_api():
    """CuPy and JAX on a GPU: read and written through __dlpack__ on the legacy stream, results in their own types."""
    cupy = pytest.importorskip("cupy")
    weight = torch.randn(64, 128).half()
    packed, scales = _qlinear.eetq_quantize(weight)
    x = torch.randn(5, 128).half()
    expected = _qlinear.EETQLinear(packed.cuda(), scales.cuda())(x.cuda())
    layer = _qlinear.EETQLinear(cupy.asarray(packed.numpy()), cupy.asarray(scales.numpy()))
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            out = layer(cupy.asarray(x.numpy()))
            assert isinstance(out, cupy.ndarray)
            assert cupy.array_equal(out, cupy.asarray(expected.cpu().numpy()))
            assert isinstance(layer.dequantize("float16"), cupy.ndarray)


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")
    weight = torch.randn(64, 128).half()
    packed, scales = _qlinear.eetq_quantize(weight)
    x = torch.randn(5, 128).half()
    expected = _qlinear.EETQLinear(packed.cuda(), scales.cuda())(x.cuda())
    layer = _qlinear.EETQLinear(jax.numpy.asarray(packed.numpy()), jax.numpy.asarray(scales.numpy()))
    out = layer(jax.numpy.asarray(x.numpy()))
    assert isinstance(out, jax.Array)
    assert (torch.from_numpy(numpy.asarray(out)) == expected.cpu()).all()
