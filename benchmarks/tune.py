"""Every candidate for a product, timed: what the tables of the CUDA engine are made from."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import report
from benchmarks.cuda import Ring
from qlinear import tuning
from qlinear.choices import Problem

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
    header = ["format", "shape", "M", "table's", "us", "best", "us", "gain", "of"]
    cells = []
    for (name, k, n, m), group in itertools.groupby(rows, key=lambda r: (r["format"], r["k"], r["n"], r["m"])):
        tried = list(group)
        best = min(tried, key=lambda row: row["us"])
        names = [f"{row['kernel']} {row['parameter']}" for row in (tried[0], best)]
        gain = f"{100 * (tried[0]['us'] / best['us'] - 1):.1f}%"
        times = [f"{row['us']:.1f}" for row in (tried[0], best)]
        cells.append([name, f"{k}x{n}", str(m), names[0], times[0], names[1], times[1], gain, str(len(tried))])
    return report.Table("The table's choice and the best candidate", header, cells)


def lines(rows: list[dict], gain: float) -> list[str]:
    """Entries of src/cuda/table_*.h: where a candidate beats the engine's own rule by so much."""
    made = []
    for (code, k, n, size, m), group in itertools.groupby(rows, key=_problem_and_rows):
        tried = list(group)
        best = min(tried, key=lambda row: row["us"])
        if tried[0]["us"] >= best["us"] * (1 + gain):
            head, _, tail = best["kernel"].partition("_f16_")
            made.append(f"X({code.upper()}, {n}, {k}, {size}, {m}, {head}, {tail}, {best['parameter']})")
    return made


def _problem_and_rows(row: dict) -> tuple:
    return row["code"], row["k"], row["n"], row["group_size"], row["m"]


def run(
    shapes: tuple[tuple[int, int], ...], formats: tuple[str, ...], ms: tuple[int, ...], json_file: Path | None
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
    console.print("\n".join(lines(rows, gain=0.02)), markup=False, highlight=False)
    if json_file:
        about = {"gpu": torch.cuda.get_device_name()} | report.versions()
        json_file.write_text(report.document({"about": about, "rows": rows}))
