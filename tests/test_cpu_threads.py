"""The CPU engine's threads: torch's own, as many as it is told, the same bits by any number, none after a fork."""

import subprocess
import sys

import pytest
import torch
from layer_cases import CASES

from qlinear import _qlinear


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_torch_tells_the_number(threads):
    if _qlinear.cpu_info()["thread_runtime"] == "none":
        pytest.skip("no OpenMP runtime here")
    for number in (1, 2, 3):
        threads(number)
        torch.ones(1 << 16).sum()
        assert _qlinear.cpu_info()["threads"] == number


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_bits_do_not_depend_on_the_number(case, threads):
    torch.manual_seed(3)
    layer = case.make(torch.randn(320, 256), torch.randn(320))
    for rows in (1, 4, 40):
        x = torch.randn(rows, 256)
        results = []
        for number in (1, 2, 3):
            threads(number)
            results.append(layer(x))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_a_child_forked_after_a_product_works():
    # torch's own parallel loops hang in such a child; the layer's are serial there.
    code = """
import os, signal, torch, qlinear
layer = qlinear.EETQLinear(torch.randn(512, 256), None)
x = torch.randn(64, 256)
expected = layer(x)
child = os.fork()
if child == 0:
    signal.alarm(120)
    os._exit(0 if bytes(layer(x).numpy()) == bytes(expected.numpy()) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0
