"""The extension's quantizers and packers for tensors on any device.

They run on the host: tensors on a GPU are copied there, and what they give is copied back. Names, arguments and results
are those of `_qlinear`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _qlinear


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _any_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(first, Tensor) or first.device.type == "cpu":
            return function(first, *args, **kwargs)
        kwargs = {name: _moved(value, "cpu") for name, value in kwargs.items()}
        return _moved(function(*_moved((first, *args), "cpu"), **kwargs), first.device)

    return call


eetq_quantize = _any_device(_qlinear.eetq_quantize)
eetq_codes = _any_device(_qlinear.eetq_codes)
eetq_pack = _any_device(_qlinear.eetq_pack)
gptq_find_params = _any_device(_qlinear.gptq_find_params)
gptq_pack = _any_device(_qlinear.gptq_pack)
gptq_unpack_codes = _any_device(_qlinear.gptq_unpack_codes)
awq_quantize = _any_device(_qlinear.awq_quantize)
awq_pack = _any_device(_qlinear.awq_pack)
awq_from_gemv = _any_device(_qlinear.awq_from_gemv)
awq_from_gemv_fast = _any_device(_qlinear.awq_from_gemv_fast)
awq_from_marlin = _any_device(_qlinear.awq_from_marlin)
int8_quantize = _any_device(_qlinear.int8_quantize)
quantize_4bit = _any_device(_qlinear.quantize_4bit)
dequantize_4bit = _any_device(_qlinear.dequantize_4bit)
quantize_blockwise = _any_device(_qlinear.quantize_blockwise)
dequantize_blockwise = _any_device(_qlinear.dequantize_blockwise)
fp8_quantize = _any_device(_qlinear.fp8_quantize)
fp8_matmul = _any_device(_qlinear.fp8_matmul)
