"""Kernels of a .cu file compiled by NVRTC, which comes with torch's CUDA wheels and with the CUDA toolkit, and launched
through the driver, both by ctypes: nothing else has to be installed."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


class NvrtcError(RuntimeError):
    pass


def _files() -> Iterator[str]:
    near_torch = Path(torch.__file__).parent
    places = [near_torch / "lib", *(Path(path) / "nvidia" for path in sys.path if path)]
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"]
    for place in places:
        for file in sorted(place.rglob("libnvrtc.so*")) if place.is_dir() else ():
            yield str(file)
    yield from (name for name in (ctypes.util.find_library("nvrtc"), "libnvrtc.so.13", "libnvrtc.so.12") if name)


def _open() -> ctypes.CDLL:
    for file in _files():
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    raise NvrtcError("libnvrtc is needed, of torch's CUDA wheels or the CUDA toolkit: none was found")


def _compile(source: Path, architecture: str) -> bytes:
    """The binary for "sm_XY"."""
    nvrtc = _open()
    program = ctypes.c_void_p()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    if status == 0:
        status = nvrtc.nvrtcCompileProgram(program, 1, options)
    size = ctypes.c_size_t()
    if status != 0:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise NvrtcError(f"{source.name} did not compile: {log.value.decode().strip() or status}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, 64 bytes of value at 8."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_OVERLAP = _Attribute(id=6, value=(ctypes.c_int * 16)(1))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Kernels:
    """The kernels of a file on the current device, whose context and stream torch has. NvrtcError where they cannot be
    made or launched."""

    def __init__(self, source: Path, names: tuple[str, ...]) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        torch.cuda.synchronize()  # the context is there before the driver is called past torch
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NvrtcError(f"the driver could not be opened: {error}") from None
        self._image = _compile(source, f"sm_{properties.major}{properties.minor}")
        module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), self._image))
        self._kernels = {}
        for name in names:
            kernel = ctypes.c_void_p()
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()))
            self._kernels[name] = kernel

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise NvrtcError(f"the driver answered {status}")

    def launch(
        self, name: str, grid: tuple[int, ...], threads: int, *values: ctypes._SimpleCData, overlap: bool = False
    ) -> None:
        """On torch's current stream. overlap: the kernel may start as the one before it ends, and waits itself."""
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_uint * 7)(*grid, *(1,) * (3 - len(grid)), threads, 1, 1, 0)
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(sizes, stream, ctypes.pointer(_OVERLAP), int(overlap))
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(config), self._kernels[name], arguments, None))
