"""Tables on the console, in Markdown, and files of results."""

from __future__ import annotations

import datetime
import json
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table as RichTable

import qlinear._qlinear as _qlinear

RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    """The first `names` columns are text, the others numbers."""

    title: str
    header: list[str]
    cells: list[list[str]]
    names: int = 1

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title)
        for i, column in enumerate(self.header):
            table.add_column(column, justify="left" if i < self.names else "right")
        for row in self.cells:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> list[str]:
        lines = [f"## {self.title}", "", "| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        return [*lines, *("| " + " | ".join(row) + " |" for row in self.cells), ""]


def versions() -> dict[str, str]:
    return {
        "qlinear": _qlinear.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}",
    }


def markdown(title: str, about: dict, notes: list[str], tables: list[Table]) -> str:
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), "", *notes, ""]
    return "\n".join(lines + [line for table in tables for line in table.markdown()])


def document(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


def result_path(name: str, suffix: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + suffix)
