"""Times and ratios on this machine. Run it from the repository's root."""

import argparse
import itertools
import json
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
            minutes=options.minutes,
        )
    )


def _tune(options: argparse.Namespace) -> None:
    from benchmarks import cuda, tune

    formats = tuple(options.formats or tune.FORMATS)
    tune.run(tuple(options.shapes or cuda.SHAPES), formats, tuple(options.m or cuda.MS), options.json, options.save)


def _model(options: argparse.Namespace) -> None:
    from benchmarks import model

    if options.rewrite:
        model.rewrite(options.rewrite)
        return
    formats = tuple(options.formats or model.MAKERS)
    if unknown := set(formats) - set(model.MAKERS):
        raise SystemExit(f"no format {', '.join(sorted(unknown))}; there are {', '.join(model.MAKERS)}")
    config = model.shortened(options.layers)
    model.run(model.Options(formats, config, options.rounds, options.json, options.save))


def _parallel(options: argparse.Namespace) -> None:
    from benchmarks import parallel

    formats = tuple(options.formats or parallel.Options.formats)
    if unknown := set(formats) - set(parallel.FORMATS):
        raise SystemExit(f"no format {', '.join(sorted(unknown))}; there are {', '.join(parallel.FORMATS)}")
    config = parallel.LLAMA_3_70B._replace(layers=options.layers)
    made = parallel.Options(formats, config, options.gpus, options.rounds, json=options.json, save=options.save)
    parallel.run(made)


def _load(options: argparse.Namespace) -> None:
    from benchmarks import load

    names = tuple(options.formats or load.SUBJECTS)
    if unknown := set(names) - set(load.SUBJECTS):
        raise SystemExit(f"no format {', '.join(sorted(unknown))}; there are {', '.join(load.SUBJECTS)}")
    rows = load.run(names, options.mb, options.rounds, options.device)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _counters(options: argparse.Namespace) -> None:
    from benchmarks import counters, cuda

    formats = options.formats or [name for name, subject in cuda.SUBJECTS.items() if not subject.peer]
    places = itertools.product(formats, options.shapes or cuda.SHAPES, options.m or cuda.MS)
    named = options.shapes or options.formats or options.m
    cells = [counters.Cell(name, k, n, m) for name, (k, n), m in places] if named else []
    counters.run(cells, options.json, options.save)


def _rewrite(options: argparse.Namespace) -> None:
    from benchmarks import cuda_report

    cuda_report.rewrite(options.files)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="products on the CPU against the fastest F.linear")
    cuda = commands.add_parser("cuda", help="products on a GPU against the read floor and F.linear in fp16")
    tune = commands.add_parser("tune", help="every kernel that could run a product on a GPU, timed")
    model = commands.add_parser("model", help="tokens a second of a whole model on a GPU against fp16, and its memory")
    parallel = commands.add_parser("parallel", help="a large model's decode step on one GPU and on several")
    counters = commands.add_parser("counters", help="what limits products on a GPU, by Nsight Compute's counters")
    load = commands.add_parser("load", help="load_checkpoint against safetensors' load_file")
    for command in (cpu, cuda, tune, model, parallel, load, counters):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
        command.add_argument("--formats", nargs="+", metavar="NAME", help="some of the formats and peers")
    for command in (cpu, cuda, model, parallel, counters):
        command.add_argument("--save", action="store_true", help="write them, with tables, into benchmarks/results")
    cpu.add_argument("--shapes", nargs="+", type=_shape, default=[(4096, 11008), (4096, 4096)], metavar="KxN")
    cpu.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 128], metavar="ROWS")
    cpu.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], metavar="DTYPE")
    cpu.add_argument("--ring", type=float, default=1.0, metavar="GIB", help="weights that one layer's turns go round")
    cpu.set_defaults(run=_cpu)
    for command in (cuda, tune, counters):
        command.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN")
        command.add_argument("--m", nargs="+", type=int, metavar="ROWS")
    tune.add_argument("--save", action="store_true", help="make what is faster the package's own choice, in its table")
    tune.set_defaults(run=_tune)
    counters.set_defaults(run=_counters)
    cuda.add_argument("--parts", nargs="+", metavar="PART", help="of layers, chains, pairs, host")
    cuda.add_argument("--rounds", type=int, default=15, help="replays of each graph that count (default: 15)")
    cuda.add_argument("--minutes", type=float, help="stop after so many; what was measured by then is reported")
    cuda.set_defaults(run=_cuda)
    model.add_argument("--layers", type=int, default=32, help="blocks of the model (default: 32, all)")
    model.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    model.add_argument("--rewrite", type=Path, metavar="FILE", help="measure nothing: tables and plot from this JSON")
    model.set_defaults(run=_model)
    parallel.add_argument("--gpus", type=int, default=2, help="how many share a model (default: 2)")
    parallel.add_argument("--layers", type=int, default=80, help="blocks of the model (default: 80, all)")
    parallel.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parallel.set_defaults(run=_parallel)
    load.add_argument("--mb", type=float, default=1000.0, help="size of the file (default: 1000)")
    load.add_argument("--rounds", type=int, default=5, help="loads of each that count (default: 5)")
    load.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to (default: cpu)")
    load.set_defaults(run=_load)
    rewrite = commands.add_parser("rewrite", help="tables and plot anew from the JSON of runs on a GPU")
    rewrite.add_argument("files", type=Path, nargs="+", metavar="FILE")
    rewrite.set_defaults(run=_rewrite)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
