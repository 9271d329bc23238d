"""Exact parts of a layer for tensor parallelism: some of its outputs (a part of N) or of its inputs (a part of K).

A part's weight is the whole's, bit for bit: nothing is quantized anew. Where a format stores several channels together
a part may begin only at a multiple of some step, and where no such step exists the error says what size would have one.
A part is made from slices: of a checkpoint that is mapped, no more than that is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import _qlinear, functional, ops
from .functional import QuantState
from .layers._module import QuantizedLinear
from .layers._packing import is_real
from .layers.awq import AWQLinear
from .layers.bnb import Linear4bit, Linear8bitLt
from .layers.eetq import EETQLinear
from .layers.fp8 import Fp8Linear
from .layers.gptq import QuantLinear
from .layers.linear import FastLinear

# Multiples of which the kernels' tiles are.
_TILE = 64
# Of x, where it is quantized by groups.
_ACTIVATION_GROUP = 128
# Groups of fewer channels are not packed for a GPU.
_LEAST_GROUP = 16
# Of double quantization: the least block that there is.
_LEAST_NESTED = 32
# Attributes beside the weight that some classes have.
_KEPT = ("weight_dtype", "scale_key")


class Step(NamedTuple):
    """Parts begin at multiples of `least`, for the reason given, and are fast at multiples of `wish`."""

    least: int
    wish: int
    reason: str


class _Range(NamedTuple):
    begin: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.begin


class _Rule(NamedTuple):
    """columns and rows: the part of a layer from its tensors with data; the bias is theirs to slice or to drop."""

    column_step: Callable[[Any], Step]
    row_step: Callable[[Any], Step]
    columns: Callable[[Any, dict[str, Tensor], _Range], nn.Module]
    rows: Callable[[Any, dict[str, Tensor], _Range], nn.Module]


def _own(tensor: Tensor | None) -> Tensor | None:
    """Memory of its own, so that the whole can go."""
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def _repeated(tensor: Tensor, part: _Range, size: int, step: int) -> Tensor:
    """Rows of `tensor`, one for each group of `size` channels, as rows for groups of `step` of the part's."""
    at = (part.begin + torch.arange(-(-part.count // step), device=tensor.device) * step) // size
    # Not all 8-bit floats can be indexed.
    same = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
    return same[at].view(tensor.dtype)


# GPTQ


def _group_index(layer: QuantLinear, g_idx: Tensor | None, groups: int, size: int) -> Tensor | None:
    """The group of each channel as it counts; None where they follow each other."""
    if g_idx is None or g_idx.numel() == 0:
        return None
    counts = g_idx.long()
    if not counts.any() and groups == -(-layer.infeatures // size):
        return None
    counts = torch.where(counts < 0, counts + groups, counts)
    plain = torch.arange(layer.infeatures, device=counts.device) // size
    return None if torch.equal(counts, plain) else counts


def _codes_from(packed: Tensor, bits: int, part: _Range, count: int) -> Tensor:
    """The part of `count` codes down each column of a bit stream."""
    first = part.begin // 32 * 32
    words = packed[first * bits // 32 : -(-part.end * bits // 32)]
    if first == part.begin and (part.end * bits % 32 == 0 or part.end == count):
        return _own(words)
    codes = _qlinear.gptq_unpack_codes(_own(words.cpu()), bits=bits, count=part.end - first)
    return _qlinear.gptq_pack_codes(_own(codes[part.begin - first :]), bits=bits).to(packed.device)


def _gptq_columns(layer: QuantLinear, tensors: dict[str, Tensor], part: _Range) -> QuantLinear:
    begin, end = part
    qzeros = _codes_from(tensors["qzeros"].t(), layer.bits, part, layer.outfeatures).t()
    return QuantLinear(
        _own(tensors["qweight"][:, begin:end]),
        _own(qzeros),
        _own(tensors["scales"][:, begin:end]),
        _own(tensors["g_idx"]),
        tensors["bias"],
        layer.bits,
        layer.groupsize,
        # Of the whole: a part's zeros could all happen to lie in the middle.
        zero_format=layer.stored_zeros(),
        in_features=layer.infeatures,
    )


def _gptq_rows(layer: QuantLinear, tensors: dict[str, Tensor], part: _Range) -> QuantLinear:
    scales, qzeros, g_idx = tensors["scales"], tensors["qzeros"], tensors["g_idx"]
    size = layer.infeatures if layer.groupsize == -1 else layer.groupsize
    group_size = layer.groupsize
    index = _group_index(layer, g_idx, scales.shape[0], size)
    is_one = index is None and scales.shape[0] == 1
    step = size if is_one else math.gcd(size, part.begin)
    if index is None and step != size and step % _LEAST_GROUP:
        index = torch.arange(layer.infeatures, device=scales.device) // size
    if index is not None:
        used, local = torch.unique(index[part.begin : part.end], return_inverse=True)
        scales, qzeros, g_idx = scales[used], qzeros[used], local.int()
    elif not is_one:
        scales, qzeros = (_repeated(tensor, part, size, step) for tensor in (scales, qzeros))
        group_size = step
    if index is None and g_idx is not None:
        g_idx = torch.arange(part.count, dtype=torch.int32, device=scales.device) // (
            part.count if group_size == -1 else group_size
        )
    return QuantLinear(
        _codes_from(tensors["qweight"], layer.bits, part, layer.infeatures),
        _own(qzeros),
        _own(scales),
        g_idx,
        tensors["bias"],
        layer.bits,
        group_size,
        zero_format=layer.stored_zeros(),
        in_features=part.count,
    )


def _gptq_row_step(layer: QuantLinear) -> Step:
    return Step(1, _TILE if layer.groupsize == -1 else math.lcm(layer.groupsize, _TILE), "")


# AWQ


def _awq_columns(layer: AWQLinear, tensors: dict[str, Tensor], part: _Range) -> AWQLinear:
    words = slice(part.begin // 8, part.end // 8)
    qzeros = tensors["qzeros"]
    zeros = slice(*part) if qzeros.is_floating_point() else words
    return AWQLinear(
        layer.w_bit,
        layer.group_size,
        _own(tensors["qweight"][:, words]),
        _own(qzeros[:, zeros]),
        _own(tensors["scales"][:, part.begin : part.end]),
        tensors["bias"],
    )


def _awq_rows(layer: AWQLinear, tensors: dict[str, Tensor], part: _Range) -> AWQLinear:
    size = layer.group_size
    is_one = tensors["scales"].shape[0] == 1
    step = part.count if is_one else math.gcd(size, part.begin)
    qzeros, scales = (_own(_repeated(tensors[name], part, size, step)) for name in ("qzeros", "scales"))
    qweight = _own(tensors["qweight"][part.begin : part.end])
    return AWQLinear(layer.w_bit, -1 if is_one else step, qweight, qzeros, scales, tensors["bias"])


def _awq_row_step(layer: AWQLinear) -> Step:
    size = layer.group_size
    if size >= layer.in_features:
        return Step(1, _TILE, "")
    least = math.gcd(size, _LEAST_GROUP)
    return Step(least, math.lcm(size, _TILE), f"AWQ has groups of {size}, which are split into no less than {least}")


# EETQ


def _eetq_columns(layer: EETQLinear, tensors: dict[str, Tensor], part: _Range) -> EETQLinear:
    K, N = layer.in_features, layer.out_features
    pairs = tensors["weight"].view(N // 2, 2 * K)[part.begin // 2 : part.end // 2]
    made = {"weight": _own(pairs).view(K, part.count), "weight_scales": _own(tensors["weight_scales"][slice(*part)])}
    return EETQLinear.from_tensors(made, tensors["bias"])


def _eetq_rows(layer: EETQLinear, tensors: dict[str, Tensor], part: _Range) -> EETQLinear:
    K, N = layer.in_features, layer.out_features
    tiles = tensors["weight"].view(N // 2, K // 64, 128)[:, part.begin // 64 : part.end // 64]
    made = {"weight": _own(tiles).view(part.count, N), "weight_scales": _own(tensors["weight_scales"])}
    return EETQLinear.from_tensors(made, tensors["bias"])


# bitsandbytes


def _int8_part(layer: Linear8bitLt, weight: Tensor, SCB: Tensor | None, bias: Tensor | None) -> Linear8bitLt:
    weight = _own(weight)
    if SCB is not None:
        made = {"weight": weight, "SCB": _own(SCB)}
        return Linear8bitLt.from_tensors(made, bias, threshold=layer.threshold, index=layer.index)
    return Linear8bitLt(weight, bias, threshold=layer.threshold, index=layer.index)


def _int8_columns(layer: Linear8bitLt, tensors: dict[str, Tensor], part: _Range) -> Linear8bitLt:
    SCB = tensors["SCB"]
    SCB = None if SCB is None else SCB[slice(*part)]
    return _int8_part(layer, tensors["weight"][slice(*part)], SCB, tensors["bias"])


def _int8_rows(layer: Linear8bitLt, tensors: dict[str, Tensor], part: _Range) -> Linear8bitLt:
    return _int8_part(layer, tensors["weight"][:, slice(*part)], tensors["SCB"], tensors["bias"])


def _int8_row_step(layer: Linear8bitLt) -> Step:
    if layer.has_fp16_weights:
        raise ValueError(
            "with has_fp16_weights its rows are quantized at each call, by the absmax of whole rows: its inputs cannot "
            "be split at any size, its outputs can"
        )
    return Step(1, _TILE, "")


def _fourbit_step(layer: Linear4bit, along: int) -> int:
    """The least number of steps of `along` elements each that are whole blocks and whole bytes."""
    return math.lcm(layer.blocksize // math.gcd(layer.blocksize, along), 2 // math.gcd(2, along))


def _fourbit_column_step(layer: Linear4bit) -> Step:
    step = _fourbit_step(layer, layer.in_features)
    text = f"blocks of {layer.blocksize} run along the rows of {layer.in_features} inputs"
    return Step(step, math.lcm(step, _TILE), text)


def _fourbit_row_step(layer: Linear4bit) -> Step:
    size = math.lcm(layer.blocksize, 2)
    if layer.in_features % size:
        below = layer.in_features // size * size
        raise ValueError(
            f"its blocks of {layer.blocksize} run on from one row of {layer.in_features} inputs into the next, so that "
            f"no part of the inputs is made of whole blocks; {below or size} or {below + size} inputs could be split"
        )
    return Step(size, math.lcm(size, _TILE), f"a block has {size} inputs")


def _fourbit_part(
    layer: Linear4bit, tensors: dict[str, Tensor], codes: Tensor, blocks: Tensor, run: int, shape: tuple[int, int]
) -> Linear4bit:
    """Of the bytes of codes and the blocks that the part has, which follow each other in the whole by runs of `run` (a
    run never ends within a block of absmax that is so many blocks or a divisor of it)."""
    absmax, nested = tensors["absmax"][blocks], tensors["nested_absmax"]
    offset = state2 = None
    if nested is not None:
        step = math.gcd(layer.nested_blocksize, run)
        offset = torch.tensor(layer.nested_offset, device=absmax.device)
        if step >= _LEAST_NESTED:
            nested = nested[blocks[::step] // layer.nested_blocksize]
            state2 = QuantState(nested, code=_own(tensors["nested_quant_map"]), blocksize=step, dtype=torch.float32)
        else:
            flat = functional.dequantize_blockwise(
                tensors["absmax"],
                absmax=nested,
                code=tensors["nested_quant_map"],
                blocksize=layer.nested_blocksize,
            )
            absmax, offset = (flat.float() + offset)[blocks], None
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=_own(tensors["quant_map"]),
        blocksize=layer.blocksize,
        quant_type=layer.quant_type,
        dtype=layer.weight_dtype,
        offset=offset,
        state2=state2,
    )
    storage = tensors["weight"].dtype
    weight = _own(codes).view(-1)
    weight = weight.view(storage) if weight.numel() % storage.itemsize == 0 else weight
    made = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return Linear4bit.from_tensors(
        made | {"weight": weight.view(-1, 1)}, tensors["bias"], compute_dtype=layer.compute_dtype
    )


def _fourbit_columns(layer: Linear4bit, tensors: dict[str, Tensor], part: _Range) -> Linear4bit:
    K = layer.in_features
    flat = _Range(part.begin * K, part.end * K)
    codes = ops.packed_bytes(tensors["weight"]).view(-1)[flat.begin // 2 : -(-flat.end // 2)]
    first, last = flat.begin // layer.blocksize, -(-flat.end // layer.blocksize)
    blocks = torch.arange(first, last, device=codes.device)
    return _fourbit_part(layer, tensors, codes, blocks, first, (part.count, K))


def _fourbit_rows(layer: Linear4bit, tensors: dict[str, Tensor], part: _Range) -> Linear4bit:
    K, N, size = layer.in_features, layer.out_features, layer.blocksize
    codes = ops.packed_bytes(tensors["weight"]).view(N, K // 2)[:, part.begin // 2 : part.end // 2]
    own = torch.arange(part.begin // size, part.end // size, device=codes.device)
    blocks = (torch.arange(N, device=codes.device)[:, None] * (K // size) + own).view(-1)
    run = math.gcd(K // size, part.begin // size, part.count // size)
    return _fourbit_part(layer, tensors, codes, blocks, run, (N, part.count))


# FP8


def _fp8_part(layer: Fp8Linear, weight: Tensor, scale: Tensor, block: tuple[int, int], tensors: dict) -> Fp8Linear:
    return Fp8Linear(
        _own(weight),
        tensors["bias"],
        _own(scale),
        _own(tensors["input_scale"]),
        # A grid that has shrunk to one block would no longer tell.
        activation=layer.activation_mode(),
        input_scale_ub=_own(tensors["input_scale_ub"]),
        block_size=block,
        promoted=layer.promoted,
    )


def _fp8_columns(layer: Fp8Linear, tensors: dict[str, Tensor], part: _Range) -> Fp8Linear:
    scale, block_n = tensors["weight_scale"], layer.block_n
    if layer.is_blockwise():
        step = math.gcd(block_n, part.begin)
        scale, block_n = _repeated(scale, part, block_n, step), step
    elif scale.numel() > 1:
        scale = scale[:, slice(*part)] if tuple(scale.shape) == (1, layer.out_features) else scale[slice(*part)]
    return _fp8_part(layer, tensors["weight"][slice(*part)], scale, (block_n, layer.block_k), tensors)


def _fp8_rows(layer: Fp8Linear, tensors: dict[str, Tensor], part: _Range) -> Fp8Linear:
    scale, block_k = tensors["weight_scale"], layer.block_k
    if layer.is_blockwise():
        step = math.gcd(block_k, part.begin)
        scale, block_k = _repeated(scale.t(), part, block_k, step).t(), step
    return _fp8_part(layer, tensors["weight"][:, slice(*part)], scale, (layer.block_n, block_k), tensors)


def _fp8_column_step(layer: Fp8Linear) -> Step:
    return Step(1, math.lcm(layer.block_n, _TILE) if layer.is_blockwise() else _TILE, "")


def _fp8_row_step(layer: Fp8Linear) -> Step:
    if layer.activation_mode() == "group":
        text = f"x is quantized by groups of {_ACTIVATION_GROUP}"
        return Step(_ACTIVATION_GROUP, math.lcm(_ACTIVATION_GROUP, layer.block_k), text)
    return Step(1, math.lcm(layer.block_k, _TILE) if layer.is_blockwise() else _TILE, "")


# Layers that are not quantized


def _dense(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if isinstance(layer, FastLinear):
        return FastLinear(_own(weight), bias)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = Parameter(_own(weight), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        made.bias = Parameter(bias, requires_grad=layer.bias.requires_grad)
    return made


_ANY = lambda layer: Step(1, _TILE, "")  # noqa: E731
_DENSE = _Rule(
    _ANY,
    _ANY,
    lambda layer, tensors, part: _dense(layer, tensors["weight"][slice(*part)], tensors["bias"]),
    lambda layer, tensors, part: _dense(layer, tensors["weight"][:, slice(*part)], tensors["bias"]),
)
_RULES: dict[type, _Rule] = {
    nn.Linear: _DENSE,
    FastLinear: _DENSE,
    QuantLinear: _Rule(_ANY, _gptq_row_step, _gptq_columns, _gptq_rows),
    AWQLinear: _Rule(
        lambda layer: Step(8, _TILE, "AWQ stores 8 outputs in a word"), _awq_row_step, _awq_columns, _awq_rows
    ),
    EETQLinear: _Rule(
        lambda layer: Step(2, _TILE, "EETQ stores outputs in pairs"),
        lambda layer: Step(64, 64, "EETQ stores 64 inputs together"),
        _eetq_columns,
        _eetq_rows,
    ),
    Linear8bitLt: _Rule(_ANY, _int8_row_step, _int8_columns, _int8_rows),
    Linear4bit: _Rule(_fourbit_column_step, _fourbit_row_step, _fourbit_columns, _fourbit_rows),
    Fp8Linear: _Rule(_fp8_column_step, _fp8_row_step, _fp8_columns, _fp8_rows),
}


def can_split(module: nn.Module) -> bool:
    return type(module) in _RULES


def column_step(layer: nn.Module) -> Step:
    """For parts of a layer's outputs."""
    return _RULES[type(layer)].column_step(layer)


def row_step(layer: nn.Module) -> Step:
    """For parts of a layer's inputs. ValueError where no part is exact."""
    return _RULES[type(layer)].row_step(layer)


def _tensors(layer: nn.Module) -> dict[str, Tensor | None]:
    is_quantized = isinstance(layer, QuantizedLinear)
    found = layer._tensors() if is_quantized else {"weight": layer.weight, "bias": layer.bias}
    if not is_real(*found.values()):
        raise ValueError("its tensors have no data: load them first")
    return found


def _finished(made: nn.Module, layer: nn.Module) -> nn.Module:
    for key in _KEPT:
        if key in vars(layer):
            setattr(made, key, vars(layer)[key])
    return made.train(layer.training)


@torch.no_grad()
def column_part(layer: nn.Module, begin: int, end: int) -> nn.Module:
    """Outputs begin to end, with their bias. begin is a multiple of the layer's column_step, end too or the last."""
    tensors = _tensors(layer)
    bias = tensors["bias"]
    part = _Range(begin, end)
    tensors["bias"] = None if bias is None else _own(bias[begin:end])
    return _finished(_RULES[type(layer)].columns(layer, tensors, part), layer)


@torch.no_grad()
def row_part(layer: nn.Module, begin: int, end: int, bias: bool) -> nn.Module:
    """Inputs begin to end: the sum of all parts' products is the layer's. bias: whether this part has it."""
    tensors = _tensors(layer)
    tensors["bias"] = _own(tensors["bias"]) if bias else None
    return _finished(_RULES[type(layer)].rows(layer, tensors, _Range(begin, end)), layer)
