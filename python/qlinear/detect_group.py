"""What detection works on: the tensors that a checkpoint has under one name, and the layer that they make."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .quantization_config import QuantizationConfig
from .shards import Entry

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Tensors(Protocol):
    """A checkpoint's tensors: Shards, or what is about to be written as one."""

    directory: Path

    def items(self) -> ItemsView[str, Entry]: ...
    def tensor(self, name: str) -> Tensor:
        """Its data. Detection asks for the small ones that describe others."""


@dataclass(frozen=True)
class Layer:
    """A quantized layer: its tensors' names in the files by what follows the layer's own, and from_tensors' options.

    conversion: which of storages' turns the tensors into those that from_tensors takes, "" where they are already."""

    name: str
    format: str
    storage: str
    tensors: Mapping[str, str]
    in_features: int
    out_features: int
    nbytes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    conversion: str = ""


class Group(NamedTuple):
    """The tensors under one prefix by what follows it."""

    name: str
    entries: dict[str, Entry]
    shards: Tensors
    config: QuantizationConfig
    size: tuple[int, int] | None

    def full(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def where(self, key: str) -> str:
        return f"{self.entries[key].path.name}: {self.full(key)}"

    def need(self, *keys: str) -> None:
        for key in keys:
            if key not in self.entries:
                raise ValueError(f"lacks {self.full(key)}, it has {', '.join(sorted(self.entries))}")

    def check(self, key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Entry:
        entry = self.entries[key]
        if entry.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{self.where(key)} must be {expected}, is {str(entry.dtype).removeprefix('torch.')}")
        if shape is not None and entry.shape != shape:
            raise ValueError(f"{self.where(key)} must have the shape {list(shape)}, has {list(entry.shape)}")
        return entry

    def made(
        self,
        form: str,
        storage: str,
        keys: tuple[str, ...],
        size: tuple[int, int],
        conversion: str = "",
        **options: Any,
    ) -> Layer:
        """The layer of these keys, size being (K, N), after the config was heard."""
        if not self.config.allows(form, self.name):
            raise self.contradiction(f"quant_method {self.config.method}", f"{form}, {storage}")
        kept = self.config.keeps(self.name)
        if kept:
            raise self.contradiction(f"that it is not quantized ({kept})", f"{form}, {storage}")
        if min(size) < 1:
            raise ValueError(f"a layer of {size[0]} inputs and {size[1]} outputs has no weight")
        if "bias" in self.entries:
            self.check("bias", FLOATS, (size[1],))
            keys = (*keys, "bias")
        tensors = {key: self.full(key) for key in keys if key in self.entries}
        nbytes = sum([self.entries[key].nbytes for key in tensors])
        return Layer(self.name, form, storage, tensors, *size, nbytes, options, conversion)

    def need_method(self, method: str, storage: str) -> None:
        """For storages that no other method's files have."""
        if self.config.method not in ("", "qlinear", method):
            raise self.contradiction(f"quant_method {self.config.method}", f"{method}, {storage}")

    def contradiction(self, said: str, tensors: str) -> ValueError:
        return ValueError(f"{self.config.source} says {said}, the tensors are {tensors}")


def ceil(count: int, size: int) -> int:
    return -(-count // size)


def words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
