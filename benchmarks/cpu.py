"""Times of one product on the CPU, weights cold.

Every subject (a layer of qlinear, or a peer) is called on a ring of copies of its weight that is larger than any cache,
so that each call reads its weight from memory as a model's layers do. The yardstick is the fastest F.linear of fp32,
bf16 and fp16 at that shape and M. It is called in turns with the subject, a block of calls each: memory shared with
other guests gives 20 GB/s in one minute and 40 in the next, and so both see the same. A ratio is the median, over the
pairs of blocks, of F.linear's time over the subject's; a time is the median of the calls. Data are random."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import qlinear._qlinear as _qlinear
from benchmarks import report

Product = Callable[[torch.Tensor], torch.Tensor]
GROUP = 128
BLOCK_CALLS, BLOCK_MS, PAIRED_SECONDS = 12, 60.0, 2.0


def _int32(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def _scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


# Each maker takes K and N and gives the packed tensor, of which the ring has copies, and a function that makes a
# product of one copy. The small tensors (scales, zeros) are one and the same around the ring, but for NF4's and FP4's
# absmax.


def gptq(bits: int, act_order: bool = False):
    def make(k: int, n: int):
        zeros, scales = _int32(k // GROUP, n * bits // 32), _scales(k // GROUP, n)
        order = (torch.randperm(k) // GROUP).to(torch.int32) if act_order else None

        def layer(packed: torch.Tensor) -> Product:
            return _qlinear.QuantLinear(packed, zeros, scales, order, bits=bits, group_size=GROUP, zero_format="gptq")

        return _int32(k * bits // 32, n), layer

    return make


def awq(k: int, n: int):
    zeros, scales = _int32(k // GROUP, n // 8), _scales(k // GROUP, n)
    return _int32(k, n // 8), lambda packed: _qlinear.AWQLinear(packed, zeros, scales, group_size=GROUP)


def fourbit(quant_type: str, nested: bool = False):
    def make(k: int, n: int):
        code = torch.tensor(_qlinear.fourbit_code(quant_type))
        blocks = n * k // 64
        absmax, options = _scales(blocks, dtype=torch.float32), {}
        if nested:
            absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
            options = {
                "nested_absmax": _scales((blocks + 255) // 256, dtype=torch.float32),
                "nested_code": torch.tensor(_qlinear.dynamic_map()),
                "nested_offset": 0.05,
            }

        def layer(packed: torch.Tensor) -> Product:
            own = absmax.clone()
            return _qlinear.Linear4bit(packed, own, code, shape=(n, k), blocksize=64, **options)

        return torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8), layer

    return make


def eetq(k: int, n: int):
    scales = _scales(n)
    return _bytes(k, n), lambda packed: _qlinear.EETQLinear(packed, scales)


def int8(k: int, n: int):
    absmax = _scales(n, dtype=torch.float32)
    return _bytes(n, k), lambda packed: _qlinear.Linear8bitLt(packed, absmax, threshold=6.0)


def fp8(activation: str, blocks: bool = False):
    def make(k: int, n: int):
        packed = torch.randn(n, k).to(torch.float8_e4m3fn)
        scales = _scales(n // 128, k // 128, dtype=torch.float32) if blocks else _scales(n, 1, dtype=torch.float32)
        return packed, lambda own: _qlinear.Fp8Linear(own, scales, activation=activation)

    return make


def bitsandbytes_nf4(k: int, n: int):
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(torch.randn(n, k), blocksize=64, quant_type="nf4")
    return packed, lambda own: lambda x: bnb.matmul_4bit(x, own.t(), quant_state=state)


def torch_int4(k: int, n: int):
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 2)
    scales = torch.rand(k // GROUP, n, 2)
    by_dtype = {dtype: scales.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    return packed, lambda own: lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, GROUP, by_dtype[x.dtype])


def torch_int8(k: int, n: int):
    scales = torch.rand(n)
    by_dtype = {dtype: scales.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    return _bytes(n, k), lambda own: lambda x: torch.ops.aten._weight_int8pack_mm(x, own, by_dtype[x.dtype])


SUBJECTS = {
    "gptq-4": gptq(4),
    "awq": awq,
    "nf4": fourbit("nf4"),
    "fp4": fourbit("fp4"),
    "nf4-double": fourbit("nf4", nested=True),
    "gptq-4-act-order": gptq(4, act_order=True),
    "gptq-3": gptq(3),
    "gptq-2": gptq(2),
    "eetq": eetq,
    "gptq-8": gptq(8),
    "int8": int8,
    "fp8-token": fp8("token"),
    "fp8-blocks": fp8("group", blocks=True),
    "bitsandbytes-nf4": bitsandbytes_nf4,
    "torch-int4": torch_int4,
    "torch-int8": torch_int8,
}


def _ring(packed: torch.Tensor, layer: Callable[[torch.Tensor], Product], gib: float) -> list[Product]:
    copies = max(1, -(-int(gib * 2**30) // packed.nbytes))
    return [layer(packed)] + [layer(packed.clone()) for _ in range(copies - 1)]


class Turns:
    """Calls that go round a ring of products: each call is the next copy's."""

    def __init__(self, ring: list[Product], x: torch.Tensor):
        self.ring, self.x, self.next = ring, x, 0
        self.block(2)
        self.estimate_ms = statistics.median(self.block(3))

    def block(self, calls: int) -> list[float]:
        """Milliseconds of each of so many calls."""
        times = []
        for _ in range(calls):
            product = self.ring[self.next % len(self.ring)]
            self.next += 1
            start = time.perf_counter()
            product(self.x)
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def block_length(self) -> int:
        return max(2, min(BLOCK_CALLS, round(BLOCK_MS / self.estimate_ms)))


def _alone(turns: Turns) -> dict[str, float]:
    """Of as many calls as a second holds, at least 7 and at most 60."""
    times = turns.block(max(7, min(60, round(1e3 / turns.estimate_ms))))
    return {"ms": statistics.median(times), "least_ms": min(times)}


def _paired(yardstick: Turns, subject: Turns) -> dict[str, float]:
    """Blocks of the yardstick and of the subject by turns, the one that begins changing each time."""
    times: dict[Turns, list[float]] = {yardstick: [], subject: []}
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < 4 or (len(ratios) < 10 and time.perf_counter() - began < PAIRED_SECONDS):
        of_block = {}
        for turns in (yardstick, subject) if len(ratios) % 2 else (subject, yardstick):
            block = turns.block(turns.block_length())
            of_block[turns] = statistics.median(block)
            times[turns] += block
        ratios.append(of_block[yardstick] / of_block[subject])
    return {
        "ms": statistics.median(times[subject]),
        "least_ms": min(times[subject]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "linear_ms": statistics.median(times[yardstick]),
    }


def _dense_ring(k: int, n: int, dtype: torch.dtype, gib: float) -> list[Product]:
    weight = torch.randn(n, k).to(dtype)
    copies = max(1, -(-int(gib * 2**30) // weight.nbytes))
    weights = [weight] + [weight.clone() for _ in range(copies - 1)]
    return [lambda x, weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]


def _measure(
    k: int, n: int, names: list[str], ms: list[int], dtypes: list[str], gib: float, progress: Progress
) -> list[dict]:
    rows: list[dict] = []
    xs = {
        (m, name): torch.randn(m, k).to(getattr(torch, name)) for m in ms for name in ("float32", "bfloat16", "float16")
    }
    dense = {}
    for dtype in ("float32", "bfloat16", "float16"):
        task = progress.add_task(f"{k}x{n} F.linear {dtype}", total=len(ms))
        dense[dtype] = _dense_ring(k, n, getattr(torch, dtype), gib)
        for m in ms:
            measured = _alone(Turns(dense[dtype], xs[m, dtype]))
            rows.append({"k": k, "n": n, "m": m, "format": "F.linear", "dtype": dtype} | measured)
            progress.advance(task)
    fastest = {m: min((row for row in rows if row["m"] == m), key=lambda row: row["ms"]) for m in ms}
    for row in rows:
        row["ratio"] = fastest[row["m"]]["ms"] / row["ms"]
    yardsticks = {m: Turns(dense[row["dtype"]], xs[m, row["dtype"]]) for m, row in fastest.items()}
    del dense
    for name in names:
        task = progress.add_task(f"{k}x{n} {name}", total=len(ms) * len(dtypes))
        try:
            ring = _ring(*SUBJECTS[name](k, n), gib)
        except (ImportError, RuntimeError, NotImplementedError) as error:
            progress.console.print(f"{name} is not here: {error}")
            continue
        for m in ms:
            for dtype in dtypes:
                progress.advance(task)
                try:
                    measured = _paired(yardsticks[m], Turns(ring, xs[m, dtype]))
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    progress.console.print(f"{name} takes no {dtype} at M={m}: {str(error).splitlines()[0]}")
                    continue
                measured["linear_dtype"] = fastest[m]["dtype"]
                rows.append({"k": k, "n": n, "m": m, "format": name, "dtype": dtype} | measured)
        del ring
    return rows


def _processor() -> dict[str, str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return {
        "processor": field.get("model name", platform.processor() or platform.machine()),
        "family": field.get("cpu family", ""),
        "model": field.get("model", ""),
    }


def _about() -> dict:
    info = _qlinear.cpu_info()
    engine = {"threads": info["threads"], "isa": info["isa"], "thread_runtime": info["thread_runtime"]}
    return _processor() | engine | report.versions()


def _tables(rows: list[dict], ms: list[int]) -> list[report.Table]:
    """A table a shape."""
    tables = []
    for k, n in dict.fromkeys((row["k"], row["n"]) for row in rows):
        of_shape = [row for row in rows if (row["k"], row["n"]) == (k, n)]
        header = ["format", "x"] + [f"M={m}: ms (ratio)" for m in ms]
        cells = []
        for name, dtype in dict.fromkeys((row["format"], row["dtype"]) for row in of_shape):
            by_m = {row["m"]: row for row in of_shape if (row["format"], row["dtype"]) == (name, dtype)}
            cells.append(
                [name, dtype] + [f"{by_m[m]['ms']:.2f} ({by_m[m]['ratio']:.2f})" if m in by_m else "-" for m in ms]
            )
        tables.append(report.Table(f"K={k}, N={n}", header, cells, names=2))
    return tables


def run(
    shapes: list[tuple[int, int]],
    formats: list[str] | None,
    ms: list[int],
    dtypes: list[str],
    gib: float,
    json_file: Path | None,
    save: bool,
) -> None:
    names = formats or list(SUBJECTS)
    if unknown := set(names) - set(SUBJECTS):
        raise SystemExit(f"no format {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    console = Console()
    rows: list[dict] = []
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        for k, n in shapes:
            rows += _measure(k, n, names, ms, dtypes, gib, progress)
    about, tables = _about(), _tables(rows, ms)
    title = f"Products on {about['processor']} ({about['threads']} threads, {about['isa']})"
    console.print(title)
    for table in tables:
        table.show(console)
    document = report.document({"about": about, "rows": rows})
    if json_file:
        json_file.write_text(document)
    if save:
        name = f"cpu-{about['processor']}-family{about['family']}-model{about['model']}"
        note = "Median milliseconds; in brackets: times as fast as the fastest F.linear at that M, in turns with it."
        report.result_path(name, ".json").write_text(document)
        report.result_path(name, ".md").write_text(report.markdown(title, about, [note], tables))
