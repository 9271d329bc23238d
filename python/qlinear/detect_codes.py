"""Detection of EETQ, bitsandbytes, FP8 and compressed-tensors' plain integers: codes in a matrix, scales beside it."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import functional
from .detect_group import FLOATS, Group, Layer, ceil

PACKED_NAMES = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}
_STATE = "weight.quant_state.bitsandbytes__"
_E8M0 = tuple(filter(None, (getattr(torch, "float8_e8m0fnu", None), torch.uint8)))


def _matrix(group: Group) -> tuple[int, int]:
    shape = group.entries["weight"].shape
    if len(shape) != 2:
        raise ValueError(
            f"{group.where('weight')} must have two dimensions, has {list(shape)}: are these fused experts?"
        )
    return shape[0], shape[1]


def eetq(group: Group) -> Layer:
    group.need("weight")
    group.check("weight", (torch.int8,))
    inputs, outputs = _matrix(group)
    group.check("weight_scales", FLOATS, (outputs,))
    if inputs % 64 or outputs % 2:
        raise ValueError(
            f"{group.where('weight')} must be [K, N] with K % 64 == 0 and N % 2 == 0, is {[inputs, outputs]}"
        )
    return group.made("eetq", "int8", ("weight", "weight_scales"), (inputs, outputs))


def int8(group: Group) -> Layer:
    group.need("weight")
    group.check("weight", (torch.int8,))
    outputs, inputs = _matrix(group)
    group.check("SCB", (torch.float32,), (outputs,))
    if "weight_format" in group.entries:
        group.check("weight_format", (torch.uint8,), ())
    threshold = group.config.positive("llm_int8_threshold", 6.0, group.name)
    return group.made(
        "bitsandbytes", "int8", ("weight", "SCB", "weight_format"), (inputs, outputs), threshold=threshold
    )


def fourbit(group: Group) -> Layer:
    states = sorted(key for key in group.entries if key.startswith(_STATE))
    if len(states) != 1:
        raise ValueError(f"there must be exactly one {group.full(_STATE)}*, got {', '.join(states) or 'none'}")
    group.need("weight", "weight.absmax", "weight.quant_map")
    kind = states[0].removeprefix(_STATE)
    group.check(states[0], (torch.uint8,))
    numbers = functional.parse_state(functional.state_bytes(group.shards.tensor(group.full(states[0]))))
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
    count, blocks = ceil(outputs * inputs, 2), ceil(outputs * inputs, blocksize)
    weight = group.check("weight", (torch.uint8, *FLOATS))
    if weight.nbytes != count:
        raise ValueError(f"{group.where('weight')} must have {count} bytes for {shape}, has {weight.nbytes}")
    group.check("weight.quant_map", (torch.float32,), (16,))
    nested = "nested_offset" in numbers
    if nested:
        group.need("weight.nested_absmax", "weight.nested_quant_map")
        size = numbers.get("nested_blocksize")
        if type(size) is not int or size < 1:
            raise ValueError(f"{group.where(states[0])}: nested_blocksize must be a positive integer, got {size!r:.60}")
        group.check("weight.nested_absmax", (torch.float32,), (ceil(blocks, size),))
        group.check("weight.nested_quant_map", (torch.float32,), (256,))
    elif "weight.nested_absmax" in group.entries:
        raise ValueError(
            f"{group.where(states[0])}: lacks the nested_offset that {group.full('weight.nested_absmax')} needs"
        )
    group.check("weight.absmax", (torch.uint8,) if nested else (torch.float32,), (blocks,))
    said = group.config.values.get("bnb_4bit_quant_type")
    if group.config.method == "bitsandbytes" and said not in (None, kind):
        raise group.contradiction(f"bnb_4bit_quant_type {said}", kind)
    keys = ("weight", *(f"weight.{key}" for key in sorted(PACKED_NAMES)), states[0])
    text = f"blocks of {blocksize}{', double quantization' if nested else ''}"
    options = (
        {}
        if group.config.compute_dtype(group.name) is None
        else {"compute_dtype": group.config.compute_dtype(group.name)}
    )
    return group.made(f"bitsandbytes-{kind}", text, keys, (inputs, outputs), **options)


def fp8(group: Group) -> Layer:
    group.check("weight", (torch.float8_e4m3fn,))
    outputs, inputs = _matrix(group)
    scales = [key for key in ("weight_scale", "weight_scale_inv") if key in group.entries]
    if len(scales) != 1:
        raise ValueError(f"{group.where('weight')} must have one weight_scale or weight_scale_inv, has {len(scales)}")
    scale = group.check(scales[0], (*FLOATS, *_E8M0))
    shape = scale.shape
    # modelopt's blocks have dimensions of one element for what is inside a block.
    is_four = len(shape) == 4 and shape[1] == shape[3] == 1
    shape = (shape[0], shape[2]) if is_four else shape
    said = group.config.block_size(group.name)
    block = said or (128, 128)
    grid = (ceil(outputs, block[0]), ceil(inputs, block[1]))
    is_grid = len(shape) == 2 and shape[0] >= grid[0] and shape[1] >= grid[1]
    if said and not is_grid:
        raise group.contradiction(f"weight_block_size {list(said)}", f"{group.where(scales[0])} {list(scale.shape)}")
    is_one = math.prod(shape) == 1 and len(shape) < 3
    if is_one and not said:
        text = "per tensor"
    elif shape in ((outputs,), (outputs, 1), (1, outputs)) and not said:
        text = "per channel"
    elif is_grid:
        text = f"blocks of {block[0]}x{block[1]}"
    else:
        raise ValueError(
            f"{group.where(scales[0])} must have one element, {outputs} or a grid of {list(grid)}, "
            f"has {list(scale.shape)}"
        )
    options: dict[str, Any] = {"block_size": block} | _activation(group, is_grid=text.startswith("blocks"))
    keys = ("weight", scales[0], "input_scale", "input_scale_ub")
    conversion = "blocks of four dimensions" if is_four else "bound" if "input_scale_ub" in group.entries else ""
    return group.made("fp8", text, keys, (inputs, outputs), conversion, **options)


def _activation(group: Group, *, is_grid: bool) -> dict[str, Any]:
    """How a layer with e4m3 weights quantizes x, in from_tensors' options."""
    has_input_scale = "input_scale" in group.entries
    for key in ("input_scale", "input_scale_ub"):
        if key in group.entries and math.prod(group.check(key, FLOATS).shape) != 1:
            raise ValueError(f"{group.where(key)} must have one element, has {list(group.entries[key].shape)}")
    activation, by = group.config.activation(group.name)
    if activation and (activation == "static") != has_input_scale and activation != "none":
        raise group.contradiction(by, f"{'with' if has_input_scale else 'without'} input_scale")
    options: dict[str, Any] = {}
    if activation not in ("", "dynamic"):
        options["activation"] = activation
    elif is_grid and not has_input_scale:
        options["activation"] = "group"
    bound = group.config.positive("activation_scale_ub", math.inf, group.name)
    if "input_scale_ub" in group.entries:
        own = float(group.shards.tensor(group.full("input_scale_ub")).reshape(()))
        if not own > 0 or bound not in (own, math.inf):
            raise group.contradiction(f"activation_scale_ub {bound}", f"with an input_scale_ub of {own}")
        bound, options["activation"] = own, "token"
    if options.get("activation") == "token" and math.isfinite(bound):
        options["input_scale_ub"] = bound
    return options


def integers(group: Group) -> Layer:
    """compressed-tensors' int-quantized: weight int8 [N, K], weight_scale of one element, [N, 1] or [N, G].

    Where activations are quantized too it is LLM.int8() without outliers; where not, GPTQ of 8 bits."""
    group.need_method("compressed-tensors", "int-quantized")
    group.check("weight", (torch.int8,))
    outputs, inputs = _matrix(group)
    scale = group.check("weight_scale", FLOATS)
    is_scalar = scale.shape in ((), (1,), (1, 1))
    if not is_scalar and (len(scale.shape) != 2 or scale.shape[0] != outputs or scale.shape[1] < 1):
        raise ValueError(
            f"{group.where('weight_scale')} must be one element or [{outputs}, groups], is {list(scale.shape)}"
        )
    odd = sorted(group.entries.keys() & {"weight_zero_point", "input_zero_point", "input_scale"})
    if odd:
        raise ValueError(
            f"{group.where(odd[0])}: int8 with zeros, or with a fixed scale of activations, is not implemented"
        )
    bits = group.config.number("bits", group.name)
    if bits not in (None, 8):
        raise group.contradiction(f"num_bits {bits}", "int8")
    activation, by = group.config.activation(group.name)
    groups = 1 if is_scalar else scale.shape[1]
    size = group.config.number("group_size", group.name) or -1
    if ceil(inputs, inputs if size == -1 else size) != groups:
        if size != -1 or groups == 1 or inputs % groups:
            raise group.contradiction(f"group_size {size}", f"{groups} groups of {inputs} inputs")
        size = inputs // groups
    if activation == "none":
        return group.made(
            "gptq",
            f"int-quantized, 8 bits, group_size {size}",
            ("weight", "weight_scale"),
            (inputs, outputs),
            "int-quantized codes",
            bits=8,
            group_size=size,
            zero_format="gptq_v2",
            in_features=inputs,
        )
    if activation not in ("", "token") or groups > 1:
        raise ValueError(
            f"{group.config.source}: {by}: int8 is implemented with activations by token and rows of weights"
        )
    return group.made(
        "bitsandbytes", "int-quantized", ("weight", "weight_scale"), (inputs, outputs), "int-quantized", threshold=0.0
    )
