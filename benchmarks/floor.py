"""The time of a launch that only reads so many cold bytes: what no product can be faster than by itself.

floor.cu is compiled by NVRTC, which comes with torch's CUDA wheels and with the CUDA toolkit, and launched through the
driver, both by ctypes: nothing else has to be installed. Of some shapes of the launch the fastest counts."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from qlinear import timing

SOURCE = Path(__file__).with_name("floor.cu")


class FloorError(RuntimeError):
    pass


def _nvrtc_files() -> Iterator[str]:
    near_torch = Path(torch.__file__).parent
    places = [near_torch / "lib", *(Path(path) / "nvidia" for path in sys.path if path)]
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"]
    for place in places:
        for file in sorted(place.rglob("libnvrtc.so*")) if place.is_dir() else ():
            yield str(file)
    yield from (name for name in (ctypes.util.find_library("nvrtc"), "libnvrtc.so.13", "libnvrtc.so.12") if name)


def _open_nvrtc() -> ctypes.CDLL:
    for file in _nvrtc_files():
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    raise FloorError("the floor needs libnvrtc, of torch's CUDA wheels or the CUDA toolkit: none was found")


def _compile(source: bytes, architecture: str) -> bytes:
    """The binary of the source for "sm_XY"."""
    nvrtc = _open_nvrtc()
    program = ctypes.c_void_p()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None)
    if status == 0:
        status = nvrtc.nvrtcCompileProgram(program, 1, options)
    size = ctypes.c_size_t()
    if status != 0:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise FloorError(f"{SOURCE.name} did not compile: {log.value.decode().strip() or status}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


class Reader:
    """Read-only launches on the current device. FloorError where the kernels cannot be made."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.multiprocessors = properties.multi_processor_count
        torch.cuda.synchronize()  # the context is there before the driver is called past torch
        try:
            self.driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise FloorError(f"the driver could not be opened: {error}") from None
        self.image = _compile(SOURCE.read_bytes(), f"sm_{properties.major}{properties.minor}")
        module = ctypes.c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(module), self.image))
        self.kernels = {}
        for batch in (4, 8, 16):
            kernel = ctypes.c_void_p()
            self._check(self.driver.cuModuleGetFunction(ctypes.byref(kernel), module, f"read_{batch}".encode()))
            self.kernels[batch] = kernel
        self.never = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.best: dict[int, timing.Replay] = {}

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise FloorError(f"the driver answered {status} to a read-only kernel")

    def _launch(self, batch: int, grid: int, threads: int, words: int, count: int) -> None:
        values = (ctypes.c_void_p(words), ctypes.c_longlong(count), ctypes.c_void_p(self.never.data_ptr()))
        arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self.driver.cuLaunchKernel(self.kernels[batch], grid, 1, 1, threads, 1, 1, 0, stream, arguments, None)
        )

    def _forms(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(batch, grid, threads): with 64 or 128 KB in flight on each multiprocessor, and with no loop at all."""
        for batch, threads in ((4, 256), (4, 512), (8, 256), (8, 512), (16, 256)):
            whole = -(-count // (batch * threads))
            flight = [self.multiprocessors * kib * 1024 // (batch * threads * 16) for kib in (64, 128)]
            yield from ((batch, grid, threads) for grid in dict.fromkeys((*flight, whole)) if grid <= whole)

    def replay(self, nbytes: int) -> timing.Replay:
        """The fastest launch that reads nbytes, round a ring of cold copies."""
        size = -(-nbytes // 256) * 256
        if size not in self.best:
            count = size // 16
            copies = timing.ring_copies(size)
            words = torch.randint(-(2**63), 2**63 - 1, (copies, size // 8), device="cuda")
            replays = []
            for form in dict.fromkeys(self._forms(count)):
                products = [functools.partial(self._launch, *form, row.data_ptr(), count) for row in words]
                replays.append(timing.Replay(products, keep=words))
            times = timing.alternate(replays, rounds=5)
            self.best[size] = min(zip(replays, times, strict=True), key=lambda pair: timing.median(pair[1]))[0]
        return self.best[size]

    def forget(self) -> None:
        """Gives the memory of all rings back."""
        self.best.clear()
