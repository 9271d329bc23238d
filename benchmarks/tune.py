"""Every candidate for a product, timed: what the package's table of choices for a GPU is made from."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import report
from benchmarks.cuda import Ring
from qlinear import _qlinear, choices, tuning
from qlinear.choices import Choice, Problem

# One of each problem: AWQ has GPTQ-4's, FP4 has NF4's.
FORMATS = ("gptq-4", "eetq", "gptq-8", "nf4-double", "gptq-3", "gptq-2")


def _rows(shape: tuple[int, int], name: str, ms: tuple[int, ...], dtype: torch.dtype) -> list[dict]:
    k, n = shape
    ring = Ring(name, k, n, dtype)
    problem = Problem(*ring.layers[0].engine().problem, str(dtype)[6:])
    rows = []
    for m in ms:
        x = torch.randn(m, k, device="cuda").to(dtype)
        for place, (choice, us) in enumerate(tuning.measure(torch.cuda.current_device(), problem, ring.layers, x)):
            row = problem._asdict() | {"format": name, "m": m, "kernel": choice.kernel, "parameter": choice.parameter}
            rows.append(row | {"us": us, "default": place == 0})
    return rows


def _table(rows: list[dict]) -> report.Table:
    header = ["format", "shape", "M", "rule's", "us", "best", "us", "gain", "of"]
    cells = []
    for (name, k, n, m), group in itertools.groupby(rows, key=lambda r: (r["format"], r["k"], r["n"], r["m"])):
        tried = list(group)
        best = min(tried, key=lambda row: row["us"])
        names = [f"{row['kernel']} {row['parameter']}" for row in (tried[0], best)]
        gain = f"{100 * (tried[0]['us'] / best['us'] - 1):.1f}%"
        times = [f"{row['us']:.1f}" for row in (tried[0], best)]
        cells.append([name, f"{k}x{n}", str(m), names[0], times[0], names[1], times[1], gain, str(len(tried))])
    return report.Table("The rule's choice and the best candidate", header, cells)


# Less may be chance.
GAIN = 0.02


def table(rows: list[dict], bf16_kernels: Callable[[Problem, int], Collection[str]]) -> list[Choice]:
    """Where a candidate beats the engine's own rule, which is the first of each product's rows: it, for fp16 as it was
    measured, and its twin for bf16 where bf16_kernels has it among those for the problem."""
    made = []
    for (problem, m), group in itertools.groupby(rows, key=_product):
        tried = list(group)
        best = min(tried, key=lambda row: row["us"])
        if tried[0]["us"] < best["us"] * (1 + GAIN):
            continue
        made.append(Choice(problem, m, best["kernel"], best["parameter"]))
        brain, twin = problem._replace(dtype="bfloat16"), best["kernel"].replace("_f16_", "_bf16_")
        if twin in bf16_kernels(brain, m):
            made.append(Choice(brain, m, twin, best["parameter"]))
    return made


def _product(row: dict) -> tuple[Problem, int]:
    return Problem(*(row[key] for key in Problem._fields)), row["m"]


def _save(rows: list[dict]) -> Path:
    device = torch.cuda.current_device()

    def bf16_kernels(problem: Problem, m: int) -> set[str]:
        return {kernel for kernel, _ in _qlinear.candidates(device, *problem, m)}

    measured = {_product(row) for row in rows}
    measured |= {(problem._replace(dtype="bfloat16"), m) for problem, m in measured}
    return choices.store_table(device, table(rows, bf16_kernels), measured)


def run(
    shapes: tuple[tuple[int, int], ...],
    formats: tuple[str, ...],
    ms: tuple[int, ...],
    json_file: Path | None,
    save: bool,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here")
    console = Console(width=max(Console().width, 200))
    rows: list[dict] = []
    with torch.inference_mode():
        for shape, name in track(list(itertools.product(shapes, formats)), console=console, transient=True):
            rows += _rows(shape, name, ms, torch.float16)
            gc.collect()
            torch.cuda.empty_cache()
    _table(rows).show(console)
    if save:
        console.print(f"written: {_save(rows)}")
    if json_file:
        about = {"gpu": torch.cuda.get_device_name()} | report.versions()
        json_file.write_text(report.document({"about": about, "rows": rows}))
