"""autotune: what it picks and leaves behind, with a GPU and, where its engine is a stand-in, without."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qlinear
from qlinear import choices, timing, tuning
from qlinear.choices import Problem

PROBLEM = Problem("int4", 64, 128, 128, "float16")
CANDIDATES = [("ql_default", 4), ("ql_fast", 2), ("ql_fast", 8), ("ql_slow", 1)]


class Engine:
    """Candidates and the choice that is in force; what a product with it takes, in microseconds."""

    times = {CANDIDATES[0]: 10.0, CANDIDATES[1]: 9.0, CANDIDATES[2]: 7.0, CANDIDATES[3]: 30.0}  # noqa: RUF012

    def __init__(self):
        self.in_force = {}

    def candidates(self, device, *problem_and_m):
        return list(CANDIDATES)

    def set_choice(self, device, code, n, k, group_size, dtype, m, kernel, parameter):
        key = (device, Problem(code, n, k, group_size, dtype), m)
        if kernel is None:
            self.in_force.pop(key, None)
        else:
            self.in_force[key] = (kernel, parameter)


@pytest.fixture
def engine(monkeypatch):
    engine = Engine()

    class Replay:
        def __init__(self, ring, keep=None):
            assert [call() for call in ring] == ["out"] * len(ring)
            self.us = engine.times[engine.in_force[0, PROBLEM, 16]]

    monkeypatch.setattr(tuning, "_qlinear", engine)
    monkeypatch.setattr(choices, "_qlinear", engine)
    monkeypatch.setattr(timing, "Replay", Replay)
    monkeypatch.setattr(timing, "alternate", lambda replays, rounds: [[replay.us] * rounds for replay in replays])
    return engine


def try_candidates():
    ring = [lambda x: "out"] * 3
    return tuning._try(0, PROBLEM, ring, torch.zeros(16, 128))


def test_the_fastest_candidate_is_in_force(engine):
    tried = try_candidates()
    assert engine.in_force == {(0, PROBLEM, 16): CANDIDATES[2]}
    assert (tried.choice.kernel, tried.choice.parameter) == CANDIDATES[2]
    assert (tried.default, tried.default_us, tried.us, tried.candidates) == (CANDIDATES[0], 10.0, 7.0, 4)


def test_a_gain_that_may_be_chance_keeps_the_default(engine, monkeypatch):
    monkeypatch.setattr(engine, "times", engine.times | {CANDIDATES[2]: 9.95, CANDIDATES[1]: 9.99})
    assert (try_candidates().choice.kernel, try_candidates().us) == ("ql_default", 10.0)


def test_one_candidate_is_no_choice(engine, monkeypatch):
    monkeypatch.setattr(engine, "candidates", lambda *_: CANDIDATES[:1])
    assert try_candidates() is None
    assert engine.in_force == {}


def test_an_error_leaves_no_candidate_in_force(engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(timing, "alternate", fail)
    monkeypatch.setattr(timing, "Replay", lambda ring, keep=None: None)
    with pytest.raises(RuntimeError, match="no memory"):
        try_candidates()
    assert engine.in_force == {}


@pytest.mark.parametrize("sizes", [[], [0], [1, -4], [1.0], ["1"], [True]], ids=repr)
def test_batch_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(ValueError, match="batch_sizes"):
        qlinear.autotune(nn.Linear(4, 4), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "float16"], ids=repr)
def test_a_dtype_with_nothing_to_choose_is_refused(dtype):
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16 or None, got"):
        qlinear.autotune(nn.Linear(4, 4), [1], dtype=dtype)


def test_choices_that_cannot_be_kept_are_a_warning(monkeypatch):
    """What was measured is in force and in the report, whatever the disk says."""

    def store(device, found):
        if device == 0:
            raise PermissionError(13, "Permission denied", "/home/.cache/qlinear")
        return Path("kept")

    monkeypatch.setattr(tuning.choices, "store", store)
    report = tuning.Report()
    with pytest.warns(RuntimeWarning, match=r"in this process alone: .*Permission denied.*\.cache"):
        tuning._keep({0: [], 1: []}, report)
    assert report.files == [Path("kept")]


def test_batch_sizes_are_rounded_up_to_those_that_share_a_choice():
    assert tuning._buckets([1, 3, 4, 17, 20, 100]) == [1, 4, 24, 128]


def test_layers_on_the_cpu_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = nn.Sequential(nn.Linear(128, 64))
    qlinear.replace_linear(model, "gptq")
    report = qlinear.autotune(model, [1])
    assert (report.tried, report.files) == ([], [])
    assert report.skipped == [("0", "it is on cpu")]
    assert "0: it is on cpu" in str(report)
    assert list(tmp_path.iterdir()) == []


NEXT_PROCESS = """
import torch, qlinear
from qlinear import _qlinear, choices
set_choice, seen = _qlinear.set_choice, []
choices._qlinear = type("Watched", (), dict(vars(_qlinear), set_choice=lambda *a: (seen.append(a), set_choice(*a))[0]))
layer = qlinear.QuantLinear.quantize(torch.randn(256, 512, device="cuda").half(), None)
assert torch.isfinite(layer(torch.randn(1, 512, device="cuda").half())).all()
print(len(seen))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512), nn.Linear(512, 256)).half().cuda()
    qlinear.replace_linear(model, "gptq")
    x = torch.randn(16, 512, device="cuda").half()
    before = model(x)
    report = qlinear.autotune(model, [1, 16, 200])
    assert len(report.tried) == 6
    assert all(tried.candidates >= 8 for tried in report.tried)
    assert torch.allclose(model(x).float(), before.float(), rtol=2e-2, atol=2e-2)
    assert [file.parent for file in report.files] == [tmp_path / "qlinear"]
    seen = subprocess.run([sys.executable, "-c", NEXT_PROCESS], check=True, capture_output=True, text=True)
    assert seen.stdout.split() == ["6"]
