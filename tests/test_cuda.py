"""The CUDA engine against float64 on dequantized weights, the CPU's bits, and the ways a call can reach a GPU."""

import copy
import gc
import os
import threading

import forced_kernels
import numpy
import packed_layers
import packed_oracle as oracle
import pytest
import torch
from layer_cases import CASES, FP_DTYPES, PACKED_CASES, exact
from test_cuda_w8a8 import cores_error

import qlinear
from qlinear import _qlinear, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=CASES, ids=repr)
def case(request):
    return request.param


def is_packed(layer):
    return type(layer.engine()) is _qlinear.PackedLinear


def make(case, K=256, N=192, dtype=torch.float16, bias=True):
    torch.manual_seed(K * 131 + N)
    weight = (torch.randn(N, K) / K**0.5).to(dtype)
    return case.make(weight, torch.randn(N).to(dtype) if bias else None)


def check(case, layer, x, out):
    """Every element within fp32's summing error of |x| @ |W|, and half a unit of the output; the kernels for packed
    weights may also round the weight to 16 bit, once, and from 9 rows on tensor cores add up FP8 by themselves."""
    K = x.shape[-1]
    tuned = os.environ.get("QLINEAR_KERNELS") != "base"
    host = copy.deepcopy(layer).cpu()
    reference, magnitude = map(torch.from_numpy, case.reference(host, x.cpu()))
    rounds = tuned and is_packed(layer) and x.dtype != torch.float32
    bound = ((K + 8) * 2.0**-24 + (UNIT[x.dtype] if rounds else 0)) * magnitude + UNIT[x.dtype] * reference.abs()
    bound += 2.0**-25
    if tuned and isinstance(host, qlinear.Fp8Linear) and host.activation_mode() != "none" and x.shape[:-1].numel() > 8:
        seen, W = case.see(x.cpu(), host), case.decode(host.state_dict(), host)
        bound += cores_error(torch.from_numpy(seen), torch.from_numpy(W), reference, K)
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
@pytest.mark.parametrize("M", [1, 7, 80])
def test_gradient(case, dtype, M):
    """The base kernel takes the weight as it is; torch's product of the matrix has it rounded once to 16 bit."""
    layer = make(case).cuda()
    x = torch.randn(M, 256, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(M, 192, device="cuda").to(dtype)
    layer(x).backward(grad)
    W = layer.dequantize(torch.float32).double()
    reference, magnitude = grad.double() @ W, grad.double().abs() @ W.abs()
    bound = (192 + 8) * 2.0**-24 * magnitude + UNIT[dtype] * reference.abs() + 2.0**-25
    assert ((layer.engine().grad_input(grad).double() - reference).abs() <= bound).all()
    rounded = UNIT[dtype] * magnitude if dtype != torch.float32 else 0
    assert ((x.grad.double() - reference).abs() <= bound + rounded).all()


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


# Packed layers


@pytest.fixture(params=PACKED_CASES, ids=repr)
def packable(request):
    return request.param


def state_of(layer):
    return {name: tensor.cpu().clone() for name, tensor in layer.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert exact(tensor.cpu(), other[name].cpu()), name


def random_layers(random, count):
    """Layers of odd shapes and random bits, and the tensors that they were made of."""
    for _ in range(count):
        n, k = int(random.integers(1, 300)), int(random.integers(1, 700))
        dtype = FP_DTYPES[random.integers(3)]
        group_size = int(random.choice([-1, 16, 32, 48, 64, 128]))
        kind = random.integers(8)
        if kind < 4:
            bits = (2, 3, 4, 8)[kind]
            act_order, zero_format = bool(random.integers(2)), ("gptq", "gptq_v2")[random.integers(2)]
            layer, tensors, g_idx = packed_layers.make_gptq(
                random, n, k, bits, group_size, dtype, act_order, zero_format
            )
            options = {"bits": bits, "group_size": group_size, "in_features": k, "zero_format": zero_format}
            yield layer, (*tensors, g_idx), lambda *t, o=options: _qlinear.QuantLinear(*t, **o)
        elif kind == 4:
            layer, tensors = packed_layers.make_awq(random, n, k, group_size, dtype)
            yield layer, tensors, lambda *t, g=group_size: _qlinear.AWQLinear(*t, group_size=g)
        elif kind == 5:
            layer, tensors = packed_layers.make_eetq(random, 2 * (n // 2 + 1), 64 * (k // 64 + 1), dtype)
            yield layer, tensors, _qlinear.EETQLinear
        else:
            blocksize = int(random.choice([32, 64, 128]))
            k, nested = blocksize * (k // blocksize + 1), 256 * (kind == 7)
            layer, tensors = packed_layers.make_fourbit(random, n, k, blocksize, nested)
            options = {"shape": (n, k), "blocksize": blocksize, "nested_offset": 0.25 if nested else 0.0}

            def make_fourbit(*t, o=options):
                return _qlinear.Linear4bit(
                    *t[:3], **o, **dict(zip(("nested_absmax", "nested_code"), t[3:], strict=True))
                )

            yield layer, tensors, make_fourbit if nested else lambda *t, o=options: _qlinear.Linear4bit(*t, **o)


def test_packing_has_the_bits_of_the_plain_twin():
    """A hundred and twenty odd shapes: every section, the way back, the weight that is read."""
    random = numpy.random.default_rng(11)
    for layer, tensors, build in random_layers(random, 120):
        there = build(*(None if tensor is None else tensor.cuda() for tensor in tensors))
        packed, spec = layer.pack()
        packed_there, spec_there = there.pack()
        assert spec_there == spec
        found = oracle.sections(spec, packed_there.cpu().numpy())
        for name, section in oracle.sections(spec, packed.numpy()).items():
            assert numpy.array_equal(found[name], section), (spec, name)
        twin = _qlinear.PackedLinear(packed_there, spec)
        unpacked = twin.unpack()
        for one, other in zip(unpacked, tensors, strict=False):
            assert exact(one.cpu(), other), spec
        for dtype in ("float32", "float16", "bfloat16"):
            assert exact(twin.dequantize(dtype).cpu(), layer.dequantize(dtype)), spec


def test_layers_pack_themselves_and_give_their_state_back(packable):
    layer = make(packable)
    saved = state_of(layer)
    layer.cuda()
    assert is_packed(layer)
    assert layer.device.type == "cuda"
    assert_same(layer.state_dict(), saved)
    assert all(tensor.is_cuda for tensor in layer.state_dict().values())
    assert is_packed(layer)
    twin = copy.deepcopy(layer)
    assert is_packed(twin)
    assert_same(twin.state_dict(), saved)
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    fresh = packable.empty(256, 192, True, "meta")
    fresh.load_state_dict({name: tensor.cuda() for name, tensor in saved.items()}, assign=True)
    assert is_packed(fresh)
    assert torch.equal(fresh(x), expected)
    other = packable.empty(256, 192, True, "cuda")
    other.load_state_dict(saved)
    assert is_packed(other)
    assert torch.equal(other(x), expected)
    assert_same(layer.cpu().state_dict(), saved)
    assert layer._packing is None


def test_a_tensor_asked_for_is_the_layers_own(packable):
    layer = make(packable).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    name = layer.packs[0]
    tensor = getattr(layer, name)
    assert tensor.is_cuda
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        getattr(layer, name).zero_()
    assert not torch.equal(layer(x), expected)
    assert is_packed(layer)


def test_an_unpacked_layer_called_inside_a_capture_keeps_what_the_graph_reads(packable):
    layer = make(packable).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    getattr(layer, layer.packs[0])  # unpacks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    layer(x)
    assert not is_packed(layer)
    overwrite = [torch.full_like(layer.state_dict()[name], 1) for name in layer.state_dict() for _ in range(4)]
    graph.replay()
    assert torch.allclose(out, expected, rtol=1e-2, atol=1e-2)
    del overwrite


def test_a_graph_of_a_packed_layer_sees_what_is_written_in_place(packable):
    layer = make(packable).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    name = {"eetq": "weight_scales", "fourbit": "quant_map"}.get(layer.operator, "scales")
    with torch.no_grad():
        getattr(layer, name).mul_(0.5)
    expected = layer(x)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_capture_leaves_a_packed_layer_packed(packable):
    layer = make(packable).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
        with pytest.raises(RuntimeError, match="captured"):
            getattr(layer, layer.packs[0])
    graph.replay()
    assert torch.equal(out, expected)
    assert is_packed(layer)


def test_operator_and_compiled_call_of_a_packed_layer(packable):
    layer = make(packable).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    operator, arguments = layer._operands()
    assert operator == "packed"
    assert torch.equal(ops._OPERATORS["packed"][0](x, *arguments), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(layer(x.float()), expected)


def test_memory_returns_to_its_start(packable):
    cpu = make(packable, K=512, N=512)
    layer = copy.deepcopy(cpu).cuda()
    nbytes = layer.nbytes
    x = torch.randn(3, 512, device="cuda", dtype=torch.float16)
    layer(x)
    del layer
    gc.collect()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    layer = copy.deepcopy(cpu).cuda()
    layer(x)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - start
    # One form of the weight at a time: g_idx and quant_state's numbers beside it, and the allocator's 512 bytes each.
    assert nbytes <= held <= nbytes + 16 * 512
    for _ in range(20):
        copy.deepcopy(cpu).cuda()(x)
        layer.state_dict()
        getattr(layer, layer.packs[0])
        layer(x)
    gc.collect()
    assert torch.cuda.memory_allocated() - start == held
    del layer
    gc.collect()
    assert torch.cuda.memory_allocated() == start


def test_a_thousand_layers_leave_no_memory_behind():
    weight = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    x = torch.randn(1, 128, device="cuda", dtype=torch.float16)

    def one():
        layer = qlinear.EETQLinear(weight, None)
        layer(x)
        layer.state_dict()

    one()
    gc.collect()
    torch.cuda.synchronize()
    start, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        one()
    gc.collect()
    assert torch.cuda.memory_allocated() == start
    assert torch.cuda.memory_reserved() == reserved


def test_layers_packed_on_one_stream_serve_another(packable):
    cpu = make(packable)
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    expected = copy.deepcopy(cpu).cuda()(x)
    torch.cuda.synchronize()
    for _ in range(10):
        one, other = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(one):
            layer = copy.deepcopy(cpu).cuda()
        with torch.cuda.stream(other):
            out = layer(x)
        other.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(packable):
    layer = make(packable).to("cuda:1")
    saved = state_of(layer)
    x = torch.randn(3, 256, dtype=torch.float16)
    expected = layer(x.to("cuda:1")).cpu()
    assert is_packed(layer)
    with pytest.raises(ValueError, match="cuda:0"):
        layer(x.to("cuda:0"))
    layer.to("cuda:0")
    assert is_packed(layer)
    assert layer.device == torch.device("cuda:0")
    assert torch.equal(layer(x.to("cuda:0")).cpu(), expected)
    assert_same(layer.state_dict(), saved)


def test_base_kernels_when_they_are_forced():
    """The same tests on the kernels that are there for every GPU."""
    if os.environ.get("QLINEAR_KERNELS") == "base":
        pytest.skip("this is that run")
    chosen = "test_product or gradient or dequantize or strided or captured_graph or side_stream"
    forced_kernels.pass_tests("base", __file__, chosen)
