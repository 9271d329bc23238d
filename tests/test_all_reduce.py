"""Sums over GPUs: what the C type takes and asks of the driver (fake_cuda.c, where every process is this one), how the
processes of a group meet, and the operator. On GPUs: test_parallel.py."""

import gc
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_cuda import ExchangeArray
from processes import spawn

from qlinear import _qlinear, all_reduce

needs_kernels = pytest.mark.skipif(
    not _qlinear.cuda_info()["built"] or not shutil.which("cc"), reason="needs CUDA kernels and a C compiler"
)


def pair(device=0):
    """Both ends, connected, in one process."""
    ends = [_qlinear.AllReduce(device, rank, 2) for rank in range(2)]
    handles = [end.handle for end in ends]
    for end in ends:
        end.connect(handles)
    for end in ends:
        end.check()
    return ends


def summand(count=100, dtype=np.float16, device=0):
    return ExchangeArray(np.ones(count, dtype), device)


def sums(driver):
    driver.devices(2, 9, 0)
    end, _ = pair(1)
    driver.forget()
    for count in (1, 2048, 2049, 1 << 18, (1 << 18) + 1):
        assert end(summand(count, device=1)) is None
    return [(call.kernel.decode(), list(call.grid), call.overlaps, call.device) for call in driver.launches()]


@needs_kernels
def test_a_sum_is_one_launch(server):
    expected = ((1, 1), (1, 1), (1, 2), (1, 128), (4, 128))
    assert server.run(sums) == [(f"ql_all_reduce_{pieces}", [blocks, 1, 1], 1, 1) for pieces, blocks in expected]


def on_streams(driver):
    """What is asked beside launches, from one sum to the next on these streams, of which one is captured."""
    end, _ = pair()
    seen = []
    driver.capture(0x30)
    for stream in (0, 0, 0x10, 0x10, 0x20, 0x30, 0x30, 0x10):
        ExchangeArray.stream = stream
        driver.forget()
        end(summand())
        seen.append([(call.function.decode(), call.stream or 0) for call in driver.calls()])
    return [[entry for entry in entries if entry[0] in ("cuEventRecord", "cuStreamWaitEvent")] for entries in seen]


@needs_kernels
def test_a_sum_on_another_stream_waits_for_the_one_before(server):
    waits = lambda of, on: [("cuEventRecord", of), ("cuStreamWaitEvent", on)]  # noqa: E731
    assert server.run(on_streams) == [[], [], waits(0, 0x10), [], waits(0x10, 0x20), [], [], []]


def meeting(driver, function, code):
    """The sentence of the failure, and what is left then and at the end."""
    seen, left = [], []
    for fails in (True, False):
        if fails:
            driver.fail(function, code)
        try:
            end, other = pair()
            end(summand())
            end(other and summand())
        except RuntimeError as error:
            seen.append(str(error))
        driver.work()
        end = other = None
        gc.collect()
        left.append((driver.depth(), driver.allocated(), driver.opened()))
    return seen, left


@needs_kernels
@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("cuMemAlloc", "memory for sums over GPUs could not be had"),
        ("cuMemsetD8Async", "memory for sums could not be set"),
        ("cuIpcGetMemHandle", "memory for sums cannot be shared"),
        ("cuIpcOpenMemHandle", "another GPU's memory could not be opened"),
        ("cuMemcpyDtoHAsync", "a tensor could not be read from the GPU"),
        ("cuEventCreate", "an event could not be made"),
        ("cuLaunchKernelEx", "ql_all_reduce_1"),
    ],
)
def test_what_fails_is_one_sentence_and_leaves_nothing(server, function, what):
    seen, left = server.run(meeting, function, 46)
    assert seen == [f"CUDA: {what}: the words for 46."]
    assert left == [(0, 0, 0)] * 2


def unheard(driver):
    ends = [_qlinear.AllReduce(0, rank, 2) for rank in range(2)]
    ends[0].connect([end.handle for end in ends])
    try:
        ends[0].check()
    except RuntimeError as error:
        return str(error)


@needs_kernels
def test_what_does_not_come_over_is_seen(server):
    assert server.run(unheard) == "CUDA: what GPU 1 of 2 wrote into the memory of GPU 0 did not come there."


def refusals(driver):
    end, other = pair()
    alone = _qlinear.AllReduce(0, 0, 2)
    wrong = {
        "parts": lambda: _qlinear.AllReduce(0, 0, 9),
        "rank": lambda: _qlinear.AllReduce(0, 2, 2),
        "kind": lambda: _qlinear.AllReduce(0, "0", 2),
        "device": lambda: _qlinear.AllReduce(99, 0, 2),
        "handles": lambda: alone.connect([alone.handle]),
        "handle": lambda: alone.connect([b"", alone.handle]),
        "twice": lambda: end.connect([end.handle, other.handle]),
        "early": lambda: alone(summand()),
        "elsewhere": lambda: end(summand(device=1)),
        "host": lambda: end(np.ones(4, np.float16)),
        "dtype": lambda: end(summand(dtype=np.int32)),
        "double": lambda: end(summand(dtype=np.float64)),
        "long": lambda: end(summand(end.most_bytes // 2 + 1)),
    }
    seen = {}
    for name, call in wrong.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
    end(summand(0))
    return seen, len(driver.launches())


@needs_kernels
def test_refusals(server):
    seen, launches = server.run(refusals)
    assert launches == 0
    expected = {
        "parts": "ValueError: parts must be 2 to 8, got 9",
        "rank": "ValueError: rank must be 0 to 1, got 2",
        "kind": "TypeError: rank must be an int, got '0'",
        "device": "RuntimeError: CUDA: there is no GPU of number -1.",
        "handles": "TypeError: handles must be a list of 2, one of each rank, got ",
        "handle": "TypeError: handles[0] must be 64 bytes, got b''",
        "twice": "ValueError: the others' memory is open: connect is called once",
        "early": "ValueError: the other GPUs are not connected: connect and check come first",
        "elsewhere": "ValueError: x must be on GPU 0, whose sums these are",
        "host": "ValueError: x must be on GPU 0, whose sums these are",
        "dtype": "TypeError: x must be ",
        "double": "TypeError: x must be ",
        "long": "ValueError: x must have at most 4194304 bytes, got 4194306",
    }
    assert seen.keys() == expected.keys()
    for name, text in expected.items():
        assert seen[name].startswith(text), (name, seen[name])


# The group


def join(rank, directory):
    """Without GPUs nobody connects, all for the same reason, and sums go by gloo: those of the operator, too."""
    group = dist.group.WORLD
    said = all_reduce.connect(group, torch.device("cuda", 0))
    assert said.startswith("by gloo (rank 0: CUDA: "), said
    assert dict(all_reduce._connected) == {}
    all_reduce.disconnect(group)
    for call in (all_reduce.all_reduce_, lambda x, group: torch.ops.qlinear.all_reduce_(x, group.group_name)):
        x = torch.arange(6.0).view(2, 3) + rank
        assert call(x, group) is None
        assert torch.equal(x, 2 * torch.arange(6.0).view(2, 3) + 1)
    torch.library.opcheck(torch.ops.qlinear.all_reduce_.default, (torch.ones(3), group.group_name))


def test_a_group_without_gpus_sums_by_its_backend(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    spawn(join, tmp_path, world=2)
