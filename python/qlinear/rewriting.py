"""What quantize and convert share: a checkpoint written anew with one layer in memory at a time, and its other files.

Tensors go into the files as they come, behind room that was left for the header: safetensors allows spaces after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .layers._module import QuantizedLinear
from .layers.gptq import QuantLinear
from .save_config import Candidates
from .saving import state_of
from .shards import Shards
from .writing import (
    STALE,
    Header,
    check_storable,
    filled,
    shard_names,
    shard_size,
    sync,
    write_index,
    write_json,
    write_tensor,
)

# Of a header: what a tensor takes there beside its name, what a layer adds to its own name, and how many it has.
_PER_TENSOR, _LONGEST_KEY, _PER_LAYER = 120, 48, 8
# Weights in whatever form: these are not copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")


class Writer:
    """Fills safetensors files in `folder`, of at most `most` bytes each where single layers are smaller."""

    def __init__(self, folder: Path, most: int, names: Iterable[str], layers: Iterable[str]) -> None:
        self._folder, self._most = folder, most
        room = sum(len(json.dumps(name)) + _PER_TENSOR for name in names)
        room += sum(_PER_LAYER * (len(json.dumps(name)) + _LONGEST_KEY + _PER_TENSOR) for name in layers)
        self._room = -(-(room + _PER_TENSOR) // 8) * 8
        self._parts: list[Path] = []
        self._file: BinaryIO | None = None
        self._header = Header()
        # Tensors of a size that would leave the next one unaligned wait for the end of the file.
        self._late: dict[str, Tensor] = {}
        self._homes: dict[str, int] = {}
        self.nbytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors that stay in one file together."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        held = self._header.end + sum(tensor.nbytes for tensor in self._late.values())
        if self._file is not None and held + size > self._most:
            self._finish()
        if self._file is None:
            self._parts.append(self._folder / f"part-{len(self._parts)}")
            self._file = self._parts[-1].open("wb")
            self._file.seek(8 + self._room)
            self._header = Header()
        for name, tensor in tensors.items():
            check_storable(name, tensor)
            if name in self._homes:
                raise ValueError(f"{name}: was written already")
            self._homes[name] = len(self._parts) - 1
            if tensor.nbytes % 8:
                self._late[name] = tensor.clone()
            else:
                self._put(name, tensor)
        self.nbytes += size

    def _put(self, name: str, tensor: Tensor) -> None:
        self._header.add(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        write_tensor(self._file, tensor)

    def _finish(self) -> None:
        if self._file is None:
            return
        for name, tensor in sorted(self._late.items(), key=lambda item: -item[1].itemsize):
            self._put(name, tensor)
        self._late.clear()
        head = self._header.encoded(self._room)
        self._file.seek(0)
        self._file.write(head)
        sync(self._file)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Completes the files under their last names, with the index where there are several."""
        self._finish()
        names = shard_names(len(self._parts))
        for path, name in zip(self._parts, names, strict=True):
            path.rename(self._folder / name)
        if len(names) > 1:
            write_index(self._folder, {name: names[home] for name, home in self._homes.items()}, self.nbytes)


@dataclasses.dataclass
class RewrittenLayer:
    """error: of the weight, relative to it in the Frobenius norm; largest: the largest of an element."""

    name: str
    in_features: int
    out_features: int
    bytes_before: int
    bytes_after: int
    error: float = 0.0
    largest: float = 0.0


@dataclasses.dataclass
class RewriteReport:
    """What quantize_checkpoint or convert_checkpoint did; skipped: linear layers that stayed, and why. Bytes are all of
    the tensors'."""

    to: str
    layers: list[RewrittenLayer] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0


class Target:
    """The directory that is written, as a context: layers and plain tensors one by one, then everything else. On an
    error nothing is left of it. unquantized: the linear layers that stay, for the config."""

    def __init__(
        self, shards: Shards, directory: str | os.PathLike, max_shard_size: int | str, layers: Iterable[str]
    ) -> None:
        self.shards, self._most, self._layers = shards, shard_size(max_shard_size), list(layers)
        self.directory = Path(directory)
        self.unquantized: list[str] = []
        self._candidates = Candidates(self.unquantized)
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise ValueError(f"{self.directory}: exists and is not an empty directory")
        if shards.directory.resolve() in (self.directory.resolve(), *self.directory.resolve().parents):
            raise ValueError(f"{self.directory}: lies in {shards.directory}, which is read")

    def __enter__(self) -> Target:
        self._stack = contextlib.ExitStack()
        self._folder = self._stack.enter_context(filled(self.directory))
        self._writer = Writer(self._folder, self._most, self.shards, self._layers)
        self._stack.callback(self._writer.close)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        try:
            if error[0] is None:
                self._complete()
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        return self._stack.__exit__(*error)

    def add_plain(self, name: str) -> None:
        self._writer.add({name: self.shards.tensor(name)})

    def add_layer(self, name: str, module: QuantizedLinear) -> int:
        """Writes a layer, whose tensors it loses then; the bytes that were written."""
        state = state_of(module, name)
        self._candidates.hear(name, module, state, state)
        self._writer.add(state)
        size = sum(tensor.nbytes for tensor in state.values())
        module.to("meta")
        del state
        _trim()
        return size

    @property
    def nbytes(self) -> int:
        return self._writer.nbytes

    def _complete(self) -> None:
        self._writer.finish()
        source = self.shards.directory
        values: Any = {}
        if (source / "config.json").is_file():
            values = json.loads((source / "config.json").read_bytes())
        values = {key: v for key, v in values.items() if key not in ("quantization_config", "compression_config")}
        values["quantization_config"] = self._candidates.best()
        _copy_rest(source, self._folder)
        write_json(self._folder / "config.json", values)


def _trim() -> None:
    """glibc keeps freed memory of many layers behind small blocks that live on; other libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _copy_rest(source: Path, folder: Path) -> None:
    """Copies what is neither weights nor written anew: tokenizers, generation_config.json, code."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        name = path.name
        if name.endswith((*_WEIGHTS, ".index.json")) or (len(relative.parts) == 1 and STALE.fullmatch(name)):
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)


def explicit(module: QuantizedLinear) -> QuantizedLinear:
    """The layer with its zeros' format said, which its tensors tell no more once they are gone."""
    if isinstance(module, QuantLinear):
        module.zero_format = module.stored_zeros()
    return module


def error_of(weight: Tensor, module: nn.Module) -> tuple[float, float]:
    """(the weight's error relative to it in the Frobenius norm, the largest of an element); weight [N, K]."""
    made = module.dequantize(torch.float32)
    squares = norm = largest = 0.0
    step = max(1, (1 << 22) // max(weight.shape[1], 1))
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        difference = made[start : start + step] - rows
        squares += difference.square().sum(dtype=torch.float64).item()
        norm += rows.square().sum(dtype=torch.float64).item()
        largest = max(largest, difference.abs().max().item())
    return (squares / norm) ** 0.5 if norm else 0.0, largest


def as_dict(report: RewriteReport) -> dict[str, Any]:
    """The report for programs."""
    return dataclasses.asdict(report)


def print_report(report: RewriteReport) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table()
    table.add_column("layer", overflow="fold")
    for title in ("inputs", "outputs", "bytes", "error", "largest"):
        table.add_column(title, justify="right")
    for layer in report.layers:
        errors = (f"{100 * layer.error:.3g}%", f"{layer.largest:.3g}")
        numbers = (f"{layer.in_features:,}", f"{layer.out_features:,}", f"{layer.bytes_after:,}")
        table.add_row(escape(layer.name), *numbers, *errors)
    console.print(table)
    for name, reason in report.skipped:
        console.print(f"stays as it is: {escape(name)}: {escape(reason)}", highlight=False)
    for note in report.notes:
        console.print(escape(note), highlight=False)
    worst = max(report.layers, key=lambda layer: layer.error)
    errors = (
        f", the largest error is {100 * worst.error:.3g}% ({worst.name})" if worst.error else ", every weight the same"
    )
    console.print(
        f"{len(report.layers)} layers to {report.to}, {report.bytes_before / 1e6:.1f} -> "
        f"{report.bytes_after / 1e6:.1f} MB{escape(errors)}",
        highlight=False,
    )
