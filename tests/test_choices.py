"""The file of choices between kernels: what is written is read again, and nothing that is wrong in it does harm."""

import json
import os
import pwd
import types

import pytest

from qlinear import choices
from qlinear.choices import Choice, Problem

WIDE = Problem("int4", 28672, 4096, 128, "float16")
TALL = Problem("table4", 4096, 14336, 64, "bfloat16")
CHOICES = [Choice(WIDE, 1, "ql_a", 132), Choice(WIDE, 64, "ql_b", 0), Choice(TALL, 1, "ql_a", -1)]


class Engine(types.SimpleNamespace):
    """What choices.py uses of the extension; `applied` has the arguments of set_choice."""

    def __init__(self, gpu="NVIDIA H200", driver="/usr/lib/libcuda.so.580.159.04", version="1.2.3"):
        info = {"driver": driver, "driver_version": 13000, "devices": [{"name": gpu}, {"name": gpu}]}
        super().__init__(__version__=version, cuda_info=lambda: info, applied=[], refused=())

    def set_choice(self, *arguments):
        if arguments[-2] in self.refused:
            raise ValueError(f"there is no kernel {arguments[-2]}")
        self.applied.append(arguments)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Begins a new process with this extension."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "TABLES", tmp_path / "tables")

    def begin(**machine):
        engine = Engine(**machine)
        monkeypatch.setattr(choices, "_qlinear", engine)
        monkeypatch.setattr(choices, "_loaded", set())
        return engine

    return begin


def applied(choice, device=0):
    return (device, *choice.problem, choice.m, choice.kernel, choice.parameter)


def test_what_one_process_stores_the_next_applies(start):
    start()
    path = choices.store(0, CHOICES)
    engine = start()
    choices.load(0)
    assert engine.applied == [applied(choice) for choice in CHOICES]
    assert path == choices.file(0)
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_the_name_says_what_the_choices_are_good_for(start, tmp_path):
    start()
    assert choices.file(0) == tmp_path / "qlinear" / "NVIDIA-H200-580.159.04-1.2.3.json"
    start(gpu="NVIDIA L4 / 24 GB", driver=None)
    assert choices.file(0).name == "NVIDIA-L4-24-GB-13000-1.2.3.json"


def test_each_gpu_is_loaded_once(start):
    start()
    choices.store(0, CHOICES[:1])
    engine = start()
    for device in (0, 1, 0, 1):
        choices.load(device)
    assert engine.applied == [applied(CHOICES[0], 0), applied(CHOICES[0], 1)]


def test_no_file_is_no_warning(start, recwarn):
    engine = start()
    choices.load(0)
    assert engine.applied == []
    assert not recwarn.list


def test_a_later_choice_replaces_the_one_for_the_same_product(start):
    start()
    choices.store(0, CHOICES)
    better = CHOICES[1]._replace(kernel="ql_c", parameter=7)
    choices.store(0, [better])
    engine = start()
    choices.load(0)
    assert sorted(engine.applied) == sorted(map(applied, (CHOICES[0], better, CHOICES[2])))


@pytest.mark.parametrize(
    "change",
    [{"gpu": "NVIDIA H100"}, {"driver": "libcuda.so.600.1"}, {"version": "1.2.4"}],
    ids=lambda change: next(iter(change)),
)
def test_the_file_of_another_machine_is_left_alone(start, change):
    start(**change)
    foreign = choices.store(0, CHOICES)
    engine = start()
    os.replace(foreign, choices.file(0))
    with pytest.warns(RuntimeWarning, match="ignored"):
        choices.load(0)
    assert engine.applied == []


def entry(**change):
    return CHOICES[0].problem._asdict() | {"m": 1, "kernel": "ql_a", "parameter": 1} | change


BROKEN = {
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "not JSON": b"{",
    "a list": b"[]",
    "nested deep": b"[" * 100_000,
    "no choices": lambda head: head,
    "choices no list": lambda head: head | {"choices": {}},
    "entry no object": lambda head: head | {"choices": [1]},
    "field missing": lambda head: head | {"choices": [{"code": "int4"}]},
    "field of a wrong type": lambda head: head | {"choices": [entry(m="1")]},
    "truth for a number": lambda head: head | {"choices": [entry(m=True)]},
    "float for a number": lambda head: head | {"choices": [entry(n=1.0)]},
    "good ones before": lambda head: head | {"choices": [entry(), entry(kernel=None)]},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_left_alone_and_written_anew(start, content):
    engine = start()
    path = choices.store(0, CHOICES)
    head = {key: value for key, value in json.loads(path.read_text()).items() if key != "choices"}
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content(head)).encode())
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match=r"\.json is ignored: "):
        choices.load(0)
    assert engine.applied == []
    assert path.read_bytes() == before
    with pytest.warns(RuntimeWarning, match="ignored"):
        choices.store(0, CHOICES[:1])
    engine = start()
    choices.load(0)
    assert engine.applied == [applied(CHOICES[0])]


def test_a_folder_in_the_files_place_is_ignored(start):
    engine = start()
    choices.file(0).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="ignored"):
        choices.load(0)
    assert engine.applied == []


def test_one_choice_that_the_engine_refuses_does_not_stop_the_others(start):
    start()
    choices.store(0, CHOICES)
    engine = start()
    engine.refused = ("ql_b",)
    with pytest.warns(RuntimeWarning, match="no kernel ql_b"):
        choices.load(0)
    assert engine.applied == [applied(CHOICES[0]), applied(CHOICES[2])]


def test_a_write_that_fails_leaves_the_old_file(start, monkeypatch):
    start()
    path = choices.store(0, CHOICES[:1])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        choices.store(0, CHOICES)
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("base", ["", "relative/path"])
def test_without_an_absolute_cache_folder_it_is_the_homes(start, monkeypatch, tmp_path, base):
    start()
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert choices.file(0).parent == tmp_path / "home" / ".cache" / "qlinear"


def test_without_a_home_nothing_is_kept_and_nothing_is_read(start, monkeypatch):
    start()
    store = choices.store_table(0, [CHOICES[0]], [(WIDE, 1)])
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    engine = start()
    choices.load(0)
    assert store.is_file()
    assert engine.applied == [applied(CHOICES[0])]
    with pytest.raises(OSError, match="HOME or XDG_CACHE_HOME"):
        choices.store(0, CHOICES)


def test_the_packages_choices_come_first_and_autotunes_go_over_them(start, tmp_path):
    start()
    assert choices.store_table(0, [CHOICES[0]], [(WIDE, 1)]) == tmp_path / "tables" / "NVIDIA-H200.json"
    choices.store(0, [CHOICES[2]])
    for machine in ({}, {"driver": "/usr/lib/libcuda.so.600.1", "version": "2.0.0"}):
        engine = start(**machine)
        choices.load(0)
        assert engine.applied == [applied(CHOICES[0])] + ([] if machine else [applied(CHOICES[2])])
    engine = start(gpu="NVIDIA H100")
    choices.load(0)
    assert engine.applied == []


def test_a_choice_of_the_package_that_a_build_lacks_is_passed_over(start, recwarn):
    start()
    choices.store_table(0, CHOICES, [])
    engine = start()
    engine.refused = ("ql_b",)
    choices.load(0)
    assert engine.applied == [applied(CHOICES[0]), applied(CHOICES[2])]
    assert not recwarn.list


def test_what_is_measured_anew_replaces_the_packages_choices_for_it_alone(start):
    start()
    choices.store_table(0, CHOICES, [])
    choices.store_table(0, [CHOICES[0]._replace(kernel="ql_c")], [(WIDE, 1), (WIDE, 64)])
    engine = start()
    choices.load(0)
    assert engine.applied == [applied(CHOICES[0]._replace(kernel="ql_c")), applied(CHOICES[2])]
