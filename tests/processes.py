"""Processes of torch.distributed that run a test's body, joined by gloo or NCCL over a file."""

import datetime
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing


def spawn(body, *arguments, world, backend="gloo"):
    """body(rank, *arguments) in `world` processes that have joined a group. What one of them raises is raised here."""
    with tempfile.TemporaryDirectory() as directory:
        made = (world, backend, f"file://{directory}/meet", body, arguments)
        torch.multiprocessing.spawn(_process, made, nprocs=world)


def _process(rank, world, backend, meet, body, arguments):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=world, timeout=timeout)
    body(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # DTensor's caches keep the group, and with it gloo's threads. One that lets go of a tensor while the interpreter
    # ends is stopped inside a destructor, which aborts the process: the interpreter is not ended here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
