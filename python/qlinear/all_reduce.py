"""Sums over a process group of GPUs: by kernels that write into each other's memory where the GPUs are of one host and
can, by torch.distributed otherwise.

A model that is split over GPUs sums twice a block and token, a few KB each. NCCL has a launch and a way over for each
that are longer than the sum; here a part is written where the others read it, in one kernel that waits for nothing but
the parts. Long sums are NCCL's.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _qlinear, ops

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Connected(NamedTuple):
    group: weakref.ref[dist.ProcessGroup]
    reducer: _qlinear.AllReduce


# By the name of their group, by which the operator knows it.
_connected: dict[str, _Connected] = {}


# Meeting: every process of the group does every step, whatever its own or another's outcome was


def _host() -> str:
    """What processes of one host have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def _heard(said: object, group: dist.ProcessGroup) -> list:
    heard: list = [None] * group.size()
    dist.all_gather_object(heard, said, group=group)
    return heard


def _begin(group: dist.ProcessGroup, device: int) -> tuple[_qlinear.AllReduce | None, str]:
    try:
        return _qlinear.AllReduce(device, group.rank(), group.size()), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _obstacle(errors: list[str]) -> str:
    return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), "")


def _met(group: dist.ProcessGroup, device: int) -> tuple[_qlinear.AllReduce | None, str]:
    """This process' end, connected to all others; or why there is none, the same for all."""
    reducer, error = _begin(group, device)
    ends = _heard((_host(), error, reducer.handle if reducer else b""), group)
    hosts, errors, handles = zip(*ends, strict=True)
    obstacle = _obstacle(errors)
    if not obstacle and (len(set(hosts)) > 1 or not hosts[0]):
        obstacle = "the GPUs are not all of one host"
    for step in ("connect", "check"):
        if obstacle:
            return None, obstacle
        error = ""
        try:
            reducer.connect(list(handles)) if step == "connect" else reducer.check()
        except RuntimeError as failed:
            error = str(failed)
        obstacle = _obstacle(_heard(error, group))
    return (None, obstacle) if obstacle else (reducer, "")


def connect(group: dist.ProcessGroup, device: torch.device) -> str:
    """Lets sums of a group of GPUs go from memory to memory; all its processes call it. How sums go from now on, in
    words."""
    found = _connected.get(group.group_name)
    if found is None or found.group() is not group:
        _connected.pop(group.group_name, None)
        reducer, obstacle = _met(group, device.index)
        if reducer is None:
            return f"by {dist.get_backend(group)} ({obstacle})"
        found = _connected[group.group_name] = _Connected(weakref.ref(group), reducer)
    return f"from memory to memory up to {found.reducer.most_bytes} bytes, by {dist.get_backend(group)} beyond"


def disconnect(group: dist.ProcessGroup) -> None:
    """From now on sums of the group go by torch.distributed; all its processes call it, when none runs or will be run
    again, as in a CUDA graph."""
    if group.group_name in _connected:
        dist.barrier(group)
        del _connected[group.group_name]


# Sums


def _sum_contiguous(x: Tensor, group: str) -> None:
    """Where the sum goes follows from what is the same in all processes."""
    found = _connected.get(group)
    if found is None or x.dtype not in _DTYPES or x.nbytes > found.reducer.most_bytes:
        dist.all_reduce(x, group=dist.distributed_c10d._resolve_process_group(group))
    else:
        found.reducer(x)


def _sum(x: Tensor, group: str) -> None:
    x = x.detach()
    if x.is_contiguous():
        _sum_contiguous(x, group)
    else:
        whole = x.contiguous()
        _sum_contiguous(whole, group)
        x.copy_(whole)


_library = torch.library.Library("qlinear", "FRAGMENT")
_library.define("all_reduce_(Tensor(a!) x, str group) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
for _device in ("CPU", "CUDA"):
    _library.impl("all_reduce_", _sum, _device)
torch.library.register_fake("qlinear::all_reduce_", lambda x, group: None, lib=_library)


def all_reduce_(x: Tensor, group: dist.ProcessGroup) -> None:
    """x, in place, becomes the sum over the group: in fp32, in the order of ranks, rounded once, with the same bits in
    every process, where it goes from memory to memory."""
    if not x.is_cuda:
        dist.all_reduce(x, group=group)
    elif ops.is_plain(x):
        _sum(x, group.group_name)
    else:
        torch.ops.qlinear.all_reduce_(x, group.group_name)
