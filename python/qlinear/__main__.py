"""python -m qlinear demo | info | inspect | quantize | convert"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any


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


def _quantize(arguments: argparse.Namespace) -> int:
    from .quantizing import quantize_checkpoint

    options = {
        name: value
        for name in ("group_size", "search_scales", "threshold", "blocksize", "max_shard_size")
        if (value := getattr(arguments, name)) is not None
    }
    skip = ("lm_head",) if arguments.skip is None else arguments.skip
    return _rewrite(arguments, lambda *ends, **bar: quantize_checkpoint(*ends, skip=skip, **options, **bar))


def _convert(arguments: argparse.Namespace) -> int:
    from .converting import convert_checkpoint

    options = {} if arguments.max_shard_size is None else {"max_shard_size": arguments.max_shard_size}
    return _rewrite(arguments, lambda *ends, **bar: convert_checkpoint(*ends, **options, **bar))


def _rewrite(arguments: argparse.Namespace, work: Callable[..., Any]) -> int:
    from . import rewriting

    try:
        report = work(arguments.source, arguments.directory, arguments.to, progress=False if arguments.json else None)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"qlinear {arguments.command}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(rewriting.as_dict(report), indent=2))
    else:
        rewriting.print_report(report)
    return 0


def _add_rewriting(commands: Any) -> list[argparse.ArgumentParser]:
    quantize = commands.add_parser("quantize", help="round a checkpoint's linear layers to a format, into a directory")
    convert = commands.add_parser("convert", help="write a quantized checkpoint in another format, where it is exact")
    for command, run in ((quantize, _quantize), (convert, _convert)):
        command.add_argument("source", metavar="SRC", help="a directory with safetensors files")
        command.add_argument("directory", metavar="DST", help="the directory to write, which must not exist")
        command.add_argument("--max-shard-size", help="of one file, as 5GB (default)")
        command.set_defaults(run=run, command=command.prog.rpartition(" ")[2])
    quantize.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="gptq-2, gptq-3, gptq-4, gptq-8, awq, eetq, nf4, fp4, int8, fp8 (a scale for each output), fp8-tensor or "
        "fp8-block",
    )
    quantize.add_argument("--skip", nargs="*", help="modules, or parts of their names, to leave out (default: lm_head)")
    quantize.add_argument("--group-size", type=int, help="of gptq and awq (default: 128)")
    quantize.add_argument("--blocksize", type=int, help="of nf4 and fp4 (default: 64)")
    quantize.add_argument("--threshold", type=float, help="of int8's outliers (default: 6)")
    quantize.add_argument(
        "--search-scales", action="store_true", default=None, help="gptq, awq, nf4, fp4: ranges of least squared error"
    )
    convert.add_argument("--to", required=True, metavar="FORMAT", help="gptq, gptq_v2, awq, int8 or eetq")
    return [quantize, convert]


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
    for command in (demo, info, inspect, *_add_rewriting(commands)):
        command.add_argument("--json", action="store_true", help="print JSON for programs")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
