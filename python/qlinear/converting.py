"""convert_checkpoint: a quantized checkpoint in another format, where that is exact: the same weight, to the bit.

What is exact is a matter of the codes: GPTQ and AWQ hold the same four bits, zeros and scales in other orders; EETQ,
LLM.int8() and GPTQ's 8 bits with one group the same bytes, with the scale or the absmax beside them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _qlinear
from .checkpoint import make_layer
from .detect import detect
from .detect_group import Layer
from .layers._module import QuantizedLinear
from .layers.awq import AWQLinear
from .layers.bnb import Linear8bitLt
from .layers.eetq import EETQLinear
from .layers.gptq import QuantLinear
from .linear_layers import linear_layers
from .model import Bar
from .quantization_config import read_config
from .rewriting import RewriteReport, RewrittenLayer, Target, explicit
from .shards import Shards
from .storages import origin_of

_UNEVEN = "its sixteen values are not evenly spaced, so no scale and zero give them"
# Why no layer of a format has the same weight in another; by the formats that detect names and the targets.
_OBSTACLES = {
    "bitsandbytes-nf4": _UNEVEN,
    "bitsandbytes-fp4": _UNEVEN,
    "fp8": "its steps grow with the value, so no scale and zero give them",
}


class NotExactError(ValueError):
    """The weight would not be the same in the other format."""


# From one format's tensors to another's


def _gptq_zeros(layer: QuantLinear) -> Tensor:
    """The zeros that the layer subtracts, uint8 [G, N]."""
    stored = layer.qzeros.t().contiguous()
    zeros = _qlinear.gptq_unpack_codes(stored, bits=layer.bits, count=layer.out_features).t()
    return zeros if layer.stored_zeros() == "gptq_v2" else (zeros + 1) & (2**layer.bits - 1)


def _groups(layer: QuantLinear) -> Tensor | None:
    """g_idx where it says what the order of the inputs does not; AutoGPTQ writes zeros for one that was not made."""
    index = layer.g_idx
    size = layer.in_features if layer.groupsize == -1 else layer.groupsize
    if index is None or not index.any():
        return None
    natural = torch.arange(len(index), dtype=index.dtype, device=index.device) // size
    return None if torch.equal(index, natural) else index


def _gptq(
    qweight: Tensor, zeros: Tensor, scales: Tensor, layer: Any, bits: int, size: int, zero_format: str, g_idx: Tensor
) -> QuantLinear:
    """zeros uint8 [G, N], as they are subtracted."""
    most = 2**bits - 1
    stored = zeros if zero_format == "gptq_v2" else (zeros.to(torch.int16) - 1 & most).to(torch.uint8)
    if zero_format == "gptq" and bool((stored == 2 ** (bits - 1)).all()):
        raise NotExactError(
            f"with every zero at {2 ** (bits - 1) + 1} its zeros would be taken for gptq_v2's: convert to gptq_v2"
        )
    qzeros = _qlinear.gptq_pack_codes(stored.t().contiguous(), bits=bits).t().contiguous()
    return QuantLinear(
        qweight, qzeros, scales, g_idx, layer.bias, bits, size, zero_format=zero_format, in_features=layer.in_features
    )


def _to_gptq(zero_format: str) -> Callable[[QuantizedLinear], QuantizedLinear]:
    def convert(layer: QuantizedLinear) -> QuantLinear:
        if isinstance(layer, (EETQLinear, Linear8bitLt)):
            codes, scales = _bytes(layer)
            zeros = torch.full((1, layer.out_features), 128, dtype=torch.uint8, device=codes.device)
            natural = torch.zeros(layer.in_features, dtype=torch.int32, device=codes.device)
            qweight = _qlinear.gptq_pack_codes(codes.view(torch.uint8) ^ 128, bits=8)
            return _gptq(qweight, zeros, scales.view(1, -1), layer, 8, -1, zero_format, natural)
        size = layer.groupsize if isinstance(layer, QuantLinear) else layer.group_size
        natural = torch.arange(layer.in_features, dtype=torch.int32, device=layer.device)
        natural //= layer.in_features if size == -1 else size
        if isinstance(layer, QuantLinear):
            index = layer.g_idx if layer.g_idx is not None else natural
            numbers = (layer.bits, size, zero_format, index)
            return _gptq(layer.qweight, _gptq_zeros(layer), layer.scales, layer, *numbers)
        _check_integer_zeros(layer)
        codes = _qlinear.awq_unpack(layer.qweight, count=layer.out_features)
        zeros = _qlinear.awq_unpack(layer.qzeros, count=layer.out_features)
        qweight = _qlinear.gptq_pack_codes(codes, bits=4)
        return _gptq(qweight, zeros, layer.scales, layer, 4, size, zero_format, natural)

    return convert


def _check_integer_zeros(layer: AWQLinear) -> None:
    if layer.qzeros.is_floating_point():
        raise NotExactError("GEMVFast stores the products of zeros and scales, rounded, from which no zero follows")


def _to_awq(layer: QuantizedLinear) -> AWQLinear:
    if isinstance(layer, AWQLinear):
        _check_integer_zeros(layer)
        return AWQLinear(4, layer.group_size, layer.qweight, layer.qzeros, layer.scales, layer.bias)
    if layer.bits != 4:
        raise NotExactError(f"it has {layer.bits} bits, AWQ's kernels and files have 4")
    if _groups(layer) is not None:
        raise NotExactError("its groups are not of neighbouring inputs (act-order), and AWQ has no index of groups")
    if layer.out_features % 8:
        raise NotExactError(f"it has {layer.out_features} outputs, AWQ's words hold 8")
    codes = _qlinear.gptq_unpack_codes(layer.qweight, bits=4, count=layer.in_features)
    zeros = _gptq_zeros(layer).contiguous()
    return AWQLinear(4, layer.groupsize, _qlinear.awq_pack(codes), _qlinear.awq_pack(zeros), layer.scales, layer.bias)


def _bytes(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """(codes int8 [K, N], scales [N]) of a layer that is both and nothing else."""
    if isinstance(layer, EETQLinear):
        return _qlinear.eetq_unpack(layer.weight), layer.weight_scales
    if isinstance(layer, Linear8bitLt):
        scales = layer.SCB.double() / 127
        if not (scales.half().double() == scales).all():
            raise NotExactError("the 127th parts of its absmax are no fp16 numbers, as scales are")
        return layer.weight.t().contiguous(), scales.half()
    if layer.bits != 8:
        raise NotExactError(f"it has {layer.bits} bits, not 8")
    if layer.scales.shape[0] != 1 or not (_gptq_zeros(layer) == 128).all():
        raise NotExactError("it has several groups, or zeros that are not 128, where the other format has one scale")
    codes = _qlinear.gptq_unpack_codes(layer.qweight, bits=8, count=layer.in_features)
    return (codes ^ 128).view(torch.int8), layer.scales[0]


def _to_int8(layer: QuantizedLinear) -> Linear8bitLt:
    rounded = "127 times its scales, which is what SCB is, are rounded in fp32"
    if isinstance(layer, Linear8bitLt):
        origin = origin_of(layer)
        scale = origin.kept.get("weight_scale") if origin is not None else None
        if scale is not None and not (layer.SCB.double() / 127 == scale.double().reshape(-1)).all():
            raise NotExactError(rounded)
        return layer
    codes, scales = _bytes(layer)
    SCB = scales.float() * 127
    if not (SCB.double() / 127 == scales.double()).all():
        raise NotExactError(rounded)
    return Linear8bitLt.from_tensors({"weight": codes.t().contiguous(), "SCB": SCB}, layer.bias)


def _to_eetq(layer: QuantizedLinear) -> EETQLinear:
    if isinstance(layer, EETQLinear):
        return layer
    if layer.in_features % 64 or layer.out_features % 2:
        sizes = f"{layer.in_features} and {layer.out_features}"
        raise NotExactError(f"EETQ's inputs are a multiple of 64 and its outputs of 2, these are {sizes}")
    codes, scales = _bytes(layer)
    return EETQLinear.from_tensors({"weight": _qlinear.eetq_pack(codes), "weight_scales": scales}, layer.bias)


_BYTES = ("eetq", "bitsandbytes", "gptq")
# For each target: the formats of detect that may hold its weights, and the way.
_TARGETS: dict[str, tuple[tuple[str, ...], Callable[[Any], QuantizedLinear]]] = {
    "gptq": ((*_BYTES, "awq"), _to_gptq("gptq")),
    "gptq_v2": ((*_BYTES, "awq"), _to_gptq("gptq_v2")),
    "awq": (("gptq", "awq"), _to_awq),
    "int8": (_BYTES, _to_int8),
    "eetq": (_BYTES, _to_eetq),
}
TARGETS = tuple(_TARGETS)


def _why_not(layer: Layer, to: str) -> str:
    if layer.format in _OBSTACLES:
        return _OBSTACLES[layer.format]
    if to == "awq":
        return "its codes have 8 bits, AWQ's 4"
    return "it has 4 bits in groups, with a zero for each, where the other format has one scale for each output"


def convert_checkpoint(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    to: str,
    *,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> RewriteReport:
    """Writes the quantized checkpoint in `source` to `directory` with its layers in the format `to`, one of TARGETS,
    and with its other files. Every weight is the same: what cannot be so is a ValueError that says why, for each layer,
    and nothing is written then. max_shard_size is save_pretrained's.
    """
    if to not in _TARGETS:
        raise ValueError(f"{to!r:.60} is none of {', '.join(TARGETS)}")
    shards = Shards(source)
    config = read_config(shards.directory)
    plain, _ = linear_layers(shards, ())
    found = detect(shards, config)
    if found.refused:
        name, reason = next(iter(found.refused.items()))
        raise ValueError(f"{shards.directory}: {len(found.refused)} layers cannot be loaded: {name}: {reason}")
    if not found.layers:
        raise ValueError(f"{shards.directory}: has no quantized layer: quantize makes some")
    formats, convert = _TARGETS[to]
    wrong = {name: _why_not(layer, to) for name, layer in found.layers.items() if layer.format not in formats}
    _raise_not_exact(wrong, found.layers, to)
    report = RewriteReport(to, bytes_before=sum(entry.nbytes for entry in shards.values()))
    target = Target(shards, directory, max_shard_size, found.layers)
    wrapping = 0
    target.unquantized += [name for name in plain if name not in found.layers]
    bar = Bar(len(found.layers), f"qlinear: to {to}", progress)
    try:
        with torch.no_grad(), torch.inference_mode(False), target:
            for layer in found.layers.values():
                old = make_layer(shards, layer, config, torch.device("cpu"), None)
                try:
                    new = explicit(convert(old))
                    _check_same(old, new)
                except NotExactError as error:
                    wrong[layer.name] = str(error)
                if not wrong:
                    wrapping += to == "gptq" and bool((_gptq_zeros(new) == 0).any())
                    after = target.add_layer(layer.name, new)
                    sizes = (layer.in_features, layer.out_features, layer.nbytes, after)
                    report.layers.append(RewrittenLayer(layer.name, *sizes))
                bar.step()
            _raise_not_exact(wrong, found.layers, to)
            for name in (*found.plain, *found.ignored):
                target.add_plain(name)
            report.bytes_after = target.nbytes
            if wrapping:
                report.notes.append(
                    f"{wrapping} layers have zeros of 0, which v1 stores as the largest code: readers that add 1 "
                    "without wrapping are wrong there by 2^bits; gptq_v2 has no such case"
                )
    finally:
        bar.close()
    return report


def _check_same(old: QuantizedLinear, new: QuantizedLinear) -> None:
    """Of layers that give a weight as code times scale; LLM.int8() divides by 127 besides, which fp32 may round."""
    plain = (QuantLinear, AWQLinear, EETQLinear)
    if not (isinstance(old, plain) and isinstance(new, plain)):
        return
    if not torch.equal(old.dequantize(torch.float32), new.dequantize(torch.float32)):
        raise NotExactError("the weight would differ")


def _raise_not_exact(wrong: dict[str, str], layers: Any, to: str) -> None:
    if not wrong:
        return
    reasons: dict[str, list[str]] = {}
    for name, reason in wrong.items():
        reasons.setdefault(f"{layers[name].format} to {to}: {reason}", []).append(name)
    lines = [
        f"  {reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for reason, names in reasons.items()
    ]
    raise NotExactError(
        "\n".join(["no exact conversion:", *lines, "  quantize rounds a float checkpoint to any format"])
    )
