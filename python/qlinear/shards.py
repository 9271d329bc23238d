"""The safetensors files of a directory: every header is read and checked before a tensor is, tensors are mapped.

Format: https://github.com/huggingface/safetensors#format, u64 size of the header, JSON header, data. What a header says
of a file is checked against the file, as its author is not known. Errors are ValueError and name the file.
"""

from __future__ import annotations

import copy
import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# That of the safetensors package for headers.
_LARGEST_JSON = 100_000_000
# torch's.
_LARGEST_SIZE = 2**63 - 1
_MOST_DIMENSIONS = 64
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_INT = frozenset({int})
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (doubled, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{doubled!r:.100} stands in it twice")
    return made


def _parsed(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object from a file; ValueError where it is none or says a name twice."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {what} must be a JSON object, got {type(found).__name__}")
    return found


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object that a file is; what: of what it is, for errors."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise ValueError(f"{path}: has {size} bytes, of {what} at most {_LARGEST_JSON} are read")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return _parsed(path, text, what)


def _are_sizes(values: Any) -> bool:
    # bool is no size, though it is an int.
    if not isinstance(values, list) or not _INT.issuperset(map(type, values)):
        return False
    return not values or (min(values) >= 0 and max(values) <= _LARGEST_SIZE)


def _entry(path: Path, said: Any, start: int, length: int) -> Entry:
    """What a header says of one tensor, checked against the `length` bytes of data from `start` on."""
    if not isinstance(said, dict) or not said.keys() >= _FIELDS:
        raise ValueError(f"must have dtype, shape and data_offsets, got {said!r:.100}")
    code, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {code!r:.60}")
    if not _are_sizes(shape):
        raise ValueError(f"shape must be a list of sizes, got {shape!r:.100}")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"shape must have at most {_MOST_DIMENSIONS} dimensions, has {len(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets must be two sizes, got {offsets!r:.100}")
    begin, end = offsets
    if not begin <= end <= length:
        raise ValueError(f"data_offsets {offsets} lie outside the {length} bytes of data")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise ValueError(f"{code} {shape!r:.100} takes {needed} bytes, data_offsets give it {end - begin}")
    # No tensor has strides of that size, though it may have no elements.
    if needed == 0 and math.prod(filter(None, shape)) * dtype.itemsize > _LARGEST_SIZE:
        raise ValueError(f"shape {shape!r:.100} is larger than an empty tensor's may be")
    return Entry(path, dtype, tuple(shape), start + begin, start + end)


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """(every tensor of one safetensors file by name, the size of the file)."""
    try:
        status = path.stat()
        # A pipe would be waited for.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a regular file")
        size = status.st_size
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
            if count > _LARGEST_JSON:
                raise ValueError(f"{path}: says that its header has {count} bytes, at most {_LARGEST_JSON} are read")
            if 8 + count > size:
                raise ValueError(f"{path}: is cut short: its header has {count} bytes, the file {size}")
            file.seek(8)
            text = file.read(count)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    header = _parsed(path, text, "its header")
    header.pop("__metadata__", None)
    start = 8 + count
    entries: dict[str, Entry] = {}
    name = ""
    try:
        for name, said in header.items():
            if not name.isprintable():
                raise ValueError("its name has characters that cannot be printed")
            entries[name] = _entry(path, said, start, size - start)
    except ValueError as error:
        raise ValueError(f"{path}: tensor {name!r:.200}: {error}") from None
    at, last = start, ""
    for begin, end, name in sorted((entry.begin, entry.end, name) for name, entry in entries.items()):
        if begin < at:
            raise ValueError(f"{path}: tensors {last!r:.200} and {name!r:.200} overlap")
        if begin > at:
            raise ValueError(f"{path}: {begin - at} bytes before tensor {name!r:.200} belong to no tensor")
        at, last = end, name
    if at != size:
        raise ValueError(f"{path}: {size - at} bytes after its last tensor belong to no tensor")
    return entries, size


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files that an index names, its map from tensors to them)."""
    names = read_json(index, "the index").get("weight_map")
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


class Shards(dict[str, Entry]):
    """The tensors of a directory's files by name. `tensor` maps one: what is written to it never reaches the file."""

    def __init__(self, directory: str | os.PathLike, paths: Sequence[Path] | None = None) -> None:
        """paths: the files where these are known, all of the directory's checkpoint where not."""
        super().__init__()
        self.directory = Path(directory)
        self.paths, index = find_files(self.directory) if paths is None else (list(paths), {})
        self._sizes: dict[Path, int] = {}
        self._storages: dict[Path, torch.UntypedStorage] = {}
        for path in self.paths:
            entries, self._sizes[path] = read_header(path)
            if not self.keys().isdisjoint(entries):
                name = next(name for name in entries if name in self)
                raise ValueError(f"tensor {name!r:.200} is in two files, {self[name].path} and {path}")
            self.update(entries)
        for name, file in index.items():
            held = self.get(name)
            if held is None or held.path.name != file:
                raise ValueError(f"{self.directory / file}: lacks tensor {name!r:.200}, which the index has in it")

    def renamed(self, rename: Callable[[str], str]) -> Shards:
        """The same files with other names for their tensors, less those whose name becomes empty."""
        other = copy.copy(self)
        other.clear()
        for name, entry in self.items():
            new = rename(name)
            if new in other:
                raise ValueError(f"{entry.path}: two tensors would be {new!r:.200}, one of them {name!r:.200}")
            if new:
                other[new] = entry
        return other

    def tensor(self, name: str) -> Tensor:
        path, dtype, shape, begin, end = self[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        storage = self._storages.get(path)
        if storage is None:
            storage = self._storages[path] = self._mapped(path)
        # A storage of its own, so that copies and pickles of one tensor do not take the whole file with them.
        own = storage[begin:end]
        if begin % dtype.itemsize:
            return torch.empty(0, dtype=torch.uint8, device="cpu").set_(own).clone().view(dtype).view(shape)
        return torch.empty(0, dtype=dtype, device="cpu").set_(own, 0, shape)

    def _mapped(self, path: Path) -> torch.UntypedStorage:
        size = self._sizes[path]
        # A page beyond the end of the file would end the process when it is read.
        if path.stat().st_size < size:
            raise ValueError(f"{path}: became shorter while it was read")
        return torch.UntypedStorage.from_file(str(path), False, size)
