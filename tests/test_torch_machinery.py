"""Every layer class within torch's own machinery: compilation, export, checkpointing, hooks, functional calls."""

import copy

import pytest
import torch
from layer_cases import CASES, PACKED_CASES, K, N, assert_close, exact, inputs, make
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import qlinear
from qlinear import ops

pytestmark = pytest.mark.usefixtures("one_thread", "packed_if_the_case_is")
every_case = pytest.mark.parametrize("case", CASES + PACKED_CASES, ids=repr)
ROWS = (3, 5, 2, 16)
# The last case of each class.
ONE_EACH = tuple({case.decode: case for case in CASES}.values())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def learning_layer(dtype=torch.float32, threshold=0.0):
    torch.manual_seed(3)
    return qlinear.Linear8bitLt((torch.randn(N, K) / 8).to(dtype), torch.randn(N).to(dtype), threshold=threshold)


class Block(torch.nn.Module):
    """A layer within what a model has around it."""

    def __init__(self, layer):
        super().__init__()
        self.norm = torch.nn.LayerNorm(K)
        self.layer = layer

    def forward(self, x):
        return torch.nn.functional.gelu(self.layer(self.norm(x)))


# ---- compilation ----


@pytest.mark.parametrize(
    ("case", "dynamic", "grad"),
    [
        *((case, True, True) for case in CASES + PACKED_CASES),
        *((case, dynamic, False) for dynamic in (False, None) for case in ONE_EACH),
    ],
    ids=str,
)
def test_compiled_whole_and_for_every_number_of_rows(case, dynamic, grad, dynamo):
    layer = make(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    graphs = []
    for rows in (3, 3) if dynamic is False else ROWS:
        x, twin = (inputs(rows, K).requires_grad_(grad) for _ in range(2))
        out, expected = compiled(x), layer(twin)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
        if grad:
            out.sum().backward()
            expected.sum().backward()
            assert torch.allclose(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
        graphs.append(dynamo["unique_graphs"])
    # "automatic" makes the second number of rows a symbol, and no third graph.
    assert graphs == [1, 1] if dynamic is False else graphs == [1] * 4 if dynamic else graphs == [1, 2, 2, 2]


@pytest.mark.slow
@every_case
def test_compiled_by_inductor(case, dynamo):
    block = Block(make(case))
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for rows in ROWS:
        x, twin = (inputs(rows, K).requires_grad_() for _ in range(2))
        out, expected = compiled(x), block(twin)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
        out.sum().backward()
        expected.sum().backward()
        assert torch.allclose(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    assert dynamo["unique_graphs"] == 1


@every_case
def test_compiled_under_autocast(case, dynamo):
    layer, x = make(case), inputs(3, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(x)
        assert torch.equal(out, layer(x))
    assert out.dtype == torch.bfloat16


def test_compute_dtype_compiles(dynamo):
    layer = qlinear.Linear4bit(torch.randn(N, K) / 8, None, "nf4", compute_dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in ROWS:
        out = compiled(inputs(rows, K))
        assert out.dtype == torch.float32
        assert torch.equal(out, layer(inputs(rows, K)))
    assert dynamo["unique_graphs"] == 1


def test_matmul248_compiles_with_its_gradient(dynamo):
    weight = torch.randn(N, K) / 8
    layer = qlinear.QuantLinear.quantize(weight, None, bits=4, group_size=32)
    arguments = (layer.qweight, layer.scales, layer.qzeros, layer.g_idx, 4, 15)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(x):
        return qlinear.QuantLinearFunction.apply(x, *arguments)

    x, twin = (inputs(3, K).requires_grad_() for _ in range(2))
    out, expected = product(x), layer(twin)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, twin.grad)


@every_case
def test_the_c_layer_is_made_once(case, monkeypatch, dynamo):
    """Making one checks the tensors, which reads from a GPU: training, compiled code and train() must not repeat it."""
    layer = make(case).to(torch.float16)
    layer.load_state_dict(make(case, seed=5).state_dict())
    made = []

    def counted(name, real):
        def make_one(*arguments):
            made.append(name)
            return real.make(*arguments)

        return real._replace(make=make_one)

    for name, real in list(ops.FORMATS.items()):
        monkeypatch.setitem(ops.FORMATS, name, counted(name, real))
    for _ in range(2):
        layer(inputs(3, K).requires_grad_()).sum().backward()
        layer.train(not layer.training)
    layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        layer(inputs(3, K).requires_grad_()).sum().backward()
    layer.forward(inputs(3, K))
    assert made == []


# ---- operators ----


@every_case
def test_operators_of_inputs_in_any_layout(case):
    name, arguments = make(case)._operands()
    # torch's schema test cannot add up float8 tensors.
    tests = ("test_faketensor",) if case.name.startswith("fp8") else ("test_schema", "test_faketensor")
    for op, width in zip(ops._OPERATORS[name], (K, N), strict=True):
        compact = inputs(3, 5, width)
        for x in (
            compact,
            inputs(width, 3).t(),
            inputs(5, 3, width).transpose(0, 1),
            inputs(2, 4, 2 * width)[..., ::2],
            inputs(6, width + 8)[::2, 8:],
            inputs(1, width).expand(4, width),
            compact[:0],
            inputs(width),
        ):
            torch.library.opcheck(op, (x, *arguments), test_utils=tests)


@every_case
def test_every_check_of_the_operators(case):
    name, arguments = make(case)._operands()
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, width in zip(ops._OPERATORS[name], (K, N), strict=True):
        torch.library.opcheck(op, (inputs(3, width), *arguments), test_utils=tests)


@pytest.mark.parametrize("layout", [lambda w: w, lambda w: w.t().contiguous().t(), lambda w: w.repeat(2, 2)[::2, ::2]])
def test_opcheck_of_the_quantizer_of_learning_weights(layout):
    weight = layout(torch.randn(N, K).half())
    torch.library.opcheck(ops.quantize_int8_weight, (weight,))


# ---- derivatives ----


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_and_third_derivatives_are_those_of_the_dequantized_weight(case, dtype):
    """A gradient penalty; whatever quantizes activations, the gradient and its own are those of the weight."""
    layer, x = make(case), inputs(3, K, dtype=dtype).requires_grad_()
    W = layer.dequantize(torch.float32).double()
    out = layer(x)
    weights = torch.randn(3, N, generator=torch.Generator().manual_seed(2)).to(dtype)
    (first,) = torch.autograd.grad((out**3 * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    y, weights, ones = out.detach().double(), weights.double(), torch.ones(3, K, dtype=torch.float64)
    bound = 2e-4 if dtype == torch.float32 else 5e-2
    for seen, factor in ((second, 6 * y * (ones @ W.T)), (third, 6 * (ones @ W.T) ** 2)):
        exact = (weights * factor) @ W
        assert (seen.double() - exact).abs().max() <= bound * ((weights * factor).abs() @ W.abs()).max()
        assert exact.abs().max() > 0


def test_second_derivatives_of_weights_that_learn_and_of_matmul248():
    learning = qlinear.Linear8bitLt(torch.randn(N, K), None)
    gptq = qlinear.QuantLinear.quantize(torch.randn(N, K), None, group_size=32)
    operands = (gptq.qweight, gptq.scales, gptq.qzeros, gptq.g_idx, 4, 15)
    for product, W, tolerance in (
        (learning, learning.weight.detach(), 0.02),
        (lambda x: qlinear.QuantLinearFunction.apply(x, *operands), gptq.dequantize(), 1e-4),
    ):
        x = inputs(3, K).requires_grad_()
        (first,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        exact = 2 * torch.ones(3, K) @ W.T @ W
        assert (second - exact).abs().max() <= tolerance * exact.abs().max()


# ---- export ----


@every_case
def test_exported_with_any_number_of_rows(case):
    layer = make(case)
    rows = torch.export.Dim("rows", min=2, max=512)
    operator = ops._OPERATORS[layer._operands()[0]][0]
    block = Block(layer)
    exported = torch.export.export(block, (inputs(3, K),), dynamic_shapes=({0: rows},))
    assert operator in {node.target for node in exported.graph.nodes if node.op == "call_function"}
    for m in ROWS:
        assert torch.allclose(exported.module()(inputs(m, K)), block(inputs(m, K)), rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("bias", [False, True])
def test_exported_by_itself(case, bias):
    layer, x = make(case, bias), inputs(3, K)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x), rtol=1e-5, atol=1e-5)


# ---- functional calls, fake and meta ----


@every_case
def test_functional_call_through_a_model(case):
    if case.packed:
        pytest.skip("test_layers_module has it for the tensors of packed layers")
    first, second = Block(make(case)), Block(make(case, seed=9))
    x = inputs(3, K)
    tensors = {**dict(second.named_parameters()), **dict(second.named_buffers())}
    before = first(x)
    if any(t.dtype == torch.uint8 and "packed_state" in name for name, t in tensors.items()):
        # nested_offset stands among the numbers of the layer, not among its tensors.
        tensors = {name: t for name, t in tensors.items() if not name.startswith("layer.")}
        assert torch.equal(torch.func.functional_call(first, tensors, (x,)), before)
    else:
        assert torch.equal(torch.func.functional_call(first, tensors, (x,)), second(x))
    assert torch.equal(first(x), before)


@every_case
def test_gradient_by_a_transform(case):
    layer = make(case)
    x = inputs(3, K)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    y = x.clone().requires_grad_()
    layer(y).square().sum().backward()
    assert torch.allclose(gradient, y.grad, rtol=1e-6, atol=1e-6)


@every_case
def test_fake_and_meta_have_the_shape_and_dtype_of_the_product(case):
    layer = make(case)
    for x in (inputs(2, 5, K, dtype=torch.bfloat16), inputs(K, 3).t(), inputs(0, K)):
        real = layer(x)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer(mode.from_tensor(x))
        meta = copy.deepcopy(layer).to("meta")(x.to("meta"))
        for out in (fake, meta):
            assert (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())
        assert isinstance(fake, torch._subclasses.FakeTensor)
        assert meta.is_meta


# ---- checkpointing and hooks ----


@every_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(case, reentrant):
    blocks = [Block(make(case, N=K, seed=seed)) for seed in range(3)]
    x, twin = (inputs(4, K).requires_grad_() for _ in range(2))
    out, expected = x, twin
    for block in blocks:
        out, expected = checkpoint(block, out, use_reentrant=reentrant), block(expected)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    grads = [p.grad for block in blocks for p in block.parameters()]
    for block in blocks:
        block.zero_grad()
    expected.square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    for kept, p in zip(grads, (p for block in blocks for p in block.parameters()), strict=True):
        assert (kept is None) == (p.grad is None)
        assert kept is None or torch.equal(kept, p.grad)


@every_case
def test_hooks_see_every_class(case):
    layer, x = make(case), inputs(3, K).requires_grad_()
    expected = layer(x).detach()
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(("pre", args[0].shape))),
        layer.register_forward_hook(lambda m, args, out: seen.append(("out", out.shape))),
        layer.register_full_backward_pre_hook(lambda m, grads: seen.append(("grad out", grads[0].shape))),
        layer.register_full_backward_hook(lambda m, gin, gout: seen.append(("grad in", gin[0].shape))),
    ]
    out = layer(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert seen == [("pre", (3, K)), ("out", (3, N)), ("grad out", (3, N)), ("grad in", (3, K))]
    for handle in handles:
        handle.remove()
    layer(x)
    assert len(seen) == 4


# ---- gradients of what CASES has not ----


def act_order(bits):
    weight, generator = torch.randn(N, K) / 8, torch.Generator().manual_seed(2)
    layer = qlinear.QuantLinear.quantize(weight, None, bits=bits, group_size=32)
    layer.g_idx = layer.g_idx[torch.randperm(K, generator=generator)]
    return layer


def awq_products():
    """AWQ's GEMVFast storage, whose zeros are products with the scales."""
    layer = qlinear.AWQLinear.quantize(torch.randn(N, K) / 8, None, group_size=32)
    products = torch.randn(layer.scales.shape) / 8
    return qlinear.AWQLinear(4, 32, layer.qweight, products.to(layer.scales.dtype), layer.scales, None)


def fp8(shape, activation):
    weight = (torch.randn(N, K) * 100).to(torch.float8_e4m3fn)
    return qlinear.Fp8Linear(weight, None, torch.rand(shape) / 1000 + 1e-3, None, activation=activation)


def bf16_scales():
    state = qlinear.QuantLinear.quantize(torch.randn(N, K) / 8, None, bits=4, group_size=32).state_dict()
    return qlinear.QuantLinear.from_tensors(state | {"scales": state["scales"].bfloat16()})


SPECIAL = {
    "act-order-2": lambda: act_order(2),
    "act-order-3": lambda: act_order(3),
    "act-order-4": lambda: act_order(4),
    "act-order-8": lambda: act_order(8),
    "awq-products": awq_products,
    "int8-outliers": lambda: qlinear.Linear8bitLt(torch.randn(N, K) / 8, None, has_fp16_weights=False, threshold=1.0),
    "fp8-tensor": lambda: fp8((1,), "tensor"),
    "fp8-blocks": lambda: fp8((1, 1), "group"),
    "fp8-channels": lambda: fp8((N, 1), "token"),
    "odd-nf4": lambda: qlinear.Linear4bit(torch.randn(N, K - 1) / 8, None, "nf4"),
    "bf16-scales": bf16_scales,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", SPECIAL)
def test_gradient_of_the_input(form, dtype):
    torch.manual_seed(4)
    layer = SPECIAL[form]()
    x = (torch.randn(3, 2, layer.in_features) * 2).to(dtype).requires_grad_()
    out = layer(x)
    grad = torch.randn(3, 2, N).to(dtype)
    out.backward(grad)
    W = layer.dequantize(torch.float32).double()
    reference, magnitude = grad.double() @ W, grad.double().abs() @ W.abs()
    assert x.grad.dtype == dtype
    assert_close(x.grad, reference.numpy(), magnitude.numpy(), N)
    assert W.abs().max() > 0


# ---- a weight that learns ----


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_a_learning_weight_compiles_whole(threshold, dynamo):
    layer = learning_layer(threshold=threshold)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in ROWS:
        x, y = (inputs(rows, K).requires_grad_() for _ in range(2))
        for module, given in ((compiled, x), (twin, y)):
            twin.zero_grad(), layer.zero_grad()
            module(given).square().sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert dynamo["unique_graphs"] == 1


@every_case
def test_no_dense_copy_of_the_weight_is_kept_for_the_gradient(case):
    layer, x, saved = make(case), inputs(3, K).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    held = {t.data_ptr() for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None}
    assert sum(t.numel() for t in saved if t.data_ptr() not in held) <= x.numel()
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K)])
def test_gradients_of_a_learning_weight(dtype, shape):
    layer = learning_layer(dtype)
    x = inputs(*shape, dtype=dtype).requires_grad_()
    out = layer(x)
    grad = inputs(*shape[:-1], N, dtype=dtype, seed=5)
    out.backward(grad)
    assert layer.has_fp16_weights
    rows, seen = grad.reshape(-1, N).double(), x.detach().reshape(-1, K).double()
    assert layer.weight.grad.dtype == dtype
    assert_close(layer.weight.grad, (rows.t() @ seen).numpy(), (rows.abs().t() @ seen.abs()).numpy(), max(len(rows), 1))
    quantized = qlinear.Linear8bitLt(layer.weight.detach(), None, has_fp16_weights=False)
    assert torch.equal(x.grad, quantized.engine().grad_input(grad))


def test_a_learning_weight_learns():
    torch.manual_seed(0)
    target, layer = torch.randn(N, K) / K**0.5, learning_layer()
    x = torch.randn(256, K)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - x @ target.t() - layer.bias).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_a_learning_weight_under_autocast_and_checkpointing():
    layer, x = learning_layer(), inputs(3, K).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(layer, x, use_reentrant=False)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    before = layer.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    assert exact(layer.weight.grad, before)


def test_a_learning_weight_under_transforms():
    layer, x = learning_layer(), inputs(3, K)

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    weights = dict(layer.named_parameters())
    gradient = torch.func.grad(loss)(weights, x)["weight"]
    layer(x).square().sum().backward()
    assert torch.allclose(gradient, layer.weight.grad, rtol=1e-5, atol=1e-5)
    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    assert torch.allclose(each.sum(0), gradient, rtol=1e-4, atol=1e-4)
    assert torch.allclose(torch.vmap(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_a_learning_weight_is_exported(strict):
    layer, x = learning_layer(), inputs(3, K)
    rows = {0: torch.export.Dim("rows", min=2)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(rows,), strict=strict).module()
    for rows in ROWS:
        assert torch.allclose(exported(inputs(rows, K)), layer(inputs(rows, K)), rtol=1e-5, atol=1e-5)
