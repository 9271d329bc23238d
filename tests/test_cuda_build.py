"""The kernels as the build left them: in their fatbins, for the architectures that were asked for, under their names.

No GPU is needed but where marked. The fatbins are read out of the extension by their headers."""

import ctypes
import re
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import qlinear._qlinear as extension

KERNELS = Path(__file__).parent.parent / "kernels"
SHARED_OBJECT = Path(find_spec("qlinear").submodule_search_locations[0]) / "_qlinear.abi3.so"
INFO = extension.cuda_info()
PTX, CUBIN = 1, 2

needs_kernels = pytest.mark.skipif(not INFO["built"], reason="built without CUDA kernels")
needs_gpu = pytest.mark.skipif(not INFO["devices"], reason=INFO["missing"] or "no GPU")


def variant_names():
    """The list of kernels/variants.h, as the preprocessor sees it."""
    source = '#include "variants.h"\n#define NAME(name, ...) @name@\nQL_KERNELS(NAME)\n'
    command = ["cc", "-E", "-P", "-I", KERNELS, "-x", "c", "-"]
    expanded = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return re.findall(r"@\s*(\w+)\s*@", expanded)


NAMES = variant_names()


def embedded_fatbins():
    """The bytes of each: a header of 16 bytes (magic, version, header's size, size of the rest), then the entries."""
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
    assert len(NAMES) >= 12
    assert len(set(NAMES)) == len(NAMES)


def test_info_is_consistent():
    assert INFO["built"] == bool(INFO["architectures"]) == bool(INFO["fatbin_bytes"])
    assert bool(INFO["missing"]) != (set(INFO["kernels"]) == set(NAMES) and bool(INFO["devices"]))


@needs_kernels
def test_each_source_has_its_fatbin():
    sizes = [len(fatbin) for fatbin in embedded_fatbins()]
    assert len(sizes) == len(list(KERNELS.glob("*.cu")))
    assert sum(sizes) == INFO["fatbin_bytes"]


@needs_kernels
def test_fatbin_has_the_architectures_it_names():
    named = [
        (PTX if name.startswith("compute_") else CUBIN, int(re.search(r"\d+", name).group()))
        for name in INFO["architectures"]
    ]
    for fatbin in embedded_fatbins():
        assert sorted(entries(fatbin)) == sorted(named)


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
        found += re.findall(r"FUNC\s+GLOBAL\s.*\s(\w+)$", symbols, re.MULTILINE)
    assert sorted(found) == sorted(NAMES)


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
    assert re.match(r"/\* [A-Z].{20,}", first)


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
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


class Params(ctypes.Structure):
    """ql_dequantize_gptq_params of kernels/params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "qweight", "qzeros", "scales", "g_idx")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group_size")),
        *((name, ctypes.c_int32) for name in ("scales_type", "zero_offset")),
    ]


class Driver:
    """The driver by ctypes, apart from the extension's own way to it: the current device's primary context."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.held = []
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        self.libraries = []
        for fatbin in embedded_fatbins():
            library = ctypes.c_void_p()
            self.held.append(fatbin)
            self("cuLibraryLoadData", ctypes.byref(library), fatbin, None, None, 0, None, None, 0)
            self.libraries.append(library)

    def __call__(self, name, *arguments):
        assert getattr(self.cuda, name)(*arguments) == 0, name

    def put(self, array):
        pointer = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 1)))
        self("cuMemcpyHtoD_v2", pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        self.held.append(pointer)
        return pointer.value

    def launch(self, name, grid, block, params):
        kernel = ctypes.c_void_p()
        for library in self.libraries:
            if self.cuda.cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode()) == 0:
                break
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self("cuLaunchKernel", kernel, grid, 1, 1, block, 1, 1, 0, None, pointers, None)
        self("cuCtxSynchronize")

    def get(self, pointer, array):
        self(
            "cuMemcpyDtoH_v2",
            array.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(array.nbytes),
        )


def pack_rows(codes, bits):
    """codes [R, C] -> int32 [R, ceil(C * bits / 32)]: each row one little-endian stream."""
    bit = (codes[:, :, None] >> np.arange(bits)) & 1
    flat = bit.reshape(len(codes), -1).astype(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view(np.int32)


@pytest.mark.gpu
@needs_gpu
@needs_kernels
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantizing_kernel_against_numpy(bits, act_order):
    rng = np.random.default_rng(bits)
    n, k, group_size, offset = 75, 200, 32, 1  # odd tiles in both directions
    groups = -(-k // group_size)
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = rng.integers(0, 2**bits, (groups, n))
    scales = rng.uniform(0.001, 0.1, (groups, n)).astype(np.float16)
    g_idx = rng.integers(0, groups, k).astype(np.int32) if act_order else np.arange(k, dtype=np.int32) // group_size
    shown = (zeros + offset) % 2**bits
    expected = ((codes - shown[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)).T

    driver = Driver()
    out = np.zeros((n, k), np.float32)
    params = Params(
        out=driver.put(out),
        qweight=driver.put(np.ascontiguousarray(pack_rows(codes.T, bits).T)),
        qzeros=driver.put(pack_rows(zeros, bits)),
        scales=driver.put(scales),
        g_idx=driver.put(g_idx) if act_order else None,
        n=n,
        k=k,
        group_size=group_size,
        scales_type=1,
        zero_offset=offset,
    )
    tiles = -(-n // 32) * -(-k // 32)
    driver.launch(f"ql_dequantize_gptq{bits}_f32", -(-tiles // 8), 256, params)
    driver.get(params.out, out)
    np.testing.assert_array_equal(out, expected)

    half = np.zeros((n, k), np.float16)
    driver.launch(f"ql_dequantize_gptq{bits}_f16", -(-tiles // 8), 256, params)
    driver.get(params.out, half)
    np.testing.assert_array_equal(half, expected.astype(np.float16))

    driver.launch(f"ql_dequantize_gptq{bits}_bf16", -(-tiles // 8), 256, params)
    driver.get(params.out, half)
    rounded = expected.view(np.uint32) + 0x7FFF + (expected.view(np.uint32) >> 16 & 1)
    np.testing.assert_array_equal(half.view(np.uint16), (rounded >> 16).astype(np.uint16))
