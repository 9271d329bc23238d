"""The kernels as the build left them: in their fatbins, for the architectures that were asked for, under their names.

No GPU is needed but where marked. The fatbins are read out of the extension by their headers."""

import re
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import qlinear._qlinear as extension

KERNELS = Path(__file__).parent.parent / "kernels"
SHARED_OBJECT = Path(find_spec("qlinear").submodule_search_locations[0]) / "_qlinear.abi3.so"
INFO = extension.cuda_info()
PTX, CUBIN = 1, 2

needs_kernels = pytest.mark.skipif(not INFO["built"], reason="built without CUDA kernels")
needs_gpu = pytest.mark.skipif(not INFO["devices"], reason=INFO["missing"] or "no GPU")


def listed_kernels():
    """(name, source) of each entry of kernels/variants.h, as the preprocessor sees it."""
    source = '#include "variants.h"\n#define NAME(name, ...) @name, __VA_ARGS__@\nQL_KERNELS(NAME)\n'
    command = ["cc", "-E", "-P", "-I", KERNELS, "-x", "c", "-"]
    expanded = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return re.findall(r"@\s*(\w+), (\w+)[^@]*@", expanded)


LISTED = listed_kernels()
NAMES = [name for name, _ in LISTED]


def embedded_fatbins():
    """The bytes of each, in the order of INFO["images"]: a header of 16 bytes, then the entries. The header has a magic
    number, a version, its own size and that of the rest."""
    data = SHARED_OBJECT.read_bytes()
    for found in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
        (rest,) = struct.unpack_from("<Q", data, found.start() + 8)
        yield data[found.start() : found.start() + 16 + rest]


def entries(fatbin):
    """(kind, architecture) of each entry: kind, version, header's size and size of the rest; the architecture at 28."""
    at = 16
    while at < len(fatbin):
        kind, _, header, size = struct.unpack_from("<HHIQ", fatbin, at)
        (architecture,) = struct.unpack_from("<I", fatbin, at + 28)
        yield kind, architecture
        at += header + size


def test_variant_names_are_unique():
    assert "ql_dequantize" in NAMES
    assert len(set(NAMES)) == len(NAMES)


def test_info_is_consistent():
    assert INFO["built"] == bool(INFO["architectures"]) == bool(INFO["fatbin_bytes"]) == bool(INFO["images"])
    assert bool(INFO["missing"]) != bool(INFO["kernels"])
    assert not INFO["kernels"] or INFO["devices"]


@needs_kernels
def test_each_source_has_its_fatbin():
    sizes = [len(fatbin) for fatbin in embedded_fatbins()]
    assert len(sizes) == len(INFO["images"])
    assert set(INFO["images"]) <= {path.stem for path in KERNELS.glob("*.cu")}
    assert {"linear", "activation"} <= set(INFO["images"])
    assert sum(sizes) == INFO["fatbin_bytes"]


@needs_kernels
def test_fatbin_has_the_architectures_it_names():
    for fatbin, names in zip(embedded_fatbins(), INFO["images"].values(), strict=True):
        named = [
            (PTX if name.startswith("compute_") else CUBIN, int(re.search(r"\d+", name).group())) for name in names
        ]
        assert sorted(entries(fatbin)) == sorted(named)


@needs_kernels
def test_only_base_kernels_are_compiled_as_ptx():
    for name, architectures in INFO["images"].items():
        assert architectures
        assert set(architectures) <= set(INFO["architectures"])
        assert name not in ("decode", "mma", "wgmma") or "compute_80" not in architectures


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Each .cu as a cubin of one architecture, with what ptxas said of it."""
    nvcc = shutil.which("nvcc")
    if not nvcc or not shutil.which("readelf"):
        pytest.skip("nvcc and readelf are not both on the PATH")
    folder = tmp_path_factory.mktemp("cubin")
    result = []
    for source in sorted(KERNELS.glob("*.cu")):
        cubin = folder / f"{source.stem}.cubin"
        command = [nvcc, "-cubin", "-std=c++17", "-arch=sm_90a", "-Xptxas=-v", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        result.append((cubin, done.stdout + done.stderr))
    return result


def test_each_variant_is_an_entry_point_and_none_is_unlisted(compiled):
    found = []
    for cubin, _ in compiled:
        symbols = subprocess.run(["readelf", "-sW", cubin], capture_output=True, text=True, check=True).stdout
        entry_points = re.findall(r"FUNC\s+GLOBAL\s.*\s(\w+)$", symbols, re.MULTILINE)
        found += ((entry_point, cubin.stem) for entry_point in entry_points)
    assert sorted(found) == sorted(LISTED)


def test_no_kernel_keeps_its_sums_in_local_memory(compiled):
    # A few spilled addresses do no harm; an array of accumulators that the compiler put into memory does.
    for _, report in compiled:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
        assert spills
        assert max(map(int, spills)) <= 64


def test_compiles_without_a_warning(compiled):
    assert [line for _, report in compiled for line in report.splitlines() if "warning" in line.lower()] == []


@pytest.mark.parametrize("name", [path.name for path in sorted(KERNELS.glob("*.cu*"))])
def test_source_begins_with_its_purpose(name):
    first = (KERNELS / name).read_text().lstrip()
    assert re.match(r"/\* \w.{20,}", first)


def test_without_a_driver_one_sentence_says_so():
    if INFO["driver"]:
        pytest.skip("there is a driver")
    assert INFO["missing"].startswith("no NVIDIA driver was found (libcuda.so.1: ")
    assert INFO["missing"].endswith(".")
    assert INFO["driver_version"] is None
    assert INFO["devices"] == []
    assert INFO["kernels"] == []
    assert not extension.cuda_initialized()


@pytest.mark.gpu
@needs_gpu
@needs_kernels
def test_driver_finds_every_kernel():
    # Files of kernels may be made for other GPUs only; the base kernels are for all.
    assert {name for name, source in LISTED if source in ("linear", "activation")} <= set(INFO["kernels"])
    assert set(INFO["kernels"]) <= set(NAMES)
    if INFO["devices"][0]["capability"] == (9, 0) and "sm_90a" in INFO["architectures"]:
        assert INFO["kernels"] == NAMES
    assert extension.cuda_initialized()


@pytest.mark.gpu
@needs_gpu
def test_forked_child_is_told_why():
    code = """
import os, qlinear._qlinear as extension
extension.cuda_info()
child = os.fork()
if child == 0:
    os._exit(0 if "forked after CUDA was initialized" in extension.cuda_info()["missing"] else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0
