"""Which quantized layers a checkpoint holds, told layer by layer from the names, dtypes and shapes of its tensors.

Where tensors leave a choice the config decides; where the two contradict each other the layer is refused, and so is
what looks like a format that is not implemented. Only the JSON of bitsandbytes' 4-bit layers is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from . import functional
from .quantization_config import QuantizationConfig
from .shards import Entry, Shards

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_E8M0 = tuple(filter(None, (getattr(torch, "float8_e8m0fnu", None), torch.uint8)))
_FLOAT8 = tuple(dtype for name in ("float8_e4m3fn", "float8_e5m2") if (dtype := getattr(torch, name, None)))
_PACKED_NAMES = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}
_STATE = "weight.quant_state.bitsandbytes__"
_USUAL_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
# Beside the layers of some files, and nothing of ours: scales of the key-value cache, buffers that models compute.
_IGNORED = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".rotary_emb.inv_freq", ".workspace")


@dataclass(frozen=True)
class Layer:
    """A quantized layer: the file's names of its tensors by those that from_tensors takes, and its options.

    planar: GPTQModel's 3-bit layout (gptq_p), whose planes of 2 bits and of 1 are to be put together first."""

    name: str
    format: str
    storage: str
    tensors: Mapping[str, str]
    in_features: int
    out_features: int
    nbytes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    planar: bool = False


@dataclass
class Found:
    """plain: the tensors of no quantized layer; refused: why a layer cannot be loaded, by its name."""

    layers: dict[str, Layer] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


class _Group(NamedTuple):
    """The tensors under one prefix by what follows it."""

    name: str
    entries: dict[str, Entry]
    shards: Shards
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

    def made(self, form: str, storage: str, keys: tuple[str, ...], size: tuple[int, int], **options: Any) -> Layer:
        """The layer of these keys, size being (K, N), after the config was heard."""
        if not self.config.allows(form):
            raise self.contradiction(f"quant_method {self.config.method}", f"{form}, {storage}")
        kept = self.config.keeps(self.name)
        if kept:
            raise self.contradiction(f"that it is not quantized ({kept})", f"{form}, {storage}")
        if min(size) < 1:
            raise ValueError(f"a layer of {size[0]} inputs and {size[1]} outputs has no weight")
        if "bias" in self.entries:
            self.check("bias", _FLOATS, (size[1],))
            keys = (*keys, "bias")
        tensors = {_RENAMED.get(key, key): self.full(key) for key in keys if key in self.entries}
        nbytes = sum(self.entries[key].nbytes for key in keys if key in self.entries)
        return Layer(self.name, form, storage, tensors, *size, nbytes, options)

    def contradiction(self, said: str, tensors: str) -> ValueError:
        return ValueError(f"{self.config.source} says {said}, the tensors are {tensors}")


# GPTQ's Marlin files call by other names what AWQ's call qweight and scales.
_RENAMED = {"B": "qweight", "s": "scales"}


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


# GPTQ and AWQ


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


def _gptq_storages(group: _Group, rows: int, columns: int, groups: int) -> list[_Storage]:
    entries = group.entries
    if entries["scales"].shape != (groups, columns) or entries["qweight"].dtype != torch.int32:
        return []
    found = []
    for bits in (2, 3, 4, 8):
        inputs = rows * 32 // bits
        # The last word of a column may have room for more codes than there are inputs.
        if group.size is not None and _words(group.size[0], bits) == rows:
            inputs = group.size[0]
        if "g_idx" in entries and entries["g_idx"].shape != (0,):
            inputs = entries["g_idx"].shape[0] if len(entries["g_idx"].shape) == 1 else -1
        if entries["qzeros"].shape == (groups, _words(columns, bits)) and _words(inputs, bits) == rows:
            found.append(
                _Storage("gptq", "act-order index" if "g_idx" in entries else "plain", bits, inputs, columns, groups)
            )
    return found


def _awq_storages(group: _Group, rows: int, columns: int, groups: int) -> list[_Storage]:
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


def _grouped(group: _Group) -> Layer:
    """A layer that has a qweight (or Marlin's B)."""
    is_marlin = "B" in group.entries
    codes, scales = ("B", "s") if is_marlin else ("qweight", "scales")
    group.need(codes, scales)
    qweight = group.check(codes, (torch.int32, torch.int16))
    group.check(scales, _FLOATS)
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
        group.check("qzeros", _FLOATS if is_fast else (torch.int32,))
        groups = group.entries["scales" if is_fast else "qzeros"].shape[0]
        found = _gptq_storages(group, rows, columns, groups)
        if "g_idx" not in group.entries:
            found += _awq_storages(group, rows, columns, groups)
    if not found:
        keys = (key for key in (codes, "qzeros", scales, "g_idx") if key in group.entries)
        shapes = ", ".join(f"{key} {list(group.entries[key].shape)}" for key in keys)
        raise ValueError(f"{qweight.path.name}: {shapes} are no storage of GPTQ or AWQ that is known")
    return _made_of(group, _chosen(group, found), codes, scales)


def _chosen(group: _Group, found: list[_Storage]) -> _Storage:
    """The one way to read the tensors that goes with the model and the config."""
    config = group.config
    fits = [storage for storage in found if group.size == (storage.in_features, storage.out_features)] or found
    bits = config.number("bits", group.name)
    heard = [
        storage
        for storage in fits
        if (config.allows(storage.format) or (storage.storage == "marlin" and config.method == "gptq"))
        and bits in (None, storage.bits)
    ]
    texts = " or ".join(map(str, fits))
    if not heard:
        said = f"quant_method {config.method}" + ("" if bits is None else f" and {bits} bits")
        raise group.contradiction(said, texts)
    if len(heard) > 1:
        raise ValueError(f"its tensors could be {' or '.join(map(str, heard))}, and no config tells which")
    return heard[0]


def _gemv_fits(inputs: int, size: int, words: int) -> bool:
    """Whether AutoAWQ pads the groups of this size to so many words."""
    multiple = {64: 2, 32: 4}.get(size, 1)
    return _ceil(_ceil(_ceil(inputs, size), 8), multiple) * multiple == words


def _group_size(group: _Group, storage: _Storage) -> int:
    inputs, groups, words = storage.in_features, storage.groups, storage.gemv_words
    said = group.config.number("group_size", group.name)
    if said is not None:
        size = inputs if said == -1 else said
        count = _ceil(inputs, size)
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
        fits = [size for size in _USUAL_GROUPS if _ceil(inputs, size) == groups]
    if len(fits) != 1:
        raise ValueError(f"{groups} groups of {inputs} inputs do not tell group_size, and no config does")
    return fits[0]


def _made_of(group: _Group, storage: _Storage, codes: str, scales: str) -> Layer:
    config, size = group.config, (storage.in_features, storage.out_features)
    group_size = _group_size(group, storage)
    text = f"{storage.storage}, group_size {group_size}"
    if storage.format == "awq":
        if storage.storage == "marlin" and config.method == "gptq":
            group = group._replace(config=QuantizationConfig())
        return group.made("awq", text, (codes, "qzeros", scales), size, group_size=group_size, bits=4)
    if "g_idx" in group.entries:
        group.check("g_idx", (torch.int32, torch.int64))
    said = str(config.values.get("checkpoint_format") or config.values.get("format") or "gptq")
    if said not in ("gptq", "gptq_v2", "gptq_p"):
        raise ValueError(f"{config.source} says checkpoint_format {said:.60}, which is not implemented")
    # Files that say gptq may hold zeros of v2: where they can be told, the layer does.
    made = group.made(
        "gptq",
        f"{storage.bits} bits, group_size {group_size}",
        ("qweight", "qzeros", "scales", "g_idx"),
        size,
        bits=storage.bits,
        group_size=group_size,
        zero_format="auto" if said == "gptq" else "gptq_v2",
        in_features=storage.in_features,
    )
    return replace(made, planar=said == "gptq_p" and storage.bits == 3)


# EETQ, bitsandbytes, FP8


def _matrix(group: _Group) -> tuple[int, int]:
    shape = group.entries["weight"].shape
    if len(shape) != 2:
        raise ValueError(
            f"{group.where('weight')} must have two dimensions, has {list(shape)}: are these fused experts?"
        )
    return shape[0], shape[1]


def _eetq(group: _Group) -> Layer:
    group.need("weight")
    group.check("weight", (torch.int8,))
    inputs, outputs = _matrix(group)
    group.check("weight_scales", _FLOATS, (outputs,))
    if inputs % 64 or outputs % 2:
        raise ValueError(
            f"{group.where('weight')} must be [K, N] with K % 64 == 0 and N % 2 == 0, is {[inputs, outputs]}"
        )
    return group.made("eetq", "int8", ("weight", "weight_scales"), (inputs, outputs))


def _int8(group: _Group) -> Layer:
    group.need("weight")
    group.check("weight", (torch.int8,))
    outputs, inputs = _matrix(group)
    group.check("SCB", (torch.float32,), (outputs,))
    if "weight_format" in group.entries:
        group.check("weight_format", (torch.uint8,), ())
    threshold = group.config.positive("llm_int8_threshold", 6.0)
    return group.made(
        "bitsandbytes", "int8", ("weight", "SCB", "weight_format"), (inputs, outputs), threshold=threshold
    )


def _fourbit(group: _Group) -> Layer:
    states = sorted(key for key in group.entries if key.startswith(_STATE))
    if len(states) != 1:
        raise ValueError(f"there must be exactly one {group.full(_STATE)}*, got {', '.join(states) or 'none'}")
    group.need("weight", "weight.absmax", "weight.quant_map")
    kind = states[0].removeprefix(_STATE)
    group.check(states[0], (torch.uint8,))
    numbers = functional.unpack_json(group.shards.tensor(group.full(states[0])))
    shape, blocksize = numbers.get("shape"), numbers.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{group.where(states[0])}: shape must be [out_features, in_features], got {shape!r:.60}")
    if numbers.get("quant_type") != kind or kind not in ("nf4", "fp4"):
        raise ValueError(
            f"{group.where(states[0])}: quant_type is {numbers.get('quant_type')!r:.60}, not nf4 or fp4 as its name"
        )
    if type(blocksize) is not int or blocksize < 1:
        raise ValueError(f"{group.where(states[0])}: blocksize must be a positive integer, got {blocksize!r:.60}")
    outputs, inputs = shape
    count, blocks = _ceil(outputs * inputs, 2), _ceil(outputs * inputs, blocksize)
    weight = group.check("weight", (torch.uint8, *_FLOATS))
    if weight.nbytes != count:
        raise ValueError(f"{group.where('weight')} must have {count} bytes for {shape}, has {weight.nbytes}")
    group.check("weight.quant_map", (torch.float32,), (16,))
    nested = "nested_offset" in numbers
    if nested:
        group.need("weight.nested_absmax", "weight.nested_quant_map")
        size = numbers.get("nested_blocksize")
        if type(size) is not int or size < 1:
            raise ValueError(f"{group.where(states[0])}: nested_blocksize must be a positive integer, got {size!r:.60}")
        group.check("weight.nested_absmax", (torch.float32,), (_ceil(blocks, size),))
        group.check("weight.nested_quant_map", (torch.float32,), (256,))
    elif "weight.nested_absmax" in group.entries:
        raise ValueError(
            f"{group.where(states[0])}: lacks the nested_offset that {group.full('weight.nested_absmax')} needs"
        )
    group.check("weight.absmax", (torch.uint8,) if nested else (torch.float32,), (blocks,))
    said = group.config.values.get("bnb_4bit_quant_type")
    if group.config.method == "bitsandbytes" and said not in (None, kind):
        raise group.contradiction(f"bnb_4bit_quant_type {said}", kind)
    keys = ("weight", *(f"weight.{key}" for key in sorted(_PACKED_NAMES)), states[0])
    text = f"blocks of {blocksize}{', double quantization' if nested else ''}"
    return group.made(f"bitsandbytes-{kind}", text, keys, (inputs, outputs))


def _fp8(group: _Group) -> Layer:
    group.check("weight", (torch.float8_e4m3fn,))
    outputs, inputs = _matrix(group)
    scales = [key for key in ("weight_scale", "weight_scale_inv") if key in group.entries]
    if len(scales) != 1:
        raise ValueError(f"{group.where('weight')} must have one weight_scale or weight_scale_inv, has {len(scales)}")
    scale = group.check(scales[0], (*_FLOATS, *_E8M0))
    said = group.config.block_size()
    block = said or (128, 128)
    grid = (_ceil(outputs, block[0]), _ceil(inputs, block[1]))
    is_grid = len(scale.shape) == 2 and scale.shape[0] >= grid[0] and scale.shape[1] >= grid[1]
    if said and not is_grid:
        raise group.contradiction(f"weight_block_size {list(said)}", f"{group.where(scales[0])} {list(scale.shape)}")
    if scale.shape in ((), (1,), (1, 1)):
        text = "per tensor"
    elif scale.shape in ((outputs,), (outputs, 1), (1, outputs)) and not said:
        text = "per channel"
    elif is_grid:
        text = f"blocks of {block[0]}x{block[1]}"
    else:
        raise ValueError(
            f"{group.where(scales[0])} must have one element, {outputs} or a grid of {list(grid)}, "
            f"has {list(scale.shape)}"
        )
    options: dict[str, Any] = {"block_size": block}
    activation, by = group.config.fp8_activation(group.name)
    has_input_scale = "input_scale" in group.entries
    if has_input_scale:
        entry = group.check("input_scale", _FLOATS)
        if entry.shape not in ((), (1,), (1, 1)):
            raise ValueError(f"{group.where('input_scale')} must have one element, has {list(entry.shape)}")
    if activation and (activation == "static") != has_input_scale and activation != "none":
        raise group.contradiction(by, f"{'with' if has_input_scale else 'without'} input_scale")
    if activation not in ("", "dynamic"):
        options["activation"] = activation
    elif said:
        options["activation"] = "group"
    bound = group.config.values.get("activation_scale_ub")
    if activation == "token" and bound is not None:
        options["input_scale_ub"] = group.config.positive("activation_scale_ub", 0.0)
    return group.made("fp8", text, ("weight", scales[0], "input_scale"), (inputs, outputs), **options)


# What is neighbouring and not implemented


def _neighbour(entries: Mapping[str, Entry]) -> str:
    """The name of a format that is known and cannot be loaded, or an empty string."""
    weight = entries.get("weight")
    by_keys = (
        (("weight_packed", "weight_global_scale"), "compressed-tensors nvfp4-pack-quantized"),
        (("weight_packed",), "compressed-tensors pack-quantized"),
        (("weight_scale_2",), "modelopt NVFP4"),
        (("W_q",), "HQQ"),
        (("Qidxs",), "QuIP#"),
        (("codebooks", "codes"), "AQLM"),
        (("q_weight", "q_scale"), "EXL2"),
        (("trellis",), "EXL3"),
    )
    for keys, name in by_keys:
        if all(key in entries for key in keys):
            return name
    if weight is not None and weight.dtype == torch.int8 and "weight_scale" in entries:
        return "compressed-tensors int-quantized"
    if weight is not None and weight.dtype == torch.uint8 and "weight_scale" in entries:
        return "MXFP4 or MXFP8"
    if weight is not None and weight.dtype in _FLOAT8 and weight.dtype != torch.float8_e4m3fn:
        return "float8_e5m2 weights"
    for key, entry in entries.items():
        if (
            f"{key.removesuffix('_blocks')}_scales" in entries
            and key.endswith("_blocks")
            and entry.dtype == torch.uint8
        ):
            return "fused experts in MXFP4"
        if entry.dtype in _FLOAT8 and len(entry.shape) > 2:
            return "fused experts in FP8"
        if key in ("qweight", "weight_scale") and len(entry.shape) > 2:
            return "fused experts"
        if entry.dtype in _FLOAT8 and key not in ("weight", "weight_scale", "weight_scale_inv", "input_scale"):
            return f"a float8 {key}"
    return ""


def _layer(group: _Group) -> Layer | None:
    """The layer that the tensors make; None where they are plain ones."""
    entries = group.entries
    name = _neighbour(entries)
    if name:
        raise ValueError(f"{next(iter(entries.values())).path.name}: {name}, which is not implemented")
    if "qweight" in entries or {"B", "s"} <= entries.keys():
        return _grouped(group)
    if any(key.startswith("weight.") for key in entries):
        return _fourbit(group)
    if "SCB" in entries:
        return _int8(group)
    if "weight_scales" in entries:
        return _eetq(group)
    weight = entries.get("weight")
    if weight is not None and weight.dtype == torch.float8_e4m3fn:
        return _fp8(group)
    companions = entries.keys() & {"qzeros", "g_idx", "weight_scale", "weight_scale_inv", "input_scale"}
    if companions:
        raise ValueError(f"{group.where(min(companions))} belongs to a quantized weight, which is not there")
    return None


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as the module's and what follows it; bitsandbytes' keys have a dot in them."""
    head, _, tail = name.rpartition(".weight.")
    if head and (tail in _PACKED_NAMES or tail.startswith("quant_state.")):
        return head, f"weight.{tail}"
    if name.startswith("weight.") and (name[7:] in _PACKED_NAMES or name[7:].startswith("quant_state.")):
        return "", name
    prefix, _, key = name.rpartition(".")
    return prefix, key


def detect(shards: Shards, config: QuantizationConfig, sizes: Mapping[str, tuple[int, int]] | None = None) -> Found:
    """Every layer and tensor of a checkpoint. sizes: (K, N) of a model's modules, which decide what tensors leave open.

    ValueError where the config speaks of quantization and no tensor is quantized."""
    groups: dict[str, dict[str, Entry]] = {}
    found = Found()
    for name, entry in shards.items():
        if f".{name}".endswith(_IGNORED):
            found.ignored.append(name)
            continue
        prefix, key = _split(name)
        groups.setdefault(prefix, {})[key] = entry
    for prefix, entries in groups.items():
        group = _Group(prefix, entries, shards, config, (sizes or {}).get(prefix))
        try:
            layer = _layer(group)
        except (ValueError, TypeError) as error:
            found.refused[prefix] = str(error)
            continue
        used = set() if layer is None else set(layer.tensors.values())
        if layer is not None:
            found.layers[prefix] = layer
        found.plain.extend(name for name in map(group.full, entries) if name not in used)
    if config.method and not found.layers and not found.refused:
        raise ValueError(
            f"{shards.directory / config.source}: says quant_method {config.method}, but no tensor is quantized"
        )
    return found
