"""How a time on the GPU is taken: cold weights, CUDA graphs, medians of replays that alternate with the yardstick's.

A ring of copies of the weight of at least 4 times the L2 makes each call read its weight from memory. A graph of many
calls round the ring has no host time in it. The replays of all that is compared are queued in turns behind a pause of
the GPU, so that it never waits for the host and every one meets the same clocks."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

WARM_ROUNDS = 2
GRAPH_US = 1500.0
MOST_CALLS = 128
_PAUSE_CYCLES = 2_000_000

median = statistics.median


def l2_bytes() -> int:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return getattr(properties, "L2_cache_size", 0) or 64 << 20


def ring_copies(nbytes: int) -> int:
    """Copies of so many bytes that are at least 4 times the L2, or a quarter of the free memory, and 2 at least."""
    free, _ = torch.cuda.mem_get_info()
    return max(2, min(-(-4 * l2_bytes() // nbytes), free // 4 // nbytes))


def _time_eager(ring: list[Call], calls: int) -> float:
    """Microseconds of a call, launched one by one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(calls):
        ring[i % len(ring)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


class Replay:
    """A graph of calls that go round the ring, whole rounds of it, lasting about GRAPH_US where that many fit.

    keep: what the calls need and do not hold themselves."""

    def __init__(self, ring: list[Call], keep: Any = None) -> None:
        for call in ring:
            call()
        torch.cuda.synchronize()
        calls = max(2, min(MOST_CALLS, round(GRAPH_US / _time_eager(ring, 3))))
        rounds = -(-calls // len(ring))
        self.calls = rounds * len(ring)
        self.keep = (ring, keep)
        self.graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it collects garbage and empties the cache, 0.1 s each time.
        with torch.cuda.stream(_capture_stream()):
            self.graph.capture_begin()
            try:
                for _ in range(rounds):
                    for call in ring:
                        call()
            finally:
                self.graph.capture_end()


def alternate(replays: list[Replay], rounds: int) -> list[list[float]]:
    """Microseconds of a call in each round, for each of the graphs, which are replayed by turns."""
    turns = [replay for _ in range(WARM_ROUNDS + rounds) for replay in replays]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(_PAUSE_CYCLES)
    events[0].record()
    for replay, event in zip(turns, events[1:], strict=True):
        replay.graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = [
        start.elapsed_time(end) * 1e3 / replay.calls
        for replay, start, end in zip(turns, events[:-1], events[1:], strict=True)
    ]
    measured = spans[WARM_ROUNDS * len(replays) :]
    return [measured[i :: len(replays)] for i in range(len(replays))]


def paired(over: list[float], under: list[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(over, under, strict=True))
