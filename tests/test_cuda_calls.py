"""The ways a call can reach a GPU: streams, threads, graphs, forks, devices; what it costs the host, and memory."""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]

K, N = 256, 192
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def make(case, K=K, N=N, dtype=torch.float16, device="cuda"):
    torch.manual_seed(K * 131 + N)
    return case.make((torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)).to(device)


def inputs(*shape, dtype=torch.float16, device="cuda"):
    torch.manual_seed(sum(shape))
    return torch.randn(*shape).to(device, dtype)


def in_a_process(code, **environment):
    """Runs code in a fresh interpreter that has the tests' folder on its path."""
    preamble = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- streams and threads ----


@every_case
def test_runs_in_the_order_of_the_current_stream(case):
    """What was queued on the stream before is seen, and what comes after waits: with 50 ms of work in between."""
    layer, x = make(case), inputs(4, K)
    other = inputs(4, K) * 2
    expected = layer(other)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(3):
        mine = x.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            mine.copy_(other)
            out = layer(mine)
            kept = out.clone()
        assert not stream.query()
        stream.synchronize()
        assert torch.equal(kept, expected)


def test_many_streams_at_once():
    layers = [make(case) for case in CASES]
    xs = [inputs(5, K) for _ in layers]
    expected = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for round_ in range(20):
        for index, layer in enumerate(layers):
            with torch.cuda.stream(streams[(round_ + index) % 8]):
                results.append((index, layer(xs[index])))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[index]) for index, out in results)


@every_case
def test_threads_that_never_touched_cuda(case):
    layer, x = make(case), inputs(3, K)
    expected = layer(x)
    torch.cuda.synchronize()
    results = []

    def work(own_stream):
        with torch.cuda.stream(torch.cuda.Stream() if own_stream else None):
            results.extend(layer(x) for _ in range(20))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 120
    assert all(torch.equal(out, expected) for out in results)


def test_a_thread_before_anything_else():
    """The process's first use of CUDA, torch's and ours, is in a thread that goes away."""
    in_a_process("""
        import threading, torch, layer_cases
        layers = [case.make(torch.randn(64, 128).half(), None) for case in layer_cases.CASES]
        outs = []
        def work():
            for layer in layers:
                outs.append(layer.cuda()(torch.ones(2, 128, device="cuda").half()))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(outs) == len(layers)
        for layer, out in zip(layers, outs):
            assert torch.equal(layer(torch.ones(2, 128, device="cuda").half()), out)
    """)


@every_case
def test_autograd_runs_it_in_a_thread_of_its_own(case):
    layer = make(case)
    x = inputs(3, K).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x).square().sum().backward()
    stream.synchronize()
    y = x.detach().clone().requires_grad_()
    layer(y).square().sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad, y.grad)


# ---- graphs ----


@every_case
@pytest.mark.parametrize("M", [1, 70])
def test_graph_of_a_layer_that_ran_before(case, M):
    layer, x = make(case), inputs(M, K)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(layer.dequantize(torch.float16)[:M].contiguous() * 0 + x)
    for scale in (1, 10):
        x.copy_(inputs(M, K) * scale)
        graph.replay()
        assert torch.equal(out, layer(x))


def test_captured_as_the_very_first_use():
    """Kernels are loaded while a graph is captured, in every capture mode."""
    in_a_process("""
        import torch, layer_cases
        for case in layer_cases.CASES:
            for mode in ("global", "thread_local", "relaxed"):
                layer = case.make(torch.randn(64, 128).half(), torch.randn(64).half()).cuda()
                x = torch.randn(3, 128).half().cuda()
                layer.engine()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode=mode):
                    out = layer(x)
                graph.replay()
                assert torch.equal(out, layer(x)), (case, mode)
    """)


# ---- processes and devices ----


def test_launches_that_block():
    out = in_a_process(
        """
        import torch, layer_cases
        for case in layer_cases.CASES:
            layer = case.make(torch.randn(64, 128).half(), torch.randn(64).half())
            for M in (1, 9, 70):
                x = torch.randn(M, 128).half().cuda()
                assert torch.equal(layer.cuda()(x), layer(x))
        print("done")
        """,
        CUDA_LAUNCH_BLOCKING="1",
    )
    assert out == "done\n"


def test_forked_after_use():
    """In our words, before torch meets the driver."""
    in_a_process("""
        import os, sys, torch, layer_cases
        layer = layer_cases.CASES[0].make(torch.randn(64, 128).half(), None).cuda()
        x = torch.randn(3, 128).half().cuda()
        expected, engine = layer(x), layer.engine()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                engine(x)
                print("nothing was raised", file=sys.stderr)
            except Exception as error:
                print(repr(error), file=sys.stderr)
                status = 0 if "forked after CUDA was initialized" in str(error) else 2
            finally:
                sys.stderr.flush()
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(layer(x), expected)
    """)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@every_case
def test_two_gpus(case):
    first, second = make(case, device="cuda:0"), make(case, device="cuda:1")
    xs = [inputs(5, K, device=f"cuda:{index}") for index in range(2)]
    outs = [first(xs[0]), second(xs[1])]
    assert [out.device.index for out in outs] == [0, 1]
    assert torch.equal(outs[0].cpu(), outs[1].cpu())
    with torch.cuda.device(1):
        assert torch.equal(first(xs[0]), outs[0])
        assert torch.cuda.current_device() == 1
    moved = first.to("cuda:1")
    assert torch.equal(moved(xs[1]), outs[1])
    with pytest.raises(ValueError, match="x is on cuda:0, but .* is on cuda:1"):
        moved(xs[0])


def test_leaves_the_current_device_and_its_errors_alone():
    layer, x = make(CASES[0]), inputs(3, K)
    before = torch.cuda.current_device()
    layer(x)
    with pytest.raises(ValueError, match="must have shape"):
        layer(inputs(3, K + 1))
    assert torch.cuda.current_device() == before
    torch.cuda.synchronize()


# ---- memory ----


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@every_case
def test_memory_is_back_after_many_layers(case):
    x = inputs(3, 128)
    source = case.make(torch.randn(64, 128).half(), torch.randn(64).half())
    state = source.state_dict()

    def use(count):
        for _ in range(count):
            made = copy.deepcopy(source).cuda()
            made(x)
            made.state_dict()
            made(x)

    use(2)
    before = allocated()
    use(1000 // len(CASES))
    assert allocated() == before
    assert all(tensor.device.type == "cpu" for tensor in state.values())


@every_case
@pytest.mark.parametrize("M", [1, 16, 130])
def test_outputs_and_scratch_come_back(case, M):
    layer, x = make(case), inputs(M, K)
    layer(x)
    before = allocated()
    for _ in range(100):
        layer(x)
    assert allocated() == before
    torch.cuda.reset_peak_memory_stats()
    layer(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # The output, scratch of a row or two of fp32 for each row of x, partial sums of a tile for each multiprocessor, the
    # allocator's rounding.
    assert peak <= 4 * M * (K + N) * 4 + (16 << 20)


@every_case
@pytest.mark.parametrize("M", [1, 5, 16, 17, 64, 130])
def test_whatever_lay_in_the_outputs_memory_before(case, M):
    """Memory that the allocator gives again is full of NaN: every element is written, and scratch is not trusted."""
    layer, x = make(case), inputs(M, K)
    expected = layer(x)
    for fill in (float("nan"), float("inf"), 3e4):
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22):
            torch.full((size,), fill, device="cuda", dtype=torch.float32)
        assert torch.equal(layer(x), expected)


# ---- what a call costs the host ----


def host_times(*functions, calls=200, rounds=20):
    """Seconds a call of each, of this thread, so that others count for little: the least of rounds that take turns. The
    GPU is idle when a round begins and not waited for within."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, own in zip(functions, times, strict=True):
            function()
            torch.cuda.synchronize()
            start = time.thread_time()
            for _ in range(calls):
                function()
            own.append((time.thread_time() - start) / calls)
    return [min(own) for own in times]


@pytest.mark.slow
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="a time: run without -n")
@every_case
def test_a_call_costs_the_host_half_of_linear(case):
    """Beside busy processors both take longer, the layer by more."""
    busy = os.getloadavg()[0]
    if busy > os.cpu_count() / 4:
        pytest.skip(f"{busy:.1f} processes run on {os.cpu_count()} processors")
    layer, x = make(case, 512, 512), inputs(1, 512)
    weight, bias = inputs(512, 512), inputs(512)
    with torch.inference_mode():
        linear, ours = host_times(lambda: F.linear(x, weight, bias), lambda: layer(x))
    assert ours <= 0.5 * linear, (ours, linear)
