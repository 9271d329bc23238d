"""load_checkpoint against safetensors.torch.load_file of the same file, in turns, the file in the page cache.

On the CPU both map the file, so that neither has read it when it returns; a second pair of times includes reading every
byte once, by a copy of each tensor in turn. Memory is what the process holds of its own (RssAnon), sampled while it
loads. On a GPU times include the packing, and memory is what torch's allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qlinear

K = N = 4096
_GROUP = 128


def _random(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype).view(torch.uint8).random_().view(dtype)


def _layer(kind: type, **options) -> dict[str, Tensor]:
    """The tensors of a layer of ours, its codes random."""
    state = kind.empty(K, N, False, device="cpu", **options).state_dict()
    large = max(state, key=lambda name: state[name].nbytes)
    return state | {large: _random(*state[large].shape, dtype=state[large].dtype)}


def _gemv() -> dict[str, Tensor]:
    groups = K // _GROUP
    return {
        "qweight": _random(N, K // 8),
        "qzeros": _random(N, groups // 8),
        "scales": torch.rand(N, groups, dtype=torch.float16),
    }


def _pack_quantized() -> dict[str, Tensor]:
    return {
        "weight_packed": _random(N, K // 8),
        "weight_scale": torch.rand(N, K // _GROUP, dtype=torch.float16),
        "weight_shape": torch.tensor([N, K]),
    }


# Of the first the layers take the files' tensors as they are, the last two are converted.
SUBJECTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "gptq-4": lambda: _layer(qlinear.QuantLinear),
    "awq": lambda: _layer(qlinear.AWQLinear),
    "eetq": lambda: _layer(qlinear.EETQLinear),
    "int8": lambda: _layer(qlinear.Linear8bitLt),
    "nf4": lambda: _layer(qlinear.Linear4bit),
    "fp8": lambda: _layer(qlinear.Fp8Linear),
    "awq-gemv": _gemv,
    "pack-quantized": _pack_quantized,
}


@dataclass
class Row:
    """Times in ms, medians; memory in MB: of the finished model and, while it was loaded, beyond that."""

    format: str
    file_mb: float
    layers: int
    load_file: float
    load_checkpoint: float
    load_file_read: float
    load_checkpoint_read: float
    model_mb: float
    beyond_mb: float
    largest_mb: float

    @property
    def ratio(self) -> float:
        return self.load_checkpoint / self.load_file

    @property
    def ratio_read(self) -> float:
        return self.load_checkpoint_read / self.load_file_read


def _own_mb() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1e3


class _Peak:
    """The most memory while the block runs."""

    def __enter__(self) -> _Peak:
        self.mb, self._stop = _own_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.mb = max(self.mb, _own_mb())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.mb = max(self.mb, _own_mb())


def _model(layers: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(K, N, bias=False) for _ in range(layers)))


class _PeakOnGPU:
    def __enter__(self) -> _PeakOnGPU:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_) -> None:
        self.mb = torch.cuda.max_memory_allocated() / 1e6


Times = tuple[float, float]


def _timed(load: Callable[[], Any], tensors_of: Callable[[Any], Iterable[Tensor]]) -> Times:
    """(ms until it returns, ms until all is read too)."""
    gc.collect()
    start = time.perf_counter()
    loaded = load()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    middle = time.perf_counter()
    for tensor in tensors_of(loaded):
        tensor.clone()
    return (middle - start) * 1e3, (time.perf_counter() - start) * 1e3


def measure(name: str, size_mb: float, rounds: int, directory: Path, device: str = "cpu") -> Row:
    from safetensors.torch import load_file, save_file

    one = SUBJECTS[name]()
    layer_mb = sum(tensor.nbytes for tensor in one.values()) / 1e6
    layers = max(2, round(size_mb / layer_mb))
    file = directory / "model.safetensors"
    save_file({f"{at}.{key}": tensor.clone() for at in range(layers) for key, tensor in one.items()}, file)

    def ours() -> Times:
        model = _model(layers)
        return _timed(
            lambda: qlinear.load_checkpoint(model, directory, device=device, progress=False),
            lambda _: (*model.parameters(), *model.buffers()),
        )

    def theirs() -> Times:
        return _timed(lambda: load_file(file, device=device), dict.values)

    file.read_bytes()
    theirs(), ours()
    times = [(theirs(), ours()) for _ in range(rounds)]
    model = _model(layers)
    gc.collect()
    # Freed memory that the allocator keeps would hide what the next load takes.
    ctypes.CDLL(None).malloc_trim(0)
    own_mb = _own_mb if device == "cpu" else lambda: torch.cuda.memory_allocated() / 1e6
    before = own_mb()
    with _Peak() if device == "cpu" else _PeakOnGPU() as peak:
        qlinear.load_checkpoint(model, directory, device=device, progress=False)
    finished = own_mb()
    medians = [statistics.median(pair[who][what] for pair in times) for what in (0, 1) for who in (0, 1)]
    return Row(name, file.stat().st_size / 1e6, layers, *medians, finished - before, peak.mb - finished, layer_mb)


def run(names: Iterable[str], size_mb: float, rounds: int, device: str = "cpu") -> list[dict]:
    rows = []
    print("| format | file MB | layers | load_file, load_checkpoint ms | ratio | every byte read | ratio | memory MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            row = measure(name, size_mb, rounds, Path(directory), device)
        rows.append(asdict(row))
        print(
            f"| {row.format} | {row.file_mb:.0f} | {row.layers} | {row.load_file:.1f}, {row.load_checkpoint:.1f} "
            f"| {row.ratio:.2f} | {row.load_file_read:.0f}, {row.load_checkpoint_read:.0f} | {row.ratio_read:.2f} "
            f"| {row.model_mb:.0f}, and {row.beyond_mb:.0f} to load (a layer: {row.largest_mb:.0f}) |",
            flush=True,
        )
    return rows
