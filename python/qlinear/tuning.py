"""autotune: which kernels are fastest for the layers of a model, tried on its GPUs and kept for later processes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import _qlinear, choices, ops, timing
from .choices import Choice, Problem
from .layers._module import QuantizedLinear
from .model import Bar

ROUNDS = 7
# A candidate has to beat the table's choice by this much: less may be chance.
GAIN = 0.01
# Of x in the products that have several kernels.
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tried:
    """One product: the time of what the table chooses and of the best candidate, in microseconds."""

    choice: Choice
    default: tuple[str, int]
    default_us: float
    us: float
    candidates: int

    def __str__(self) -> str:
        code, n, k, group_size, dtype = self.choice.problem
        kept = (self.choice.kernel, self.choice.parameter) == self.default
        what = "as the table says" if kept else f"{self.choice.kernel}, {self.choice.parameter}: {self.us:.1f} us"
        return (
            f"{code} {k}x{n}, groups of {group_size}, {dtype}, up to {self.choice.m} rows: {self.default_us:.1f} us, "
            f"{what} (of {self.candidates})"
        )


@dataclass
class Report:
    """What autotune tried; files: where the choices are kept."""

    tried: list[Tried] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.tried)} products tried, choices kept in {', '.join(map(str, self.files)) or 'no file'}"]
        lines += [f"  {tried}" for tried in self.tried]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped])


def _dtype_of(layer: QuantizedLinear) -> torch.dtype:
    natural = layer.natural_dtype()
    return natural if natural in _DTYPES else torch.float16


def _problems(
    model: nn.Module, dtype: torch.dtype | None, report: Report
) -> dict[tuple[int, Problem], list[QuantizedLinear]]:
    """The layers of each problem on each GPU."""
    found: dict[tuple[int, Problem], list[QuantizedLinear]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        if layer.device.type != "cuda":
            report.skipped.append((name, f"it is on {layer.device}"))
            continue
        packed = getattr(layer.engine(), "problem", None)
        if packed is None:
            report.skipped.append((name, "its weight is not packed: only the base kernels take it"))
            continue
        problem = Problem(*packed, ops.DTYPE_NAMES[dtype or _dtype_of(layer)])
        found.setdefault((layer.device.index, problem), []).append(layer)
    return found


def _cold_ring(layers: list[QuantizedLinear]) -> list[QuantizedLinear]:
    """The layers, and copies of the first, until they do not fit the L2: a model meets each weight cold."""
    wanted = timing.ring_copies(layers[0].nbytes)
    return [*layers[:wanted], *(copy.deepcopy(layers[0]) for _ in range(wanted - len(layers)))]


def measure(
    device: int, problem: Problem, ring: list[QuantizedLinear], x: Tensor, rounds: int = ROUNDS
) -> list[tuple[Choice, float]]:
    """Microseconds of a call with each candidate, the table's choice first. No choice is in force afterwards."""
    calls = [lambda layer=layer: layer(x) for layer in ring]
    m = x.shape[0]
    candidates = [Choice(problem, m, *candidate) for candidate in _qlinear.candidates(device, *problem, m)]
    try:
        replays = []
        for candidate in candidates:
            choices.apply(device, candidate)
            replays.append(timing.Replay(calls, keep=x))
    finally:
        _qlinear.set_choice(device, *problem, m, None, 0)
    times = timing.alternate(replays, rounds)
    return [(candidate, timing.median(us)) for candidate, us in zip(candidates, times, strict=True)]


def _try(device: int, problem: Problem, ring: list[QuantizedLinear], x: Tensor) -> Tried | None:
    """None where there is nothing to choose. The best candidate is in force afterwards, or on an error none."""
    if len(_qlinear.candidates(device, *problem, x.shape[0])) < 2:
        return None
    measured = measure(device, problem, ring, x)
    default, default_us = measured[0]
    choice, us = min(measured, key=lambda one: one[1])
    if us > default_us * (1 - GAIN):
        choice, us = measured[0]
    choices.apply(device, choice)
    return Tried(choice, (default.kernel, default.parameter), default_us, us, len(measured))


def _buckets(batch_sizes: Iterable[int]) -> list[int]:
    sizes = list(batch_sizes)
    if not sizes or any(type(m) is not int or m < 1 for m in sizes):
        raise ValueError(f"batch_sizes must be positive integers, got {sizes!r:.100}")
    return sorted({_qlinear.choice_bucket(m) for m in sizes})


def autotune(
    model: nn.Module,
    batch_sizes: Iterable[int],
    *,
    dtype: torch.dtype | None = None,
    save: bool = True,
    progress: bool | None = None,
) -> Report:
    """Tries the kernels that can run model's layers on its GPUs, for every distinct packed weight and each number of
    rows of x in batch_sizes, rounded up as the choices are. The fastest are in force at once, and with save in every
    later process with the same GPU, driver and version; where their file cannot be written a warning says so.

    dtype: of x, float16 or bfloat16; None is what the weights had before, or the scales'. progress: True or False shows
    a bar or none; None when it takes long. Needs memory for copies of a layer, 4 times the L2 in all.
    """
    buckets = _buckets(batch_sizes)
    if dtype not in (None, *_DTYPES):
        raise TypeError(f"dtype must be float16, bfloat16 or None, got {dtype}")
    report = Report()
    problems = _problems(model, dtype, report)
    bar = Bar(len(problems) * len(buckets), "qlinear: autotune", progress)
    found: dict[int, list[Choice]] = {}
    try:
        with torch.inference_mode():
            for (device, problem), layers in problems.items():
                with torch.cuda.device(device):
                    choices.load(device)
                    ring = _cold_ring(layers)
                    for m in buckets:
                        x = torch.randn(m, problem.k, device="cuda").to(getattr(torch, problem.dtype))
                        tried = _try(device, problem, ring, x)
                        if tried is not None:
                            report.tried.append(tried)
                            found.setdefault(device, []).append(tried.choice)
                        bar.step()
                    del ring
    finally:
        bar.close()
    if save:
        _keep(found, report)
    return report


def _keep(found: dict[int, list[Choice]], report: Report) -> None:
    for device, of_device in found.items():
        try:
            report.files.append(choices.store(device, of_device))
        except OSError as error:
            # The measurements took minutes, and are in force and in the report.
            warnings.warn(f"qlinear: the choices hold in this process alone: {error}", RuntimeWarning, stacklevel=3)
