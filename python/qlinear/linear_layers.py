"""Which weights of a checkpoint are linear layers': by the model's class, or by their names where none is known."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from . import hf
from .model import is_conv1d, weights_of_attention
from .shards import Shards

# Parts of names of two-dimensional weights that are no linear layer's.
_TABLES = re.compile(
    r"(^|[._])(emb\w*|wte|wpe|shared|tokens?|positions?|relative_attention_bias|norm\w*|ln\w*)([._]|$)"
)


class LinearLayer(NamedTuple):
    """transposed: its weight is [K, N], as transformers' Conv1D has it; obstacle: why it must stay."""

    transposed: bool = False
    obstacle: str = ""


def _of_model(shards: Shards) -> dict[str, LinearLayer] | None:
    """Those of the transformers model that config.json names; None where it names none that is known here."""
    if not (shards.directory / "config.json").is_file():
        return None
    try:
        model = hf.model_on_meta(shards.directory)
    except (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError):
        return None
    rename, reserved = hf.renaming(model), weights_of_attention(model.modules())
    modules = dict(model.named_modules(remove_duplicate=False))
    shared = {id(m.weight): name for name, m in modules.items() if isinstance(m, nn.Embedding)}
    found = {}
    for name in shards:
        layer = name.removesuffix(".weight")
        module = modules.get(rename(name).removesuffix(".weight"))
        if layer == name or module is None or not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        obstacle = reserved.get(id(module), "")
        if id(module.weight) in shared:
            obstacle = f"its weight is tied to {shared[id(module.weight)]}'s"
        elif isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            obstacle = f"{type(module).__name__} is a subclass of nn.Linear, whose users may read its weight"
        found[layer] = LinearLayer(is_conv1d(module), obstacle)
    return found


def _of_names(shards: Shards) -> dict[str, LinearLayer]:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return {
        name.removesuffix(".weight"): LinearLayer()
        for name, entry in shards.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and entry.dtype in floats and not _TABLES.search(name)
    }


def linear_layers(shards: Shards, skip: Iterable[str]) -> tuple[dict[str, LinearLayer], str]:
    """({the name of each linear layer in the files: what it is}, what should be said of how they were told). Those in
    skip, names of modules or parts of dotted names, have that as their obstacle."""
    known, named = _of_model(shards), _of_names(shards)
    found = named if known is None else known
    for name in found:
        key = next((key for key in skip if f".{key}." in f".{name}."), None)
        if key is not None:
            found[name] = found[name]._replace(obstacle=f"in skip: {key}")
    if known is None:
        return found, "no model's class is known: linear layers were told by the names of their weights"
    others = [name for name in named if name not in known]
    if others:
        return found, f"{len(others)} matrices are no linear layer of the model's class and stay, as {others[0]}"
    return found, ""
