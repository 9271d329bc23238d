"""Activations whose rows a thread block holds: the codes, scales and outliers that come of reading them twice, which is
what happens to rows that begin anywhere, so the same bits of the product."""

import pytest
import torch
from test_cuda_w8a8 import activations, make, pytestmark  # noqa: F401


def elsewhere(x):
    """The same values two bytes beyond where a load of 16 bytes could begin."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


# 28672: most threads of a block; 32768: the longest row that is held, 32896: no more; 1040: a part of 128 columns.
@pytest.mark.parametrize("K", [128, 1040, 4096, 14336, 28672, 32768, 32896])
@pytest.mark.parametrize("kind", ["token", "group", "int8", "int8-0"])
def test_the_bits_of_rows_that_are_read_twice(kind, K):
    layer = make(kind, K, 136)
    for i, M in enumerate((9, 40, 133, 1500)):
        x = activations(M, K, (torch.float16, torch.bfloat16)[i % 2], outliers=(6, 40, 0)[i % 3])
        x[1] = 0
        x[2] = torch.finfo(x.dtype).smallest_normal / 4
        x[3, ::7] = 2 * x[3, ::7].sign()
        assert torch.equal(layer(x), layer(elsewhere(x)))


@pytest.mark.parametrize("kind", ["token", "group", "int8", "int8-0"])
def test_what_is_no_number(kind):
    layer = make(kind, 1024, 136)
    x = activations(64, 1024, torch.float16)
    x[5, 3], x[6, 700], x[7, 1023] = float("inf"), float("nan"), -float("inf")
    out, expected = layer(x), layer(elsewhere(x))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_outliers_that_move_while_a_graph_is_replayed():
    """The mask is cleared by each launch, the mark of that too."""
    layer = make("int8", 4096, 264)
    inputs = [activations(300, 4096, torch.float16, seed=seed) for seed in range(3)]
    expected = [layer(x) for x in inputs]
    held = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(held)
    for i in (1, 2, 0, 1):
        held.copy_(inputs[i])
        graph.replay()
        assert torch.equal(out, expected[i])


def test_every_row_and_every_value_an_outlier():
    layer = make("int8", 4096, 264)
    for M in (20, 700):
        x = activations(M, 4096, torch.bfloat16)
        x[::3] = 9.0
        assert torch.equal(layer(x), layer(elsewhere(x)))
