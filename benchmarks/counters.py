"""What limits products on an NVIDIA GPU: hardware counters of single launches by Nsight Compute, each with its caches
emptied, as the weights of the benchmark's ring are cold. Where no products are named, those that miss their bars by
most in the results at hand: one of each family of formats and kind of M, and F.linear in fp16 beside the long ones."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import qlinear._qlinear as _qlinear
from benchmarks import bars, cuda, report
from benchmarks.cuda_layers import DEVIATION, SUBJECTS, Layer, Subject

FAMILIES = (
    *(bars.FOUR, bars.EIGHT, ("nf4", "fp4"), bars.DOUBLE, ("gptq-3",), ("gptq-2",)),
    *(bars.FP8, bars.FP8_BLOCKS, bars.INT8),
)
ROWS = ((1,), bars.DECODE_M[1:], bars.MIDDLE_M, bars.LONG_M)
# A metric for each column; what the GPU at hand does not have stays empty. %: of what it could do in the time.
METRICS = {
    "ns": "gpu__time_duration.sum",
    "hz": "smsp__cycles_elapsed.avg.per_second",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "alu": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "shared": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active(?:\.ratio)?")
# A kernel of torch's between the products, which tells whose launches are whose.
MARK = "spin_kernel"
LINEAR = "F.linear"


@dataclass(frozen=True, order=True)
class Cell:
    format: str
    k: int
    n: int
    m: int


def worst(results: dict) -> list[Cell]:
    """Of each family and kind of M the cell that is furthest from its bar; and with act-order, and at odd shapes."""
    found: dict[tuple, tuple[float, Cell]] = {}

    def offer(what: tuple | str, miss: float, cell: Cell) -> None:
        key = (what, next(ms for ms in ROWS if cell.m in ms))
        if key not in found or found[key][0] < miss:
            found[key] = (miss, cell)

    for verdict in bars.judge(results["rows"], bars.LAYERS):
        if not verdict["met"]:
            family = next(family for family in FAMILIES if verdict["format"] in family)
            ratio = verdict["value"] / verdict["bound"]
            miss = 1 / ratio if verdict["measure"] == "linear" else ratio
            offer(family, miss, Cell(*(verdict[key] for key in ("format", "k", "n", "m"))))
    for pair in results["pairs"]:
        if pair["met"] or pair["what"] == "bf16":
            continue
        name, k, n = pair["format"], pair["k"], pair["n"]
        if pair["what"] == "act-order":
            name += "-act-order"
        else:
            k, n = cuda.odd(name, k, n)
        offer(pair["what"], pair["ratio"], Cell(name, k, n, pair["m"]))
    cells = {cell for _, cell in found.values()}
    return sorted(cells | {dataclasses.replace(cell, format=LINEAR) for cell in cells if cell.m in bars.LONG_M})


def _linear(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
    weight = torch.randn(n, k, dtype=dtype, device="cuda").mul_(DEVIATION)
    return lambda x: torch.nn.functional.linear(x, weight), weight.nbytes


def launch(cells: Iterable[Cell]) -> None:
    """Each once, for the counters, and once before."""
    made, layer = None, None
    _qlinear.set_cuda_overlap(False)
    with torch.inference_mode():
        for cell in cells:
            print(f"{cell.format} {cell.k}x{cell.n} M={cell.m}", flush=True)
            subject = Subject(_linear) if cell.format == LINEAR else SUBJECTS[cell.format]
            if made != (cell.format, cell.k, cell.n):
                layer = None
                layer, _ = subject.make(cell.k, cell.n, subject.dtypes[0])
                made = (cell.format, cell.k, cell.n)
            x = subject.activations(cell.m, cell.k, subject.dtypes[0])
            layer(x)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            layer(x)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def _metrics(ncu: str) -> list[str]:
    """Those of METRICS, and of stalls, that the GPU has."""
    listed = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=True).stdout
    known = {line.split()[0] for line in listed.splitlines() if line.strip()}
    named = [name for name in METRICS.values() if name.startswith("launch__") or name.split(".")[0] in known]
    stalls = [f"{name}.ratio" for name in sorted(known) if STALL.fullmatch(name) and "not_issued" not in name]
    return named + stalls


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def parse(log: str, cells: list[Cell]) -> list[dict]:
    """A row for each launch, from ncu's log with a table of comma separated values in it."""
    start = log.find('"ID"')
    if start < 0:
        raise SystemExit(f"ncu gave no counters:\n{log[-2000:]}")
    _units, *launches = csv.DictReader(io.StringIO(log[start:]))
    rows: list[dict] = []
    at = -1
    for of in launches:
        if MARK in of["Kernel Name"]:
            at += 1
            continue
        row = dataclasses.asdict(cells[at]) | {"kernel": of["Kernel Name"].split("(")[0]}
        row |= {column: _number(of.get(metric) or "") for column, metric in METRICS.items()}
        stalls = {
            match[1]: _number(value) or 0.0 for name, value in of.items() if name and (match := STALL.fullmatch(name))
        }
        every = sum(stalls.values())
        shares = {name: value / every for name, value in stalls.items() if every and name != "selected"}
        largest = sorted(shares, key=shares.__getitem__, reverse=True)[:3]
        rows.append(row | {"stalls": {name: round(shares[name], 3) for name in largest}})
    if at + 1 != len(cells):
        raise SystemExit(f"ncu saw {at + 1} of {len(cells)} products:\n{log[-2000:]}")
    return rows


def table(rows: list[dict]) -> report.Table:
    shares = ("dram", "l2", "issue", "tensor", "alu", "fma", "shared")
    header = ["format", "shape", "kernel", "M", "us", "MHz", *(f"{name} %" for name in shares)]
    header += ["warps", "registers", "waves", "what warps wait for"]

    def cell(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    cells = []
    for row in rows:
        times = [cell(row["ns"], 1, 1e-3), cell(row["hz"], 0, 1e-6)]
        launched = [cell(row["warps"], 1), cell(row["registers"]), cell(row["waves"], 2)]
        stalls = ", ".join(f"{name} {share:.0%}" for name, share in row["stalls"].items())
        place = [row["format"], f"{row['k']}x{row['n']}", row["kernel"], str(row["m"])]
        cells.append([*place, *times, *(cell(row[name]) for name in shares), *launched, stalls])
    return report.Table("Counters of single launches", header, cells, names=3)


NOTES = [
    "One launch with empty caches, by ncu, whose passes may run at other clocks than the benchmark. %: of what the GPU",
    "could do in that time: bytes of memory and of L2, instructions issued, cycles of the tensor cores, of the integer",
    "and of the fp32 units, wavefronts of shared memory. warps: on a multiprocessor while it works; of the time that",
    "warps spend there the share of the three largest waits.",
]


def run(cells: list[Cell], json_file: Path | None, save: bool) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here")
    ncu = shutil.which("ncu")
    if not ncu:
        raise SystemExit("ncu, Nsight Compute's command, is not on the PATH")
    gpu = torch.cuda.get_device_name()
    if not cells:
        results = report.result_path(f"cuda-{gpu}", ".json")
        if not results.exists():
            raise SystemExit(f"no results of a {gpu} to choose products from: name them")
        cells = worst(json.loads(results.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--clock-control", "none", "--cache-control", "all", "--profile-from-start", "off"]
        options += ["--target-processes", "all", "--csv", "--page", "raw", "--print-units", "base"]
        options += ["--log-file", str(log), "--metrics", ",".join(_metrics(ncu))]
        listed = json.dumps([dataclasses.astuple(cell) for cell in cells])
        done = subprocess.run([ncu, *options, sys.executable, "-m", "benchmarks.counters", listed], check=False)
        text = log.read_text() if log.exists() else ""
        if done.returncode:
            raise SystemExit(f"ncu ended with {done.returncode}:\n{text[-2000:]}")
        rows = parse(text, cells)
    made = table(rows)
    made.show(Console(width=max(Console().width, 220)))
    content = {"about": {"gpu": gpu} | report.versions(), "rows": rows}
    if json_file:
        json_file.write_text(report.document(content))
    if save:
        name = f"counters-{gpu}"
        report.result_path(name, ".json").write_text(report.document(content))
        text = report.markdown(f"What limits products on one {gpu}", content["about"], NOTES, [made])
        report.result_path(name, ".md").write_text(text)


if __name__ == "__main__":
    launch(Cell(*place) for place in json.loads(sys.argv[1]))
