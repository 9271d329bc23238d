"""A decode step of Llama-3-70B's stack of blocks in 4 bit on one GPU and on several, the all-reduces included.

Each process has the part of every layer that qlinear.parallelize gives it: heads and the columns between gate and down
shared out evenly, two sums a block. A step is a CUDA graph. Random weights, made on the device."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import qlinear
from benchmarks import report
from benchmarks.llama import LLAMA_3_70B, Cache, Config, CudaGlue, Layer, Llama, MakeLayer, TorchGlue
from qlinear import all_reduce

FORMATS = ("gptq-4", "awq", "nf4-double")
# What several GPUs are asked to be, times as fast as one.
BAR = 1.6
CONTEXT, STEPS = 128, 8

# How a row-parallel layer's parts are summed: as parallelize has it, or by the group's backend.
WAYS = ("parallelize", "backend")


@dataclass(frozen=True)
class Options:
    """device "cpu" is for trying it out: gloo, no graph, and times that mean nothing."""

    formats: tuple[str, ...] = ("gptq-4",)
    config: Config = LLAMA_3_70B
    parts: int = 2
    rounds: int = 7
    device: str = "cuda"
    json: Path | None = None
    save: bool = False


def _make(name: str, k: int, n: int, device: str) -> Layer:
    if device == "cuda":
        from benchmarks import cuda_layers

        return cuda_layers.SUBJECTS[name].make(k, n, torch.float16)[0]
    quantize = {"gptq-4": qlinear.QuantLinear.quantize, "awq": qlinear.AWQLinear.quantize}
    weight = torch.randn(n, k)
    return quantize[name](weight, None) if name in quantize else qlinear.Linear4bit(weight, None, "nf4")


class _Parts:
    """Makes layers whole and keeps this process' parts of them. sums: how those of row-parallel layers are summed."""

    def __init__(self, name: str, device: str, mesh: DeviceMesh) -> None:
        self.name, self.device, self.mesh, self.sums = name, device, mesh, ""

    def __call__(self, layer: str, k: int, n: int) -> Layer:
        is_row, parts = layer.endswith((".o", ".down")), self.mesh.size()
        sizes = (k * parts, n) if is_row else (k, n * parts)
        model = nn.ModuleDict({"layer": _make(self.name, *sizes, self.device)})
        plan = {"layer": "rowwise" if is_row else "colwise"}
        self.sums = qlinear.parallelize(model, self.mesh, plan, progress=False).sums
        return model["layer"]


class _Step:
    """One token through all blocks."""

    def __init__(self, config: Config, options: Options, make: MakeLayer) -> None:
        device = options.device
        dtype = torch.float16 if device == "cuda" else torch.float32
        # The same weights each time and in each process, so that what comes out one way can be held against another's.
        torch.manual_seed(1)
        norms = torch.ones(2 * config.layers + 1, config.hidden, dtype=dtype, device=device)
        nothing = torch.empty(0, device=device)
        glue = CudaGlue() if device == "cuda" else TorchGlue()
        self.llama = Llama(config, make, embedding=nothing, head=lambda x: x, norms=norms, glue=glue)
        self.cache = Cache(config, 1, 256, device, dtype)
        self.cache.place.fill_(CONTEXT)
        torch.manual_seed(0)
        self.x = torch.randn(1, 1, config.hidden, dtype=torch.float32).to(device, dtype)
        self.bytes = sum(layer.nbytes for block in self.llama.blocks for layer in block.values())
        self._graph = None

    def start(self) -> None:
        """Warms up, which every process has to do at the same time, and captures."""
        self._call()
        if self.x.is_cuda:
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._call()

    def _call(self) -> None:
        self.out = self.llama.hidden(self.x.clone(), self.cache)

    def _run(self) -> None:
        self._graph.replay() if self._graph else self._call()

    def times(self, rounds: int) -> list[float]:
        """Milliseconds of a step in each round; every process replays alike."""
        times = []
        for measured in range(rounds + 2):
            began = time.perf_counter()
            if self._graph:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
            for _ in range(STEPS):
                self._run()
            if self._graph:
                end.record()
                end.synchronize()
            spent = start.elapsed_time(end) if self._graph else (time.perf_counter() - began) * 1e3
            if measured >= 2:
                times.append(spent / STEPS)
        if not bool(torch.isfinite(self.out).all()):
            raise RuntimeError("a step's result is not finite")
        return times


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rows_of(name: str, options: Options, mesh: DeviceMesh) -> list[dict]:
    """A format's, in process 0."""
    rows, alone, whole_bytes, first = [], [], 0, None
    if mesh.get_rank() == 0:
        step = _Step(options.config, options, lambda _, k, n: _make(name, k, n, options.device))
        step.start()
        alone, whole_bytes = step.times(options.rounds), step.bytes
        del step
        _free()
    for way in WAYS if options.device == "cuda" else WAYS[:1]:
        make = _Parts(name, options.device, mesh)
        step = _Step(options.config.part(options.parts), options, make)
        if way == "backend":
            all_reduce.disconnect(mesh.get_group())
        dist.barrier()
        step.start()
        dist.barrier()
        times = step.times(options.rounds)
        if mesh.get_rank() == 0:
            ms, one_ms = statistics.median(times), statistics.median(alone)
            sums = make.sums if way == "parallelize" and make.sums else f"by {dist.get_backend()}"
            row = {"format": name, "reduce": way, "sums": sums, "parts": options.parts}
            sizes = {"bytes": whole_bytes, "part_bytes": step.bytes}
            ratio = {"one_ms": one_ms, "ms": ms, "x_one": one_ms / ms, "asked": BAR, "met": one_ms / ms >= BAR}
            rows.append(row | sizes | ratio | ({} if first is None else {"same_bits": torch.equal(step.out, first)}))
        first = step.out.clone() if first is None else first
        del step
        _free()
        dist.barrier()
    return rows


def _process(rank: int, options: Options, rendezvous: str, rows_file: str) -> None:
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=options.parts,
        device_id=torch.device("cuda", rank) if options.device == "cuda" else None,
    )
    mesh = DeviceMesh(options.device, list(range(options.parts)))
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    with torch.inference_mode():
        rows = [row for name in options.formats for row in _rows_of(name, options, mesh)]
    if rank == 0:
        Path(rows_file).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def tables(content: dict) -> list[report.Table]:
    header = ["format", "sums", "GB", "GB of a part", "one GPU, ms", f"{content['parts']} GPUs, ms", "times", ""]
    cells = []
    for row in content["rows"]:
        sizes = [f"{row[key] / 1e9:.2f}" for key in ("bytes", "part_bytes")]
        times = [f"{row['one_ms']:.3f}", f"{row['ms']:.3f}", f"{row['x_one']:.2f}"]
        verdict = f"{row['asked']} {'✓' if row['met'] else '✗'}"
        same = {True: ", the same bits", False: ", other bits"}.get(row.get("same_bits"), "")
        cells.append([row["format"], row["sums"], *sizes, *times, verdict + same])
    return [report.Table(f"A decode step of {content['blocks']} blocks", header, cells, names=2)]


NOTES = [
    f"Llama-3-70B's blocks, one token at {CONTEXT} tokens of context, all layers in one CUDA graph a step, two sums a",
    "block; medians of rounds of replays. Layers are split by qlinear.parallelize, and summed as it has it or, in its",
    "place, by the group's backend alone.",
]


def run(options: Options) -> None:
    if options.device == "cuda" and torch.cuda.device_count() < options.parts:
        raise SystemExit(f"{options.parts} NVIDIA GPUs are needed, torch sees {torch.cuda.device_count()}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        rows_file = f"{directory}/rows.json"
        arguments = (options, f"file://{directory}/rendezvous", rows_file)
        torch.multiprocessing.spawn(_process, arguments, nprocs=options.parts)
        rows = json.loads(Path(rows_file).read_text())
    content = {"about": _about(options), "blocks": options.config.layers, "parts": options.parts, "rows": rows}
    content["about"]["minutes"] = round((time.monotonic() - began) / 60, 2)
    for table in tables(content):
        table.show(Console(width=max(Console().width, 140)))
    if options.json:
        options.json.write_text(report.document(content))
    if options.save:
        gpu = content["about"]["gpu"]
        name = f"parallel-{options.parts}-{gpu}"
        report.result_path(name, ".json").write_text(report.document(content))
        title = f"One and {options.parts} {gpu}"
        text = report.markdown(title, content["about"], NOTES, tables(content))
        report.result_path(name, ".md").write_text(text)


def _about(options: Options) -> dict:
    if options.device != "cuda":
        return {"gpu": "none"} | report.versions()
    from benchmarks import model

    return model.about() | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
