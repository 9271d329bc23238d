"""The benchmarks judge by the bars that are asked for, and their reports say what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(Path(__file__).parent.parent))
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    sys.path.pop(0)


def row(name, m, mb, us=10.0, floor_us=9.0, linear_us=30.0, k=4096, n=28672):
    measured = {"us": us, "least_us": us, "linear_us": linear_us, "x_linear": linear_us / us}
    floor = {"floor_us": floor_us, "x_floor": us / floor_us} if m <= 16 else {}
    return {"k": k, "n": n, "m": m, "format": name, "bytes": int(mb * 1e6)} | measured | floor


ASKED = [
    ("eetq", 1, 117, "floor", 1.06),
    ("eetq", 1, 25, "floor", 1.15),
    ("gptq-8", 8, 84, "floor", 1.15),
    ("gptq-8", 16, 39.9, "floor", 1.4),
    ("gptq-4", 1, 61, "floor", 1.15),
    ("awq", 4, 30.5, "floor", 1.55),
    ("nf4-double", 16, 60.6, "floor", 1.7),
    ("fp4-double", 1, 13, "floor", 1.55),
    ("gptq-2", 1, 31.6, "floor", 1.45),
    ("gptq-2", 1, 22, "floor", None),
    ("gptq-4", 32, 61, "linear", 2.0),
    ("awq", 64, 24, "linear", 1.45),
    ("gptq-4", 4096, 30, "linear", 1.02),
    ("eetq", 128, 58.7, "linear", 1.3),
    ("gptq-8", 1024, 49, "linear", 1.0),
    ("nf4", 32, 61, "linear", 1.0),
    ("gptq-3", 256, 46, "linear", 1.0),
]


@pytest.mark.parametrize(("name", "m", "mb", "measure", "bound"), ASKED)
def test_bounds(benchmarks, name, m, mb, measure, bound):
    bars = benchmarks("bars")
    found = [
        verdict["bound"] for verdict in bars.judge([row(name, m, mb)], bars.LAYERS) if verdict["measure"] == measure
    ]
    assert found == ([] if bound is None else [bound])


def test_at_most_and_at_least(benchmarks):
    bars = benchmarks("bars")

    def verdicts(*rows):
        return {v["measure"]: v["met"] for v in bars.judge(rows, bars.LAYERS) if v["format"] == rows[-1]["format"]}

    assert verdicts(row("eetq", 1, 117, us=9.54)) == {"floor": True, "linear": True}
    assert verdicts(row("eetq", 1, 117, us=9.55)) == {"floor": False, "linear": True}
    assert verdicts(row("gptq-4", 32, 61, us=15.0)) == {"linear": True}
    assert verdicts(row("gptq-4", 32, 61, us=15.1)) == {"linear": False}
    # By way of F.linear: the clocks differ, the layers do not.
    plain, other = row("gptq-4", 64, 61, us=10.0, linear_us=20.0), row("nf4", 64, 61, us=13.0, linear_us=23.0)
    assert verdicts(plain, other) == {"gptq-4": True, "linear": True}
    assert verdicts(plain, row("nf4", 64, 61, us=13.0, linear_us=22.0)) == {"gptq-4": False, "linear": True}
    assert verdicts(row("nf4", 64, 61, us=40.0)) == {"linear": False}


def content(rows):
    about = {"gpu": "a GPU", "driver": "1", "torch": "2", "qlinear": "3", "minutes": 1.0, "command": "c"}
    chains = [
        {"k": 4096, "n": 28672, "m": 1, "format": "eetq", "bytes": 117_000_000}
        | dict.fromkeys(("us", "alone_us", "floor_us", "x_floor"), 1.5)
    ]
    pair = {"what": "bf16", "k": 1, "n": 2, "m": 3, "format": "awq", "plain_us": 1.0, "us": 1.2, "ratio": 1.2}
    host = {"k": 1, "n": 2, "m": 1, "format": "awq", "us": 4.0, "linear_us": 9.0, "ratio": 0.44}
    return {
        "about": about,
        "rows": rows,
        "chains": chains,
        "pairs": [pair | {"bound": 1.05, "met": False}],
        "host": [host | {"bound": 0.5, "met": True}, host | {"format": "torch-int4"}],
    }


def test_a_report_tells_what_is_met(benchmarks):
    report, cuda_report = benchmarks("report"), benchmarks("cuda_report")
    judged = cuda_report.judged(content([row("eetq", 1, 117), row("eetq", 32, 117), row("torch-int4", 1, 61)]))
    made = cuda_report.tables(judged)
    text = report.markdown("Title", judged["about"], cuda_report.NOTES, made)
    assert "| eetq | 117.0 | 9.0 | 10.0: 1.11f 3.00x ✗ | 10.0: 3.00x ✓ |" in text
    assert "| torch-int4 | 61.0 | 9.0 | 10.0: 1.11f 3.00x | - |" in text
    assert "| eetq | floor | 4096x28672 | 1 | 1.111 | 1.06 |" in text
    assert "| bf16 | awq | 1x2 | 3 | 1.0 | 1.2 | 1.200 | 1.05 ✗ |" in text
    assert "| torch-int4 | 9.00 | 4.00 | 0.44 |  |" in text
    assert "1.00 ✗" in text


def test_runs_of_parts_are_put_together(benchmarks, tmp_path, monkeypatch, capsys):
    report, cuda_report, plot = benchmarks("report"), benchmarks("cuda_report"), benchmarks("plot")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot, "save", lambda content, file: None)
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, name in zip(files, ("eetq", "awq"), strict=True):
        file.write_text(json.dumps(content([row(name, 1, 61)])))
    cuda_report.rewrite(files)
    saved = json.loads((tmp_path / "results" / "cuda-a-gpu.json").read_text())
    assert [entry["format"] for entry in saved["rows"]] == ["eetq", "awq"]
    assert saved["about"]["minutes"] == 2.0
    assert (tmp_path / "results" / "cuda-a-gpu.md").read_text().startswith("# Products on one a GPU\n")
    other = content([])
    other["about"]["driver"] = "another"
    files[1].write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="driver"):
        cuda_report.rewrite(files)


def test_a_run_stops_when_its_minutes_are_over(benchmarks, monkeypatch):
    cuda = benchmarks("cuda")
    monkeypatch.setattr(cuda, "Reader", lambda: None)

    class Progress:
        def add_task(self, *arguments, **options):
            return 0

        def update(self, *arguments, **options):
            pass

    def made(minutes):
        options = cuda.Options((), (), (), (), rounds=1, json=None, save=False, minutes=minutes)
        return cuda.Run(options, None, Progress())

    for endless in (None, 60.0):
        made(endless)._step("")
    with pytest.raises(cuda.TimeIsUpError):
        made(0.0)._step("")


def test_a_table_has_what_beats_the_rule(benchmarks):
    tune = benchmarks("tune")
    first, second = (("int4", 64, 128, 128, "float16"), 1), (("int4", 64, 128, 128, "float16"), 16)

    def tried(product, kernel, us):
        problem = dict(zip(tune.Problem._fields, product[0], strict=True))
        return problem | {"m": product[1], "kernel": kernel, "parameter": 3, "us": us}

    rows = [tried(first, "ql_a_f16_8", 10.2), tried(first, "ql_b_f16_8", 10.0), tried(first, "ql_c_f16_8", 11.0)]
    rows += [tried(second, "ql_a_f16_8", 10.1), tried(second, "ql_b_f16_8", 10.0)]
    problem = tune.Problem(*first[0])
    chosen = tune.Choice(problem, 1, "ql_b_f16_8", 3)
    assert tune.table(rows, lambda problem, m: []) == [chosen]
    twin = tune.Choice(problem._replace(dtype="bfloat16"), 1, "ql_b_bf16_8", 3)
    assert tune.table(rows, lambda problem, m: ["ql_b_bf16_8"]) == [chosen, twin]


# ---- counters ----


def test_counters_are_of_what_misses_its_bar_by_most(benchmarks):
    counters = benchmarks("counters")
    rows = [row("gptq-4", 1, 61, us=us, n=n) for us, n in ((12.0, 6144), (13.0, 28672), (9.0, 57344))]
    rows += [row("awq", 4, 61, us=20.0), row("awq", 8, 61, us=19.0), row("gptq-4", 256, 61, us=40.0)]
    rows.append(row("eetq", 4, 117, us=9.0))
    pair = {"k": 4096, "n": 6144, "m": 4, "format": "eetq", "ratio": 1.2, "met": False}
    pairs = [pair | {"what": "act-order", "format": "gptq-4"}, pair | {"what": "odd shape"}, pair | {"what": "bf16"}]
    pairs.append(pair | {"what": "odd shape", "m": 8, "met": True})
    wanted = [
        *(("F.linear", 4096, 28672, 256), ("awq", 4096, 28672, 4), ("eetq", 4032, 6142, 4)),
        *(("gptq-4", 4096, 28672, 1), ("gptq-4", 4096, 28672, 256)),
        ("gptq-4-act-order", 4096, 6144, 4),
    ]
    found = counters.worst({"rows": rows, "pairs": pairs})
    assert found == [counters.Cell(*place) for place in wanted]


NCU_LOG = """==PROF== Profiling "spin_kernel" - 0: 0%....100% - 1 pass
==PROF== Disconnected
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"launch__registers_per_thread","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","ns","%","register/thread","inst","inst","inst"
"0","spin_kernel(long)","1","0","8","0","0","0"
"1","ql_first(ql_params)","1,500","12.5","96","1","2","1"
"2","ql_second(ql_params)","2500","50","128","","n/a","1"
"3","spin_kernel(long)","1","0","8","0","0","0"
"4","ql_third(ql_params)","3500","75","64","3","1","0"
""".replace("\\\n", "")


def test_counters_of_a_log(benchmarks):
    counters = benchmarks("counters")
    cells = [counters.Cell("awq", 1, 2, 3), counters.Cell("eetq", 4, 5, 6)]
    rows = counters.parse(NCU_LOG, cells)
    assert [(of["format"], of["kernel"], of["ns"]) for of in rows] == [
        ("awq", "ql_first", 1500.0),
        ("awq", "ql_second", 2500.0),
        ("eetq", "ql_third", 3500.0),
    ]
    assert rows[0]["stalls"] == {"barrier": 0.5, "wait": 0.25}
    assert rows[2]["stalls"] == {"wait": 0.75, "barrier": 0.25}
    assert (rows[2]["registers"], rows[2]["hz"]) == (64.0, None)
    text = counters.table(rows).markdown()
    line = "| awq | 1x2 | ql_first | 3 | 1.5 | - | 12 | - | - | - | - | - | - | - | 96 | - | barrier 50%, wait 25% |"
    assert line in text
    with pytest.raises(SystemExit, match="1 of 2 products"):
        counters.parse(NCU_LOG[: NCU_LOG.index('"3"')], cells)
    with pytest.raises(SystemExit, match="no counters"):
        counters.parse("==ERROR== no permission", cells)
