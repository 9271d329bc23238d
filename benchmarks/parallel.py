"""A decode step of Llama-3-70B's stack of blocks in 4 bit on one GPU and on several, the all-reduces included.

Each process has the part of every layer that qlinear.parallelize would give it: heads and the columns between gate and
down shared out evenly, two sums a block. A step is a CUDA graph. Random weights, made on the device."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

import qlinear
from benchmarks import exchange, report
from benchmarks.llama import LLAMA_3_70B, Cache, Config, CudaGlue, Llama, TorchGlue

FORMATS = ("gptq-4", "awq", "nf4-double")
# What several GPUs are asked to be, times as fast as one.
BAR = 1.6
CONTEXT, STEPS = 128, 8

Reduce = Callable[[torch.Tensor], object]


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


def _make(name: str, k: int, n: int, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if device == "cuda":
        from benchmarks import cuda_layers

        return cuda_layers.SUBJECTS[name].make(k, n, torch.float16)[0]
    quantize = {"gptq-4": qlinear.QuantLinear.quantize, "awq": qlinear.AWQLinear.quantize}
    weight = torch.randn(n, k)
    return quantize[name](weight, None) if name in quantize else qlinear.Linear4bit(weight, None, "nf4")


def _all_reduce(x: torch.Tensor) -> object:
    return dist.all_reduce(x)


class _Step:
    """One token through all blocks."""

    def __init__(self, name: str, config: Config, options: Options, reduce: Reduce | None, glue: TorchGlue) -> None:
        device = options.device
        dtype = torch.float16 if device == "cuda" else torch.float32
        # The same weights each time, so that what comes out by one way of summing can be held against the other's.
        torch.manual_seed(1 + dist.get_rank())
        norms = torch.ones(2 * config.layers + 1, config.hidden, dtype=dtype, device=device)
        nothing = torch.empty(0, device=device)
        self.llama = Llama(
            config,
            lambda _, k, n: _make(name, k, n, device),
            embedding=nothing,
            head=lambda x: x,
            norms=norms,
            glue=glue,
            reduce=reduce or (lambda x: None),
        )
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


def _tell(said: object) -> list:
    heard: list = [None] * dist.get_world_size()
    dist.all_gather_object(heard, said)
    return heard


def _ways(options: Options, rank: int) -> dict[str, tuple[Reduce | None, TorchGlue] | str]:
    """How parts are summed, by name; or why not so. Every process comes to the same."""
    if options.device != "cuda":
        return {"gloo": (_all_reduce, TorchGlue())}
    found: dict[str, tuple[Reduce | None, TorchGlue] | str] = {"nccl": (_all_reduce, CudaGlue())}
    if options.parts != 2:
        return found | {"exchange": "is for two GPUs"}
    try:
        addresses = exchange.connected(1, options.config.hidden, rank, _tell)
        return found | {"exchange": (None, exchange.ExchangeGlue(1, *addresses))}
    except exchange.ExchangeError as error:
        return found | {"exchange": str(error)}


def _rows(rank: int, options: Options) -> list[dict]:
    rows = []
    ways = _ways(options, rank)
    plain = ways["nccl" if options.device == "cuda" else "gloo"][1]
    for name in options.formats:
        alone, whole_bytes = [], 0
        if rank == 0:
            step = _Step(name, options.config, options, None, plain)
            step.start()
            alone, whole_bytes = step.times(options.rounds), step.bytes
            del step
            _free()
        dist.barrier()
        first: torch.Tensor | None = None
        for how, way in ways.items():
            row = {"format": name, "reduce": how, "parts": options.parts}
            if isinstance(way, str):
                rows.append(row | {"missing": way})
                continue
            step = _Step(name, options.config.part(options.parts), options, *way)
            dist.barrier()
            step.start()
            dist.barrier()
            times = step.times(options.rounds)
            if rank == 0:
                ms, one_ms = statistics.median(times), statistics.median(alone)
                sizes = {"bytes": whole_bytes, "part_bytes": step.bytes}
                ratio = {"x_one": one_ms / ms, "asked": BAR, "met": one_ms / ms >= BAR}
                same = {} if first is None else {"same_bits": torch.equal(step.out, first)}
                rows.append(row | sizes | {"one_ms": one_ms, "ms": ms} | ratio | same)
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
    with torch.inference_mode():
        rows = _rows(rank, options)
    if rank == 0:
        Path(rows_file).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def tables(content: dict) -> list[report.Table]:
    header = ["format", "all-reduce", "GB", "GB of a part", "one GPU, ms", f"{content['parts']} GPUs, ms", "times", ""]
    cells = []
    for row in content["rows"]:
        if "missing" in row:
            cells.append([row["format"], row["reduce"], "", "", "", "-", "", row["missing"]])
            continue
        sizes = [f"{row[key] / 1e9:.2f}" for key in ("bytes", "part_bytes")]
        times = [f"{row['one_ms']:.3f}", f"{row['ms']:.3f}", f"{row['x_one']:.2f}"]
        verdict = f"{row['asked']} {'✓' if row['met'] else '✗'}"
        same = {True: ", the same bits", False: ", other bits"}.get(row.get("same_bits"), "")
        cells.append([row["format"], row["reduce"], *sizes, *times, verdict + same])
    return [report.Table(f"A decode step of {content['blocks']} blocks", header, cells, names=2)]


NOTES = [
    f"Llama-3-70B's blocks, one token at {CONTEXT} tokens of context, all layers in one CUDA graph a step, two",
    "all-reduces a block; medians of rounds of replays. nccl: NCCL's all-reduce; exchange: parts written into the",
    "other GPU's memory by the kernel that adds them to the residual stream (benchmarks/exchange.py).",
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
