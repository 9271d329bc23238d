"""What python -m qlinear inspect shows of a directory: its layers by format, their bytes, what cannot be loaded."""

from __future__ import annotations

import os
from typing import Any

from .detect import detect
from .quantization_config import read_config
from .shards import Shards


def collect(directory: str | os.PathLike) -> dict[str, Any]:
    """Everything that is printed, for programs. ValueError where the directory cannot be read."""
    shards = Shards(directory)
    config = read_config(shards.directory)
    found = detect(shards, config)
    layers = [
        {
            "name": layer.name,
            "format": layer.format,
            "storage": layer.storage,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bytes": layer.nbytes,
            "bits_per_weight": _bits(layer.nbytes, layer.in_features * layer.out_features),
        }
        for layer in found.layers.values()
    ]
    return {
        "directory": str(shards.directory),
        "files": [path.name for path in shards.paths],
        "config": {"file": config.source, "quant_method": config.method} if config.method else None,
        "bytes": sum(entry.nbytes for entry in shards.values()),
        "layers": layers,
        "plain": {"tensors": len(found.plain), "bytes": sum(shards[name].nbytes for name in found.plain)},
        "ignored": found.ignored,
        "refused": found.refused,
    }


def _bits(nbytes: int, weights: int) -> float:
    return round(8 * nbytes / weights, 3)


def print_found(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    files, config = len(found["files"]), found["config"]
    said = f"{config['file']} says {config['quant_method']}" if config else "no config speaks of quantization"
    console.print(
        escape(f"{found['directory']}: {files} file{'s' * (files != 1)}, {found['bytes'] / 1e6:.1f} MB; {said}"),
        highlight=False,
    )
    table = Table("format", "storage")
    for title in ("layers", "weights", "MB", "bits/weight"):
        table.add_column(title, justify="right")
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in found["layers"]:
        kinds.setdefault((layer["format"], layer["storage"]), []).append(layer)
    for (form, storage), layers in sorted(kinds.items()):
        weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
        nbytes = sum(layer["bytes"] for layer in layers)
        bits = f"{_bits(nbytes, weights):.2f}"
        table.add_row(form, storage, str(len(layers)), f"{weights:,}", f"{nbytes / 1e6:.1f}", bits)
    plain = found["plain"]
    table.add_row("not quantized", f"{plain['tensors']} tensors", "", "", f"{plain['bytes'] / 1e6:.1f}", "")
    console.print(table)
    if found["refused"]:
        console.print(f"{len(found['refused'])} would be refused:")
    for name, reason in found["refused"].items():
        console.print(f"- {escape(name)}: {escape(reason)}", highlight=False)
