"""The tables of a run on a GPU, its Markdown, its JSON and its plot."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from benchmarks import bars, plot, report
from qlinear import timing


def judged(content: dict) -> dict:
    """The results with what they are judged by bars.py."""
    verdicts = {
        "verdicts": bars.judge(content["rows"], bars.LAYERS),
        "chain_verdicts": bars.judge(content["chains"], bars.CHAIN),
    }
    return content | verdicts


def _cell(row: dict | None, verdicts: list[dict]) -> str:
    if row is None:
        return "-"
    floor = f"{row['x_floor']:.2f}f " if "x_floor" in row else ""
    marks = "" if not verdicts else f" {_mark(all(verdict['met'] for verdict in verdicts))}"
    return f"{row['us']:.1f}: {floor}{row['x_linear']:.2f}x{marks}"


def _layer_tables(rows: list[dict], verdicts: list[dict]) -> list[report.Table]:
    tables = []
    place = lambda row: tuple(row[key] for key in ("k", "n", "m", "format"))  # noqa: E731
    by_place = {place(row): row for row in rows}
    judged: dict[tuple, list[dict]] = {}
    for verdict in verdicts:
        judged.setdefault(place(verdict), []).append(verdict)
    for k, n in dict.fromkeys((row["k"], row["n"]) for row in rows):
        of_shape = [row for row in rows if (row["k"], row["n"]) == (k, n)]
        ms = sorted({row["m"] for row in of_shape})
        linear = {m: timing.median(row["linear_us"] for row in of_shape if row["m"] == m) for m in ms}
        cells = [["F.linear", f"{2 * k * n / 1e6:.1f}", "", *(f"{linear[m]:.1f}" for m in ms)]]
        for name in dict.fromkeys(row["format"] for row in of_shape):
            first = next(row for row in of_shape if row["format"] == name)
            floor = f"{first['floor_us']:.1f}" if "floor_us" in first else ""
            places = [(k, n, m, name) for m in ms]
            found = [_cell(by_place.get(place), judged.get(place, [])) for place in places]
            cells.append([name, f"{first['bytes'] / 1e6:.1f}", floor, *found])
        tables.append(report.Table(f"K={k}, N={n}", ["format", "MB", "floor us", *(f"M={m}" for m in ms)], cells))
    return tables


def _missed_table(verdicts: list[dict]) -> report.Table:
    missed = [verdict for verdict in verdicts if not verdict["met"]]
    header = ["format", "measure", "shape", "M", "measured", "asked"]
    cells = [
        [v["format"], v["measure"], f"{v['k']}x{v['n']}", str(v["m"]), f"{v['value']:.3f}", f"{v['bound']:.2f}"]
        for v in missed
    ]
    return report.Table(f"Not met: {len(missed)} of {len(verdicts)} bars", header, cells, names=3)


def _mark(met: bool) -> str:
    return "✓" if met else "✗"


def _asked(entry: dict) -> str:
    return f"{entry['bound']:.2f} {_mark(entry['met'])}" if "bound" in entry else ""


def tables(content: dict) -> list[report.Table]:
    """Of a run's results, as its JSON has them."""
    verdicts = content["verdicts"]
    made = _layer_tables(content["rows"], verdicts)
    if content["chains"]:
        header = ["format", "shape", "MB", "floor us", "alone us", "in a chain us", "x floor", "asked"]
        asked = {(v["k"], v["n"], v["format"]): v for v in content["chain_verdicts"]}
        cells = []
        for row in content["chains"]:
            bar = asked.get((row["k"], row["n"], row["format"]))
            times = [f"{row[key]:.1f}" for key in ("floor_us", "alone_us", "us")]
            judged = _asked(bar or {})
            size = f"{row['bytes'] / 1e6:.1f}"
            cells.append([row["format"], f"{row['k']}x{row['n']}", size, *times, f"{row['x_floor']:.2f}", judged])
        made.append(report.Table("Layers in a chain, M=1, each may start as the one before ends", header, cells, 2))
    if content["pairs"]:
        header = ["what", "format", "shape", "M", "plain us", "us", "ratio", "asked"]
        cells = [
            [
                *(p["what"], p["format"], f"{p['k']}x{p['n']}", str(p["m"])),
                *(f"{p['plain_us']:.1f}", f"{p['us']:.1f}", f"{p['ratio']:.3f}", _asked(p)),
            ]
            for p in content["pairs"]
        ]
        made.append(report.Table("In alternation with the plain layer", header, cells, 3))
    if content["host"]:
        header = ["format", "F.linear us", "us", "ratio", "asked"]
        cells = [
            [h["format"], *(f"{h[key]:.2f}" for key in ("linear_us", "us", "ratio")), _asked(h)]
            for h in content["host"]
        ]
        made.append(report.Table("Host time of a call at M=1", header, cells))
    if verdicts:
        made.append(_missed_table(verdicts))
    return made


NOTES = [
    "A cell: microseconds of a call; its ratio to the read floor (f, M up to 16); how many times as fast as F.linear",
    "in fp16, in alternation with it (x); ✓ where all that is asked at that place is met, ✗ where not. Medians of",
    "graph replays, weights cold; GPTQ and AWQ in groups of 128, NF4 and FP4 in blocks of 64; no bias.",
]


def write(content: dict, json_file: Path | None, save: bool) -> None:
    text = report.document(content)
    if json_file:
        json_file.write_text(text)
    if save:
        about = content["about"]
        name = f"cuda-{about['gpu']}"
        report.result_path(name, ".json").write_text(text)
        title = f"Products on one {about['gpu']}"
        report.result_path(name, ".md").write_text(report.markdown(title, about, NOTES, tables(content)))
        plot.save(content, report.result_path(name, ".png"))


def _merged(contents: list[dict]) -> dict:
    """One of several runs' results on the same machine, as of parts that were run apart."""
    first, *others = contents
    for other in others:
        different = [key for key in ("gpu", "driver", "torch", "qlinear") if other["about"][key] != first["about"][key]]
        if different:
            raise SystemExit(f"the runs differ in {', '.join(different)}")
    lists = {key: [row for content in contents for row in content[key]] for key in ("rows", "chains", "pairs", "host")}
    minutes = round(sum(content["about"]["minutes"] for content in contents), 1)
    commands = "; ".join(dict.fromkeys(content["about"]["command"] for content in contents))
    return {"about": first["about"] | {"minutes": minutes, "command": commands}} | lists


def rewrite(files: list[Path]) -> None:
    """Tables, Markdown and plot anew from the JSON of one run or several, judged by the bars as they are now."""
    content = judged(_merged([json.loads(file.read_text()) for file in files]))
    for table in tables(content):
        table.show(Console(width=max(Console().width, 200)))
    write(content, None, True)
