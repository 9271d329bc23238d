"""A whole model on one NVIDIA GPU: tokens a second at batch 1 and 16 and a prompt, against fp16 in the same run, and
memory.

Llama-3-8B's shape with random weights made on the device: all layers, a static cache, a CUDA graph of a step that feeds
the next with its own token. The embedding and the head are fp16 for all. Some channels of the residual stream are
large, as in real models, so that LLM.int8() has its outliers."""

from __future__ import annotations

import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import qlinear
import qlinear._qlinear as _qlinear
from benchmarks import cuda_layers, model_plot, report
from benchmarks.llama import LLAMA_3_8B, Cache, Config, CudaGlue, Llama, TorchGlue, layer_shapes
from qlinear import timing

DEVIATION = cuda_layers.DEVIATION
# Of LLM.int8()'s: with more, what comes out of the gate would have outliers in every channel, as no real model has.
SMALL_DEVIATION = DEVIATION / 4
BATCHES = (1, 16)
PROMPT = 2048
# Where decoding starts, and how many steps a round has.
CONTEXT, STEPS = 128, 16
OUTLIERS = 6
FOUR, EIGHT = ("gptq-4", "awq", "nf4"), ("eetq", "int8", "fp8")
# Times as fast as fp16, at least, and bytes over the packed ones, at most.
BARS = dict.fromkeys(FOUR, 2.4) | dict.fromkeys(EIGHT, 1.6)
SLOWEST, MEMORY = 1.0, 1.02


def _int8(k: int, n: int) -> torch.nn.Module:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    SCB = (torch.rand(n, device="cuda") + 0.5).mul_(SMALL_DEVIATION * 3**0.5)
    return qlinear.Linear8bitLt.from_tensors({"weight": codes, "SCB": SCB}, threshold=6.0)


def _fp8(k: int, n: int) -> torch.nn.Module:
    codes = torch.randn(n, k, dtype=torch.float16, device="cuda").mul_(100).clamp_(-448, 448)
    scale = (torch.rand(n, 1, device="cuda") + 0.5).mul_(DEVIATION / 100)
    return qlinear.Fp8Linear(codes.to(torch.float8_e4m3fn), None, scale, None, activation="token")


def _weight_only(name: str) -> Callable[[int, int], torch.nn.Module]:
    return lambda k, n: cuda_layers.SUBJECTS[name].make(k, n, torch.float16)[0]


MAKERS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    **{name: _weight_only(name) for name in ("gptq-4", "awq", "nf4", "nf4-double", "eetq")},
    "int8": _int8,
    "fp8": _fp8,
}


def _dense(k: int, n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = torch.empty(n, k, dtype=torch.float16, device="cuda").normal_(0, DEVIATION)
    return lambda x: torch.nn.functional.linear(x, weight)


@dataclass(frozen=True)
class Options:
    formats: tuple[str, ...]
    config: Config
    rounds: int
    json: Path | None
    save: bool


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def norms(config: Config) -> torch.Tensor:
    """The residual stream has OUTLIERS channels that no norm hides."""
    made = torch.ones(2 * config.layers + 1, config.hidden, dtype=torch.float16, device="cuda")
    made[:-1, :: config.hidden // OUTLIERS] = 10
    return made


class Model:
    """One format's: its graphs, what it takes and how it is timed."""

    def __init__(self, config: Config, make: Callable[[int, int], object], parts: dict) -> None:
        _free()
        before = torch.cuda.memory_allocated()
        self.llama = Llama(config, lambda name, k, n: make(k, n), **parts)
        _free()
        self.allocated = torch.cuda.memory_allocated() - before
        self.config = config

    def decoder(self, batch: int) -> Replayed:
        cache = Cache(self.config, batch, 1024, "cuda", torch.float16)
        tokens = torch.randint(0, self.config.vocab, (batch, 1), device="cuda")

        def step() -> None:
            self.llama.glue.pick(tokens, self.llama(tokens, cache), cache)

        return Replayed(step, before=lambda: cache.place.fill_(CONTEXT), count=STEPS)

    def reader(self) -> Replayed:
        cache = Cache(self.config, 1, PROMPT, "cuda", torch.float16)
        tokens = torch.randint(0, self.config.vocab, (1, PROMPT), device="cuda")
        return Replayed(lambda: self.llama(tokens, cache), before=lambda: None, count=1)


class Replayed:
    """A CUDA graph of one call, replayed `count` times a round."""

    def __init__(self, call: Callable[[], object], before: Callable[[], object], count: int) -> None:
        self.before, self.count, self.call = before, count, call
        before()
        call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            call()

    def round(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.before()
        start.record()
        for _ in range(self.count):
            self.graph.replay()
        end.record()
        return start, end


def alternate(subjects: list[Replayed], rounds: int) -> list[list[float]]:
    """Milliseconds of a call in each round, by turns; the first round warms up."""
    events: list[list] = [[] for _ in subjects]
    torch.cuda.synchronize()
    for _ in range(rounds + 1):
        for subject, own in zip(subjects, events, strict=True):
            own.append(subject.round())
        # The queue of launches is finite, and a round may be long.
        torch.cuda.synchronize()
    return [
        [start.elapsed_time(end) / subject.count for start, end in own[1:]]
        for subject, own in zip(subjects, events, strict=True)
    ]


def stored_bytes(config: Config, make: Callable[[int, int], torch.nn.Module]) -> int:
    """Of the checkpoint's tensors of all quantized layers."""
    total = 0
    for k, n in layer_shapes(config).values():
        total += sum(tensor.nbytes for tensor in make(k, n).state_dict().values())
    return total * config.layers


def _measure(dense: dict[str, Replayed], model: Model, rounds: int) -> dict:
    row = {}
    for name, reference in dense.items():
        subject = model.reader() if name == "prompt" else model.decoder(int(name))
        linear_ms, ms = alternate([reference, subject], rounds)
        row[name] = {
            "ms": statistics.median(ms),
            "fp16_ms": statistics.median(linear_ms),
            "x_fp16": timing.paired(linear_ms, ms),
        }
        del subject
        _free()
    return row


def judged(row: dict) -> dict:
    """Which of what is asked of a format it meets."""
    name = row["format"]
    asked = {"1": BARS.get(name, SLOWEST), "16": SLOWEST, "prompt": SLOWEST}
    met = {key: row[key]["x_fp16"] >= bound for key, bound in asked.items() if key in row}
    return row | {"asked": asked, "met": met | {"memory": row["x_memory"] <= MEMORY}}


def _cell(row: dict, key: str, tokens: int) -> str:
    if key not in row:
        return "-"
    mark = "✓" if row["met"][key] else "✗"
    return f"{tokens * 1e3 / row[key]['ms']:.0f}: {row[key]['x_fp16']:.2f}x {mark}"


def tables(content: dict) -> list[report.Table]:
    rows = content["rows"]
    header = ["format", *(f"batch {batch}, tokens/s" for batch in BATCHES), f"prompt of {PROMPT}, tokens/s", "GB", ""]
    fp16 = ["fp16"]
    for key, tokens in (*((str(batch), batch) for batch in BATCHES), ("prompt", PROMPT)):
        times = [row[key]["fp16_ms"] for row in rows if key in row]
        fp16.append(f"{tokens * 1e3 / statistics.median(times):.0f}" if times else "-")
    cells = [[*fp16, f"{content['fp16_bytes'] / 1e9:.2f}", ""]]
    for row in rows:
        measured = [_cell(row, str(batch), batch) for batch in BATCHES] + [_cell(row, "prompt", PROMPT)]
        memory = f"{row['x_memory']:.3f} x its files {'✓' if row['met']['memory'] else '✗'}"
        cells.append([row["format"], *measured, f"{row['allocated'] / 1e9:.2f}", memory])
    return [report.Table("Tokens a second, and how many times as many as fp16", header, cells)]


NOTES = [
    "Random weights in Llama-3-8B's shape, fused projections, a static cache and CUDA graphs; medians of rounds in",
    f"turns with fp16 (F.linear). Decoding from {CONTEXT} tokens of context on. Embedding and head are fp16 and not in",
    "GB, which is what the linear layers of the blocks take. Asked at batch 1: "
    f"{BARS['gptq-4']} x for {', '.join(FOUR)},",
    f"{BARS['eetq']} x for {', '.join(EIGHT)}; {SLOWEST} x at batch {BATCHES[1]} and for the prompt; memory at most",
    f"{MEMORY} x the tensors of the files.",
]


def about() -> dict:
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    info = _qlinear.cuda_info()
    driver = re.sub(r".*\.so\.", "", info["driver"] or "")
    return {"gpu": device.name, "driver": driver, "cuda_of_torch": torch.version.cuda} | report.versions()


def write(content: dict, json_file: Path | None, save: bool) -> None:
    text = report.document(content)
    if json_file:
        json_file.write_text(text)
    if save:
        name = f"model-{content['about']['gpu']}"
        report.result_path(name, ".json").write_text(text)
        title = f"Llama-3-8B's shape on one {content['about']['gpu']}"
        report.result_path(name, ".md").write_text(report.markdown(title, content["about"], NOTES, tables(content)))
        model_plot.save(content, report.result_path(name, ".png"))


def run(options: Options) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here")
    console = Console(width=max(Console().width, 160))
    began = time.monotonic()
    config = options.config
    glue = CudaGlue() if config.head_dim == 128 else TorchGlue()
    rows: list[dict] = []
    with torch.inference_mode():
        parts = {
            "embedding": torch.empty(config.vocab, config.hidden, dtype=torch.float16, device="cuda").normal_(),
            "head": _dense(config.hidden, config.vocab),
            "norms": norms(config),
            "glue": glue,
        }
        fp16 = Model(config, _dense, parts)
        dense = {str(batch): fp16.decoder(batch) for batch in BATCHES} | {"prompt": fp16.reader()}
        for name in options.formats:
            stored = stored_bytes(config, MAKERS[name])
            model = Model(config, MAKERS[name], parts)
            sizes = {"format": name, "allocated": model.allocated, "stored": stored}
            row = judged(sizes | {"x_memory": model.allocated / stored} | _measure(dense, model, options.rounds))
            rows.append(row)
            shown = ", ".join(f"{key} {row[key]['x_fp16']:.2f}x" for key in dense)
            console.print(f"{name}: {shown}, memory {row['x_memory']:.3f} at {time.monotonic() - began:.0f} s")
            del model
            _free()
    content = {
        "about": about() | {"minutes": round((time.monotonic() - began) / 60, 2), "layers": config.layers},
        "fp16_bytes": fp16.allocated,
        "rows": rows,
    }
    for table in tables(content):
        table.show(console)
    write(content, options.json, options.save)


def rewrite(file: Path) -> None:
    """Table and plot anew from the JSON of a run, judged by the bars as they are now."""
    content = json.loads(file.read_text())
    content["rows"] = [judged(row) for row in content["rows"]]
    for table in tables(content):
        table.show(Console(width=160))
    write(content, None, True)


def shortened(layers: int) -> Config:
    return LLAMA_3_8B._replace(layers=layers)
