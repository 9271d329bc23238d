"""10,000 calls of every entry point, those that fail included, leave as much memory in use as they found."""

import contextlib
import ctypes
import gc
import platform
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from dlpack_producers import OldProducer, Producer

from qlinear import _qlinear

CALLS = 10_000
K, N, GROUP = 64, 8, 32

FRAMEWORKS = {
    "torch": lambda tensor: tensor,
    "numpy": lambda tensor: tensor.numpy(),
    "capsule": lambda tensor: Producer(tensor),
    "old capsule": lambda tensor: OldProducer(tensor),
}


class MallocInfo(ctypes.Structure):
    """struct mallinfo2: of use here are the bytes that are mapped each by itself, and all others."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def malloc_bytes():
    """Bytes in use of the C allocator, to the byte; 0 where it is not glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_collect():
    """What torch brought along is left out of the many collections here: they take a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def in_use():
    gc.collect()
    return sys.getallocatedblocks(), malloc_bytes()


def check_no_leak(call, calls=CALLS):
    """Both allocators are asked, as a layer's memory comes from Python's and a tensor's from C's. A block or 8 bytes a
    call, were they lost, are 10 times what is let pass here (caches that fill once), and would be lost in every round:
    interpreters keep a hundred freed objects more or less at hand."""
    assert not tracemalloc.is_tracing()
    for _ in range(200):
        call()
    for _ in range(3):
        blocks, size = in_use()
        for _ in range(calls):
            call()
        blocks_after, size_after = in_use()
        lost, bytes_lost = blocks_after - blocks, size_after - size
        if lost < calls / 10 and bytes_lost < calls * 8 / 10 + 4096:
            return
    raise AssertionError(f"{calls} calls lost {lost} blocks of Python's and {bytes_lost} bytes of C's, three times")


def tensors():
    """By the names that the entries below use."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    eetq, eetq_scales = _qlinear.eetq_quantize(weight)
    CB, SCB, _ = _qlinear.int8_quantize(weight)
    scales, zeros = _qlinear.gptq_find_params(weight, bits=4, group_size=GROUP)
    qweight, qzeros, gptq_scales = _qlinear.gptq_pack(weight, scales, zeros, bits=4, group_size=GROUP)
    awq, awq_zeros, awq_scales = _qlinear.awq_quantize(weight, group_size=GROUP)
    packed, absmax = _qlinear.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    fp8, fp8_scale = _qlinear.fp8_quantize(weight, mode="token")
    fp8_bytes = fp8.view(torch.uint8)
    code256 = torch.tensor(_qlinear.dynamic_map())
    bytes8, absmax8 = _qlinear.quantize_blockwise(weight, code256, blocksize=256)
    return {
        "weight": weight,
        "x": torch.randn(3, K, generator=generator) * 3,
        "g": torch.randn(3, N, generator=generator),
        "bias": torch.zeros(N),
        "eetq": eetq,
        "packed_eetq": _qlinear.EETQLinear(eetq, eetq_scales).pack()[0],
        "eetq_scales": eetq_scales,
        "codes": _qlinear.eetq_unpack(eetq),
        "CB": CB,
        "SCB": SCB,
        "scales": scales,
        "zeros": zeros,
        "qweight": qweight,
        "qzeros": qzeros,
        "gptq_scales": gptq_scales,
        "g_idx": torch.arange(K - 1, -1, -1, dtype=torch.int32) // GROUP,
        "gptq_codes": _qlinear.gptq_unpack_codes(qweight, bits=4, count=K),
        "awq": awq,
        "awq_zeros": awq_zeros,
        "awq_scales": awq_scales,
        "awq_codes": _qlinear.awq_unpack(awq, count=N),
        "packed": packed,
        "absmax": absmax,
        "code": torch.tensor(_qlinear.fourbit_code("nf4")),
        "code256": code256,
        "bytes8": bytes8,
        "absmax8": absmax8,
        "fp8": fp8_bytes,
        "fp8_t": fp8_bytes.T,
        "fp8_scale": fp8_scale,
    }


_, SPEC = _qlinear.EETQLinear(*_qlinear.eetq_quantize(torch.zeros(N, K))).pack()

# Entry point, tensors by name, keywords.
ENTRIES = [
    ("eetq_quantize", ["weight"], {}),
    ("eetq_codes", ["weight"], {}),
    ("eetq_pack", ["codes"], {}),
    ("eetq_unpack", ["eetq"], {}),
    ("gptq_find_params", ["weight"], {"bits": 4, "group_size": GROUP}),
    ("gptq_pack", ["weight", "scales", "zeros"], {"bits": 4, "group_size": GROUP}),
    ("gptq_pack", ["weight", "scales", "zeros", "g_idx"], {"bits": 4, "group_size": GROUP}),
    ("gptq_pack_codes", ["gptq_codes"], {"bits": 4}),
    ("gptq_unpack_codes", ["qweight"], {"bits": 4, "count": K}),
    ("gptq_unplanar", ["qweight"], {"bits": 4}),
    ("awq_quantize", ["weight"], {"group_size": GROUP}),
    ("awq_pack", ["awq_codes"], {}),
    ("awq_unpack", ["awq"], {"count": N}),
    ("int8_quantize", ["x"], {}),
    ("int8_quantize", ["x"], {"threshold": 2.0}),
    ("fourbit_code", [], {"quant_type": "fp4"}),
    ("dynamic_map", [], {}),
    ("quantize_4bit", ["weight"], {"quant_type": "nf4", "blocksize": 64}),
    ("dequantize_4bit", ["packed", "absmax", "code"], {"count": N * K, "blocksize": 64, "dtype": "float16"}),
    ("quantize_blockwise", ["weight", "code256"], {"blocksize": 256}),
    ("dequantize_blockwise", ["bytes8", "absmax8", "code256"], {"blocksize": 256, "dtype": "float16"}),
    ("absmax_mean", ["absmax"], {}),
    ("fp8_quantize", ["weight"], {"mode": "tensor"}),
    ("fp8_quantize", ["weight"], {"mode": "group"}),
    ("fp8_matmul", ["fp8", "fp8_t", "fp8_scale", "fp8_scale", "bias"], {"dtype": "float32"}),
    ("cpu_info", [], {}),
    ("cuda_info", [], {}),
    ("cuda_initialized", [], {}),
    ("EETQLinear", ["eetq", "eetq_scales", "bias"], {}),
    ("QuantLinear", ["qweight", "qzeros", "gptq_scales"], {"bits": 4, "group_size": GROUP}),
    ("QuantLinear", ["qweight", "qzeros", "gptq_scales", "g_idx", "bias"], {"bits": 4, "group_size": GROUP}),
    ("AWQLinear", ["awq", "awq_zeros", "awq_scales", "bias"], {"group_size": GROUP}),
    ("Linear8bitLt", ["CB", "SCB", "bias"], {"threshold": 2.0}),
    ("Linear4bit", ["packed", "absmax", "code", "bias"], {"shape": (N, K), "blocksize": 64}),
    ("Fp8Linear", ["fp8", "fp8_scale", "bias"], {}),
    ("PackedLinear", ["packed_eetq"], {"spec": SPEC}),
]
# Their arguments are other projects' layouts; the errors below go through them all the same.
ONLY_ERRORS = ["awq_from_gemv", "awq_from_gemv_fast", "awq_from_marlin"]
# Positional numbers and no tensor; without a GPU the last three have nothing but an error.
PROBLEM = (0, "int4", 256, 256, 128, "float16", 4)
NUMBERS = [
    ("choice_bucket", (7,)),
    ("set_cuda_overlap", (True,)),
    ("candidates", PROBLEM),
    ("set_choice", (*PROBLEM, None, 0)),
    ("AllReduce", (0, 0, 2)),
]
LAYERS = [entry for entry in ENTRIES if entry[0][0].isupper()]


def test_every_entry_point_is_here():
    public = {name for name in dir(_qlinear) if not name.startswith("_")} - {"Layer", "DLPackArray", "Shortcut"}
    assert public == {name for name, *_ in (*ENTRIES, *NUMBERS)} | set(ONLY_ERRORS)


@pytest.mark.parametrize(("name", "arguments"), NUMBERS)
def test_calls_with_numbers(name, arguments):
    def call():
        with contextlib.suppress(RuntimeError):
            getattr(_qlinear, name)(*arguments)

    check_no_leak(call)


def label(entry):
    return "-".join([entry[0], *entry[1], *map(str, entry[2].values())])


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_calls(entry):
    name, arguments, keywords = entry
    held = tensors()
    values = [held[argument] for argument in arguments]
    function = getattr(_qlinear, name)
    check_no_leak(lambda: function(*values, **keywords))


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "torch"])
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry[1]], ids=label)
def test_calls_with_tensors_of(entry, framework):
    """What differs is the way in and out, which all functions share: fewer calls will do."""
    name, arguments, keywords = entry
    held = tensors()
    values = [FRAMEWORKS[framework](held[argument]) for argument in arguments]
    function = getattr(_qlinear, name)
    check_no_leak(lambda: function(*values, **keywords), CALLS // 10)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("entry", LAYERS, ids=label)
def test_layer_calls(entry, framework):
    name, arguments, keywords = entry
    held = {key: FRAMEWORKS[framework](tensor) for key, tensor in tensors().items()}
    layer = getattr(_qlinear, name)(*[held[argument] for argument in arguments], **keywords)
    x, g = held["x"], held["g"]
    strided = held["x"][::2]
    check_no_leak(lambda: (layer(x), layer(strided), repr(layer), layer.nbytes, layer.in_features, layer.out_features))
    check_no_leak(lambda: (layer.dequantize(), layer.dequantize("float16"), layer.grad_input(g)), CALLS // 2)
    check_no_leak(lambda: (layer.pack(), layer.pack_obstacle, getattr(layer, "unpack", layer.pack)()), CALLS // 2)


@pytest.mark.parametrize("entry", LAYERS, ids=label)
def test_layer_errors(entry):
    name, arguments, keywords = entry
    held = tensors()
    layer = getattr(_qlinear, name)(*[held[argument] for argument in arguments], **keywords)
    wrong = [
        None,
        torch.zeros(3, K + 1),
        torch.zeros(3, K, dtype=torch.int8),
        np.zeros((2, K + 1)),
        Producer(torch.zeros(2)),
    ]

    def call():
        for x in wrong:
            for function in (layer, layer.grad_input):
                try:
                    function(x)
                except (TypeError, ValueError):
                    continue
                raise AssertionError(f"{function} took {x}")
        for bad in ({"dtype": "int8"}, {"dtype": 3}, {"kind": "float32"}):
            try:
                layer.dequantize(**bad)
            except (TypeError, ValueError):
                continue
            raise AssertionError(f"dequantize took {bad}")

    check_no_leak(call, CALLS // 5)


FAILING = [*ENTRIES, *[(name, ["weight"] * 3, {"group_size": 8}) for name in ONLY_ERRORS]]


@pytest.mark.parametrize("entry", FAILING, ids=label)
def test_errors(entry):
    """Each argument in turn is something else, and each keyword; what was made before the error is given back."""
    name, arguments, keywords = entry
    held = tensors()
    function = getattr(_qlinear, name)
    values = [held[argument] for argument in arguments]
    wrong = [
        object(),
        np.zeros((2, 2), np.complex64),
        torch.zeros(1, 1, 1, 1),
        Producer(torch.zeros(3, dtype=torch.int16)),
    ]
    attempts = [(values, {**keywords, "no_such": 1}), ([*values, *[None] * 9], keywords)]
    for index in range(len(values)):
        for other in wrong:
            attempts.append(([*values[:index], other, *values[index + 1 :]], keywords))
    for key in keywords:
        attempts += [(values, {**keywords, key: other}) for other in (object(), -7, "x", 2**70)]
    failed = [0]

    def call():
        for positional, named in attempts:
            try:
                function(*positional, **named)
            except (TypeError, ValueError, NotImplementedError):
                failed[0] += 1

    call()
    # The tensors a function takes are few, so nearly every attempt has to fail; one wrong thing may be right elsewhere.
    assert failed[0] >= len(attempts) * 0.75
    check_no_leak(call, max(CALLS // len(attempts), 400))
