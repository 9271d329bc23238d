"""The quantization_config under which layers are saved: one whose reading gives these layers again, which is tried.

Published configs come first, as files of one format have them; what none of them describes is listed layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _qlinear, ops
from .detect import detect
from .detect_group import Layer
from .layers._module import QuantizedLinear
from .layers.awq import AWQLinear
from .layers.bnb import Linear4bit, Linear8bitLt
from .layers.eetq import EETQLinear
from .layers.fp8 import Fp8Linear
from .layers.gptq import QuantLinear
from .quantization_config import QuantizationConfig
from .shards import Entry
from .storages import origin_of

_SMALL = 4096


class _Saved(NamedTuple):
    """A layer and, for GPTQ, whether its zeros as they are stored are all the middle, or all one less, and whether its
    inputs are ordered. What is asked of the module later needs no data: it may be on the meta device by then."""

    name: str
    module: QuantizedLinear
    is_middle: bool = False
    is_below: bool = False
    is_ordered: bool = False


class _Recorded(dict[str, Entry]):
    """What the files will hold of the layers, as detect reads it from headers."""

    directory = Path()

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self[name] = Entry(Path("model.safetensors"), tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
        # Those that describe others, which detect reads.
        if tensor.nbytes <= _SMALL:
            self._tensors[name] = tensor.cpu()

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class Candidates:
    """The configs that could describe a model's layers, told of each layer as its tensors pass by."""

    def __init__(self, unquantized: list[str]) -> None:
        self._unquantized = unquantized
        self._layers: list[_Saved] = []
        self._recorded = _Recorded()

    def hear(
        self, name: str, module: QuantizedLinear, own: Mapping[str, Tensor], written: Mapping[str, Tensor]
    ) -> None:
        """A layer, its state, and that state as it goes into the files."""
        if isinstance(module, Linear8bitLt) and module.has_fp16_weights:
            return
        saved = _Saved(name, module)
        if isinstance(module, QuantLinear):
            stored = own[f"{name}.qzeros" if name else "qzeros"].t().contiguous()
            zeros = _qlinear.gptq_unpack_codes(stored, bits=module.bits, count=module.out_features)
            middle = 1 << (module.bits - 1)
            is_middle, is_below = bool((zeros == middle).all()), bool((zeros == middle - 1).all())
            saved = _Saved(name, module, is_middle, is_below, _has_act_order(module))
        self._layers.append(saved)
        for key, tensor in written.items():
            self._recorded.add(key, tensor)

    def best(self) -> dict[str, Any] | None:
        """quantization_config; None where nothing is quantized. ValueError where no config describes a layer."""
        if not self._layers:
            return None
        refused = ""
        for values in self._configs():
            refused = self._refused(values)
            if not refused:
                return values
        raise ValueError(f"{refused}: no config says how to load this layer again")

    def _configs(self) -> Iterator[dict[str, Any]]:
        origins = [origin_of(saved.module) for saved in self._layers]
        configs = [origin.config for origin in origins if origin is not None]
        if len(configs) == len(origins) and configs[0].method and all(config == configs[0] for config in configs):
            yield {**configs[0].values, "quant_method": configs[0].method}
        kinds = {type(saved.module) for saved in self._layers}
        if len(kinds) == 1:
            yield from _CONFIGS[kinds.pop()](self._layers, self._unquantized)
        yield {"quant_method": "qlinear", "layers": {saved.name: _listed(saved.module) for saved in self._layers}}

    def _refused(self, values: dict[str, Any]) -> str:
        """The first layer that a config does not describe, or an empty string."""
        config = QuantizationConfig("config.json", values["quant_method"], values)
        sizes = {saved.name: (saved.module.in_features, saved.module.out_features) for saved in self._layers}
        try:
            found = detect(self._recorded, config, sizes).layers
        except (ValueError, TypeError) as error:
            return str(error)
        for saved in self._layers:
            layer = found.get(saved.name)
            if layer is None or not _agrees(saved, layer):
                return saved.name
        return ""


def _agrees(saved: _Saved, layer: Layer) -> bool:
    """Whether loading the layer as it was detected gives this module."""
    module, options = saved.module, layer.options
    if form_of(module) != layer.format or (module.in_features, module.out_features) != (
        layer.in_features,
        layer.out_features,
    ):
        return False
    if isinstance(module, (QuantLinear, AWQLinear)) and _group_size(options["group_size"], module) != _own_size(module):
        return False
    if isinstance(module, QuantLinear):
        zeros = options["zero_format"]
        if zeros == "auto":
            zeros = "gptq_v2" if saved.is_middle else "gptq"
        return options["bits"] == module.bits and zeros == module.stored_zeros()
    if isinstance(module, Linear8bitLt):
        return options["threshold"] == module.threshold
    if isinstance(module, Linear4bit):
        return options.get("compute_dtype") == module.compute_dtype
    if isinstance(module, Fp8Linear):
        blocks = options["block_size"]
        default = "static" if "input_scale" in layer.tensors else "group" if module.is_blockwise() else "token"
        return (
            options.get("activation", default) == module.activation_mode()
            and (not module.is_blockwise() or blocks == (module.block_n, module.block_k))
            and (module.activation_mode() != "token" or options.get("input_scale_ub") == _bound(module))
        )
    return True


def form_of(module: QuantizedLinear) -> str:
    """The format's name, as replace_linear and detect have it."""
    if isinstance(module, Linear4bit):
        return f"bitsandbytes-{module.quant_type}"
    return next(name for kind, name in _NAMES.items() if isinstance(module, kind))


def _group_size(size: int, module: QuantizedLinear) -> int:
    """-1 and whatever is larger than the row are the row."""
    return module.in_features if size == -1 else min(size, module.in_features)


def _own_size(module: QuantLinear | AWQLinear) -> int:
    return _group_size(module.groupsize if isinstance(module, QuantLinear) else module.group_size, module)


def _bound(module: Fp8Linear) -> float | None:
    return None if module.input_scale_ub is None else float(module.input_scale_ub)


# One format


def _gptq(layers: list[_Saved], unquantized: list[str]) -> Iterator[dict[str, Any]]:
    modules = [saved.module for saved in layers]
    is_below = all(saved.is_below for saved in layers)
    for form in ("gptq", "gptq_v2"):
        yield {
            "quant_method": "gptq",
            "bits": _usual(module.bits for module in modules),
            "group_size": _usual(module.groupsize for module in modules),
            "desc_act": any(saved.is_ordered for saved in layers),
            "sym": is_below if form == "gptq" else all(saved.is_middle for saved in layers),
            "lm_head": any(saved.name.endswith("lm_head") for saved in layers),
            "checkpoint_format": form,
            "modules_to_not_convert": unquantized,
        }


def _has_act_order(module: QuantLinear) -> bool:
    index = module.g_idx
    if index is None or not index.any():
        return False
    return not torch.equal(index, torch.arange(len(index), dtype=index.dtype, device=index.device) // _own_size(module))


def _awq(layers: list[_Saved], unquantized: list[str]) -> Iterator[dict[str, Any]]:
    yield {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _usual(saved.module.group_size for saved in layers),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": unquantized,
    }


def _eetq(layers: list[_Saved], unquantized: list[str]) -> Iterator[dict[str, Any]]:
    yield {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": unquantized}


def _int8(layers: list[_Saved], unquantized: list[str]) -> Iterator[dict[str, Any]]:
    yield {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": _usual(saved.module.threshold for saved in layers),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": unquantized,
    }


def _fourbit(layers: list[_Saved], unquantized: list[str]) -> Iterator[dict[str, Any]]:
    modules = [saved.module for saved in layers]
    yield {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": _usual(module.quant_type for module in modules),
        "bnb_4bit_use_double_quant": _usual(module.compress_statistics for module in modules),
        "bnb_4bit_quant_storage": str(_usual(module.quant_storage for module in modules)).removeprefix("torch."),
        "bnb_4bit_compute_dtype": "float32",
        "llm_int8_skip_modules": unquantized,
    }


def _fp8(layers: list[_Saved], unquantized: list[str]) -> Iterator[dict[str, Any]]:
    modules = [saved.module for saved in layers]
    mode = _usual(module.activation_mode() for module in modules)
    first = modules[0]
    if first.is_blockwise():
        yield {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [first.block_n, first.block_k],
            "modules_to_not_convert": unquantized,
        }
    elif first.weight_scale.numel() == 1 and mode in ("static", "token"):
        scheme = "static" if mode == "static" else "dynamic"
        yield {"quant_method": "fp8", "activation_scheme": scheme, "modules_to_not_convert": unquantized}
    if _bound(first) is not None:
        yield {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": _bound(first),
            "modules_to_not_convert": unquantized,
        }
    yield compressed_fp8(first, mode, unquantized)


def compressed_fp8(first: Fp8Linear, mode: str, unquantized: list[str]) -> dict[str, Any]:
    """The config of compressed-tensors, which says most of what FP8 files can be."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    activations: dict[str, Any] | None = weights | {"dynamic": mode != "static"}
    if first.is_blockwise():
        weights |= {"strategy": "block", "block_structure": [first.block_n, first.block_k]}
    else:
        weights |= {"strategy": "tensor" if first.weight_scale.numel() == 1 else "channel"}
    if mode == "none":
        activations = None
    else:
        activations |= {"strategy": "tensor" if mode == "static" else mode}
        if mode == "group":
            activations |= {"group_size": 128}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": unquantized,
    }


def _usual(values) -> Any:
    """The most common value."""
    return Counter(values).most_common(1)[0][0]


# Several formats


def _listed(module: QuantizedLinear) -> dict[str, Any]:
    """A layer's numbers that its tensors do not tell, in JSON."""
    said: dict[str, Any] = {"format": form_of(module)}
    if isinstance(module, QuantLinear):
        said |= {"bits": module.bits, "group_size": module.groupsize, "zero_format": module.stored_zeros()}
    elif isinstance(module, AWQLinear):
        said |= {"bits": 4, "group_size": module.group_size}
    elif isinstance(module, Linear8bitLt):
        said |= {"llm_int8_threshold": module.threshold}
    elif isinstance(module, Linear4bit) and module.compute_dtype is not None:
        said |= {"compute_dtype": ops.DTYPE_NAMES[module.compute_dtype]}
    elif isinstance(module, Fp8Linear):
        said |= {"activation": module.activation_mode()}
        if module.is_blockwise():
            said |= {"weight_block_size": [module.block_n, module.block_k]}
        if module.activation_mode() == "token" and _bound(module) is not None:
            said |= {"activation_scale_ub": _bound(module)}
    return said


_NAMES: dict[type[nn.Module], str] = {
    QuantLinear: "gptq",
    AWQLinear: "awq",
    EETQLinear: "eetq",
    Linear8bitLt: "bitsandbytes",
    Fp8Linear: "fp8",
}
_CONFIGS = {
    QuantLinear: _gptq,
    AWQLinear: _awq,
    EETQLinear: _eetq,
    Linear8bitLt: _int8,
    Linear4bit: _fourbit,
    Fp8Linear: _fp8,
}
