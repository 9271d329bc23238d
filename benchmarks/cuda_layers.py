"""What is measured on the GPU: qlinear's layers, made on the device from random tensors as a checkpoint holds them, and
peers that happen to be installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import qlinear
from qlinear import functional

GROUP = 128
BLOCK = 64
# The standard deviation of the weights: that of a language model's, and far from the least fp16.
DEVIATION = 0.02

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """make(k, n, dtype) gives a layer and the bytes of its weight; dtype: of x and, where the format leaves it open, of
    the scales. dtypes: those that it takes. outliers: columns of x that are far larger than the others."""

    make: Callable[[int, int, torch.dtype], tuple[Layer, int]]
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    peer: bool = False
    outliers: int = 0

    def activations(self, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(m, k, device="cuda").clamp_(-5, 5)
        if self.outliers:
            x[:, torch.randperm(k, device="cuda")[: self.outliers]] *= 20
        return x.to(dtype)


def _int32(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


def _uint8(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def _scales(*shape: int, code_deviation: float, dtype: torch.dtype) -> torch.Tensor:
    """Within a half of what gives the weights DEVIATION."""
    return (torch.rand(shape, device="cuda") + 0.5).mul_(DEVIATION / code_deviation).to(dtype)


def _uniform_deviation(bits: int) -> float:
    return 2**bits / 12**0.5


def _own(layer: Any) -> tuple[Layer, int]:
    return layer, layer.nbytes


def _gptq(bits: int, act_order: bool = False) -> Subject:
    def make(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
        groups = -(-k // GROUP)
        g_idx = torch.arange(k, dtype=torch.int32, device="cuda") // GROUP
        tensors = {
            "qweight": _int32(-(-k * bits // 32), n),
            "qzeros": _int32(groups, -(-n * bits // 32)),
            "scales": _scales(groups, n, code_deviation=_uniform_deviation(bits), dtype=dtype),
            "g_idx": g_idx[torch.randperm(k, device="cuda")] if act_order else g_idx,
        }
        return _own(qlinear.QuantLinear.from_tensors(tensors, bits=bits, group_size=GROUP, zero_format="gptq"))

    return Subject(make)


def _awq(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
    groups = -(-k // GROUP)
    tensors = {
        "qweight": _int32(k, n // 8),
        "qzeros": _int32(groups, n // 8),
        "scales": _scales(groups, n, code_deviation=_uniform_deviation(4), dtype=dtype),
    }
    return _own(qlinear.AWQLinear.from_tensors(tensors, group_size=GROUP))


def _eetq(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
    scales = _scales(n, code_deviation=_uniform_deviation(8), dtype=dtype)
    return _own(qlinear.EETQLinear.from_tensors({"weight": _uint8(k, n).view(torch.int8), "weight_scales": scales}))


def _fp8(blocks: bool) -> Subject:
    def make(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
        shape = (-(-n // 128), -(-k // 128)) if blocks else (n, 1)
        # Without the bytes that are NaN.
        weight = _uint8(n, k).bitwise_and_(0xBF).view(torch.float8_e4m3fn)
        scales = _scales(*shape, code_deviation=0.7, dtype=torch.float32)
        return _own(qlinear.Fp8Linear(weight, None, scales, None, activation="group" if blocks else "token"))

    return Subject(make)


def _int8(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
    scales = _scales(n, code_deviation=_uniform_deviation(8), dtype=torch.float32) * 127
    tensors = {"weight": _uint8(n, k).view(torch.int8), "SCB": scales}
    return _own(qlinear.Linear8bitLt.from_tensors(tensors, threshold=6.0))


def _fourbit_state(quant_type: str, k: int, n: int, dtype: torch.dtype, double: bool) -> functional.QuantState:
    blocks = -(-k * n // BLOCK)
    code = functional.get_4bit_type(quant_type, "cuda")
    deviation = float(code.std())
    state = functional.QuantState(
        absmax=_scales(blocks, code_deviation=deviation, dtype=torch.float32),
        shape=torch.Size((n, k)),
        code=code,
        blocksize=BLOCK,
        quant_type=quant_type,
        dtype=dtype,
    )
    if double:
        mean = DEVIATION / deviation
        state.absmax = _uint8(blocks)
        state.offset = torch.tensor(mean)
        state.state2 = functional.QuantState(
            absmax=torch.full((-(-blocks // functional.NESTED_BLOCKSIZE),), mean / 2, device="cuda"),
            code=functional.create_dynamic_map().cuda(),
            blocksize=functional.NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    return state


def _fourbit(quant_type: str, double: bool = False) -> Subject:
    def make(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
        parts = _fourbit_state(quant_type, k, n, dtype, double).as_dict(packed=True)
        tensors = {f"weight.{key}": value for key, value in parts.items()}
        return _own(qlinear.Linear4bit.from_tensors(tensors | {"weight": _uint8(-(-k * n // 2), 1)}))

    return Subject(make)


def _bitsandbytes(quant_type: str, double: bool = False) -> Subject:
    def make(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
        import bitsandbytes

        own = _fourbit_state(quant_type, k, n, dtype, double)
        state = bitsandbytes.functional.QuantState.from_dict(own.as_dict(packed=True), device=torch.device("cuda"))
        packed = _uint8(-(-k * n // 2), 1)
        layer = lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)  # noqa: E731
        return layer, packed.nbytes + own.absmax.nbytes

    return Subject(make, peer=True)


def _torch_int4(k: int, n: int, dtype: torch.dtype) -> tuple[Layer, int]:
    packed = torch.ops.aten._convert_weight_to_int4pack(_uint8(n, k // 2), 8)
    scales = _scales(k // GROUP, n, 2, code_deviation=_uniform_deviation(4), dtype=dtype)
    layer = lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)  # noqa: E731
    return layer, packed.nbytes + scales.nbytes


SUBJECTS = {
    "gptq-4": _gptq(4),
    "awq": Subject(_awq),
    "eetq": Subject(_eetq),
    "gptq-8": _gptq(8),
    "nf4": _fourbit("nf4"),
    "nf4-double": _fourbit("nf4", double=True),
    "fp4": _fourbit("fp4"),
    "fp4-double": _fourbit("fp4", double=True),
    "fp8": _fp8(blocks=False),
    "fp8-blocks": _fp8(blocks=True),
    "int8": Subject(_int8, outliers=6),
    "gptq-3": _gptq(3),
    "gptq-2": _gptq(2),
    "gptq-4-act-order": _gptq(4, act_order=True),
    "gptq-8-act-order": _gptq(8, act_order=True),
    "bitsandbytes-nf4": _bitsandbytes("nf4"),
    "bitsandbytes-nf4-double": _bitsandbytes("nf4", double=True),
    "torch-int4": Subject(_torch_int4, dtypes=(torch.bfloat16,), peer=True),
}
