"""Which quantized layers a checkpoint holds, told layer by layer from the names, dtypes and shapes of its tensors.

Where tensors leave a choice the config decides; where the two contradict each other the layer is refused, and so is
what looks like a format that is not implemented. Of the data only what describes a layer is read: the JSON of
bitsandbytes' 4-bit layers, compressed-tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .detect_affine import grouped, packed_integers
from .detect_codes import PACKED_NAMES, eetq, fourbit, fp8, int8, integers
from .detect_group import Group, Layer, Tensors
from .quantization_config import QuantizationConfig
from .shards import Entry

_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
# Beside the layers of some files, and nothing of ours: scales of the key-value cache, buffers that models compute.
_IGNORED = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".rotary_emb.inv_freq", ".workspace")
# Formats that are known and cannot be loaded, by names that only they have.
_BY_KEYS = (
    (("weight_packed", "weight_global_scale"), "compressed-tensors nvfp4-pack-quantized"),
    (("weight_packed", "meta"), "compressed-tensors marlin-24"),
    (("compressed", "bitmask"), "compressed-tensors' sparse weights"),
    (("weight_scale_2",), "modelopt NVFP4"),
    (("W_q",), "HQQ"),
    (("Qidxs",), "QuIP#"),
    (("codebooks", "codes"), "AQLM"),
    (("q_weight", "q_scale"), "EXL2"),
    (("trellis",), "EXL3"),
)
_MARKS = frozenset(keys[-1] for keys, _ in _BY_KEYS)


@dataclass
class Found:
    """plain: the tensors of no quantized layer; refused: why a layer cannot be loaded, by its name."""

    layers: dict[str, Layer] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def _neighbour(entries: Mapping[str, Entry]) -> str:
    """The name of a format that is known and cannot be loaded, or an empty string."""
    weight = entries.get("weight")
    if not _MARKS.isdisjoint(entries):
        for keys, name in _BY_KEYS:
            if all(key in entries for key in keys):
                return name
    if weight is not None and weight.dtype == torch.uint8 and "weight_scale" in entries:
        return "MXFP4 or MXFP8"
    if weight is not None and weight.dtype in _FLOAT8 and weight.dtype != torch.float8_e4m3fn:
        return "float8_e5m2 weights"
    for key, (_, dtype, shape, _, _) in entries.items():
        if key.endswith("_blocks") and dtype == torch.uint8 and f"{key.removesuffix('_blocks')}_scales" in entries:
            return "fused experts in MXFP4"
        if len(shape) > 2:
            if dtype in _FLOAT8:
                return "fused experts in FP8"
            if key in ("qweight", "weight_scale") and not (weight and len(weight.shape) == 2):
                return "fused experts"
        if dtype in _FLOAT8 and key not in ("weight", "weight_scale", "weight_scale_inv", "input_scale"):
            return f"a float8 {key}"
    return ""


_COMPANIONS = {"qzeros", "g_idx", "input_scale"}
_COMPANIONS |= {"weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_shape"}


def _layer(group: Group) -> Layer | None:
    """The layer that the tensors make; None where they are plain ones."""
    entries = group.entries
    name = _neighbour(entries)
    if name:
        raise ValueError(f"{next(iter(entries.values())).path.name}: {name}, which is not implemented")
    if "qweight" in entries or {"B", "s"} <= entries.keys():
        return grouped(group)
    if "weight_packed" in entries:
        return packed_integers(group)
    if any(key.startswith("weight.") for key in entries):
        return fourbit(group)
    if "SCB" in entries:
        return int8(group)
    if "weight_scales" in entries:
        return eetq(group)
    weight = entries.get("weight")
    if weight is not None and weight.dtype == torch.float8_e4m3fn:
        return fp8(group)
    if weight is not None and weight.dtype == torch.int8 and "weight_scale" in entries:
        return integers(group)
    companions = entries.keys() & _COMPANIONS
    if companions:
        raise ValueError(f"{group.where(min(companions))} belongs to a quantized weight, which is not there")
    return None


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as the module's and what follows it; bitsandbytes' keys have a dot in them."""
    # Of an empty module name nothing would be left to tell it from the root's.
    if name.startswith("."):
        return "", name
    head, dot, tail = f".{name}".rpartition(".weight.")
    if dot and (tail in PACKED_NAMES or tail.startswith("quant_state.")):
        return head[1:], f"weight.{tail}"
    prefix, _, key = name.rpartition(".")
    return prefix, key


def detect(shards: Tensors, config: QuantizationConfig, sizes: Mapping[str, tuple[int, int]] | None = None) -> Found:
    """Every layer and tensor of a checkpoint. sizes: (K, N) of a model's modules, which decide what tensors leave open.

    ValueError where the config speaks of quantization and no tensor is quantized."""
    config.check()
    groups: dict[str, dict[str, Entry]] = {}
    found = Found()
    for name, entry in shards.items():
        if f".{name}".endswith(_IGNORED):
            found.ignored.append(name)
            continue
        prefix, key = _split(name)
        groups.setdefault(prefix, {})[key] = entry
    for prefix, entries in groups.items():
        group = Group(prefix, entries, shards, config, (sizes or {}).get(prefix))
        try:
            layer = _layer(group)
        except (ValueError, TypeError) as error:
            found.refused[prefix] = str(error)
            continue
        used = {}
        if layer is not None:
            found.layers[prefix], used = layer, layer.tensors
        if len(used) < len(entries):
            found.plain += [group.full(key) for key in entries if key not in used]
    if config.method and not found.layers and not found.refused:
        raise ValueError(
            f"{shards.directory / config.source}: says quant_method {config.method}, but no tensor is quantized"
        )
    return found
