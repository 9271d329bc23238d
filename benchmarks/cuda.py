"""Products on an NVIDIA GPU: time, the ratio to the read floor and to F.linear in fp16, and what was asked for.

Real layers through their public interface. See timing.py for how a time is taken and bars.py for what is asked. In the
table of layers a product may not start while the one before it ends: each is measured as a launch by itself, as the
floor is. The chains allow it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import qlinear._qlinear as _qlinear
from benchmarks import bars, cuda_report, report
from benchmarks.cuda_layers import DEVIATION, SUBJECTS, Layer
from benchmarks.floor import Reader
from benchmarks.nvrtc import NvrtcError
from qlinear import timing

SHAPES = ((4096, 6144), (4096, 28672), (14336, 4096), (8192, 10240), (8192, 57344), (28672, 8192))
MS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
PARTS = ("layers", "chains", "pairs", "host")
PAIR_SHAPES = ((4096, 6144), (8192, 10240), (8192, 57344))
HOST_SHAPE = (4096, 4096)
# Up to here the floor is replayed in turns with the layer; above, F.linear and the layer alone, strictly.
FLOOR_M = 16


@dataclass(frozen=True)
class Options:
    shapes: tuple[tuple[int, int], ...]
    formats: tuple[str, ...]
    ms: tuple[int, ...]
    parts: tuple[str, ...]
    rounds: int
    json: Path | None
    save: bool
    minutes: float | None = None


class TimeIsUpError(Exception):
    """No more is to be measured."""


@contextlib.contextmanager
def _launches_by_themselves() -> Iterator[None]:
    before = _qlinear.set_cuda_overlap(False)
    try:
        yield
    finally:
        _qlinear.set_cuda_overlap(before)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class Ring:
    """Copies of one layer, enough of them to be cold."""

    def __init__(self, name: str, k: int, n: int, dtype: torch.dtype) -> None:
        self.subject = subject = SUBJECTS[name]
        first, self.bytes = subject.make(k, n, dtype)
        copies = timing.ring_copies(self.bytes)
        self.layers: list[Layer] = [first, *(subject.make(k, n, dtype)[0] for _ in range(copies - 1))]
        self.k, self.dtype = k, dtype

    def replay(self, m: int) -> timing.Replay:
        x = self.subject.activations(m, self.k, self.dtype)
        return timing.Replay([lambda layer=layer: layer(x) for layer in self.layers], keep=x)


class DenseRing(Ring):
    """F.linear in fp16, the yardstick. Its graphs are kept."""

    def __init__(self, k: int, n: int) -> None:
        copies = timing.ring_copies(2 * k * n)
        weights = [torch.randn(n, k, dtype=torch.float16, device="cuda").mul_(DEVIATION) for _ in range(copies)]
        self.layers = [lambda x, weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]
        self.k, self.dtype, self.bytes, self.subject = k, torch.float16, 2 * k * n, SUBJECTS["eetq"]
        self._replays: dict[int, timing.Replay] = {}

    def replay(self, m: int) -> timing.Replay:
        if m not in self._replays:
            self._replays[m] = super().replay(m)
        return self._replays[m]


class Run:
    def __init__(self, options: Options, console: Console, progress: Progress) -> None:
        self.options, self.console, self.progress = options, console, progress
        self.rows: list[dict] = []
        self.chains: list[dict] = []
        self.pairs: list[dict] = []
        self.host: list[dict] = []
        self.task = progress.add_task("", total=_count(options))
        self.end = time.monotonic() + 60 * (float("inf") if options.minutes is None else options.minutes)
        try:
            self.reader = Reader()
        except NvrtcError as error:
            self.reader = None
            console.print(f"No ratios to the floor: {error}")

    def _step(self, text: str, count: int = 1) -> None:
        if time.monotonic() > self.end:
            raise TimeIsUpError
        self.progress.update(self.task, description=text, advance=count)

    def _ring(self, name: str, k: int, n: int, dtype: torch.dtype) -> Ring | None:
        """None, and a line that says so, where a peer is not installed or does not take the shape."""
        try:
            return Ring(name, k, n, dtype)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            if not SUBJECTS[name].peer:
                raise
            self.console.print(f"{name} is not here at {k}x{n}: {str(error).splitlines()[0]}")
            return None

    def all(self) -> None:
        if "layers" in self.options.parts:
            with _launches_by_themselves():
                self.layers()
        if "chains" in self.options.parts:
            self.chain()
        if "pairs" in self.options.parts:
            self.pair()
        if "host" in self.options.parts:
            self.hosts()

    def layers(self) -> None:
        for k, n in self.options.shapes:
            dense = DenseRing(k, n)
            for name in self.options.formats:
                self._layer(name, k, n, dense)
                _free()
            del dense
            if self.reader:
                self.reader.forget()
            _free()

    def _layer(self, name: str, k: int, n: int, dense: DenseRing) -> None:
        ms = self.options.ms
        ring = self._ring(name, k, n, SUBJECTS[name].dtypes[0])
        if ring is None:
            self._step(name, len(ms))
            return
        for m in ms:
            self._step(f"{k}x{n} {name} M={m}")
            place = {"k": k, "n": n, "m": m, "format": name, "x_dtype": str(ring.dtype)[6:], "bytes": ring.bytes}
            subject, linear = ring.replay(m), dense.replay(m)
            with_floor = self.reader is not None and m <= FLOOR_M
            replays = [*([self.reader.replay(ring.bytes)] if with_floor else []), linear, subject]
            *floor, linear_us, us = timing.alternate(replays, self.options.rounds)
            row = place | {
                "us": timing.median(us),
                "least_us": min(us),
                "linear_us": timing.median(linear_us),
                "x_linear": timing.paired(linear_us, us),
            }
            if floor:
                row |= {"floor_us": timing.median(floor[0]), "x_floor": timing.paired(us, floor[0])}
            self.rows.append(row)

    def chain(self) -> None:
        """Layers that follow each other and may overlap, against one read-only launch by itself."""
        names = [name for name in self.options.formats if name in (*bars.EIGHT, *bars.FOUR, *bars.DOUBLE)]
        for (k, n), name in itertools.product(self.options.shapes, names):
            self._step(f"{k}x{n} {name} in a chain")
            if not self.reader:
                continue
            ring = Ring(name, k, n, torch.float16)
            with _launches_by_themselves():
                alone = ring.replay(1)
            replays = [self.reader.replay(ring.bytes), alone, ring.replay(1)]
            floor, alone_us, us = timing.alternate(replays, self.options.rounds)
            self.chains.append(
                {
                    "k": k,
                    "n": n,
                    "m": 1,
                    "format": name,
                    "bytes": ring.bytes,
                    "us": timing.median(us),
                    "alone_us": timing.median(alone_us),
                    "floor_us": timing.median(floor),
                    "x_floor": timing.paired(us, floor),
                }
            )
            self.reader.forget()
            del ring, alone, replays
            _free()

    def pair(self) -> None:
        for what, name, (k, n), first, second in _pairs(self.options):
            rings = [Ring(*first), Ring(*second)]
            for m in self.options.ms:
                self._step(f"{k}x{n} {name}: {what} M={m}")
                plain_us, us = timing.alternate([ring.replay(m) for ring in rings], self.options.rounds)
                ratio = timing.paired(us, plain_us)
                times = {"plain_us": timing.median(plain_us), "us": timing.median(us), "ratio": ratio}
                bound = bars.PAIRS[what]
                place = {"what": what, "k": k, "n": n, "m": m, "format": name}
                self.pairs.append(place | times | {"bound": bound, "met": ratio <= bound})
            del rings
            _free()

    def hosts(self) -> None:
        k, n = HOST_SHAPE
        weight = torch.randn(n, k, dtype=torch.float16, device="cuda").mul_(DEVIATION)
        for name in self.options.formats:
            self._step(f"host time of {name}")
            dtype = SUBJECTS[name].dtypes[0]
            ring = self._ring(name, k, n, dtype)
            if ring is None:
                continue
            x, layer = torch.randn(1, k, device="cuda").to(dtype), ring.layers[0]
            dense = weight.to(dtype)
            linear_us, us = _host_us([lambda x=x, w=dense: torch.nn.functional.linear(x, w), lambda x=x, f=layer: f(x)])
            ratio = timing.paired(us, linear_us)
            times = {"us": timing.median(us), "linear_us": timing.median(linear_us), "ratio": ratio}
            asked = {} if SUBJECTS[name].peer else {"bound": bars.HOST, "met": ratio <= bars.HOST}
            self.host.append({"k": k, "n": n, "m": 1, "format": name} | times | asked)
            del ring
            _free()


def _host_us(calls: list[Callable[[], object]], rounds: int = 25, block: int = 100) -> list[list[float]]:
    """Microseconds of host time of a call, in blocks by turns, with the GPU idle at each block's start."""
    times: list[list[float]] = [[] for _ in calls]
    for measured in range(rounds + 2):
        for call, own in zip(calls, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(block):
                call()
            spent = time.perf_counter() - start
            if measured >= 2:
                own.append(spent * 1e6 / block)
    torch.cuda.synchronize()
    return times


def odd(name: str, k: int, n: int) -> tuple[int, int]:
    """A little less than k and n: the largest sizes that the format can hold and that no tile divides."""
    if name == "eetq":
        return k - 64, n - 2
    if name.startswith(("nf4", "fp4")):
        return k - 64, n - 3
    return k - 32, n - 8


def _pairs(options: Options) -> Iterator[tuple]:
    """(what, format, shape, arguments of the plain Ring, of the other)."""
    half, brain = torch.float16, torch.bfloat16
    shapes = [shape for shape in options.shapes if shape in PAIR_SHAPES] or options.shapes[:1]
    for k, n in shapes:
        for name in options.formats:
            if SUBJECTS[name].peer or name.endswith("act-order"):
                continue
            if f"{name}-act-order" in SUBJECTS:
                yield "act-order", name, (k, n), (name, k, n, half), (f"{name}-act-order", k, n, half)
            if name in ("gptq-4", "awq", "eetq", "nf4-double"):
                yield "bf16", name, (k, n), (name, k, n, half), (name, k, n, brain)
                yield "odd shape", name, (k, n), (name, k, n, half), (name, *odd(name, k, n), half)


def _count(options: Options) -> int:
    counts = {
        "layers": len(options.shapes) * len(options.formats) * len(options.ms),
        "chains": len(options.shapes) * len(options.formats),
        "pairs": len(list(_pairs(options))) * len(options.ms),
        "host": len(options.formats),
    }
    return sum(counts[part] for part in options.parts)


def _minutes(options: Options) -> float:
    """A guess from the bytes and the operations, for kernels that are as fast as they are meant to be."""
    seconds = 0.0
    for (k, n), m in itertools.product(options.shapes, options.ms):
        call_us = max(2.0 + 2 * k * n / 3.5e6, 2.0 * m * n * k / 5.5e8)
        graph_us = max(timing.GRAPH_US, 4 * call_us)
        layers = len(options.formats) * ("layers" in options.parts)
        seconds += layers * (3 * (options.rounds + timing.WARM_ROUNDS) * graph_us * 1e-6 + 0.1)
    making = sum(0.3 + 4 * timing.l2_bytes() / 3e9 for _ in itertools.product(options.shapes, options.formats))
    seconds += making * len(options.parts)
    seconds += 0.25 * len(list(_pairs(options))) * len(options.ms) * ("pairs" in options.parts)
    return seconds / 60


def _about() -> dict:
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    info = _qlinear.cuda_info()
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_mb": round(timing.l2_bytes() / 1e6, 1),
        "driver": re.sub(r".*\.so\.", "", info["driver"] or ""),
        "architectures": " ".join(info["architectures"]),
        "cuda_of_torch": torch.version.cuda,
    } | report.versions()


def run(options: Options) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here")
    # So that a time limit from outside leaves what was measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=max(Console().width, 200))
    began = time.monotonic()
    console.print(
        f"{_count(options)} measurements, about {_minutes(options):.1f} minutes if nothing is slower than meant"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with torch.inference_mode(), Progress(*columns, console=console, transient=True) as progress:
        measured = Run(options, console, progress)
        try:
            measured.all()
        except (KeyboardInterrupt, TimeIsUpError):
            console.print("Stopped: these are the figures so far.")
    content = {
        "about": _about() | {"minutes": round((time.monotonic() - began) / 60, 1)},
        "rows": measured.rows,
        "chains": measured.chains,
        "pairs": measured.pairs,
        "host": measured.host,
    }
    content = cuda_report.judged(content)
    for table in cuda_report.tables(content):
        table.show(console)
    console.print(f"{content['about']['minutes']} minutes")
    cuda_report.write(content, options.json, options.save)
