"""A checkpoint's files as they are written: safetensors and JSON, into a directory that has all of them or none."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .shards import CODES

INDEX = "model.safetensors.index.json"
# What an earlier save into the same directory may have left, and the new files would contradict.
STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|(hf_)?quant(ize)?_config\.json")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def shard_size(value: int | str) -> int:
    """max_shard_size in bytes, from a number or a text as "5GB". ValueError where it is neither."""
    if type(value) is int and value > 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", value.upper()) if isinstance(value, str) else None
    if match is None or not float(match[1]) > 0:
        raise ValueError(f"max_shard_size must be a positive number of bytes or a text as '5GB', got {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def shard_names(count: int) -> list[str]:
    """Of so many files, as transformers calls them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def check_storable(name: str, tensor: Tensor) -> None:
    """ValueError or TypeError where a tensor has no place in a safetensors file."""
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: is on the meta device, it has no data to save")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: safetensors has no {tensor.layout} tensors")
    if tensor.dtype not in CODES:
        raise TypeError(f"{name}: safetensors has no {tensor.dtype}")


class Header:
    """What a safetensors file says of its tensors, which follow each other in the order of `add`."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.end = 0

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> int:
        """Where the tensor's bytes begin, counted from the first tensor's."""
        begin, self.end = self.end, self.end + nbytes
        self._said[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, self.end]}
        return begin

    def encoded(self, room: int = 0) -> bytes:
        """The file's beginning, with spaces up to `room` bytes of text or, without, to the next multiple of 8."""
        text = json.dumps(self._said, separators=(",", ":")).encode()
        room = room or -(-len(text) // 8) * 8
        if len(text) > room:
            raise RuntimeError(f"a header takes {len(text)} bytes, {room} were left for it")
        return struct.pack("<Q", room) + text.ljust(room)


def write_tensor(out: BinaryIO, tensor: Tensor) -> None:
    """The bytes of its elements in order, from any device."""
    tensor = tensor.cpu().contiguous()
    if tensor.numel():
        out.write((ctypes.c_char * (tensor.numel() * tensor.itemsize)).from_address(tensor.data_ptr()))


def sync(out: Any) -> None:
    """Whoever sees the file under its last name sees all of it, after a power failure too."""
    out.flush()
    os.fsync(out.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=2)
        out.write("\n")
        sync(out)


def write_index(folder: Path, homes: Mapping[str, str], nbytes: int) -> None:
    """homes: the file of each tensor; nbytes: of all tensors."""
    write_json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": homes})


@contextlib.contextmanager
def filled(directory: Path) -> Iterator[Path]:
    """A folder to write into, whose files are in `directory` afterwards; after an error none of them is."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # One that exists may be somebody's working directory, or a link: it stays what it is.
    is_new = not directory.exists()
    # Beside the directory or in it: a rename works on one file system only.
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory.parent if is_new else directory))
    try:
        yield scratch
        if is_new:
            # mkdtemp lets nobody else in.
            umask = os.umask(0)
            os.umask(umask)
            scratch.chmod(0o777 & ~umask)
            scratch.rename(directory)
            return
        written = sorted(scratch.iterdir(), key=lambda path: (path.suffix == ".json", path.name == "config.json"))
        names = {path.name for path in written}
        for path in written:
            path.replace(directory / path.name)
        for path in directory.iterdir():
            if path.name not in names and STALE.fullmatch(path.name):
                path.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
