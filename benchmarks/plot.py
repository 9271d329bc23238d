"""Time over M: one panel a shape, log-log, with the floor, F.linear and the peers."""

from __future__ import annotations

from pathlib import Path

# Families share a color; peers are dashed.
_COLORS = {
    "gptq-4": "tab:blue",
    "awq": "tab:cyan",
    "eetq": "tab:red",
    "gptq-8": "tab:orange",
    "nf4": "tab:green",
    "nf4-double": "tab:olive",
    "fp4": "yellowgreen",
    "fp4-double": "darkkhaki",
    "gptq-3": "tab:purple",
    "gptq-2": "tab:pink",
    "bitsandbytes-nf4": "tab:green",
    "bitsandbytes-nf4-double": "tab:olive",
    "torch-int4": "tab:blue",
}
_FLOORS = ("gptq-4", "eetq")


def _line(axes, rows: list[dict], name: str) -> None:
    own = sorted((row for row in rows if row["format"] == name), key=lambda row: row["m"])
    peer = name.startswith(("bitsandbytes", "torch"))
    ms, us = [row["m"] for row in own], [row["us"] for row in own]
    axes.plot(ms, us, "--" if peer else "-", marker=".", color=_COLORS.get(name), label=name, linewidth=1.2)
    floors = [row["floor_us"] for row in own if "floor_us" in row]
    if name in _FLOORS and floors:
        axes.axhline(min(floors), color=_COLORS[name], linestyle=":", linewidth=1, label=f"floor of {name}")


def save(content: dict, file: Path) -> None:
    """A PNG of a run's rows. Says so, and makes none, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {file.name}: it needs matplotlib; `python -m benchmarks rewrite FILE.json` makes it later")
        return
    shapes = list(dict.fromkeys((row["k"], row["n"]) for row in content["rows"]))
    if not shapes:
        return
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(6 * columns, 5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (k, n) in zip(panels, shapes, strict=False):
        rows = [row for row in content["rows"] if (row["k"], row["n"]) == (k, n) and "act-order" not in row["format"]]
        linear = {row["m"]: row["linear_us"] for row in rows}
        ms = sorted(linear)
        axes.plot(ms, [linear[m] for m in ms], color="black", marker=".", label="F.linear fp16", linewidth=1.6)
        for name in dict.fromkeys(row["format"] for row in rows):
            _line(axes, rows, name)
        axes.set(xscale="log", yscale="log", title=f"K={k}, N={n}", xlabel="M (tokens)", ylabel="us a call")
        axes.set_xticks(ms, [str(m) for m in ms])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(shapes) :]:
        axes.set_visible(False)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"Products on one {content['about']['gpu']}, weights cold, CUDA graphs")
    figure.savefig(file, dpi=110)
