"""quantize_checkpoint: a directory's float weights rounded to the nearest codes of a format, into another directory.

One layer is in memory at a time: its weight is mapped from the files, quantized, compared, written and dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .detect import detect
from .layers._module import QuantizedLinear
from .layers.fp8 import Fp8Linear, codes_of, scale_of
from .linear_layers import linear_layers
from .model import Bar, makers
from .quantization_config import QuantizationConfig, read_config
from .rewriting import RewriteReport, RewrittenLayer, Target, error_of, explicit
from .shards import Shards

_BLOCK = 128

FORMATS = (
    "gptq-2", "gptq-3", "gptq-4", "gptq-8", "awq", "eetq", "nf4", "fp4", "int8", "fp8", "fp8-tensor", "fp8-block",
)  # fmt: skip

_Make = Callable[[Tensor, Tensor | None], QuantizedLinear]


def _fp8_tensor(weight: Tensor, bias: Tensor | None) -> Fp8Linear:
    """One scale for the weight, one for each token: what vLLM calls fp8 with dynamic activations."""
    wide = weight.float()
    scale = scale_of(wide.abs().amax().reshape(1))
    return Fp8Linear(codes_of(wide, scale), bias, scale, None, activation="token")


def _fp8_block(weight: Tensor, bias: Tensor | None) -> Fp8Linear:
    """A scale for each block of 128x128, and for 128 features of a token, as DeepSeek-V3's files have them."""
    n, k = weight.shape
    rows, columns = -(-n // _BLOCK), -(-k // _BLOCK)
    wide = torch.nn.functional.pad(weight.float(), (0, columns * _BLOCK - k, 0, rows * _BLOCK - n))
    blocks = wide.view(rows, _BLOCK, columns, _BLOCK)
    scale = scale_of(blocks.abs().amax((1, 3)))
    codes = codes_of(blocks, scale.view(rows, 1, columns, 1)).view(rows * _BLOCK, columns * _BLOCK)
    # A copy of the part: the padding is not the layer's.
    layer = Fp8Linear(codes[:n, :k].clone(), bias, scale, None, activation="group")
    layer.scale_key = "weight_scale_inv"
    return layer


def _maker(to: str, group_size: int, search_scales: bool, threshold: float, blocksize: int) -> _Make:
    if to not in FORMATS:
        raise ValueError(f"{to!r:.60} is none of {', '.join(FORMATS)}")
    if to == "fp8-tensor":
        return _fp8_tensor
    if to == "fp8-block":
        return _fp8_block
    name, _, bits = to.partition("-")
    name = {"nf4": "bitsandbytes-nf4", "fp4": "bitsandbytes-fp4", "int8": "bitsandbytes"}.get(name, name)
    options = {"group_size": group_size, "search_scales": search_scales, "threshold": threshold, "blocksize": blocksize}
    make = makers(bits=int(bits or 4), **options)[name]
    # Options that no weight goes with fail here, not as one reason to skip for each layer.
    make(torch.zeros(128, 128, device="cpu"), None)
    return make


def quantize_checkpoint(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    to: str,
    *,
    skip: Iterable[str] = ("lm_head",),
    group_size: int = 128,
    search_scales: bool = False,
    threshold: float = 6.0,
    blocksize: int = 64,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> RewriteReport:
    """Quantizes the linear layers of the checkpoint in `source` to one of FORMATS and writes it to `directory`, with
    its other files. The options are replace_linear's; max_shard_size is save_pretrained's.

    Which weights are linear layers' the model's class tells, where config.json names one of transformers' and that is
    installed; else their names do: two-dimensional weights but for embeddings. A layer that the format cannot hold
    stays as it is. ValueError, and nothing written, where the files cannot be read, are quantized already or have no
    layer that can be, and where `directory` has files in it.
    """
    if isinstance(skip, str):
        raise TypeError("skip must be a collection of names, not a string")
    make = _maker(to, group_size, search_scales, threshold, blocksize)
    shards = Shards(source)
    _check_plain(shards, read_config(shards.directory))
    layers, note = linear_layers(shards, tuple(skip))
    report = RewriteReport(to, bytes_before=sum(entry.nbytes for entry in shards.values()))
    report.notes += [note] if note else []
    target = Target(shards, directory, max_shard_size, layers)
    consumed: set[str] = set()
    bar = Bar(len(layers), f"qlinear: {to}", progress)
    try:
        with torch.no_grad(), torch.inference_mode(False), target:
            for name in shards:
                layer = name.removesuffix(".weight")
                if name != layer and layer in layers:
                    reason = layers[layer].obstacle or _quantize(layer, layers[layer].transposed, make, target, report)
                    bar.step()
                    if not reason:
                        consumed |= {name, f"{layer}.bias"}
                        continue
                    report.skipped.append((layer, reason))
                    target.unquantized.append(layer)
            for name in shards:
                if name not in consumed:
                    target.add_plain(name)
            if not report.layers:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped[:5]) or "it has none"
                raise ValueError(f"{shards.directory}: no linear layer can be quantized to {to}: {reasons}")
            report.bytes_after = target.nbytes
    finally:
        bar.close()
    return report


def _check_plain(shards: Shards, config: QuantizationConfig) -> None:
    found = detect(shards, QuantizationConfig())
    names = [*found.layers, *found.refused]
    if config.method or names:
        what = f"quant_method {config.method}" if config.method else f"{names[0]} and {len(names) - 1} more"
        raise ValueError(f"{shards.directory}: is quantized already ({what}): convert changes a format, where it can")


def _quantize(layer: str, transposed: bool, make: _Make, target: Target, report: RewriteReport) -> str:
    """Writes the layer; the reason why it cannot be quantized, or an empty string."""
    shards = target.shards
    weight = shards.tensor(f"{layer}.weight")
    weight = weight.t() if transposed else weight
    bias = shards.tensor(f"{layer}.bias") if f"{layer}.bias" in shards else None
    try:
        module = explicit(make(weight, bias))
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    error, largest = error_of(weight, module)
    before = weight.nbytes + (0 if bias is None else bias.nbytes)
    n, k = weight.shape
    report.layers.append(RewrittenLayer(layer, k, n, before, target.add_layer(layer, module), error, largest))
    return ""
