"""How many times as fast as fp16 a whole model runs, by format: three bars each, and what is asked."""

from __future__ import annotations

from pathlib import Path

_COLORS = {"1": "tab:blue", "16": "tab:orange", "prompt": "tab:green"}
_LABELS = {"1": "batch 1", "16": "batch 16", "prompt": "prompt of 2,048 tokens"}


def save(content: dict, file: Path) -> None:
    """A PNG of a run's rows. Says so, and makes none, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {file.name}: it needs matplotlib; `python -m benchmarks model --rewrite FILE.json` makes it later")
        return
    rows = content["rows"]
    figure = Figure(figsize=(2 + 1.3 * len(rows), 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (key, label) in enumerate(_LABELS.items()):
        places = [at + (i - 1) * 0.27 for at in range(len(rows))]
        values = [row.get(key, {}).get("x_fp16", 0) for row in rows]
        drawn = axes.bar(places, values, 0.25, color=_COLORS[key], label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    for at, row in enumerate(rows):
        bound = row["asked"]["1"]
        axes.plot([at - 0.4, at - 0.14], [bound, bound], color="black", linewidth=1.5)
    axes.axhline(1, color="gray", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(rows)), [row["format"] for row in rows])
    axes.set_ylabel("times as fast as fp16")
    axes.legend(fontsize=8)
    axes.set_title(f"Llama-3-8B's shape on one {content['about']['gpu']} (black: asked at batch 1)", fontsize=10)
    figure.savefig(file, dpi=110)
