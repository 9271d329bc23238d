"""save_pretrained: a model's tensors and configs as a directory that load_checkpoint and transformers read.

Sizes are planned first, module by module, then each file is written under another name and renamed: it is complete or
absent. A directory that did not exist appears with all of its files at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .layers._module import QuantizedLinear
from .model import Bar, is_conv1d
from .save_config import Candidates
from .storages import stored
from .writing import (
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


@dataclass
class _Piece:
    """A tensor to be written: its name, its module and that one's name, and where in its file its bytes go."""

    name: str
    prefix: str
    module: nn.Module
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _File:
    name: str
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def state_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors that are the module's own, under their names in the files."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, f"{prefix}." if prefix else "", False)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: a {type(value).__name__} in the state dict cannot be written to safetensors")
    return state


def written_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """state_of, with layers that were converted when they were loaded as they were in the files."""
    state = state_of(module, prefix)
    return stored(module, prefix, state) if isinstance(module, QuantizedLinear) else state


def _tied_names(model: nn.Module) -> set[str]:
    """The names that transformers gives to tensors that are others, tied."""
    tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    return set(tied)


def _place_of(tensor: Tensor) -> tuple | None:
    """What two tensors on the same memory have in common."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _plan(model: nn.Module, candidates: Candidates) -> list[_Piece]:
    """Every tensor once, in the order of the modules; tied ones under the name that is not the copy's."""
    tied = _tied_names(model)
    known: dict[tuple, int] = {}
    pieces: list[_Piece] = []
    for prefix, module in model.named_modules():
        state = state_of(module, prefix)
        if isinstance(module, QuantizedLinear):
            own, state = state, stored(module, prefix, state)
            candidates.hear(prefix, module, own, state)
        for name, tensor in state.items():
            check_storable(name, tensor)
            piece = _Piece(name, prefix, module, tensor.dtype, tuple(tensor.shape))
            # Packed tensors are made anew, in memory that the next one's may get.
            place = None if isinstance(module, QuantizedLinear) else _place_of(tensor)
            if place in known:
                if pieces[known[place]].name in tied:
                    pieces[known[place]] = piece
                continue
            if place is not None:
                known[place] = len(pieces)
            pieces.append(piece)
    return pieces


def _split(pieces: list[_Piece], most: int) -> list[_File]:
    """The pieces in files of at most `most` bytes, but for single tensors that are larger."""
    files = [_File("")]
    for piece in pieces:
        if files[-1].pieces and files[-1].nbytes + piece.nbytes > most:
            files.append(_File(""))
        files[-1].pieces.append(piece)
    for file, name in zip(files, shard_names(len(files)), strict=True):
        file.name = name
    return files


def _header(file: _File) -> bytes:
    """The file's beginning; says to each piece where its bytes go. Wide types come first, so that all are aligned."""
    header = Header()
    for piece in sorted(file.pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name)):
        piece.begin = header.add(piece.name, piece.dtype, piece.shape, piece.nbytes)
    return header.encoded()


def _write_file(path: Path, file: _File, bar: Bar) -> None:
    head = _header(file)
    with path.open("wb") as out:
        out.write(head)
        state: dict[str, Tensor] = {}
        held = None
        for piece in file.pieces:
            if held is not piece.module:
                state, held = written_of(piece.module, piece.prefix), piece.module
                bar.step()
            tensor = state[piece.name]
            if (tensor.dtype, tuple(tensor.shape)) != (piece.dtype, piece.shape):
                raise RuntimeError(f"{piece.name}: was changed while the model was saved")
            out.seek(len(head) + piece.begin)
            write_tensor(out, tensor)
        sync(out)


def _model_config(model: nn.Module, directory: Path) -> dict[str, Any]:
    """config.json without its quantization: a transformers model's own, else what is in the directory already."""
    config = getattr(model, "config", None)
    values: Any = None
    if callable(getattr(config, "to_json_string", None)):
        values = json.loads(config.to_json_string())
        values["architectures"] = [type(model).__name__]
    elif (directory / "config.json").is_file():
        with contextlib.suppress(ValueError):
            values = json.loads((directory / "config.json").read_bytes())
    values = values if isinstance(values, dict) else {}
    return {key: value for key, value in values.items() if key not in ("quantization_config", "compression_config")}


def _unquantized(model: nn.Module) -> list[str]:
    """The linear layers that stayed as they were."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> None:
    """Writes model's state dict to safetensors files in `directory`, and config.json with what they are.

    Layers that were loaded are written as they were in the files, byte for byte, with the config that stood there;
    others with the config of their format, and models that no published config describes (several formats in one, say)
    with one that lists the layers: quant_method "qlinear". Tied tensors are written once. A file larger than
    max_shard_size is split, an index beside the parts. progress: as for replace_linear.

    ValueError or TypeError, and nothing written, where a tensor has no data or no place in safetensors. On any error
    the files in `directory` are what they were, or, if it comes while files are renamed, whole ones.
    """
    most = shard_size(max_shard_size)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is not a directory")
    with torch.no_grad(), torch.inference_mode(False):
        candidates = Candidates(_unquantized(model))
        files = _split(_plan(model, candidates), most)
        config = _model_config(model, directory)
        quantization = candidates.best()
        if quantization is not None:
            config["quantization_config"] = quantization
        bar = Bar(len({id(piece.module) for file in files for piece in file.pieces}), "qlinear: save", progress)
        try:
            with filled(directory) as scratch:
                for file in files:
                    _write_file(scratch / file.name, file, bar)
                if len(files) > 1:
                    homes = {piece.name: file.name for file in files for piece in file.pieces}
                    write_index(scratch, homes, sum(file.nbytes for file in files))
                generation = getattr(model, "generation_config", None)
                if callable(getattr(generation, "to_json_string", None)):
                    write_json(scratch / "generation_config.json", json.loads(generation.to_json_string()))
                write_json(scratch / "config.json", config)
        finally:
            bar.close()
