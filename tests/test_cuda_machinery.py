"""torch's machinery over every class on a GPU: compilation, CUDA graphs of training, checkpointing, FSDP2."""

import copy
import gc
import importlib.util

import fsdp_worker
import pytest
import torch
from layer_cases import CASES, exact, inputs
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import qlinear
from qlinear import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="inductor needs triton on a GPU")

K = 256
ROWS = (3, 17, 2, 40)


@pytest.fixture(autouse=True)
def _no_collection():
    """A graph that the collector destroys while another is captured makes that one invalid."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=CASES, ids=repr)
def case(request):
    return request.param


def make(case, N=192, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(N, K, generator=generator) / K**0.5).half()
    return case.make(weight, torch.randn(N, generator=generator).half() if bias else None).cuda()


def batch(*shape, seed=1):
    return inputs(*shape, dtype=torch.float16, seed=seed).cuda()


class Block(torch.nn.Module):
    """A layer with one that learns before it, so that its gradient is asked for."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(K, K, dtype=torch.float16, device="cuda")
        self.layer = layer

    def forward(self, x):
        return torch.nn.functional.silu(self.layer(self.mix(x)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_triton)])
def test_compiled_for_every_number_of_rows(case, backend):
    torch._dynamo.reset()
    counters.clear()
    block = Block(make(case))
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for rows in ROWS:
        x, twin = (batch(rows, K).requires_grad_() for _ in range(2))
        out, expected = compiled(x), block(twin)
        assert torch.allclose(out, expected, rtol=1e-2, atol=1e-2)
        out.sum().backward()
        expected.sum().backward()
        assert torch.allclose(x.grad, twin.grad, rtol=2e-2, atol=2e-2)
    assert counters["stats"]["unique_graphs"] == 1


@needs_triton
def test_compiled_into_cuda_graphs(case):
    torch._dynamo.reset()
    counters.clear()
    layer = make(case)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(6):
            x = batch(4, K, seed=seed)
            assert torch.equal(compiled(x), layer(x))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_captured_forward_and_backward(case):
    block = Block(make(case))
    twin = copy.deepcopy(block)
    graphed = torch.cuda.make_graphed_callables(block, (batch(5, K).requires_grad_(),))
    for seed in range(3):
        x, y = (batch(5, K, seed=seed).requires_grad_() for _ in range(2))
        out, expected = graphed(x), twin(y)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, y.grad)
        assert torch.equal(block.mix.weight.grad, twin.mix.weight.grad)
        block.zero_grad()
        twin.zero_grad()


def test_a_captured_step_of_training(case):
    block = Block(make(case))
    twin = copy.deepcopy(block)
    x, y = batch(8, K), batch(8, 192, seed=2)
    parameters = list(block.mix.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)

    def step(model, given):
        given.zero_grad(set_to_none=False)
        loss = (model(x).float() - y.float()).square().mean()
        loss.backward()
        given.step()
        return loss

    plain = torch.optim.SGD(twin.mix.parameters(), lr=1e-2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(block, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        step(twin, plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(block, optimizer)
    for _ in range(5):
        graph.replay()
        assert torch.equal(loss, step(twin, plain))
    assert torch.equal(block.mix.weight, twin.mix.weight)


def test_a_learning_weight_in_a_captured_step():
    torch.manual_seed(0)
    layer = qlinear.Linear8bitLt(torch.randn(192, K) / 16, None).cuda()
    twin = copy.deepcopy(layer)
    x = torch.randn(8, K, device="cuda")
    graphed = torch.cuda.make_graphed_callables(layer, (x.clone(),))
    for module in (graphed, twin):
        module(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_operators_of_inputs_in_any_layout(case):
    layer = make(case)
    name, arguments = layer._operands()
    tests = ("test_faketensor",) if case.name.startswith("fp8") else ("test_schema", "test_faketensor")
    for op, width in zip(ops._OPERATORS[name], (K, 192), strict=True):
        for x in (batch(3, 5, width), batch(width, 3).t(), batch(2, 4, 2 * width)[..., ::2], batch(0, width)):
            torch.library.opcheck(op, (x, *arguments), test_utils=tests)


def test_exported_with_any_number_of_rows(case):
    block = Block(make(case))
    rows = torch.export.Dim("rows", min=2, max=512)
    with torch.no_grad():
        exported = torch.export.export(block, (batch(3, K),), dynamic_shapes=({0: rows},))
        for m in ROWS:
            assert torch.equal(exported.module()(batch(m, K)), block(batch(m, K)))


def test_called_with_other_tensors(case):
    layer, x = make(case), batch(3, K)
    before = layer(x)
    out = torch.func.functional_call(layer, {"bias": torch.zeros_like(layer.bias)}, (x,))
    bias = layer.bias.clone()
    layer.bias = torch.zeros_like(bias)
    assert torch.equal(layer(x), out)
    assert not torch.equal(before, out)
    layer.bias = bias
    assert torch.equal(layer(x), before)
    with pytest.raises(ValueError, match="bias must have shape"):
        torch.func.functional_call(layer, {"bias": bias[:-1]}, (x,))


def test_a_gradient_by_a_transform_and_many_by_vmap(case):
    layer = make(case)
    x, y = batch(3, K), batch(3, K).requires_grad_()
    gradient = torch.func.grad(lambda x: layer(x).float().square().sum())(x)
    layer(y).float().square().sum().backward()
    assert torch.equal(gradient, y.grad)
    xs = batch(4, 3, K)
    assert torch.equal(torch.vmap(layer)(xs), torch.stack([layer(x) for x in xs]))


def test_hooks_see_every_class(case):
    layer, x = make(case), batch(3, K).requires_grad_()
    expected, seen = layer(x).detach(), []
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    layer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    layer.register_full_backward_hook(lambda m, gin, gout: seen.append((gin[0].shape, gout[0].shape)))
    out = layer(x)
    out.sum().backward()
    assert torch.equal(out, expected)
    assert seen == [(3, K), (3, 192), ((3, K), (3, 192))]


def test_checkpointing_under_autocast(case):
    block = Block(make(case)).float()
    grads = []
    for use in (True, False):
        x = batch(6, K).float().requires_grad_()
        block.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = checkpoint(block, x, use_reentrant=False) if use else block(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append((x.grad, block.mix.weight.grad.clone()))
    assert all(map(torch.equal, *grads))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_fsdp_of_nf4_layers(tmp_path, storage):
    """On one GPU, where the packed form of a weight would be in the way of sharding it."""
    if storage == torch.uint8 and not fsdp_worker.SHARDS_INTEGERS:
        pytest.skip("this torch shards floats only")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, y = (part.cuda() for part in fsdp_worker.batch())
    expected = fsdp_worker.train(fsdp_worker.model(storage, True).cuda(), x, y)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        model = fsdp_worker.model(storage, True)
        packed = [block.base.weight.detach().clone() for block in model]
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert fsdp_worker.train(model, x, y) == pytest.approx(expected, rel=1e-4)
        weights = [block.base._parameters["weight"].full_tensor().cpu() for block in model]
        assert all(map(exact, weights, packed))
    finally:
        torch.distributed.destroy_process_group()
