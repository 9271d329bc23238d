"""Runs functions in processes of their own, where libcuda.so.1 is the one of fake_cuda.c, and makes tensors for it.

A driver can be opened once in a process, so each function gets a fresh fork of a server that has not opened it yet.
The function is named by its module and name; what it returns or raises comes back."""

import ctypes
import importlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from typing import ClassVar

import numpy as np
from dlpack_producers import DELETER, DataType, Device, ManagedVersioned, Tensor, new_capsule

HERE = Path(__file__).parent


def build(folder, *options):
    """The library, compiled into `folder`."""
    path = Path(folder) / "libcuda.so.1"
    command = ["cc", "-std=c11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, *options, "-o", path, HERE / "fake_cuda.c"], check=True)
    return path


class Call(ctypes.Structure):
    """fake_call of fake_cuda.c."""

    _fields_ = (
        ("function", ctypes.c_char * 40),
        ("kernel", ctypes.c_char * 64),
        ("stream", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("cluster", ctypes.c_int32),
        ("overlaps", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("result", ctypes.c_int32),
    )


class Driver:
    """The library's fake_* functions, and its record of calls."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.fake_calls.restype = ctypes.POINTER(Call)
        self.library.fake_allocated.restype = self.library.fake_retained.restype = ctypes.c_int64

    def __getattr__(self, name):
        return getattr(self.library, f"fake_{name}")

    def fail(self, function, result, first=0, last=1 << 30):
        """Its calls from the first to the last of these give the result."""
        self.library.fake_fail(function.encode(), result, first, last)

    def hide(self, function):
        self.library.fake_hide(function.encode())

    def calls(self, function=None):
        record = self.library.fake_calls()
        found = (record[i] for i in range(self.library.fake_call_count()))
        return [call for call in found if function is None or call.function.decode() == function]

    def functions(self):
        return [call.function.decode() for call in self.calls()]

    def launches(self):
        return self.calls("cuLaunchKernelEx")


# ---- tensors: host memory that says it is a GPU's ----

CODES = {"f": 2, "i": 0, "u": 1, "V": 4}  # V: the bfloat16 of ml_dtypes


class DlpackArray:
    """Lends itself by __dlpack__ alone, as CuPy's arrays do."""

    def __init__(self, array, device=0):
        self.array = np.ascontiguousarray(array)
        self.device = device
        self.lent = 0
        self.streams = []

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, *, stream=None, max_version=None):
        self.streams.append(stream)
        self.lent += 1
        managed = Lent(self.array, self.device, self.give_back)
        return new_capsule(ctypes.addressof(managed.managed), b"dltensor_versioned", None)

    def give_back(self):
        self.lent -= 1


class Lent:
    """A managed tensor on an array; alive until its deleter is called."""

    alive: ClassVar[dict] = {}

    def __init__(self, array, device, on_delete=lambda: None):
        self.array, self.on_delete = array, on_delete
        self.shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        self.managed = ManagedVersioned(major=1, minor=3)
        self.managed.deleter = self.deleter = DELETER(self.delete)
        describe(self.managed.tensor, array, self.shape, device)
        Lent.alive[ctypes.addressof(self.managed)] = self

    def delete(self, _):
        del Lent.alive[ctypes.addressof(self.managed)]
        self.on_delete()


def describe(tensor, array, shape, device):
    tensor.data = array.ctypes.data
    tensor.device = Device(2, device)
    tensor.ndim = array.ndim
    tensor.dtype = DataType(CODES[array.dtype.kind], 8 * array.itemsize, 1)
    tensor.shape = shape


class ExchangeApi(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev_api", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    )


class ExchangeArray:
    """Has the exchange API, as torch's tensors do: `stream` of its class is the current one of every device."""

    stream = 0
    allocates = True

    def __init__(self, array, device=0):
        self.array = np.ascontiguousarray(array)
        self.device = device
        self.shape = (ctypes.c_int64 * max(self.array.ndim, 1))(*self.array.shape)


@ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(Tensor), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_void_p
)
def allocate(prototype, out, context, set_error):
    if not ExchangeArray.allocates:
        return -1
    like = prototype.contents
    kind = {code: kind for kind, code in CODES.items()}[like.dtype.code]
    array = np.full(like.shape[: like.ndim], 0x55, np.dtype(f"{kind}{like.dtype.bits // 8}"))
    out[0] = ctypes.addressof(Lent(array, like.device.id).managed)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
def managed_to_object(managed, out):
    lent = Lent.alive[managed]
    made = ExchangeArray(lent.array, lent.managed.tensor.device.id)
    lent.delete(None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    out[0] = id(made)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
def tensor_from_object(made, out):
    out.contents.strides = ctypes.POINTER(ctypes.c_int64)()
    out.contents.byte_offset = 0
    describe(out.contents, made.array, made.shape, made.device)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def current_stream(device_type, device_id, out):
    assert device_type == 2
    out[0] = ExchangeArray.stream
    return 0


def address(function):
    return ctypes.cast(function, ctypes.c_void_p).value


API = ExchangeApi(
    1,
    3,
    None,
    address(allocate),
    None,
    address(managed_to_object),
    address(tensor_from_object),
    address(current_stream),
)
ExchangeArray.__dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(API), b"dlpack_exchange_api", None)


# ---- processes ----


class Server:
    """Forks a process for each function that it is asked to run."""

    def __init__(self, library):
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE
        )

    def run(self, function, *arguments):
        send(self.process.stdin, (function.__module__, function.__name__, arguments))
        worked, value = receive(self.process.stdout)
        assert worked, value
        return value

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def send(pipe, value):
    data = pickle.dumps(value)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def receive(pipe):
    header = pipe.read(8)
    return pickle.loads(pipe.read(struct.unpack("<Q", header)[0])) if header else None


def answer(library, module, name, arguments):
    """(whether it worked, what it returned or the traceback)."""
    try:
        return True, getattr(importlib.import_module(module), name)(Driver(library), *arguments)
    except BaseException:
        return False, traceback.format_exc()


def serve(library):
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (request := receive(sys.stdin.buffer)) is not None:
        importlib.import_module(request[0])
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            with os.fdopen(writer, "wb") as pipe:
                send(pipe, answer(library, *request))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            result = receive(pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        send(replies, result or (False, f"the process ended with {status}"))


if __name__ == "__main__":
    sys.modules["fake_cuda"] = sys.modules["__main__"]
    serve(sys.argv[1])
