"""The time of a launch that only reads so many cold bytes: what no product can be faster than by itself.

Of some shapes of the launch the fastest counts."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import nvrtc
from qlinear import timing

SOURCE = Path(__file__).with_name("floor.cu")


class Reader:
    """Read-only launches on the current device. NvrtcError where the kernels cannot be made."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.multiprocessors = properties.multi_processor_count
        self.kernels = nvrtc.Kernels(SOURCE, tuple(f"read_{batch}" for batch in (4, 8, 16)))
        self.never = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.best: dict[int, timing.Replay] = {}

    def _launch(self, batch: int, grid: int, threads: int, words: int, count: int) -> None:
        values = (ctypes.c_void_p(words), ctypes.c_longlong(count), ctypes.c_void_p(self.never.data_ptr()))
        self.kernels.launch(f"read_{batch}", (grid,), threads, *values)

    def _forms(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(batch, grid, threads): with 64 or 128 KB in flight on each multiprocessor, and with no loop at all."""
        for batch, threads in ((4, 256), (4, 512), (8, 256), (8, 512), (16, 256)):
            whole = -(-count // (batch * threads))
            flight = [self.multiprocessors * kib * 1024 // (batch * threads * 16) for kib in (64, 128)]
            yield from ((batch, grid, threads) for grid in dict.fromkeys((*flight, whole)) if grid <= whole)

    def replay(self, nbytes: int) -> timing.Replay:
        """The fastest launch that reads nbytes, round a ring of cold copies."""
        size = -(-nbytes // 256) * 256
        if size not in self.best:
            count = size // 16
            copies = timing.ring_copies(size)
            words = torch.randint(-(2**63), 2**63 - 1, (copies, size // 8), device="cuda")
            replays = []
            for form in dict.fromkeys(self._forms(count)):
                products = [functools.partial(self._launch, *form, row.data_ptr(), count) for row in words]
                replays.append(timing.Replay(products, keep=words))
            times = timing.alternate(replays, rounds=5)
            self.best[size] = min(zip(replays, times, strict=True), key=lambda pair: timing.median(pair[1]))[0]
        return self.best[size]

    def forget(self) -> None:
        """Gives the memory of all rings back."""
        self.best.clear()
