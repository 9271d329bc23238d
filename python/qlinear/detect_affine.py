"""Detection of GPTQ, AWQ and compressed-tensors' packed integers: codes with scales and zeros by groups of inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .detect_group import FLOATS, Group, Layer, ceil, words
from .quantization_config import QuantizationConfig

_USUAL_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


class _Storage(NamedTuple):
    """One way to read the tensors. group_size 0: they do not tell it; gemv: the padded words of groups, else 0."""

    format: str
    storage: str
    bits: int
    in_features: int
    out_features: int
    groups: int
    gemv_words: int = 0

    def __str__(self) -> str:
        return f"{self.format}, {self.storage}" + (f", {self.bits} bits" if self.format == "gptq" else "")


def _gptq_storages(group: Group, rows: int, columns: int, groups: int) -> list[_Storage]:
    entries = group.entries
    if entries["scales"].shape != (groups, columns) or entries["qweight"].dtype != torch.int32:
        return []
    found = []
    for bits in (2, 3, 4, 8):
        inputs = rows * 32 // bits
        # The last word of a column may have room for more codes than there are inputs.
        if group.size is not None and words(group.size[0], bits) == rows:
            inputs = group.size[0]
        if "g_idx" in entries and entries["g_idx"].shape != (0,):
            inputs = entries["g_idx"].shape[0] if len(entries["g_idx"].shape) == 1 else -1
        if entries["qzeros"].shape == (groups, words(columns, bits)) and words(inputs, bits) == rows:
            found.append(
                _Storage("gptq", "act-order index" if "g_idx" in entries else "plain", bits, inputs, columns, groups)
            )
    return found


def _awq_storages(group: Group, rows: int, columns: int, groups: int) -> list[_Storage]:
    entries = group.entries
    qzeros, scales = entries["qzeros"].shape, entries["scales"].shape
    if entries["qweight"].dtype == torch.int16:
        if qzeros == scales == (groups, 4 * rows) and groups % 8 == 0:
            return [_Storage("awq", "gemv_fast", 4, columns, 4 * rows, groups, groups // 8)]
        return []
    found = []
    if scales == (groups, 8 * columns) and qzeros == (groups, columns):
        found.append(_Storage("awq", "gemm", 4, rows, 8 * columns, groups))
    if qzeros[0] == scales[0] == rows and scales[1] == 8 * qzeros[1]:
        found.append(_Storage("awq", "gemv", 4, 8 * columns, rows, scales[1], qzeros[1]))
    return found


def grouped(group: Group) -> Layer:
    """A layer that has a qweight (or Marlin's B)."""
    is_marlin = "B" in group.entries
    codes, scales = ("B", "s") if is_marlin else ("qweight", "scales")
    group.need(codes, scales)
    qweight = group.check(codes, (torch.int32, torch.int16))
    group.check(scales, FLOATS)
    for key in (codes, scales, *(("qzeros",) if "qzeros" in group.entries else ())):
        if len(group.entries[key].shape) != 2:
            raise ValueError(f"{group.where(key)} must have two dimensions, has {list(group.entries[key].shape)}")
    rows, columns = qweight.shape
    if is_marlin or ("qzeros" not in group.entries and "g_idx" not in group.entries):
        groups, outputs = group.entries[scales].shape
        found = [_Storage("awq", "marlin", 4, 16 * rows, outputs, groups)] if columns == 2 * outputs else []
    else:
        group.need("qzeros")
        is_fast = qweight.dtype == torch.int16
        group.check("qzeros", FLOATS if is_fast else (torch.int32,))
        groups = group.entries["scales" if is_fast else "qzeros"].shape[0]
        found = _gptq_storages(group, rows, columns, groups)
        if "g_idx" not in group.entries:
            found += _awq_storages(group, rows, columns, groups)
    if not found:
        keys = (key for key in (codes, "qzeros", scales, "g_idx") if key in group.entries)
        shapes = ", ".join(f"{key} {list(group.entries[key].shape)}" for key in keys)
        raise ValueError(f"{qweight.path.name}: {shapes} are no storage of GPTQ or AWQ that is known")
    return _made_of(group, _chosen(group, found), codes, scales)


def _chosen(group: Group, found: list[_Storage]) -> _Storage:
    """The one way to read the tensors that goes with the model and the config."""
    config = group.config
    fits = [storage for storage in found if group.size == (storage.in_features, storage.out_features)] or found
    bits = config.number("bits", group.name)
    heard = [
        storage
        for storage in fits
        if (config.allows(storage.format, group.name) or (storage.storage == "marlin" and config.method == "gptq"))
        and bits in (None, storage.bits)
    ]
    if not heard:
        said = f"quant_method {config.method}" + ("" if bits is None else f" and {bits} bits")
        raise group.contradiction(said, " or ".join(map(str, fits)))
    if len(heard) > 1:
        raise ValueError(f"its tensors could be {' or '.join(map(str, heard))}, and no config tells which")
    return heard[0]


def _gemv_fits(inputs: int, size: int, words: int) -> bool:
    """Whether AutoAWQ pads the groups of this size to so many words."""
    multiple = {64: 2, 32: 4}.get(size, 1)
    return ceil(ceil(ceil(inputs, size), 8), multiple) * multiple == words


def _group_size(group: Group, storage: _Storage) -> int:
    inputs, groups, words = storage.in_features, storage.groups, storage.gemv_words
    said = group.config.number("group_size", group.name)
    if said is not None:
        size = inputs if said == -1 else said
        count = ceil(inputs, size)
        if not (count <= 8 * words if words else count == groups):
            text = f"{groups} groups of {inputs} inputs" if not words else f"{8 * words} padded groups"
            raise group.contradiction(f"group_size {said}", text)
        return said
    if words:
        fits = sorted({size for size in (32, 64, 128, inputs) if _gemv_fits(inputs, size, words)})
    elif groups == 1:
        fits = [-1]
    elif groups > 0 and inputs % groups == 0:
        fits = [inputs // groups]
    else:
        fits = [size for size in _USUAL_GROUPS if ceil(inputs, size) == groups]
    if len(fits) != 1:
        raise ValueError(f"{groups} groups of {inputs} inputs do not tell group_size, and no config does")
    return fits[0]


def _made_of(group: Group, storage: _Storage, codes: str, scales: str) -> Layer:
    config, size = group.config, (storage.in_features, storage.out_features)
    group_size = _group_size(group, storage)
    text = f"{storage.storage}, group_size {group_size}"
    if storage.format == "awq":
        if storage.storage == "marlin" and config.method == "gptq":
            group = group._replace(config=QuantizationConfig())
        conversion = "" if storage.storage == "gemm" else "gptq-marlin" if codes == "B" else storage.storage
        return group.made("awq", text, (codes, "qzeros", scales), size, conversion, group_size=group_size, bits=4)
    if "g_idx" in group.entries:
        group.check("g_idx", (torch.int32, torch.int64))
    said = config.gptq_format(group.name)
    zeros = config.zero_format(group.name)
    # Files that say gptq may hold zeros of v2: where they can be told, the layer does.
    return group.made(
        "gptq",
        f"{storage.bits} bits, group_size {group_size}",
        ("qweight", "qzeros", "scales", "g_idx"),
        size,
        # The other numbers of bits are one plane, which is the stream.
        "planar" if said == "gptq_p" and storage.bits == 3 else "",
        bits=storage.bits,
        group_size=group_size,
        zero_format=zeros or ("auto" if said == "gptq" else "gptq_v2"),
        in_features=storage.in_features,
    )


def packed_integers(group: Group) -> Layer:
    """compressed-tensors' pack-quantized: GPTQ's codes and zeros with rows and columns exchanged.

    weight_packed int32 [N, ceil(K * bits / 32)], weight_scale [N, G] or one element, weight_shape [2] = (N, K),
    weight_zero_point int32 [ceil(N * bits / 32), G] or int8 [N, G], weight_g_idx int32 [K]."""
    group.need_method("compressed-tensors", "pack-quantized")
    group.need("weight_packed", "weight_scale", "weight_shape")
    packed = group.check("weight_packed", (torch.int32,))
    scale = group.check("weight_scale", FLOATS)
    group.check("weight_shape", (torch.int64, torch.int32), (2,))
    outputs, inputs = group.shards.tensor(group.full("weight_shape")).tolist()
    if len(packed.shape) != 2 or packed.shape[0] != outputs or inputs < 1:
        raise ValueError(f"{group.where('weight_packed')} is {list(packed.shape)}, weight_shape {[outputs, inputs]}")
    fits = [bits for bits in (2, 4, 8) if words(inputs, bits) == packed.shape[1]]
    said = group.config.number("bits", group.name)
    if not fits:
        text = f"{said}-bit codes" if said else "weight_packed of this width"
        raise ValueError(
            f"{packed.path.name}: compressed-tensors {text}, which is not implemented: 2, 4 and 8 bits are"
        )
    bits = said if said in fits else fits[0]
    if said not in (None, bits):
        raise group.contradiction(f"num_bits {said}", f"{bits}-bit codes")
    is_scalar = scale.shape in ((), (1,), (1, 1))
    if not is_scalar and (len(scale.shape) != 2 or scale.shape[0] != outputs or scale.shape[1] < 1):
        raise ValueError(f"{group.where('weight_scale')} must be [{outputs}, groups], is {list(scale.shape)}")
    groups = 1 if is_scalar else scale.shape[1]
    if "weight_zero_point" in group.entries:
        entry = group.check("weight_zero_point", (torch.int32, torch.int8))
        shape = (words(outputs, bits) if entry.dtype == torch.int32 else outputs, groups)
        group.check("weight_zero_point", (entry.dtype,), shape)
    elif group.config.is_symmetric(group.name) is False:
        raise group.contradiction("symmetric false", "without weight_zero_point")
    if "weight_g_idx" in group.entries:
        group.check("weight_g_idx", (torch.int32, torch.int64), (inputs,))
    size = _group_size(group, _Storage("gptq", "pack-quantized", bits, inputs, outputs, groups))
    return group.made(
        "gptq",
        f"pack-quantized, {bits} bits, group_size {size}",
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
        (inputs, outputs),
        "pack-quantized",
        bits=bits,
        group_size=size,
        zero_format="gptq_v2",
        in_features=inputs,
    )
