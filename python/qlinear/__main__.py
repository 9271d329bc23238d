"""python -m qlinear demo | info | inspect"""

from __future__ import annotations

import argparse
import json
import sys


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    def show(text: str) -> None:
        if not arguments.json:
            print(f"{text} ...", file=sys.stderr, flush=True)

    try:
        rows = demo.run(arguments.device, show=show)
    except (demo.DemoError, NotImplementedError) as error:
        print(f"qlinear demo: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(demo.as_dicts(rows), indent=2))
    else:
        demo.print_table(rows)
    return 1 if any(row.missed for row in rows) else 0


def _info(arguments: argparse.Namespace) -> int:
    from . import info

    found = info.collect()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        info.print_info(found)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from . import inspection

    try:
        found = inspection.collect(arguments.directory)
    except ValueError as error:
        print(f"qlinear inspect: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        inspection.print_found(found)
    return 1 if found["refused"] else 0


def main(argv: list[str] | None = None) -> int:
    """0: all well; 1: a bar of the demo was missed, a layer cannot be loaded; 2: it cannot run here, or read that."""
    parser = argparse.ArgumentParser(prog="python -m qlinear", description="Quantized linear layers for PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="run a real model with each format and compare")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    demo.set_defaults(run=_demo)
    info = commands.add_parser("info", help="show versions, what was found and what is missing")
    info.set_defaults(run=_info)
    inspect = commands.add_parser("inspect", help="show what a checkpoint's layers are, and what would be refused")
    inspect.add_argument("directory", help="a directory with safetensors files")
    inspect.set_defaults(run=_inspect)
    for command in (demo, info, inspect):
        command.add_argument("--json", action="store_true", help="print JSON for programs")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
