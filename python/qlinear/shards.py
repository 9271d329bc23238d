"""The safetensors files of a directory: every header is read and checked before a tensor is, tensors are mapped.

Format: https://github.com/huggingface/safetensors#format, u64 size of the header, JSON header, data. What a header says
of a file is checked against the file, as its author is not known. Errors are ValueError and name the file.
"""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# That of the safetensors package.
_LARGEST_HEADER = 100_000_000
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPES = {
    name: dtype
    for name, attribute in (
        ("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"),
        ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E8M0", "float8_e8m0fnu"),
        ("I64", "int64"), ("I32", "int32"), ("I16", "int16"), ("I8", "int8"),
        ("U64", "uint64"), ("U32", "uint32"), ("U16", "uint16"), ("U8", "uint8"), ("BOOL", "bool"),
    )
    if (dtype := getattr(torch, attribute, None)) is not None
}  # fmt: skip
CODES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies: bytes begin to end of the file, both counted from its start."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def parse_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object from a file; ValueError where it is none or says a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            doubled = next(name for name in made if names.count(name) > 1)
            raise ValueError(f"{doubled!r:.100} stands in it twice")
        return made

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {what} must be a JSON object, got {type(found).__name__}")
    return found


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(path: Path, name: str, said: Any, start: int, length: int) -> Entry:
    """What a header says of one tensor, checked against the `length` bytes of data from `start` on."""
    where = f"{path}: tensor {name!r:.200}"
    if not isinstance(said, dict) or not said.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: must have dtype, shape and data_offsets, got {said!r:.100}")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.60}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ValueError(f"{where}: shape must be a list of sizes, got {shape!r:.100}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"{where}: data_offsets must be two sizes, got {offsets!r:.100}")
    begin, end = offsets
    if not begin <= end <= length:
        raise ValueError(f"{where}: data_offsets {offsets} lie outside the {length} bytes of data")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise ValueError(f"{where}: {dtype} {shape} takes {needed} bytes, data_offsets give it {end - begin}")
    return Entry(path, _DTYPES[dtype], tuple(shape), start + begin, start + end)


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one safetensors file by name."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, opening = file.read(8), file.read(1)
            count = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            # The size of a header may begin with the same bytes.
            is_other = opening != b"{"
            if is_other and (head[:2] in _PICKLES or head[:4] == b"PK\x03\x04"):
                raise ValueError(f"{path}: is a pickle, which could run anything when loaded, not safetensors")
            if is_other and head[:4] == b"GGUF":
                raise ValueError(f"{path}: is a GGUF file, not safetensors")
            if len(head) < 8:
                raise ValueError(f"{path}: is cut short: {size} bytes, the size of the header takes 8")
            if count > _LARGEST_HEADER:
                raise ValueError(f"{path}: says that its header has {count} bytes, at most {_LARGEST_HEADER} are read")
            if 8 + count > size:
                raise ValueError(f"{path}: is cut short: its header has {count} bytes, the file {size}")
            file.seek(8)
            text = file.read(count)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    header = parse_json(path, text, "its header")
    header.pop("__metadata__", None)
    start = 8 + count
    entries = {name: _entry(path, name, said, start, size - start) for name, said in header.items()}
    at, last = start, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            raise ValueError(f"{path}: tensors {last!r:.200} and {name!r:.200} overlap")
        if entry.begin > at:
            raise ValueError(f"{path}: {entry.begin - at} bytes before tensor {name!r:.200} belong to no tensor")
        at, last = entry.end, name
    if at != size:
        raise ValueError(f"{path}: {size - at} bytes after its last tensor belong to no tensor")
    return entries


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files that an index names, its map from tensors to them)."""
    try:
        text = index.read_bytes()
    except OSError as error:
        raise ValueError(f"{index}: cannot be read: {error.strerror}") from None
    names = parse_json(index, text, "the index").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map must map names of tensors to names of files")
    for name, file in names.items():
        if file != os.path.basename(file) or file in ("", ".", ".."):
            raise ValueError(f"{index}: tensor {name!r:.200}: {file!r:.200} is not the name of a file in the directory")
    paths = [index.parent / file for file in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            name = next(name for name, file in names.items() if file == path.name)
            raise ValueError(f"{path}: is absent, {index.name} names it for {name!r:.200}")
    return paths, names


def find_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files that make a directory's checkpoint, the index' map from tensors to file names where there is one)."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: is not a directory")
    present = sorted(path.name for path in directory.iterdir())
    indices = [name for name in present if name.endswith(".safetensors.index.json")]
    files = [name for name in present if name.endswith(".safetensors")]
    if "model.safetensors" in files and "model.safetensors.index.json" not in indices:
        return [directory / "model.safetensors"], {}
    if "model.safetensors.index.json" in indices:
        indices = ["model.safetensors.index.json"]
    if len(indices) == 1:
        return _indexed(directory / indices[0])
    if len(files) == 1 and not indices:
        return [directory / files[0]], {}
    if files:
        raise ValueError(f"{directory}: has {', '.join(indices or files)}: none is model.safetensors or its index")
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        raise ValueError(f"{directory / pickles[0]}: is a pickle, which could run anything when loaded; no safetensors")
    raise ValueError(f"{directory}: has no safetensors file")


class Shards(Mapping[str, Entry]):
    """The tensors of a directory's files by name. `tensor` maps one: what is written to it never reaches the file."""

    def __init__(self, directory: str | os.PathLike, paths: Sequence[Path] | None = None) -> None:
        """paths: the files where these are known, all of the directory's checkpoint where not."""
        self.directory = Path(directory)
        self.paths, index = find_files(self.directory) if paths is None else (list(paths), {})
        self._entries: dict[str, Entry] = {}
        self._storages: dict[Path, torch.UntypedStorage] = {}
        for path in self.paths:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise ValueError(f"tensor {name!r:.200} is in two files, {self._entries[name].path} and {path}")
                self._entries[name] = entry
        for name, file in index.items():
            held = self._entries.get(name)
            if held is None or held.path.name != file:
                raise ValueError(f"{self.directory / file}: lacks tensor {name!r:.200}, which the index has in it")

    def renamed(self, rename: Callable[[str], str]) -> Shards:
        """The same files with other names for their tensors, less those whose name becomes empty."""
        other = copy.copy(self)
        other._entries = {}
        for name, entry in self._entries.items():
            new = rename(name)
            if new in other._entries:
                raise ValueError(f"{entry.path}: two tensors would be {new!r:.200}, one of them {name!r:.200}")
            if new:
                other._entries[new] = entry
        return other

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def tensor(self, name: str) -> Tensor:
        path, dtype, shape, begin, end = self._entries[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        storage = self._storages.get(path)
        if storage is None:
            size = path.stat().st_size
            if size < max(entry.end for entry in self._entries.values() if entry.path == path):
                raise ValueError(f"{path}: became shorter while it was read")
            storage = self._storages[path] = torch.UntypedStorage.from_file(str(path), False, size)
        # A storage of its own, so that copies and pickles of one tensor do not take the whole file with them.
        if begin % dtype.itemsize:
            return (
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage[begin:end]).clone().view(dtype).view(shape)
            )
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage[begin:end]).view(shape)
