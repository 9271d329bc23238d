"""Python code that runs in the middle of a construction or a call, and objects that are not what they look like."""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch
from dlpack_producers import Producer

import qlinear
from qlinear import _qlinear

ROOT = Path(__file__).parent.parent


class Acting(Producer):
    """Does something of its own when it is read."""

    def __init__(self, inner, act):
        super().__init__(inner)
        self.act = act

    def __dlpack__(self, **arguments):
        self.act()
        return super().__dlpack__(**arguments)


def replaced(tensor, data):
    """A function that gives the tensor other storage, and lets go of what it had."""

    def act():
        tensor.data = data

    return act


def eetq(value):
    return _qlinear.eetq_pack(torch.full((64, 2), value, dtype=torch.int8))


def test_a_layer_shows_itself_when_it_is_ready():
    gc.collect()

    def look():
        assert not any(issubclass(type(thing), _qlinear.EETQLinear) for thing in gc.get_objects())

    layer = _qlinear.EETQLinear(np.zeros((64, 2), np.int8), Acting(np.ones(2, np.float16), look))
    assert any(thing is layer for thing in gc.get_objects())


def test_a_layer_keeps_its_type():
    layer = _qlinear.EETQLinear(eetq(1), torch.ones(2))
    for other in (_qlinear.PackedLinear, _qlinear.QuantLinear, _qlinear.Linear8bitLt):
        with pytest.raises(TypeError):
            layer.__class__ = other
    for type_ in (_qlinear.Layer, _qlinear.EETQLinear, _qlinear.DLPackArray):
        with pytest.raises(TypeError):
            type_.dequantize = None
    assert type(layer) is _qlinear.EETQLinear


def test_storage_replaced_while_a_layer_is_made():
    """g_idx is read when the layer is made: after the last argument, whose reading freed what g_idx was."""
    k = 1 << 20
    g_idx = torch.zeros(k, dtype=torch.int32)
    bias = Acting(np.zeros(8, np.float32), replaced(g_idx, torch.zeros(1, dtype=torch.int32)))
    words = torch.zeros(k // 8, 8, dtype=torch.int32), torch.zeros(k // 32, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"qweight must have 1 rows for in_features=1|g_idx must have shape"):
        _qlinear.QuantLinear(*words, torch.ones(k // 32, 8), g_idx, bias, bits=4, group_size=32)


def test_storage_replaced_while_a_gradient_is_read():
    weight = eetq(1)
    layer = _qlinear.EETQLinear(weight, torch.ones(2))
    gradient = Acting(np.ones((1, 2), np.float32), replaced(weight, eetq(3)))
    assert (np.from_dlpack(layer.grad_input(gradient)) == 6).all()
    assert (np.from_dlpack(layer(Acting(np.ones((1, 64), np.float32), replaced(weight, eetq(2))))) == 128).all()


def vector(values):
    return np.asarray(values, np.float32)


def functions_of_several_tensors():
    """Name: the call with its first tensor and, last, what is put around its last one."""
    code = vector(_qlinear.dynamic_map())
    byte = np.zeros((64, 64), np.uint8)
    one = vector([1])
    yield (
        "quantize_blockwise",
        torch.ones(4096),
        lambda x, around: _qlinear.quantize_blockwise(x, around(code), blocksize=4096),
    )
    yield (
        "dequantize_blockwise",
        torch.zeros(4096, dtype=torch.uint8),
        lambda x, around: _qlinear.dequantize_blockwise(x, one, around(code), blocksize=4096, dtype="float32"),
    )
    yield (
        "dequantize_4bit",
        torch.zeros(2048, dtype=torch.uint8),
        lambda x, around: _qlinear.dequantize_4bit(
            x, one, around(code[:16]), count=4096, blocksize=4096, dtype="float32"
        ),
    )
    yield (
        "fp8_quantize static",
        torch.ones(64, 64),
        lambda x, around: _qlinear.fp8_quantize(x, around(one), mode="static"),
    )
    yield (
        "fp8_quantize token",
        torch.ones(64, 64),
        lambda x, around: _qlinear.fp8_quantize(x, mode="token", scale_ub=around(one)),
    )
    yield (
        "fp8_matmul",
        torch.zeros(64, 64, dtype=torch.uint8),
        lambda x, around: _qlinear.fp8_matmul(x, byte, one, around(one), dtype="float32"),
    )
    yield (
        "gptq_pack",
        torch.ones(64, 64),
        lambda x, around: _qlinear.gptq_pack(
            x, np.ones((64, 1), np.float32), around(np.ones((64, 1), np.float32)), bits=4, group_size=64
        ),
    )
    yield (
        "gptq_pack g_idx",
        torch.ones(64, 64),
        lambda x, around: _qlinear.gptq_pack(
            x,
            np.ones((64, 2), np.float32),
            np.ones((64, 2), np.float32),
            around(np.arange(64, dtype=np.int32) % 2),
            bits=4,
            group_size=32,
        ),
    )
    yield (
        "awq_from_marlin",
        torch.zeros(4, 128, dtype=torch.int32),
        lambda x, around: _qlinear.awq_from_marlin(x, around(np.ones((1, 64), np.float16)), group_size=64),
    )


@pytest.mark.parametrize(
    ("first", "call"), [pytest.param(first, call, id=name) for name, first, call in functions_of_several_tensors()]
)
def test_storage_replaced_while_a_later_tensor_is_read(first, call):
    """The call sees the first tensor as it is when the last one was read: here of a dtype that it refuses."""
    call(first.clone(), Producer)
    x = first.clone()
    with pytest.raises(TypeError, match=r"must be .*, got bool"):
        call(x, lambda inner: Acting(inner, replaced(x, torch.zeros(first.shape, dtype=torch.bool))))


# ---- objects that are not what they look like ----


def test_lazily_negated_tensors():
    """Their memory holds the opposite of their values: C refuses them, modules compute with the values."""
    layer = _qlinear.EETQLinear(eetq(1), torch.ones(2))
    x = torch.complex(torch.zeros(1, 64), torch.ones(1, 64)).conj().imag
    assert x.is_neg()
    assert x[0, 0] == -1
    for call in (layer, _qlinear.eetq_quantize):
        with pytest.raises(ValueError, match="negated lazily"):
            call(x)
    assert torch.equal(layer(x.resolve_neg()), torch.full((1, 2), -64.0))
    with pytest.raises(ValueError, match="bias is negated lazily"):
        _qlinear.EETQLinear(eetq(1), torch.ones(2), x[0, :2])
    bias = torch.zeros(2)
    layer = _qlinear.EETQLinear(eetq(1), torch.ones(2), bias)
    bias.data = x[0, :2]
    with pytest.raises(ValueError, match="bias is negated lazily"):
        layer(torch.ones(64))
    module = qlinear.EETQLinear.from_tensors({"weight": eetq(1), "weight_scales": torch.ones(2)})
    with torch.no_grad():
        assert torch.equal(module(x), module(x.resolve_neg()))


def test_numpy_has_two_types_of_64_bits():
    g_idx = np.arange(64) % 2
    parameters = np.ones((8, 64), np.float32), np.ones((8, 2), np.float32), np.ones((8, 2), np.float32)
    wanted = _qlinear.gptq_pack(*parameters, g_idx.astype("l"), bits=4, group_size=32)
    packed = _qlinear.gptq_pack(*parameters, g_idx.astype("q"), bits=4, group_size=32)
    assert all(np.array_equal(*pair) for pair in zip(wanted, packed, strict=True))


def test_sizes_at_the_end_of_their_type():
    for arguments in ((True, 7, -(2**63)), (True, -(2**63), 2**63 - 1), (False, 2**63 - 1, -(2**63))):
        with pytest.raises(ValueError, match=r"total_bits must be in \[2, 8\]"):
            _qlinear.dynamic_map(*arguments)


def test_subinterpreters_are_refused():
    """In a process of its own: what a subinterpreter leaves behind breaks torch's autograd."""
    pytest.importorskip("_testcapi")
    code = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("_qlinear", {_qlinear.__file__!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_qlinear", loader))
try:
    loader.exec_module(module)
except ImportError as error:
    assert "main interpreter" in str(error)
else:
    raise AssertionError("it was imported")
"""
    script = f"import _testcapi, sys; sys.exit(_testcapi.run_in_subinterp({code!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_blocks_have_sizes_that_32_bits_hold():
    code, one = vector(_qlinear.fourbit_code("nf4")), np.ones(1, np.float32)
    packed = np.full(64, 0xF7, np.uint8)
    largest = _qlinear.Linear4bit(packed, one, code, shape=(2, 64), blocksize=2**30)
    usual = _qlinear.Linear4bit(packed, np.ones(2, np.float32), code, shape=(2, 64), blocksize=64)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    assert np.array_equal(largest(x), usual(x))
    for size in (2**31, 2**40, 2**62):
        with pytest.raises(ValueError, match=r"blocksize must be a power of two, at least 32 and at most 2\^30"):
            _qlinear.Linear4bit(packed, one, code, shape=(2, 64), blocksize=size)
        with pytest.raises(ValueError, match="blocksize must be a power of two"):
            _qlinear.quantize_4bit(x, quant_type="nf4", blocksize=size)


ORDER = """
#include "src/formats/packed.h"

int main(void) {
    const ql_weight weight = {.format = QL_FORMAT_GPTQ, .n = 8, .k = 64,
                              .gptq = {.bits = 4, .group_size = 32, .groups = 2, .scales_dtype = QL_F16}};
    int32_t g_idx[64];
    ql_packed_spec spec;
    char reason[QL_PACKED_REASON];
    for (int i = 0; i < 64; i++) g_idx[i] = i % 2;
    if (ql_packed_describe(&spec, &weight, g_idx, reason) != 0) return 1;
    const int32_t wrong[] = {2, -1, 1 << 20, INT32_MIN, INT32_MAX};
    for (int i = 0; i < 5; i++) {
        g_idx[9] = wrong[i];
        if (ql_packed_describe(&spec, &weight, g_idx, reason) == 0) return 2;
    }
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("gcc") or not (ROOT / "src").exists(), reason="needs gcc and the source tree")
def test_a_g_idx_that_changed_after_it_was_checked(tmp_path):
    """On a GPU it stays the caller's tensor, and pack() reads it anew."""
    source, program = tmp_path / "order.c", tmp_path / "order"
    source.write_text(ORDER)
    flags = ["-std=c11", f"-I{ROOT}", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run(["gcc", *flags, source, ROOT / "src/formats/packed.c", "-o", program, "-lm"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- sizes that nothing stands behind ----

HUGE = 2**58


def empty_tensors():
    """Name: a function of tensors that are empty and claim a huge size; its outputs are empty or few elements."""

    def none(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)

    def words(*shape):
        return none(*shape, dtype=torch.int32)

    def bytes_(*shape):
        return none(*shape, dtype=torch.uint8)

    few = 64 * 2**40
    yield "gptq_pack_codes", lambda: _qlinear.gptq_pack_codes(bytes_(HUGE, 0), bits=4)
    yield "gptq_unpack_codes", lambda: _qlinear.gptq_unpack_codes(words(HUGE // 8, 0), bits=4, count=HUGE)
    yield "gptq_unplanar", lambda: _qlinear.gptq_unplanar(words(HUGE, 0), bits=4)
    yield "gptq_find_params", lambda: _qlinear.gptq_find_params(none(HUGE, 0), bits=4, group_size=32)
    yield (
        "gptq_pack rows",
        lambda: _qlinear.gptq_pack(none(HUGE, 0), none(HUGE, 0), none(HUGE, 0), bits=4, group_size=32),
    )
    yield (
        "gptq_pack columns",
        lambda: _qlinear.gptq_pack(none(0, HUGE), none(0, HUGE // 32), none(0, HUGE // 32), bits=4, group_size=32),
    )
    yield (
        "QuantLinear",
        lambda: _qlinear.QuantLinear(
            words(HUGE // 8, 0), words(HUGE // 32, 0), none(HUGE // 32, 0), bits=4, group_size=32
        ).dequantize(),
    )
    yield (
        "QuantLinear without inputs",
        lambda: _qlinear.QuantLinear(words(0, 8), words(0, 1), none(0, 8), bits=4, group_size=32).dequantize(),
    )
    yield "awq_quantize", lambda: _qlinear.awq_quantize(none(HUGE, 0), group_size=32)
    yield "awq_pack", lambda: _qlinear.awq_pack(bytes_(HUGE, 0))
    yield "awq_unpack", lambda: _qlinear.awq_unpack(words(HUGE, 0), count=0)
    yield (
        "awq_from_gemv",
        lambda: _qlinear.awq_from_gemv(words(0, few // 8), words(0, few // 64), none(0, few // 8), group_size=8),
    )
    yield (
        "awq_from_gemv_fast",
        lambda: _qlinear.awq_from_gemv_fast(none(0, few, dtype=torch.int16), none(few, 0), none(few, 0), group_size=8),
    )
    yield "awq_from_marlin", lambda: _qlinear.awq_from_marlin(words(few, 0), none(few, 0), group_size=16)
    yield "eetq_pack", lambda: _qlinear.eetq_pack(none(0, HUGE, dtype=torch.int8))
    yield "eetq_unpack", lambda: _qlinear.eetq_unpack(none(0, HUGE, dtype=torch.int8))
    for mode in ("tensor", "group", "block"):
        yield f"fp8_quantize {mode}", lambda mode=mode: _qlinear.fp8_quantize(none(HUGE, 0), mode=mode)
    yield "fp8_quantize static", lambda: _qlinear.fp8_quantize(none(HUGE, 0), torch.ones(1), mode="static")
    yield "int8_quantize", lambda: _qlinear.int8_quantize(none(0, 64), threshold=6.0)


def expanded_tensors():
    """Name: a function of one element that claims to be more than any memory holds."""

    def one(dtype, *shape):
        return torch.zeros(1, 1, dtype=dtype).expand(shape)

    rows = 2**44
    yield "awq_pack", lambda: _qlinear.awq_pack(one(torch.uint8, rows, 64))
    yield "awq_quantize", lambda: _qlinear.awq_quantize(one(torch.float32, rows, 64), group_size=32)
    yield "gptq_pack_codes", lambda: _qlinear.gptq_pack_codes(one(torch.uint8, rows, 64), bits=4)
    yield "gptq_find_params", lambda: _qlinear.gptq_find_params(one(torch.float32, rows, 64), bits=4, group_size=32)
    yield "eetq_quantize", lambda: _qlinear.eetq_quantize(one(torch.float32, rows, 64))
    yield "eetq_pack", lambda: _qlinear.eetq_pack(one(torch.int8, rows, 64))
    yield "fp8_quantize", lambda: _qlinear.fp8_quantize(one(torch.float32, rows, 64), mode="tensor")
    yield "int8_quantize", lambda: _qlinear.int8_quantize(one(torch.float32, rows, 64))
    yield "quantize_4bit", lambda: _qlinear.quantize_4bit(one(torch.float32, rows, 64), quant_type="nf4", blocksize=64)


def in_a_child(act):
    """What act raised, or None, or "it did not return": in a fork, as C's loops take no signal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            act()
            answer = ""
        except (RuntimeError, MemoryError) as error:
            answer = repr(error)
        os.write(writer, answer[:1000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        return "it did not return"
    return answer or None


def cases(named):
    return pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in named])


@cases(empty_tensors())
def test_empty_tensors_of_huge_sizes(act):
    assert in_a_child(act) is None


@cases(expanded_tensors())
def test_expanded_tensors_of_huge_sizes(act):
    assert "memory" in in_a_child(act).lower()


# ---- a layer that several threads call ----


def test_scales_that_change_while_a_product_runs():
    """Scales that are not fp32 are converted at each call: one that runs goes on with those that it began with."""
    n, k = 512, 1024
    scale = torch.ones(n, 1, dtype=torch.bfloat16)
    layer = _qlinear.Fp8Linear(torch.full((n, k), 0x38, dtype=torch.uint8), scale, activation="none")
    x, row = torch.ones(8192, k), torch.ones(1, k)
    results, threads = [], torch.get_num_threads()

    def long_product():
        torch.set_num_threads(1)
        results.append(layer(x))

    thread = threading.Thread(target=long_product)
    thread.start()
    time.sleep(0.01)
    changed = 0
    while thread.is_alive():
        changed += 1
        scale.fill_(2.0 ** (changed % 8))
        assert (layer(row) == k * 2.0 ** (changed % 8)).all()
    thread.join()
    torch.set_num_threads(threads)
    assert changed > 2
    assert (results[0] == results[0][0, 0]).all()


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="a sanitized build keeps freed memory")
def test_layers_bound_anew_keep_no_memory_of_before():
    k = 1 << 20
    g_idx = torch.arange(k, dtype=torch.int32) % (k // 32)
    words = torch.zeros(k // 8, 8, dtype=torch.int32), torch.zeros(k // 32, 1, dtype=torch.int32)
    layer = _qlinear.QuantLinear(*words, torch.ones(k // 32, 8), g_idx, bits=4, group_size=32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shift in range(1, 41):
        g_idx.data = torch.roll(g_idx, shift)
        layer(torch.ones(0, k))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * k * 4 // 1024


# ---- exceptions ----


class Number:
    def __init__(self, error):
        self.error = error

    def __index__(self):
        raise self.error

    __float__ = __index__


def test_what_an_argument_raises_comes_through():
    x = torch.ones(2, 64)
    for error in (KeyboardInterrupt(), RuntimeError("of its own")):
        with pytest.raises(type(error)):
            _qlinear.gptq_find_params(x, bits=Number(error), group_size=64)
        with pytest.raises(type(error)):
            _qlinear.int8_quantize(x, threshold=Number(error))
    with pytest.raises(TypeError, match="bits must be an int"):
        _qlinear.gptq_find_params(x, bits=Number(TypeError("no")), group_size=64)
    with pytest.raises(TypeError, match="threshold must be a float"):
        _qlinear.int8_quantize(x, threshold=Number(TypeError("no")))
    with pytest.raises(ValueError, match="threshold is out of range"):
        _qlinear.int8_quantize(x, threshold=10**400)


def test_an_output_is_on_its_own_device_only():
    made = _qlinear.eetq_pack(Producer(np.zeros((64, 2), np.int8)))
    made.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="dl_device"):
        made.__dlpack__(dl_device=(2, 0))


# ---- on a GPU, by a driver without one ----


def bound_by_two_threads(driver):
    """Tensors are replaced: one thread binds the layer anew, and another calls it while the first reads g_idx, which is
    large enough for that."""
    k, group_size = 1 << 22, 1 << 10

    def tensors(n):
        groups = k // group_size
        g_idx = np.tile(np.arange(groups, dtype=np.int32), group_size)
        shapes = (k // 8, n), (groups, n // 8)
        return *(np.zeros(shape, np.int32) for shape in shapes), np.zeros((groups, n), np.float16), g_idx

    held = [fake_cuda.ExchangeArray(tensor) for tensor in tensors(64)]
    layer = _qlinear.QuantLinear(*held, bits=4, group_size=group_size, zero_format="gptq")
    x = fake_cuda.ExchangeArray(np.zeros((1, k), np.float16))
    layer(x)
    results = []
    widths = (128, 64, 192, 64)
    for n in widths:
        fresh = [fake_cuda.ExchangeArray(tensor) for tensor in tensors(n)]
        for old, new in zip(held, fresh, strict=True):
            old.array, old.shape = new.array, new.shape
        driver.forget()
        first = threading.Thread(target=lambda: results.append(layer(x).array.shape))
        first.start()
        while driver.call_count() == 0 and first.is_alive():
            pass
        results.append(layer(x).array.shape)
        first.join()
        assert [shape[1] for shape in results[-2:]] == [n, n], results
        assert layer.out_features == n
    return len(results) == 2 * len(widths)


@pytest.mark.skipif(not _qlinear.cuda_info()["built"], reason="built without CUDA kernels")
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_layer_called_while_another_thread_binds_it(server):
    assert server.run(bound_by_two_threads)
