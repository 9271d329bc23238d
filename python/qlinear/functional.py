"""Quantizers and products as functions, with the names and signatures that EETQ, bitsandbytes and vLLM gave them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import _qlinear, ops, search

NESTED_BLOCKSIZE = 256


def _check_out(out: Tensor | None, result: Tensor, name: str) -> None:
    if out is None:
        return
    ops.check_tensors(**{name: out})
    if out.dtype != result.dtype or out.shape != result.shape:
        raise ValueError(f"{name} must be {result.dtype} {tuple(result.shape)}, got {out.dtype} {tuple(out.shape)}")


def _store(*places: tuple[Tensor | None, Tensor, str]) -> list[Tensor]:
    """For each (out, result, the argument's name) the result, in out where one is given: in all of them or in none."""
    for place in places:
        _check_out(*place)
    return [result if out is None else out.copy_(result) for out, result, _ in places]


# EETQ


def quant_weights(
    weight: Tensor, quant_type: torch.dtype = torch.int8, return_unprocessed: bool = False
) -> list[Tensor]:
    """weight float [K, N] -> [processed int8 [K, N], scales [N]], or [codes int8 [K, N], processed, scales]."""
    if quant_type == torch.quint4x2:
        raise NotImplementedError("quant_weights: torch.quint4x2 is not implemented, torch.int8 is")
    if quant_type != torch.int8:
        raise TypeError(f"quant_type must be torch.int8, got {quant_type}")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError("weight must be a 2-D tensor [in_features, out_features]")
    rows = weight.detach().t()
    if not return_unprocessed:
        return list(_qlinear.eetq_quantize(rows))
    codes, scales = _qlinear.eetq_codes(rows)
    return [codes, _qlinear.eetq_pack(codes), scales]


def preprocess_weights(weight: Tensor, is_int4: bool = False) -> Tensor:
    """Codes int8 [K, N] -> EETQ's interleaved bytes, int8 [K, N]."""
    if is_int4:
        raise NotImplementedError("preprocess_weights: 4-bit weights are not implemented, 8-bit ones are")
    return _qlinear.eetq_pack(weight)


def w8_a16_gemm(input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """input [..., K] times the interleaved weight [K, N] with scale [N] -> [..., N]."""
    return ops.linear("eetq", input, (weight, scale, None))


# GPTQ


def matmul248(
    input: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int, maxq: int
) -> Tensor:
    """input [..., K] times a packed GPTQ weight -> [..., N] in input's dtype. maxq must be 2^bits - 1."""
    ops.check_tensors(input=input, qweight=qweight, scales=scales, qzeros=qzeros)
    if maxq != 2**bits - 1:
        raise ValueError(f"maxq must be 2**bits - 1 = {2**bits - 1}, got {maxq}")
    return ops.linear("gptq", input, gptq_arguments(qweight, scales, qzeros, g_idx, bits, input.shape[-1]))


def gptq_arguments(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int, in_features: int
) -> tuple:
    """The gptq operator's arguments where the group size has to be told from the number of groups."""
    group_size = -(-in_features // max(scales.shape[0], 1))
    return (qweight, qzeros, scales, g_idx, None, bits, group_size, "auto", in_features, qweight.shape[1])


# bitsandbytes


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The 256 values of the dynamic 8-bit code, ascending, on the CPU."""
    return torch.tensor(_qlinear.dynamic_map(signed, max_exponent_bits, total_bits), dtype=torch.float32, device="cpu")


def get_4bit_type(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The 16 values of "nf4" or "fp4" in the order of their bit patterns."""
    return torch.tensor(_qlinear.fourbit_code(quant_type), dtype=torch.float32, device=device)


@dataclass(eq=False)
class QuantState:
    """What bitsandbytes keeps beside a packed tensor: absmax [blocks], the code, the shape and dtype before packing.

    Where the absmax are quantized themselves (`nested`), state2 holds their absmax and code and offset their mean.
    """

    absmax: Tensor
    shape: torch.Size | None = None
    code: Tensor | None = None
    blocksize: int | None = None
    quant_type: str | None = None
    dtype: torch.dtype | None = None
    offset: Tensor | None = None
    state2: QuantState | None = None

    @property
    def nested(self) -> bool:
        """Whether absmax are codes of a quantized absmax."""
        return self.state2 is not None

    def to(self, device: torch.device | str) -> None:
        """Moves every tensor, in place as bitsandbytes does."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        if self.state2 is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The parts by name; packed: tensors only, with the rest as JSON in `quant_state.bitsandbytes__<type>`."""
        parts: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": ops.dtype_name(self.dtype),
            "shape": tuple(self.shape),
        }
        if self.state2 is not None:
            parts |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code,
                "nested_dtype": ops.dtype_name(self.state2.dtype),
                "nested_offset": float(self.offset),
            }
        if not packed:
            return parts
        tensors = {key: value for key, value in parts.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in parts.items() if not isinstance(value, Tensor)}
        return tensors | {f"quant_state.bitsandbytes__{self.quant_type}": _pack_json(rest)}

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str | None = None) -> QuantState:
        """The inverse of as_dict, packed or not, with or without a prefix that ends in "weight."."""
        parts = {key.rpartition("weight.")[2]: value for key, value in qs_dict.items()}
        packed = [key for key in parts if key.startswith("quant_state.") or key.startswith("bitsandbytes__")]
        if len(packed) > 1 or (not packed and "quant_type" not in parts):
            raise ValueError(
                f"there should be exactly one quant_state.bitsandbytes__* entry, got {sorted(packed) or 'none'}"
            )
        if packed:
            parts |= parse_state(state_bytes(parts.pop(packed[0])))
        nested = {"nested_absmax", "nested_quant_map", *_NESTED_FIELDS}
        plain = {"absmax", "quant_map", *_PLAIN_FIELDS}
        unknown = parts.keys() - plain - nested
        missing = (plain | nested if parts.keys() & nested else plain) - parts.keys()
        if unknown or missing:
            raise ValueError(f"not a bitsandbytes quant state: unknown {sorted(unknown)}, missing {sorted(missing)}")
        shape = parts["shape"]
        if not isinstance(shape, (list, tuple)) or any(type(size) is not int for size in shape):
            raise ValueError(f"shape must be a list of integers, got {shape!r:.60}")
        state2 = offset = None
        if "nested_absmax" in parts:
            offset = torch.tensor(_number(parts, "nested_offset"), device=device or parts["absmax"].device)
            state2 = cls(
                absmax=parts["nested_absmax"].to(device),
                code=parts["nested_quant_map"].to(device),
                blocksize=parts["nested_blocksize"],
                dtype=_float_dtype(parts["nested_dtype"]),
            )
        return cls(
            absmax=parts["absmax"].to(device),
            shape=torch.Size(shape),
            code=parts["quant_map"].to(device),
            blocksize=parts["blocksize"],
            quant_type=parts["quant_type"],
            dtype=_float_dtype(parts["dtype"]),
            offset=offset,
            state2=state2,
        )


_PLAIN_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_STATE_FIELDS = (*_PLAIN_FIELDS, *_NESTED_FIELDS)


def _number(parts: dict[str, Any], name: str) -> float:
    try:
        return float(parts[name])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {parts[name]!r:.60}") from None


def _pack_json(parts: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(parts).encode()), dtype=torch.uint8, device="cpu")


def state_bytes(packed: Tensor) -> bytes:
    """The JSON of a packed quant state, of which many layers of a model have the same."""
    return bytes(packed.detach().cpu().to(torch.uint8).flatten().tolist())


@functools.lru_cache(maxsize=256)
def parse_state(text: bytes) -> Mapping[str, Any]:
    """The numbers of a quant state. ValueError where the bytes are no JSON object of the known fields."""
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"quant_state is not JSON: {error}") from None
    if not isinstance(parts, dict) or not parts.keys() <= set(_STATE_FIELDS):
        raise ValueError(f"quant_state must be an object with fields among {list(_STATE_FIELDS)}, got {parts!r:.200}")
    return MappingProxyType(parts)


def _float_dtype(name: Any) -> torch.dtype:
    for dtype, known in ops.DTYPE_NAMES.items():
        if name == known:
            return dtype
    raise ValueError(f"quant_state's dtype must be one of {sorted(ops.DTYPE_NAMES.values())}, got {name!r:.60}")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """A float of any shape -> (uint8 of A's shape, its state); code: 256 ascending values, None the dynamic map."""
    ops.check_tensors(A=A)
    # The kernel takes the map from the host: one that is there already is not waited for.
    code = create_dynamic_map() if code is None else code
    codes, stats = _qlinear.quantize_blockwise(A.detach(), code, blocksize=blocksize)
    codes, kept = _store((out, codes, "out"), (absmax, stats, "absmax"))
    state = QuantState(absmax=kept, code=code.to(A.device), blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.absmax, state.offset, state.state2 = _nest(stats)
    return codes, state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The inverse: by a quant_state, or by absmax and code (then float32). A nested state says so itself."""
    ops.check_tensors(A=A)
    if (quant_state is None) == (absmax is None):
        raise ValueError("exactly one of quant_state and absmax must be given")
    if quant_state is None:
        code = create_dynamic_map().to(A.device) if code is None else code
        quant_state = QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    stats = _flat_absmax(quant_state)
    name = ops.dtype_name(quant_state.dtype, "quant_state.dtype")
    result = _qlinear.dequantize_blockwise(A, stats, quant_state.code, blocksize=quant_state.blocksize, dtype=name)
    return _store((out, result.reshape(A.shape), "out"))[0]


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    """Double quantization: (uint8 absmax, their offset, the state of the 8-bit code)."""
    offset = _qlinear.absmax_mean(absmax)
    codes, state = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, offset, state


def _flat_absmax(state: QuantState) -> Tensor:
    """The absmax as fp32, whether the state is nested or not."""
    if state.state2 is None:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset.float()


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    search_scales: bool = False,
) -> tuple[Tensor, QuantState]:
    """A float of any shape -> (packed [(n + 1) // 2, 1] uint8, or those bytes as quant_storage; its state).
    search_scales: absmax is not a block's largest magnitude but what leaves the least squared error."""
    if quant_type not in ("nf4", "fp4"):
        raise NotImplementedError(f"4-bit quantization data type {quant_type} is not implemented.")
    ops.check_tensors(A=A)
    if not isinstance(quant_storage, torch.dtype):
        raise TypeError(f"quant_storage must be a torch.dtype, got {type(quant_storage).__name__}")
    blocksize = 64 if blocksize is None else blocksize
    code = get_4bit_type(quant_type, A.device)
    if search_scales:
        packed, stats = search.quantize_4bit(A, code, blocksize=blocksize)
    else:
        packed, stats = _qlinear.quantize_4bit(A.detach(), quant_type=quant_type, blocksize=blocksize)
    if quant_storage != torch.uint8:
        if packed.numel() % quant_storage.itemsize:
            raise ValueError(f"{packed.numel()} packed bytes are no whole number of {quant_storage}")
        packed = packed.reshape(-1, quant_storage.itemsize).view(quant_storage)
    packed, kept = _store((out, packed, "out"), (absmax, stats, "absmax"))
    state = QuantState(
        absmax=kept,
        shape=A.shape,
        code=code,
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
    )
    if compress_statistics:
        state.absmax, state.offset, state.state2 = _nest(stats)
    return packed, state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The inverse: by a quant_state, or by absmax and out, which tells shape and dtype."""
    ops.check_tensors(A=A)
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs a quant_state, or absmax and out")
        quant_state = QuantState(
            absmax=absmax,
            shape=out.shape,
            code=get_4bit_type(quant_type, A.device),
            blocksize=64 if blocksize is None else blocksize,
            quant_type=quant_type,
            dtype=out.dtype,
        )
    flat = _qlinear.dequantize_4bit(
        ops.packed_bytes(A),
        _flat_absmax(quant_state),
        quant_state.code,
        count=quant_state.shape.numel(),
        blocksize=quant_state.blocksize,
        dtype=ops.dtype_name(quant_state.dtype, "quant_state.dtype"),
    )
    return _store((out, flat.reshape(quant_state.shape), "out"))[0]


def quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    """quantize_4bit of "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    """quantize_4bit of "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    """dequantize_4bit of "nf4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    """dequantize_4bit of "fp4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """A float [..., C] -> (codes int8 of A's shape, absmax fp32 [rows], outlier columns int64, None at threshold 0)."""
    ops.check_tensors(A=A)
    if A.dim() == 0:
        raise ValueError("A must have the shape [..., C], got a number")
    codes, stats, outliers = _qlinear.int8_quantize(A.detach().reshape(-1, A.shape[-1]), threshold=threshold)
    return codes.reshape(A.shape), stats, outliers


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """The inverse, fp32: A int8 [..., C] * stats [rows] / 127 row by row."""
    ops.check_tensors(A=A, stats=stats)
    rows = A.shape[:-1]
    if A.dim() == 0 or stats.numel() != rows.numel():
        raise ValueError(f"stats must have one element for each row of A {tuple(A.shape)}, got {tuple(stats.shape)}")
    return A.float() * stats.reshape(*rows, 1).float() * (1.0 / 127.0)


# FP8


def scaled_fp8_quant(
    input: Tensor,
    scale: Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """input float [M, K] -> (float8_e4m3fn [max(M, num_token_padding), K], scale). With a scale: static; else one
    scale for the tensor [1], or one a token [M, 1], whose absmax scale_ub bounds. Rows of padding are zero."""
    ops.check_tensors(input=input)
    if input.dim() != 2:
        raise ValueError(f"input must be 2-D [tokens, features], got {tuple(input.shape)}")
    mode = "static" if scale is not None else "token" if use_per_token_if_dynamic else "tensor"
    if scale_ub is not None and mode != "token":
        raise ValueError("scale_ub bounds the scales of tokens: it needs use_per_token_if_dynamic and no scale")
    codes, scale = ops.fp8_quantize(input, scale, mode=mode, scale_ub=scale_ub)
    if num_token_padding is not None and num_token_padding > codes.shape[0]:
        if output is not None:
            raise ValueError("num_token_padding and output exclude each other")
        padded = torch.zeros(num_token_padding, codes.shape[1], dtype=torch.uint8, device=codes.device)
        padded[: codes.shape[0]] = codes.view(torch.uint8)
        codes = padded.view(codes.dtype)
    return _store((output, codes, "output"))[0], scale


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
) -> Tensor:
    """a e4m3 [M, K] @ b e4m3 [K, N], any strides, scale_a of 1 or M, scale_b of 1 or N -> [M, N] in out_dtype."""
    name = ops.dtype_name(out_dtype, "out_dtype")
    if a.device.type == "cpu":
        return _qlinear.fp8_matmul(ops.exportable(a), ops.exportable(b), scale_a, scale_b, bias, dtype=name)
    # In fp32 as on the CPU: a by rows of activations, b as the weight of a layer.
    x = a.view(torch.float8_e4m3fn).float() * scale_a.float().reshape(-1, 1)
    return ops.engine("fp8", (b.t(), scale_b, bias, None, None, "none", 128, 128))(x).to(out_dtype)
