"""`python -m benchmarks cpu`: times and ratios on this machine's processor. Run it from the repository's root."""

import argparse
from pathlib import Path

from benchmarks import cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cpu", help="products on the CPU against the fastest F.linear")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    command.add_argument("--shapes", nargs="+", default=["4096x11008", "4096x4096"], metavar="KxN")
    command.add_argument("--formats", nargs="+", metavar="NAME", help=f"of {', '.join(cpu.SUBJECTS)}")
    command.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 128], metavar="ROWS")
    command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], metavar="DTYPE")
    command.add_argument(
        "--ring", type=float, default=1.0, metavar="GIB", help="weights that one layer's turns go round"
    )
    command.add_argument("--save", action="store_true", help="write benchmarks/results/cpu-<processor>.json and .md")
    options = parser.parse_args()
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in options.shapes]
    cpu.run(shapes, options.formats, options.m, options.dtypes, options.ring, options.json, options.save)


if __name__ == "__main__":
    main()
