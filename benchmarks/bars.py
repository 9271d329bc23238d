"""What the CUDA engine is asked to reach on an H200: one table, and how a measured row is judged by it.

A measure is a number of one layer at one shape and M:

    floor    time over that of a kernel that only reads as many bytes: at most
    linear   F.linear's time in fp16, in alternation with the layer, over the layer's: at least
    gptq-4   time over GPTQ-4's at the same shape and M, both by way of F.linear: at most
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EIGHT = ("eetq", "gptq-8")
FOUR = ("gptq-4", "awq")
DOUBLE = ("nf4-double", "fp4-double")
TABLES = ("nf4", "fp4", *DOUBLE)
FEW = ("gptq-2", "gptq-3")
# With activations of 8 bits.
FP8, FP8_BLOCKS, INT8 = ("fp8",), ("fp8-blocks",), ("int8",)
QUANTIZED_M = (64, 256, 1024, 4096)
ALL = (*EIGHT, *FOUR, *TABLES, *FEW)
DECODE_M = (1, 4, 8, 16)
MIDDLE_M = (32, 64, 128)
LONG_M = (256, 1024, 4096)


@dataclass(frozen=True)
class Bar:
    """The bound is `large` from large_mb of packed bytes on (10^6 bytes), `small` below; None: nothing is asked."""

    formats: tuple[str, ...]
    ms: tuple[int, ...]
    measure: str
    large: float | None
    small: float | None
    large_mb: float

    @property
    def at_least(self) -> bool:
        return self.measure == "linear"

    def bound(self, nbytes: int) -> float | None:
        return self.large if nbytes >= self.large_mb * 1e6 else self.small

    def met(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound


def _linear(formats: tuple[str, ...], large_mb: float, large: Iterable[float], small: Iterable[float]) -> list[Bar]:
    ms = (*MIDDLE_M, *LONG_M)
    return [Bar(formats, (m,), "linear", *of_m, large_mb) for m, *of_m in zip(ms, large, small, strict=True)]


def _quantized(formats: tuple[str, ...], floor: Iterable[tuple], linear: Iterable[tuple]) -> list[Bar]:
    """Each (from 50 MB, below): x the floor at M=1, 4 and 8, 16; x F.linear at each of QUANTIZED_M."""
    decode = [Bar(formats, ms, "floor", *of_m, 50) for ms, of_m in zip(((1,), (4, 8), (16,)), floor, strict=True)]
    return decode + [Bar(formats, (m,), "linear", *of_m, 50) for m, of_m in zip(QUANTIZED_M, linear, strict=True)]


LAYERS = (
    Bar(EIGHT, (1,), "floor", 1.06, 1.15, 40),
    Bar(EIGHT, (4, 8), "floor", 1.15, 1.22, 40),
    Bar(EIGHT, (16,), "floor", 1.2, 1.4, 40),
    Bar(FOUR, (1,), "floor", 1.15, 1.4, 40),
    Bar(FOUR, (4, 8), "floor", 1.25, 1.55, 40),
    Bar(FOUR, (16,), "floor", 1.5, 1.9, 40),
    Bar(DOUBLE, (1,), "floor", 1.3, 1.55, 40),
    Bar(DOUBLE, (4, 8), "floor", 1.4, 1.65, 40),
    Bar(DOUBLE, (16,), "floor", 1.7, 2.1, 40),
    Bar(FEW, DECODE_M, "gptq-4", 1.0, 1.0, 0),
    Bar(("gptq-2",), (1,), "floor", 1.45, None, 30),
    *_linear(FOUR, 25, (2.0, 1.85, 1.4, 1.06, 1.02, 1.02), (1.55, 1.45, 1.12, 1.0, 1.0, 1.0)),
    *_linear(EIGHT, 50, (1.6, 1.6, 1.3, 1.03, 1.01, 1.02), (1.3, 1.25, 1.05, 1.0, 1.0, 1.0)),
    Bar((*TABLES, *FEW), MIDDLE_M, "gptq-4", 1.15, 1.15, 0),
    Bar((*TABLES, *FEW), LONG_M, "gptq-4", 1.05, 1.05, 0),
    Bar((*TABLES, *FEW), (*MIDDLE_M, *LONG_M), "linear", 1.0, 1.0, 0),
    Bar(ALL, DECODE_M, "linear", 1.0, 1.0, 0),
    *_quantized(FP8, ((1.1, 1.3), (1.18, 1.4), (1.3, 1.6)), ((1.65, 1.25), (1.7, 1.3), (1.75, 1.5), (1.8, 1.6))),
    *_quantized(
        FP8_BLOCKS, ((1.15, 1.35), (1.25, 1.5), (1.35, 1.7)), ((1.6, 1.2), (1.6, 1.25), (1.65, 1.4), (1.65, 1.5))
    ),
    *_quantized(INT8, ((1.2, 1.45), (1.3, 1.6), (1.4, 1.8)), ((1.5, 1.15), (1.5, 1.2), (1.5, 1.3), (1.5, 1.4))),
)

# A layer in a chain of layers at M=1, over the floor of a single launch.
CHAIN = (
    Bar(EIGHT, (1,), "floor", 1.0, None, 40),
    Bar(FOUR, (1,), "floor", 1.08, None, 40),
)

# Two layers in alternation, the second's time over the first's: at most.
PAIRS = {"act-order": 1.05, "bf16": 1.05, "odd shape": 1.1}

# Host time of a call over that of F.linear: at most.
HOST = 0.5


def _value(row: dict, measure: str, by_place: dict) -> float | None:
    if measure != "gptq-4":
        return row.get(f"x_{measure}")
    other = by_place.get((row["k"], row["n"], row["m"], "gptq-4"))
    return other["x_linear"] / row["x_linear"] if other else None


def judge(rows: list[dict], bars: Iterable[Bar]) -> list[dict]:
    """Every bar that meets a row: the row's place, the measure, its value, the bound and whether it is met."""
    by_place = {(row["k"], row["n"], row["m"], row["format"]): row for row in rows}
    verdicts = []
    for row in rows:
        for bar in bars:
            if row["format"] not in bar.formats or row["m"] not in bar.ms:
                continue
            bound, value = bar.bound(row["bytes"]), _value(row, bar.measure, by_place)
            if bound is None or value is None:
                continue
            place = {key: row[key] for key in ("k", "n", "m", "format")}
            met = bar.met(value, bound)
            verdicts.append(place | {"measure": bar.measure, "value": value, "bound": bound, "met": met})
    return verdicts
