"""get_linear: the layer of a weight and the name of its quantization, and the layer for none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ._module import take
from .awq import AWQLinear
from .bnb import Linear4bit, Linear8bitLt, warn_deprecate_bnb
from .eetq import EETQLinear
from .fp8 import Fp8Linear
from .gptq import QuantLinear


class FastLinear(torch.nn.Module):
    """A linear layer that is not quantized; weight [N, K] and bias are Parameters that do not learn."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops.check_tensors(weight=weight)
        if bias is not None:
            ops.check_tensors(bias=bias)
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def load(cls, config: Any, prefix: str, weights: Any, bias: bool) -> FastLinear:
        """From `weights.get_tensor` under prefix, as lorax' loaders have it."""
        weight = weights.get_tensor(f"{prefix}.weight")
        return cls(weight, weights.get_tensor(f"{prefix}.bias") if bias else None)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


_INCOMPATIBLE = {
    "gptq": "The passed weight is not `gptq` compatible, loader needs to be updated.",
    "awq": "The passed weight is not compatible with `awq`",
}


def _unpack(weight: Any, count: int, message: str) -> tuple:
    if not isinstance(weight, (tuple, list)) or len(weight) != count:
        raise NotImplementedError(message)
    return tuple(weight)


def _gptq(weight: Any, bias: Tensor | None) -> QuantLinear:
    if isinstance(weight, Mapping):
        return QuantLinear.from_tensors(*_split(weight, "gptq"), bias=bias, **_numbers(weight))
    parts = _unpack(weight, 7, _INCOMPATIBLE["gptq"])
    qweight, qzeros, scales, g_idx, bits, groupsize, _use_exllama = parts
    return QuantLinear(qweight, qzeros, scales, g_idx, bias, bits, groupsize)


def _awq(weight: Any, bias: Tensor | None) -> AWQLinear:
    if isinstance(weight, Mapping):
        return AWQLinear.from_tensors(*_split(weight, "awq"), bias=bias, **_numbers(weight))
    qweight, qzeros, scales, _g_idx, bits, groupsize, _use_exllama = _unpack(weight, 7, _INCOMPATIBLE["awq"])
    return AWQLinear(bits, groupsize, qweight, qzeros, scales, bias)


def _split(weight: Mapping, quantize: str) -> tuple[dict[str, Tensor]]:
    tensors = {key: value for key, value in weight.items() if isinstance(value, Tensor)}
    if "qweight" not in tensors or "scales" not in tensors:
        raise NotImplementedError(_INCOMPATIBLE[quantize])
    return (tensors,)


def _numbers(weight: Mapping) -> dict[str, int]:
    """bits and group size that stand among the tensors, under any of the names that lorax and others give them."""
    names = {"bits": ("bits", "gptq_bits", "w_bit"), "group_size": ("group_size", "groupsize", "gptq_groupsize")}
    return {
        argument: int(next(weight[name] for name in spellings if name in weight))
        for argument, spellings in names.items()
        if any(name in weight for name in spellings)
    }


def _fp8(weight: Any, bias: Tensor | None, weight_scale: Tensor | None, input_scale: Tensor | None) -> Fp8Linear:
    if isinstance(weight, Mapping):
        return Fp8Linear.from_tensors(weight, bias)
    if isinstance(weight, (tuple, list)):
        # lorax' loaders hand out this order.
        weight, input_scale, weight_scale = _unpack(
            weight, 3, "The passed weight is not compatible with `fp8`: (weight, input_scale, weight_scale)"
        )
    return Fp8Linear(weight, bias, weight_scale, input_scale)


def _int8(weight: Any, bias: Tensor | None) -> Linear8bitLt:
    warn_deprecate_bnb()
    if isinstance(weight, Mapping):
        return Linear8bitLt.from_tensors(weight, bias)
    return Linear8bitLt(weight, bias, has_fp16_weights=False, threshold=6.0)


def _fourbit(weight: Any, bias: Tensor | None, quant_type: str) -> Linear4bit:
    if isinstance(weight, Mapping):
        return Linear4bit.from_tensors(weight, bias)
    return Linear4bit(weight, bias, quant_type)


def get_linear(
    weight: Any,
    bias: Tensor | None,
    quantize: str | None,
    fan_in_fan_out: bool = False,
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> torch.nn.Module:
    """The layer for `quantize`: None, "eetq", "gptq", "awq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4",
    "fp8" or "fp8-kv".

    weight: a float [N, K] ([K, N] with fan_in_fan_out) for None, eetq and the bitsandbytes ones; for gptq and awq
    (qweight, qzeros, scales, g_idx or None, bits, groupsize, use_exllama); for fp8 an fp8 tensor with weight_scale and
    input_scale, or (weight, input_scale, weight_scale). A dict of a checkpoint's tensors by name serves for each.
    """
    if fan_in_fan_out:
        if not isinstance(weight, Tensor):
            raise ValueError("fan_in_fan_out is for a float weight, not for packed tensors")
        weight = weight.T.contiguous()
    if quantize is None:
        if isinstance(weight, Mapping):
            weight, bias = take(weight, bias, "weight")
        return FastLinear(weight, bias)
    if quantize == "eetq":
        return EETQLinear.from_tensors(weight, bias) if isinstance(weight, Mapping) else EETQLinear(weight, bias)
    if quantize == "gptq":
        return _gptq(weight, bias)
    if quantize == "awq":
        return _awq(weight, bias)
    if quantize == "bitsandbytes":
        return _int8(weight, bias)
    if quantize in ("bitsandbytes-nf4", "bitsandbytes-fp4"):
        return _fourbit(weight, bias, quantize[-3:])
    if quantize in ("fp8", "fp8-kv"):
        return _fp8(weight, bias, weight_scale, input_scale)
    raise NotImplementedError(f"Quantization `{quantize}` is not implemented yet.")
