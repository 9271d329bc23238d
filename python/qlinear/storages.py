"""Checkpoints' storages that no layer has: into the tensors that from_tensors takes, and, bit for bit, back.

Each conversion has a name, which detect gives to a layer. Tensors are keyed by what follows the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _qlinear
from .layers._module import QuantizedLinear
from .layers.awq import to_gemm
from .quantization_config import QuantizationConfig

_Tensors = dict[str, Tensor]

# Conversions that write codes anew, which a GPU does faster than a CPU reads them.
ON_DEVICE = {"planar", "gemv", "gemv_fast", "marlin", "gptq-marlin", "pack-quantized", "int-quantized codes"}


class Origin(NamedTuple):
    """How a layer stood in the files that it was loaded from: the config, and the conversion with what the way back
    needs besides the layer's tensors."""

    config: QuantizationConfig
    conversion: str = ""
    kept: Mapping[str, Tensor] = {}


def origin_of(module: QuantizedLinear) -> Origin | None:
    return vars(module).get("_origin")


def set_origin(module: QuantizedLinear, origin: Origin) -> None:
    # Past nn.Module, for which a packed layer unpacks itself.
    vars(module)["_origin"] = origin


def stored(module: QuantizedLinear, prefix: str, state: _Tensors) -> _Tensors:
    """A layer's state dict as its tensors stood in the files; as it is where it was not converted or has changed."""
    origin = origin_of(module)
    if origin is None or not origin.conversion:
        return state
    start = f"{prefix}." if prefix else ""
    own = {name.removeprefix(start): tensor for name, tensor in state.items()}
    back = _CONVERSIONS[origin.conversion].back(own, origin.kept)
    if back is None:
        return state
    if "bias" in own:
        back["bias"] = own["bias"]
    return {f"{start}{key}": tensor for key, tensor in back.items()}


def convert(name: str, tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    """(the tensors that from_tensors takes, what `stored` needs besides them)."""
    made, kept = _CONVERSIONS[name].there(tensors, options)
    if "bias" in tensors:
        made["bias"] = tensors["bias"]
    return made, kept


class _Conversion(NamedTuple):
    """back gives None where the tensors are no longer those of such a layer."""

    there: Callable[[_Tensors, Mapping[str, Any]], tuple[_Tensors, _Tensors]]
    back: Callable[[_Tensors, Mapping[str, Tensor]], _Tensors | None]


def _int32(values: Tensor) -> Tensor:
    """Words in int64 as int32 of the same bits."""
    return values.to(torch.int32)


def _nibbles(codes: Tensor) -> Tensor:
    """codes uint8 [R, 8 * words] -> int32 [R, words], the first in the lowest bits."""
    eights = codes.view(len(codes), -1, 8).to(torch.int64)
    return _int32((eights << torch.arange(0, 32, 4, device=codes.device)).sum(-1))


def _padded(tensor: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]))


def _constant_zeros(groups: int, outputs: int, bits: int, device: torch.device) -> Tensor:
    """qzeros [G, ceil(N * bits / 32)] of which every zero is the middle, as GPTQ's v2 stores it; bits 2, 4 or 8."""
    word = sum(1 << at + bits - 1 for at in range(0, 32, bits))
    zeros = torch.full((groups, -(-outputs * bits // 32)), word - (1 << 32), dtype=torch.int32, device=device)
    if rest := outputs * bits % 32:
        # A last word that is not full has nothing after its codes, nor then a sign.
        zeros[:, -1] = word & ((1 << rest) - 1)
    return zeros


# GPTQModel's planar 3 bits


def _from_planar(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    qzeros = _qlinear.gptq_unplanar(tensors["qzeros"].t().contiguous(), bits=3).t().contiguous()
    made = {**tensors, "qweight": _qlinear.gptq_unplanar(tensors["qweight"], bits=3), "qzeros": qzeros}
    return made, {}


def _planar(packed: Tensor) -> Tensor:
    """3-bit streams [3 * blocks, columns] -> of each 32 codes two words of their low bits and one of the high ones."""
    count = packed.shape[0] * 32 // 3
    codes = _qlinear.gptq_unpack_codes(packed, bits=3, count=count).to(torch.int64).view(count // 32, 32, -1)
    at = torch.arange(32, device=packed.device).view(1, 32, 1)
    low = ((codes & 3).view(count // 32, 2, 16, -1) << (2 * at.view(1, 2, 16, 1) % 32)).sum(2)
    high = ((codes >> 2) << at).sum(1, keepdim=True)
    return _int32(torch.cat([low, high], 1)).reshape(packed.shape)


def _to_planar(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    qzeros = own["qzeros"].t().contiguous()
    if own["qweight"].shape[0] % 3 or qzeros.shape[0] % 3:
        return None
    return {**own, "qweight": _planar(own["qweight"]), "qzeros": _planar(qzeros).t().contiguous()}


# AWQ's storages; to_gemm tells them apart


def _from_awq(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    codes, scales = ("B", "s") if "B" in tensors else ("qweight", "scales")
    made = to_gemm(tensors[codes], tensors.get("qzeros"), tensors[scales], options["group_size"])
    return dict(zip(("qweight", "qzeros", "scales"), made, strict=True)), {}


def _from_gemv(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    made, _ = _from_awq(tensors, options)
    # How far the groups are padded; the padding itself is zero, or it is gone.
    return made, {"width": torch.tensor(tensors["scales"].shape[1], device="cpu")}


def _to_gemv(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    outputs, width = own["scales"].shape[1], int(kept["width"])
    codes = _qlinear.awq_unpack(own["qweight"], count=outputs).t().contiguous()
    zeros = _padded(_qlinear.awq_unpack(own["qzeros"], count=outputs).t(), width)
    return {"qweight": _nibbles(codes), "qzeros": _nibbles(zeros), "scales": _padded(own["scales"].t(), width)}


def _from_gemv_fast(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    made, _ = _from_awq(tensors, options)
    return made, {"width": torch.tensor(tensors["scales"].shape[0], device="cpu")}


def _to_gemv_fast(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    inputs, outputs, width = own["qweight"].shape[0], own["scales"].shape[1], int(kept["width"])
    codes = _qlinear.awq_unpack(own["qweight"], count=outputs).to(torch.int32)
    if inputs % 64 or outputs % 4 or not own["qzeros"].is_floating_point():
        return None
    # k = 64 a + 32 b + 8 nibble + 2 c + d; the column is 64 a + 16 (n % 4) + 8 b + 2 c + d.
    parts = codes.view(inputs // 64, 2, 4, 4, 2, outputs // 4, 4)
    shifts = torch.arange(0, 16, 4, device=codes.device, dtype=torch.int32).view(1, 1, 4, 1, 1, 1, 1)
    words = (parts << shifts).sum(2, dtype=torch.int32).permute(4, 0, 5, 1, 2, 3)
    qweight = words.reshape(outputs // 4, inputs).to(torch.int16)
    qzeros, scales = (_padded(own[key].t(), width).t().contiguous() for key in ("qzeros", "scales"))
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def _to_marlin(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    """Marlin has no zeros: its codes have theirs at 8."""
    inputs, outputs = own["qweight"].shape[0], own["scales"].shape[1]
    if inputs % 16 or outputs % 64 or own["qzeros"].is_floating_point():
        return None
    if not (_qlinear.awq_unpack(own["qzeros"], count=outputs) == 8).all():
        return None
    codes = _qlinear.awq_unpack(own["qweight"], count=outputs).to(torch.int64)
    # k = 16 a + 8 e + 2 p + d, n = 64 f + 16 w + 8 h + j: word 128 f + 16 j + 4 p + w, nibble 4 d + 2 h + e.
    parts = codes.view(inputs // 16, 2, 4, 2, outputs // 64, 4, 2, 8).permute(0, 4, 7, 2, 5, 3, 6, 1)
    qweight = _nibbles(parts.reshape(-1, 8).to(torch.uint8)).view(inputs // 16, 2 * outputs)
    groups = own["scales"].shape[0]
    if groups > 1:
        scales = own["scales"].view(groups, -1, 8, 8).transpose(2, 3)
    else:
        # n = 32 f + 8 h + 2 i + d is stored at 32 f + 8 i + 2 h + d.
        scales = own["scales"].view(groups, -1, 4, 4, 2).transpose(2, 3)
    return {"qweight": qweight, "scales": scales.reshape(groups, outputs)}


def _to_gptq_marlin(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    made = _to_marlin(own, kept)
    return made and {"B": made["qweight"], "s": made["scales"]}


# compressed-tensors


def _from_packed(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    bits, outputs = options["bits"], tensors["weight_packed"].shape[0]
    scale = tensors["weight_scale"]
    kept = {"weight_shape": tensors["weight_shape"]}
    if scale.numel() == 1:
        kept["weight_scale"] = scale
        scale = scale.reshape(1, 1).expand(outputs, 1)
    zeros = tensors.get("weight_zero_point")
    if zeros is None:
        qzeros = _constant_zeros(scale.shape[1], outputs, bits, scale.device)
    elif zeros.dtype == torch.int8:
        kept["weight_zero_point"] = zeros
        codes = (zeros.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        qzeros = _qlinear.gptq_pack_codes(codes, bits=bits).t().contiguous()
    else:
        qzeros = zeros.t().contiguous()
    kept["has_zeros"] = torch.tensor(zeros is not None, device="cpu")
    made = {"qweight": tensors["weight_packed"].t().contiguous(), "qzeros": qzeros, "scales": scale.t().contiguous()}
    index = tensors.get("weight_g_idx")
    if index is not None and (index == -1).all():
        # Of a layer whose inputs were not ordered.
        kept["weight_g_idx"] = index
    elif index is not None:
        made["g_idx"] = index
    return made, kept


def _to_packed(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    made = {
        "weight_packed": own["qweight"].t().contiguous(),
        "weight_scale": own["scales"].t().contiguous(),
        "weight_shape": kept["weight_shape"],
    }
    if "weight_scale" in kept:
        if not (made["weight_scale"] == kept["weight_scale"].to(made["weight_scale"].device).reshape(1, 1)).all():
            return None
        made["weight_scale"] = kept["weight_scale"]
    outputs, inputs = kept["weight_shape"].tolist()
    bits = next(bits for bits in (2, 4, 8) if -(-inputs * bits // 32) == len(own["qweight"]))
    if "weight_zero_point" in kept:
        codes = _qlinear.gptq_unpack_codes(own["qzeros"].t().contiguous(), bits=bits, count=outputs)
        zeros = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        made["weight_zero_point"] = zeros
    elif kept["has_zeros"]:
        made["weight_zero_point"] = own["qzeros"].t().contiguous()
    elif not torch.equal(own["qzeros"], _constant_zeros(len(own["scales"]), outputs, bits, own["qzeros"].device)):
        return None
    if "g_idx" in own or "weight_g_idx" in kept:
        made["weight_g_idx"] = own.get("g_idx", kept.get("weight_g_idx"))
    return made


def _int8_scales(scale: Tensor, outputs: int) -> Tensor:
    """weight_scale as SCB, the absmax of which it is the 127th part."""
    return scale.float().reshape(-1).expand(outputs) * 127


def _from_integers(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    # The product with 127 is rounded where the scale has more than 17 bits.
    return {"weight": weight, "SCB": _int8_scales(scale, len(weight))}, {"weight_scale": scale}


def _to_integers(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    scale = kept["weight_scale"].to(own["SCB"].device)
    if not torch.equal(_int8_scales(scale, len(own["SCB"])), own["SCB"]):
        return None
    return {"weight": own["weight"], "weight_scale": scale}


def _from_integer_codes(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    """int8 [N, K] as GPTQ's codes, which are larger by 128."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    outputs, inputs = weight.shape
    kept = {"width": torch.tensor(inputs, device="cpu")}
    if scale.numel() == 1:
        kept["weight_scale"] = scale
        scale = scale.reshape(1, 1).expand(outputs, 1)
    codes = torch.nn.functional.pad(weight.view(torch.uint8) ^ 128, (0, -inputs % 4))
    return {
        "qweight": codes.view(torch.int32).t().contiguous(),
        "qzeros": _constant_zeros(scale.shape[1], outputs, 8, scale.device),
        "scales": scale.t().contiguous(),
    }, kept


def _to_integer_codes(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    codes = own["qweight"].t().contiguous().view(torch.uint8)[:, : int(kept["width"])]
    scale = own["scales"].t().contiguous()
    middle = _constant_zeros(len(own["scales"]), len(codes), 8, own["qzeros"].device)
    if "g_idx" in own or not torch.equal(own["qzeros"], middle):
        return None
    if "weight_scale" in kept:
        if not (scale == kept["weight_scale"].to(scale.device).reshape(1, 1)).all():
            return None
        scale = kept["weight_scale"]
    return {"weight": (codes ^ 128).view(torch.int8), "weight_scale": scale}


# FP8


def _from_four_dimensions(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    key = next(key for key in ("weight_scale", "weight_scale_inv") if key in tensors)
    return {**tensors, key: tensors[key][:, 0, :, 0]}, {}


def _to_four_dimensions(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    key = next(key for key in ("weight_scale", "weight_scale_inv") if key in own)
    return {**own, key: own[key][:, None, :, None]}


def _from_bound(tensors: _Tensors, options: Mapping[str, Any]) -> tuple[_Tensors, _Tensors]:
    """The bound of activations, which is an option."""
    rest = {key: tensor for key, tensor in tensors.items() if key != "input_scale_ub"}
    return rest, {"input_scale_ub": tensors["input_scale_ub"]}


def _to_bound(own: _Tensors, kept: Mapping[str, Tensor]) -> _Tensors | None:
    return {**own, **kept}


_CONVERSIONS = {
    "planar": _Conversion(_from_planar, _to_planar),
    "gemv": _Conversion(_from_gemv, _to_gemv),
    "gemv_fast": _Conversion(_from_gemv_fast, _to_gemv_fast),
    "marlin": _Conversion(_from_awq, _to_marlin),
    "gptq-marlin": _Conversion(_from_awq, _to_gptq_marlin),
    "pack-quantized": _Conversion(_from_packed, _to_packed),
    "int-quantized": _Conversion(_from_integers, _to_integers),
    "int-quantized codes": _Conversion(_from_integer_codes, _to_integer_codes),
    "blocks of four dimensions": _Conversion(_from_four_dimensions, _to_four_dimensions),
    "bound": _Conversion(_from_bound, _to_bound),
}
