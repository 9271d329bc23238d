"""Times and ratios on this machine. Run it from the repository's root."""

import argparse
from pathlib import Path


def _shape(text: str) -> tuple[int, int]:
    k, n = (int(size) for size in text.split("x"))
    return k, n


def _cpu(options: argparse.Namespace) -> None:
    from benchmarks import cpu

    cpu.run(options.shapes, options.formats, options.m, options.dtypes, options.ring, options.json, options.save)


def _cuda(options: argparse.Namespace) -> None:
    from benchmarks import cuda

    formats = tuple(options.formats or cuda.SUBJECTS)
    if unknown := set(formats) - set(cuda.SUBJECTS):
        raise SystemExit(f"no format {', '.join(sorted(unknown))}; there are {', '.join(cuda.SUBJECTS)}")
    if unknown := set(options.parts or ()) - set(cuda.PARTS):
        raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(cuda.PARTS)}")
    cuda.run(
        cuda.Options(
            shapes=tuple(options.shapes or cuda.SHAPES),
            formats=formats,
            ms=tuple(options.m or cuda.MS),
            parts=tuple(options.parts or cuda.PARTS),
            rounds=options.rounds,
            json=options.json,
            save=options.save,
        )
    )


def _tune(options: argparse.Namespace) -> None:
    from benchmarks import cuda, tune

    formats = tuple(options.formats or tune.FORMATS)
    tune.run(tuple(options.shapes or cuda.SHAPES), formats, tuple(options.m or cuda.MS), options.json)


def _rewrite(options: argparse.Namespace) -> None:
    from benchmarks import cuda_report

    cuda_report.rewrite(options.files)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="products on the CPU against the fastest F.linear")
    cuda = commands.add_parser("cuda", help="products on a GPU against the read floor and F.linear in fp16")
    tune = commands.add_parser("tune", help="every kernel that could run a product on a GPU, timed")
    for command in (cpu, cuda, tune):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
        command.add_argument("--formats", nargs="+", metavar="NAME", help="some of the formats and peers")
    for command in (cpu, cuda):
        command.add_argument("--save", action="store_true", help="write them, with tables, into benchmarks/results")
    cpu.add_argument("--shapes", nargs="+", type=_shape, default=[(4096, 11008), (4096, 4096)], metavar="KxN")
    cpu.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 128], metavar="ROWS")
    cpu.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], metavar="DTYPE")
    cpu.add_argument("--ring", type=float, default=1.0, metavar="GIB", help="weights that one layer's turns go round")
    cpu.set_defaults(run=_cpu)
    for command in (cuda, tune):
        command.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN")
        command.add_argument("--m", nargs="+", type=int, metavar="ROWS")
    tune.set_defaults(run=_tune)
    cuda.add_argument("--parts", nargs="+", metavar="PART", help="of layers, chains, pairs, host")
    cuda.add_argument("--rounds", type=int, default=15, help="replays of each graph that count (default: 15)")
    cuda.set_defaults(run=_cuda)
    rewrite = commands.add_parser("rewrite", help="tables and plot anew from the JSON of runs on a GPU")
    rewrite.add_argument("files", type=Path, nargs="+", metavar="FILE")
    rewrite.set_defaults(run=_rewrite)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
