"""What every layer owes a torch user: exact state, casts that spare packed bytes, copies, gradients, tracing."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from layer_cases import (
    CASES,
    FP_DTYPES,
    PACKED_CASES,
    K,
    N,
    array,
    assert_close,
    assert_same_state,
    exact,
    inputs,
    make,
)

import qlinear

pytestmark = pytest.mark.usefixtures("packed_if_the_case_is")
every_case = pytest.mark.parametrize("case", CASES + PACKED_CASES, ids=repr)


def state_of(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


# The product


@every_case
@pytest.mark.parametrize("dtype", FP_DTYPES)
def test_product_against_float64(case, dtype):
    layer = make(case)
    x = inputs(5, K, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert_close(out, *case.reference(layer, x), K)


@every_case
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 2), (2, 0, 3), (2, 1, 3, 2)])
def test_leading_dimensions(case, shape):
    layer = make(case)
    x = inputs(*shape, K)
    out = layer(x)
    assert out.shape == (*shape, N)
    if x.numel() and not (case.name.startswith("int8") and layer.threshold):
        flat = layer(x.reshape(-1, K))
        assert_close(out, *case.reference(layer, x), K)
        assert torch.allclose(out.reshape(-1, N), flat, rtol=1e-5, atol=1e-5)


@every_case
def test_non_contiguous_input(case):
    layer = make(case)
    wide = inputs(2 * K, 6)
    for x in (wide[::2].t(), inputs(4, 2 * K)[:, ::2], inputs(1, K).expand(3, K), inputs(3, 4, K).transpose(0, 1)):
        assert torch.equal(layer(x), layer(x.contiguous()))


@every_case
def test_bias_in_any_dtype_and_never_changed(case):
    for dtype in FP_DTYPES:
        layer = case.make(torch.randn(N, K) / 8, torch.randn(N).to(dtype))
        before = layer.bias.clone()
        for x_dtype in FP_DTYPES:
            x = inputs(2, K, dtype=x_dtype)
            assert_close(layer(x), *case.reference(layer, x), K)
        assert layer.bias.dtype == dtype
        assert exact(layer.bias, before)


@every_case
def test_wrong_input_is_refused(case):
    layer = make(case)
    with pytest.raises(TypeError):
        layer(inputs(2, K).double())
    with pytest.raises(TypeError):
        layer(torch.zeros(2, K, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        layer(np.zeros((2, K), np.float32))
    with pytest.raises(ValueError, match=r"\d"):
        layer(inputs(2, K + 1))
    with pytest.raises(ValueError, match="x"):
        layer(torch.tensor(1.0))


@every_case
def test_wrong_construction_is_refused(case):
    weight = torch.randn(N, K)
    with pytest.raises(ValueError, match="bias"):
        case.make(weight, torch.zeros(N + 1))
    with pytest.raises(TypeError, match="bias"):
        case.make(weight, torch.zeros(N, dtype=torch.int32))
    with pytest.raises(ValueError, match="2-D"):
        case.make(weight[0], None)
    with pytest.raises(TypeError, match="weight"):
        case.make(weight.double(), None)
    with pytest.raises(TypeError, match="weight"):
        case.make(weight.numpy(), None)


@every_case
def test_dequantize_and_description(case):
    layer = make(case, dtype=torch.float16)
    W = case.decode(layer.state_dict(), layer)
    for dtype in FP_DTYPES:
        dense = layer.dequantize(dtype)
        assert dense.dtype == dtype
        assert np.abs(array(dense) - W).max() <= torch.finfo(dtype).eps * np.abs(W).max()
    assert layer.dequantize().dtype == torch.float16
    assert (layer.in_features, layer.out_features) == (K, N)
    assert f"in_features={K}, out_features={N}, bias=True" in repr(layer)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert layer.nbytes >= stored
    with pytest.raises(TypeError):
        layer.dequantize(torch.float64)


# State


@every_case
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_into_a_fresh_layer(case, bias):
    layer = make(case, bias=bias)
    saved = state_of(layer)
    x = inputs(3, K)
    expected = layer(x)

    fresh = case.empty(K, N, bias, "cpu")
    result = fresh.load_state_dict(saved, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(fresh.state_dict(), saved)
    assert torch.equal(fresh(x), expected)
    # A copy: what happens to the file's tensors does not reach the layer.
    assert not {t.data_ptr() for t in saved.values() if t.numel()} & {
        t.data_ptr() for t in fresh.state_dict().values() if t.numel()
    }

    meta = case.empty(K, N, bias, "meta")
    assert all(t.is_meta for name, t in meta.state_dict().items() if "quant_state" not in name)
    meta.load_state_dict(saved, strict=True, assign=True)
    assert_same_state(meta.state_dict(), saved)
    assert torch.equal(meta(x), expected)
    for key, value in meta.state_dict().items():
        assert case.packed or value.data_ptr() == saved[key].data_ptr(), key


@every_case
def test_state_dict_inside_a_model(case):
    model = torch.nn.Sequential(make(case), torch.nn.ReLU(), torch.nn.ModuleDict({"weight": make(case, seed=3)}))
    saved = state_of(model)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    with torch.device("cpu"):
        fresh = torch.nn.Sequential(
            case.empty(K, N, True, "meta"),
            torch.nn.ReLU(),
            torch.nn.ModuleDict({"weight": case.empty(K, N, True, "meta")}),
        )
    fresh.load_state_dict(torch.load(buffer), strict=True, assign=True)
    assert_same_state(fresh.state_dict(), saved)
    assert torch.equal(fresh[0](inputs(2, K)), model[0](inputs(2, K)))


@every_case
def test_missing_unexpected_and_misfit_keys(case):
    layer = make(case)
    saved = state_of(layer)
    for key in saved:
        if key in ("g_idx", "weight_format", "input_scale"):
            continue
        with pytest.raises(RuntimeError, match=r"[Mm]issing|exactly one|go together"):
            case.empty(K, N, True, "cpu").load_state_dict({k: v for k, v in saved.items() if k != key})
    with pytest.raises(RuntimeError, match="Unexpected"):
        case.empty(K, N, True, "cpu").load_state_dict(saved | {"weight.extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        case.empty(K, N, False, "cpu").load_state_dict(saved)
    with pytest.raises(RuntimeError, match="size mismatch"):
        case.empty(K, 2 * N, True, "cpu").load_state_dict(saved)


@every_case
def test_loading_keeps_the_files_dtypes(case):
    layer = make(case, dtype=torch.bfloat16)
    saved = state_of(layer)
    fresh = case.empty(K, N, True, "cpu").float()
    fresh.load_state_dict(saved)
    assert_same_state(fresh.state_dict(), saved)


@every_case
def test_a_loaded_layer_forgets_its_old_weight(case):
    layer, other = make(case), make(case, seed=7)
    x = inputs(2, K)
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


# Casts, moves, copies

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double-and-back": lambda m: m.double().float(),
    "to-dtype": lambda m: m.to(torch.float16),
    "to-device-dtype": lambda m: m.to("cpu", torch.bfloat16),
    "to-tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.float16),
    "cpu": lambda m: m.cpu(),
}


@every_case
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_spare_the_packed_weight(case, cast):
    layer = make(case)
    x = inputs(2, K)
    saved = state_of(layer)
    bias = layer.bias
    kept = bias.clone()
    assert cast(layer) is layer
    now = layer.state_dict()
    for key in saved:
        if key != "bias":
            assert exact(now[key], saved[key]), key
    assert exact(bias, kept)
    assert layer.bias.dtype == cast(torch.nn.Linear(1, 1)).bias.dtype
    assert_close(layer(x), *case.reference(layer, x), K)


@every_case
def test_meta_and_back(case):
    layer = make(case)
    saved = state_of(layer)
    x = inputs(2, 3, K)
    expected = layer(x)
    meta = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    out = meta(x.to("meta"))
    assert out.is_meta
    assert out.shape == (2, 3, N)
    back = meta.to_empty(device="cpu")
    back.load_state_dict(saved)
    assert torch.equal(back(x), expected)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch_saved(m),
}


def torch_saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_case
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(case, duplicate):
    layer = make(case)
    x = inputs(2, K)
    expected = layer(x)
    twin = duplicate(layer)
    assert_same_state(twin.state_dict(), state_of(layer))
    assert torch.equal(twin(x), expected)
    assert twin.engine() is not layer.engine()
    twin.bias.add_(1)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)


@every_case
def test_share_memory(case):
    layer = make(case)
    x = inputs(2, K)
    expected = layer(x)
    layer.share_memory()
    # A GPU's memory is shared as it is: there is nothing to do for a packed tensor.
    assert case.packed or all(t.is_shared() for t in layer.state_dict().values())
    assert torch.equal(layer(x), expected)


@every_case
def test_replaced_and_changed_tensors_are_seen(case):
    layer = make(case)
    x = inputs(2, K)
    before = layer(x)
    layer.bias = layer.bias + 1
    assert torch.allclose(layer(x), before + 1, atol=1e-5)
    layer.bias.sub_(1)
    assert torch.allclose(layer(x), before, atol=1e-5)
    state, tensors = {**dict(layer.named_buffers()), **dict(layer.named_parameters())}, {}
    for name, tensor in state.items():
        tensors[name] = make(case, seed=9).get_buffer(name) if name in layer._buffers else make(case, seed=9).weight
        stands_in = name in layer._parameters and case.packed
        assert name == "packed_state" or stands_in or tensors[name].shape == tensor.shape
    if "packed_state" not in tensors:
        # A packed layer computes with whatever tensors are put in their place, and they are not packed.
        assert torch.allclose(
            torch.func.functional_call(layer, tensors, (x,)), make(case, seed=9)(x), rtol=1e-5, atol=1e-5
        )
        assert torch.allclose(layer(x), before, atol=1e-5)


@every_case
def test_no_cycle_keeps_a_layer_alive(case):
    layer = make(case)
    layer(inputs(1, K))
    gone = [weakref.ref(layer), weakref.ref(layer.engine()), weakref.ref(getattr(layer, layer.fixed[0]))]
    gc.disable()
    try:
        del layer
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()


# Gradients and the ways around the fast lane


@every_case
@pytest.mark.parametrize("dtype", FP_DTYPES)
def test_gradient_of_the_input(case, dtype):
    layer = make(case)
    x = inputs(2, 3, K, dtype=dtype).requires_grad_()
    out = layer(x)
    assert out.requires_grad
    assert torch.allclose(out.detach(), layer(x.detach()), rtol=1e-6, atol=1e-6)
    grad = inputs(2, 3, N, dtype=dtype, seed=5)
    out.backward(grad)
    W = case.decode(layer.state_dict(), layer)
    g = array(grad).astype(np.float64)
    assert x.grad.dtype == dtype
    assert_close(x.grad, g @ W, np.abs(g) @ np.abs(W), N)
    assert layer.bias.grad is None
    assert not layer.bias.requires_grad


@every_case
def test_gradient_of_a_broadcast_and_under_no_grad(case):
    layer = make(case)
    x = inputs(4, K).requires_grad_()
    layer(x).sum().backward()
    W = case.decode(layer.state_dict(), layer)
    assert_close(x.grad, np.tile(W.sum(0), (4, 1)), np.tile(np.abs(W).sum(0), (4, 1)), N)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert not layer(x.detach()).requires_grad
    empty = torch.zeros(0, K, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, K)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    layer = make(case)
    x = inputs(3, K)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
        assert out.dtype == torch.nn.functional.linear(x, torch.ones(1, K)).dtype
        x.requires_grad_()
        layer(x).sum().backward()
    assert torch.equal(out, layer(x.detach().to(dtype)))
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert layer(x.detach()).dtype == torch.float32


@every_case
def test_vmap(case):
    layer = make(case)
    if case.name.startswith("int8") and layer.threshold:
        pytest.skip("outlier columns depend on the whole batch")
    x = inputs(4, 3, K)
    assert torch.allclose(torch.vmap(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@every_case
def test_threads_at_once(case):
    layer = make(case)
    xs = [inputs(m, K, seed=m) for m in range(1, 9)]
    expected = [layer(x) for x in xs]
    layer._forget()
    failures = []

    def work(x, want):
        for _ in range(50):
            if not torch.equal(layer(x), want):
                failures.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_extension_is_imported_without_torch():
    code = "import sys; from qlinear import _qlinear; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_import_is_lazy_and_complete():
    for name in qlinear.__all__:
        assert getattr(qlinear, name) is not None
        assert name in dir(qlinear)
    with pytest.raises(AttributeError):
        qlinear.nothing  # noqa: B018
    assert isinstance(qlinear.__version__, str)
