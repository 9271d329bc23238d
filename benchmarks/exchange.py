"""The sum of two processes' parts in the kernel that adds it to the residual stream (exchange_add_norm in glue.cu):
each writes its part into the other GPU's memory, which CUDA's IPC opens to it. In place of NCCL's all-reduce."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p

import torch
from torch import Tensor

from benchmarks.llama import CudaGlue

_LAZY_ENABLE_PEER_ACCESS = 1


class ExchangeError(RuntimeError):
    pass


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("bytes", ctypes.c_char * 64),)


def _check(status: int, what: str) -> None:
    if status != 0:
        raise ExchangeError(f"the driver answered {status} when {what}")


class Inbox:
    """Memory of this GPU, all bits set (NOTHING in glue.cu), that another process may write. It lives as long as the
    process."""

    def __init__(self, nbytes: int) -> None:
        torch.cuda.synchronize()
        self._driver = ctypes.CDLL("libcuda.so.1")
        memory = ctypes.c_uint64()
        _check(self._driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(nbytes)), "memory was asked for")
        self.address = memory.value
        _check(self._driver.cuMemsetD8_v2(memory, ctypes.c_ubyte(255), ctypes.c_size_t(nbytes)), "memory was cleared")
        torch.cuda.synchronize()

    def handle(self) -> bytes:
        made, memory = _Handle(), ctypes.c_uint64(self.address)
        _check(self._driver.cuIpcGetMemHandle(ctypes.byref(made), memory), "memory was to be shared")
        return ctypes.string_at(ctypes.byref(made), 64)

    def open(self, handle: bytes) -> int:
        """The address of another process' inbox in this one."""
        given, memory = _Handle(), ctypes.c_uint64()
        ctypes.memmove(ctypes.byref(given), handle, 64)
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        status = self._driver.cuIpcOpenMemHandle_v2(ctypes.byref(memory), given, flags)
        _check(status, "the other GPU's memory was opened")
        return memory.value


def inbox_bytes(rows: int, hidden: int) -> int:
    """Two places of 2 bytes a value (glue.cu)."""
    return 2 * rows * hidden * 2


class ExchangeGlue(CudaGlue):
    """Layers give their parts as they are; add_norm exchanges them. rows: of the residual stream."""

    KERNELS = (*CudaGlue.KERNELS, "exchange_add_norm")

    def __init__(self, rows: int, inbox: int, outbox: int) -> None:
        super().__init__()
        self._addresses = (inbox, outbox)
        self._exchanges = torch.zeros(rows, dtype=torch.int32, device="cuda")

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is None:
            return super().add_norm(x, delta, weight, eps)
        out, n = torch.empty_like(x), x.shape[-1]
        threads = -(-n // 256) * 32
        inbox, outbox = map(c_void_p, self._addresses)
        tensors = (out, x, delta, weight)
        ends = (self._exchanges, c_int(n), c_float(eps))
        self._launch("exchange_add_norm", (x.shape[0],), threads, *tensors, inbox, outbox, *ends)
        return out


def connected(rows: int, hidden: int, rank: int, tell: Callable[[object], list]) -> tuple[int, int]:
    """(this process' inbox, the other's) of two processes. tell(object): everybody's, by rank. ExchangeError in both
    where one of them cannot."""
    inbox, outbox, own, error = None, 0, b"", ""
    try:
        inbox = Inbox(inbox_bytes(rows, hidden))
        own = inbox.handle()
    except (ExchangeError, OSError) as failed:
        error = str(failed)
    handles = tell(own)
    try:
        if all(handles):
            outbox = inbox.open(handles[1 - rank])
    except ExchangeError as failed:
        error = str(failed)
    if errors := [said for said in tell(error) if said]:
        raise ExchangeError(errors[0])
    return inbox.address, outbox
