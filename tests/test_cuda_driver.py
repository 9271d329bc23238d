"""What the CUDA side asks of the driver, seen by a driver without a GPU (fake_cuda.c): contexts are left as they were
found, launches go to the stream that is current, and whatever fails gives one sentence and leaves nothing half done."""

import gc
import os
import re
import shutil
import threading
import time

import fake_cuda
import numpy as np
import pytest
from fake_cuda import DlpackArray, ExchangeArray, Lent

from qlinear import _qlinear

INFO_HAS_KERNELS = _qlinear.cuda_info()["built"]

pytestmark = [
    pytest.mark.skipif(not INFO_HAS_KERNELS, reason="built without CUDA kernels"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler"),
]

K, N, M = 128, 64, 3
FORKED = "this process was forked after CUDA was initialized, and the driver does not work in it: start worker "


@pytest.fixture(scope="module")
def old_server(tmp_path_factory):
    """A driver from before CUDA 12, without cuGetProcAddress_v2."""
    started = fake_cuda.Server(fake_cuda.build(tmp_path_factory.mktemp("old"), "-DFAKE_BEFORE_12"))
    yield started
    started.close()


# ---- layers and calls, on either kind of array ----


def arrays(kind, *given, device=0):
    return [kind(np.asarray(array), device) for array in given]


def weight():
    return np.random.default_rng(0).standard_normal((N, K)).astype(np.float16)


def x_of(kind, device=0, rows=M):
    return kind(np.ones((rows, K), np.float16), device)


def make_eetq(kind, device=0):
    return _qlinear.EETQLinear(*arrays(kind, *_qlinear.eetq_quantize(weight()), device=device))


def make_int8(kind, device=0):
    codes, absmax, _ = _qlinear.int8_quantize(weight())
    return _qlinear.Linear8bitLt(*arrays(kind, codes, absmax, device=device), threshold=6.0)


def make_static_fp8(kind, device=0):
    """Reads the scale of its input out of the GPU's memory when it is made."""
    given = np.zeros((N, K), np.uint8), np.ones(1, np.float32), np.ones(1, np.float32)
    codes, scale, input_scale = arrays(kind, *given, device=device)
    return _qlinear.Fp8Linear(codes, scale, activation="static", input_scale=input_scale)


def product(kind=ExchangeArray):
    made = make_eetq(kind)
    made(x_of(kind))


def product_with_scratch(kind=ExchangeArray):
    made = make_int8(kind)
    made(x_of(kind, rows=20))


def product_of_arrays_that_lend():
    product_with_scratch(DlpackArray)


def read_back():
    make_static_fp8(ExchangeArray)


def result_for_a_consumer():
    made = make_eetq(DlpackArray)
    made(x_of(DlpackArray)).__dlpack__(max_version=(1, 3))


# ---- everything that can fail ----

INITIALIZED = {
    "cuDriverGetVersion": (product, "the NVIDIA driver ({path}) does not tell its version: {words}."),
    "cuInit": (product, "the NVIDIA driver could not be initialized: {words}."),
    "cuDeviceGet": (product, "GPU 0 could not be asked what it is: {words}."),
    "cuDeviceGetName": (product, "GPU 0 could not be asked what it is: {words}."),
    "cuDeviceGetAttribute": (product, "GPU 0 could not be asked what it is: {words}."),
    "cuDeviceTotalMem": (product, "GPU 0 could not be asked what it is: {words}."),
    "cuLibraryLoadData": (product, "the NVIDIA driver could not load the kernels: {words}."),
    "cuLibraryGetKernel": (product, "the NVIDIA driver could not load {kernel}: {words}."),
    "cuDevicePrimaryCtxRetain": (product, "the context of GPU 0 could not be had: {words}."),
}
READY = {
    "cuCtxGetCurrent": (product, "the GPU's context could not be entered: {words}."),
    "cuCtxPushCurrent": (product, "the GPU's context could not be entered: {words}."),
    "cuLaunchKernelEx": (product_with_scratch, "{kernel}: {words}."),
    "cuMemAlloc": (product_of_arrays_that_lend, "memory on the GPU could not be had: {words}."),
    "cuMemcpyDtoHAsync": (read_back, "a tensor could not be read from the GPU: {words}."),
    "cuStreamSynchronize": (result_for_a_consumer, "a product on the GPU failed: {words}."),
}
OWN_SENTENCE = {
    ("cuInit", 3): FORKED + "processes with 'spawn' or 'forkserver'.",
    ("cuInit", 100): "the NVIDIA driver finds no GPU (none is built in, or CUDA_VISIBLE_DEVICES hides it).",
    ("cuInit", 803): (
        "the NVIDIA driver's library and its kernel module are of different releases: restart the machine."
    ),
    ("cuLibraryLoadData", 209): "the NVIDIA driver finds no kernels for a GPU here among those of {file} ({for_what}).",
    ("cuLibraryLoadData", 222): "the NVIDIA driver is too old for the kernels: it knows CUDA 13.0.",
}
CODES = {
    "INVALID_VALUE": 1,
    "OUT_OF_MEMORY": 2,
    "NOT_INITIALIZED": 3,
    "STUB_LIBRARY": 34,
    "DEVICE_UNAVAILABLE": 46,
    "NO_DEVICE": 100,
    "INVALID_CONTEXT": 201,
    "NO_BINARY_FOR_GPU": 209,
    "INVALID_PTX": 218,
    "UNSUPPORTED_PTX_VERSION": 222,
    "ILLEGAL_ADDRESS": 700,
    "LAUNCH_FAILED": 719,
    "SYSTEM_DRIVER_MISMATCH": 803,
    "STREAM_CAPTURE_UNSUPPORTED": 900,
}


def sentence_of(operation):
    try:
        operation()
    except RuntimeError as error:
        return str(error)
    return None


def leftovers(driver):
    gc.collect()
    return driver.depth(), driver.allocated(), len(Lent.alive)


def run_failing(driver, name, function, code, first):
    """The sentence of the operation while its (first + 1)th call of the function fails; after that it must work."""
    operation = globals()[name]
    driver.fail(function, code, first)
    sentence = sentence_of(operation)
    assert leftovers(driver) == (0, 0, 0)
    kernel = next((call.kernel.decode() for call in driver.launches() if call.result), "")
    driver.work()
    operation()
    assert leftovers(driver) == (0, 0, 0)
    assert not driver.calls("cuInit")[1:] or function in ("cuInit", "cuDriverGetVersion")
    return sentence, kernel, _qlinear.cuda_info()["driver"]


@pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
@pytest.mark.parametrize("function", [*INITIALIZED, *READY])
def test_a_failure_is_one_sentence_and_leaves_nothing(server, function, code):
    operation, template = (INITIALIZED | READY)[function]
    first = 0 if function in INITIALIZED else 1  # the second: the first of several allocations or launches has worked
    if function in ("cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuCtxGetCurrent", "cuCtxPushCurrent"):
        first = 0
    sentence, kernel, path = server.run(run_failing, operation.__name__, function, code, first)
    images = _qlinear.cuda_info()["images"]
    file, for_what = list(images.items())[-1]
    expected = OWN_SENTENCE.get((function, code), template).format(
        path=path, words=f"the words for {code}", kernel=kernel or "@", file=file, for_what=" ".join(for_what)
    )
    assert re.fullmatch(re.escape("CUDA: " + expected).replace("@", r"\w+"), sentence)


def failing_at_each_call(driver, name, function):
    operation = globals()[name]
    operation()
    driver.forget()
    operation()
    count = len(driver.calls(function))
    for first in range(count):
        driver.fail(function, 2, first, first)
        assert sentence_of(operation)
        assert leftovers(driver) == (0, 0, 0)
        driver.work()
    operation()
    return count


def empty_product(driver):
    return make_eetq(DlpackArray)(x_of(DlpackArray, rows=0)).shape


def test_an_empty_output_has_memory_too(server):
    """The driver gives none of 0 bytes."""
    assert server.run(empty_product) == (0, N)


@pytest.mark.parametrize("name", ["product_with_scratch", "product_of_arrays_that_lend", "result_for_a_consumer"])
@pytest.mark.parametrize("function", ["cuLaunchKernelEx", "cuMemAlloc"])
def test_whichever_call_fails_leaves_nothing(server, name, function):
    count = server.run(failing_at_each_call, name, function)
    assert count or (name, function) == ("product_with_scratch", "cuMemAlloc")


def failing_where_it_does_not_matter(driver, function):
    driver.fail(function, 700)
    product_of_arrays_that_lend()
    return driver.functions().count(function)


@pytest.mark.parametrize("function", ["cuCtxPopCurrent", "cuMemFree"])
def test_what_fails_after_the_product_does_not_lose_it(server, function):
    assert server.run(failing_where_it_does_not_matter, function) > 0


def without_words(driver):
    driver.fail("cuGetErrorString", 1)
    driver.fail("cuLaunchKernelEx", 700)
    return sentence_of(product)


def test_an_error_without_words(server):
    assert server.run(without_words).endswith(": an error it has no words for.")


def without_output_memory(driver):
    make_eetq(ExchangeArray)(x_of(ExchangeArray))
    ExchangeArray.allocates = False
    with pytest.raises(MemoryError, match="no memory for the output"):
        product()
    with pytest.raises(MemoryError, match="no memory for the output"):
        product_with_scratch()
    return leftovers(driver)


def test_no_memory_for_the_output(server):
    assert server.run(without_output_memory) == (0, 0, 0)


# ---- drivers that are old or lack something ----


def hiding(driver, function):
    driver.hide(function)
    sentence = sentence_of(product)
    driver.hide("")
    product()
    return sentence


@pytest.mark.parametrize("function", [*INITIALIZED, *READY, "cuGetErrorString", "cuKernelSetAttribute", "cuMemFree"])
def test_a_missing_function(server, function):
    assert re.fullmatch(
        rf"CUDA: the NVIDIA driver \(.*libcuda\.so\.1\) has no {function}\.", server.run(hiding, function)
    )


def of_version(driver, version):
    driver.driver_version(version)
    return sentence_of(product), _qlinear.cuda_info(), driver.functions()


def test_a_driver_that_knows_an_older_cuda(server):
    sentence, info, functions = server.run(of_version, 12020)
    assert re.fullmatch(
        r"CUDA: the NVIDIA driver is too old: it knows CUDA 12\.2, the kernels here need 1\d\.\d "
        r"\(release \d+ or newer\)\.",
        sentence,
    )
    assert f"CUDA: {info['missing']}" == sentence
    assert info["driver_version"] == 12020
    assert "cuInit" not in functions


def test_a_driver_from_before_cuda_12(old_server):
    sentence, info, _ = old_server.run(of_version, 11080)
    assert sentence == (
        "CUDA: the NVIDIA driver is too old: it is from before CUDA 12.0 (release 525), which is the least needed."
    )
    assert info["driver"] is None


def describing(driver, function, code):
    driver.fail(function, code)
    return _qlinear.cuda_info()


@pytest.mark.parametrize("function", ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_info_says_what_the_driver_does_not_tell(server, function):
    info = server.run(describing, function, 46)
    assert info["missing"] == "the NVIDIA driver does not tell its GPUs: the words for 46."
    assert info["devices"] == info["kernels"] == []


def of_capability(driver, major, minor):
    driver.devices(1, major, minor)
    return sentence_of(product), _qlinear.cuda_info(), driver.functions()


def test_a_gpu_that_the_kernels_were_not_compiled_for(server):
    sentence, info, functions = server.run(of_capability, 5, 2)
    architectures = " ".join(_qlinear.cuda_info()["architectures"])
    assert sentence == f"CUDA: the GPU has compute capability 5.2; the kernels were compiled for {architectures}."
    assert f"CUDA: {info['missing']}" == sentence
    assert info["kernels"] == []
    assert "cuLibraryLoadData" not in functions
    assert "cuDevicePrimaryCtxRetain" not in functions


def without_one_image(driver, index):
    driver.fail("cuLibraryLoadData", 209, index, index)
    return sentence_of(product), sentence_of(product_with_scratch)


def test_an_image_that_fails_leaves_the_others(server):
    index = list(_qlinear.cuda_info()["images"]).index("linear")
    product_says, int8_says = server.run(without_one_image, index)
    assert re.fullmatch(r"CUDA: ql_\w+ was not compiled for a GPU of compute capability 9\.0\.", product_says)
    assert int8_says is None


def loading(driver):
    product()
    return [(call.function.decode(), call.result) for call in driver.calls()]


def test_each_kernel_is_looked_for_in_its_own_image(server):
    calls = server.run(loading)
    assert all(result == 0 for _, result in calls)
    lookups = [function for function, _ in calls if function == "cuLibraryGetKernel"]
    assert len(lookups) == len(server.run(describing, "", 0)["kernels"])


# ---- contexts, devices, threads ----


def steady(driver):
    made, x = make_eetq(ExchangeArray), x_of(ExchangeArray)
    made(x)
    driver.forget()
    made(x)
    outside = driver.functions()
    driver.push(0)
    driver.forget()
    made(x)
    return outside, driver.functions(), driver.depth()


def test_a_call_asks_the_driver_for_no_more_than_it_needs(server):
    outside, inside, depth = server.run(steady)
    assert outside == ["cuCtxGetCurrent", "cuCtxPushCurrent", "cuLaunchKernelEx", "cuCtxPopCurrent"]
    assert inside == ["cuCtxGetCurrent", "cuLaunchKernelEx"]
    assert depth == 1


class Anything:
    """As much of a module as the short way looks at; the long way gives "long"."""

    def __init__(self, layer):
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self.__dict__.update({key: {} for key in (*hooks, "_parameters", "_buffers")}, _made=(layer, ()))

    def forward(self, x):
        raise NotImplementedError

    def __call__(self, x):
        return "long"


def the_short_way(driver, autocast):
    asked = []

    def is_autocast_enabled(*device):
        asked.append(device)
        return autocast

    shortcut = _qlinear.Shortcut(
        module=Anything,
        types=(ExchangeArray,),
        forwards=[Anything.forward],
        empty=(),
        constant=(),
        silent=(),
        is_grad_enabled=lambda: False,
        is_autocast_enabled=is_autocast_enabled,
    )
    module = type("Short", (Anything,), {"__call__": shortcut})(make_eetq(ExchangeArray))
    result = module(x_of(ExchangeArray))
    return asked, result == "long", len(driver.launches())


def test_the_short_way_asks_for_autocast_on_cuda(server):
    assert server.run(the_short_way, False) == ([()], False, 1)
    assert server.run(the_short_way, True) == ([()], True, 0)


def in_another_context(driver, kind):
    driver.devices(8, 9, 0)
    driver.push(7)
    made = make_int8(globals()[kind], 2)
    made(x_of(globals()[kind], 2))
    return driver.depth(), driver.current(), {call.device for call in driver.launches()}


@pytest.mark.parametrize("kind", ["ExchangeArray", "DlpackArray"])
def test_runs_on_the_tensors_device_and_leaves_the_callers_current(server, kind):
    assert server.run(in_another_context, kind) == (1, 7, {2})


def on_two_devices(driver):
    driver.devices(2, 9, 0)
    layers = [make_eetq(ExchangeArray, device) for device in (1, 0, 1)]
    for layer, device in zip(layers, (1, 0, 1), strict=True):
        layer(x_of(ExchangeArray, device))
    with pytest.raises(ValueError, match="x is on cuda:0, but .* is on cuda:1"):
        layers[0](x_of(ExchangeArray, 0))
    counts = [driver.functions().count(name) for name in ("cuInit", "cuLibraryLoadData")]
    return driver.retained(), *counts, [call.device for call in driver.launches()]


def test_each_device_is_made_ready_once(server):
    assert server.run(on_two_devices) == (2, 1, len(_qlinear.cuda_info()["images"]), [1, 0, 1])


def of_no_such_device(driver, number):
    return sentence_of(lambda: make_eetq(ExchangeArray, number)(x_of(ExchangeArray, number)))


def test_a_device_that_is_not_there(server):
    assert server.run(of_no_such_device, 3) == "CUDA: GPU 3 could not be asked what it is: the words for 101."
    for number in (32, -1):
        assert server.run(of_no_such_device, number) == f"CUDA: there is no GPU of number {number}."


def in_cold_threads(driver):
    made, depths = make_eetq(ExchangeArray), []

    def work():
        for _ in range(20):
            made(x_of(ExchangeArray))
        depths.append(driver.depth())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return depths, driver.retained(), len(driver.launches()), {call.device for call in driver.launches()}


def test_threads_that_never_touched_cuda(server):
    assert server.run(in_cold_threads) == ([0] * 8, 1, 160, {0})


# ---- streams ----


def on_streams(driver):
    layers = [make_eetq(ExchangeArray), make_int8(ExchangeArray)]
    seen = []
    for stream in (0, 0x1000, 0x2000):
        ExchangeArray.stream = stream
        for layer in layers:
            driver.forget()
            layer(x_of(ExchangeArray))
            layer(x_of(ExchangeArray, rows=100))
            layer.grad_input(ExchangeArray(np.ones((2, N), np.float16)))
            seen.append((stream, {call.stream or 0 for call in driver.launches()}, len(driver.launches())))
    return seen


def test_launches_on_the_current_stream_of_the_framework(server):
    for stream, streams, count in server.run(on_streams):
        assert streams == {stream}
        assert count >= 3


def on_the_legacy_stream(driver):
    made, x = make_int8(DlpackArray), x_of(DlpackArray)
    result = made(x)
    before = driver.functions().count("cuStreamSynchronize")
    result.__dlpack__(max_version=(1, 3), stream=0x77)
    waits = [call.stream for call in driver.calls("cuStreamSynchronize")]
    return x.streams, x.lent, {call.stream for call in driver.launches()}, before, waits


def test_arrays_without_the_exchange_api_meet_on_the_legacy_stream(server):
    streams, lent, launched, waited_before, waits = server.run(on_the_legacy_stream)
    assert streams == [1]  # DLPack's number for it: the producer lets it wait for its own work
    assert lent == 0
    assert launched == {None}
    assert waited_before == 0
    assert waits == [None]


def of_many_rows(driver, rows):
    made = make_eetq(ExchangeArray)
    made(x_of(ExchangeArray, rows=rows))
    return [(list(call.grid), list(call.block)) for call in driver.launches()]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 64, 65, 1000])
def test_blocks_cover_every_row_and_are_what_a_gpu_takes(server, rows):
    launched = server.run(of_many_rows, rows)
    assert bool(launched) == (rows > 0)
    for grid, block in launched:
        assert grid[0] >= 1
        assert 1 <= grid[1] <= 65535
        assert block[1:] == [1, 1]
        assert block[0] in (128, 256, 384, 512)


def of_no_outputs(driver, name):
    codes, scales = np.zeros((0, K), np.int8), np.zeros(0, np.float32)
    if name == "eetq":
        made = _qlinear.EETQLinear(*arrays(ExchangeArray, codes.T, scales.astype(np.float16)))
    else:
        made = _qlinear.Linear8bitLt(*arrays(ExchangeArray, codes, scales), threshold=6.0)
    shapes = [made(x_of(ExchangeArray, rows=rows)).array.shape for rows in (1, 20)]
    shapes.append(made.dequantize("float16").array.shape)
    before = len(driver.launches())
    shapes.append(made.grad_input(ExchangeArray(np.ones((M, 0), np.float16))).array.shape)
    return shapes, before, [call.kernel.decode() for call in driver.launches()[before:]]


@pytest.mark.parametrize("name", ["eetq", "int8"])
def test_a_layer_without_outputs(server, name):
    """Nothing is launched but what fills the gradient with zeros."""
    shapes, before, launched = server.run(of_no_outputs, name)
    assert shapes == [(1, 0), (20, 0), (0, K), (M, K)]
    assert before == 0
    assert launched == ["ql_linear_grad"]


# ---- forks ----


def forked(check):
    """What `check` gives in a forked child: True, False, or a number where the child failed otherwise."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {0: True, 1: False}.get(os.waitstatus_to_exitcode(status), status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


def says_forked():
    sentence, missing = sentence_of(product), _qlinear.cuda_info()["missing"]
    return sentence.startswith(f"CUDA: {FORKED}") and missing.startswith(FORKED)


def says_forked_before_it_allocates():
    ExchangeArray.allocates = False
    return says_forked()


def fork_after_use(driver):
    product()
    told = forked(says_forked_before_it_allocates)
    product()
    return told


def fork_before_use(driver):
    result = forked(lambda: sentence_of(product) is None)
    product()
    return result


def fork_while_a_thread_initializes(driver):
    driver.slow_init(500)
    thread = threading.Thread(target=_qlinear.cuda_info)
    thread.start()
    while not _qlinear.cuda_initialized():
        time.sleep(0.001)
    told = forked(says_forked_before_it_allocates)
    thread.join()
    product()
    return told


def fork_while_a_thread_loads(driver, work):
    """Before cuInit a child has nothing to do with what the thread is at, and uses the GPU itself."""

    def works():
        driver.slow_version(0)
        return sentence_of(product) is None

    driver.slow_version(500)
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    worked = forked(works)
    thread.join()
    product()
    return worked


def fork_while_a_thread_asks_for_the_driver(driver):
    return fork_while_a_thread_loads(driver, _qlinear.cuda_info)


def fork_while_a_thread_makes_a_device_ready(driver):
    return fork_while_a_thread_loads(driver, read_back)


def fork_after_anothers_use(driver):
    """As with a framework that called cuInit before."""
    driver.fail("cuInit", 3)
    return says_forked()


@pytest.mark.parametrize(
    "scenario",
    [
        fork_after_use,
        fork_before_use,
        fork_while_a_thread_initializes,
        fork_while_a_thread_asks_for_the_driver,
        fork_while_a_thread_makes_a_device_ready,
        fork_after_anothers_use,
    ],
)
def test_forks(server, scenario):
    assert server.run(scenario) is True


def importing(driver):
    make_eetq(ExchangeArray)
    return driver.functions(), _qlinear.cuda_initialized()


def test_neither_importing_nor_making_a_layer_asks_the_driver(server):
    assert server.run(importing) == ([], False)


# ---- memory ----


def many_calls(driver):
    driver.record(False)
    made, x = make_int8(DlpackArray), x_of(DlpackArray)
    for _ in range(200):
        made(x)
        made.dequantize("float16")
    return leftovers(driver)


def test_memory_of_our_own_is_given_back(server):
    assert server.run(many_calls) == (0, 0, 2)  # the two tensors of the layer


def test_the_server_runs_what_it_is_asked(server):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        server.run(divide)


def divide(driver):
    return 1 // 0
