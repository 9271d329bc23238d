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
    if json_file:
        about = {"gpu": torch.cuda.get_device_name()} | report.versions()
        json_file.write_text(report.document({"about": about, "rows": rows}))
