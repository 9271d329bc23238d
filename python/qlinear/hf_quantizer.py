"""The quantizer that hf.register gives to transformers: our layers in the models of its own from_pretrained.

The layers' tensors are loaded here, straight from the files; transformers sees modules without tensors in their place
and loads the rest.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import Plan, make_layer, named_modules, plan_layers, raise_problems
from .hf import renaming
from .model import owners, put, replace_linear
from .quantization_config import QuantizationConfig
from .saving import written_of
from .shards import Shards

# As transformers calls them: bitsandbytes by its number of bits.
_METHODS = (
    "gptq", "awq", "eetq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "fbgemm_fp8", "modelopt",
    "compressed-tensors", "auto-round", "intel/auto-round", "qlinear",
)  # fmt: skip


class QlinearConfig(QuantizationConfigMixin):
    """A checkpoint's quantization_config as it stands in config.json."""

    quant_method = "qlinear"

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(copy.deepcopy(dict(config_dict)))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)

    def __iter__(self):
        yield from self.to_dict().items()

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class _Pending(nn.Module):
    """Stands where a layer will be, and is no layer that anybody initializes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Models that initialize the weights of some children themselves find one that is there already.
        weight = torch.empty(0, device="meta")
        weight._is_hf_initialized = True
        self.__dict__.update(weight=weight, bias=None, _is_hf_initialized=True)


def _part_of(model: Any) -> Callable[[str], str]:
    """renaming; of a model that is a part of the one that was saved, only of what that part has."""
    rename = renaming(model)
    if type(model).__name__ in (model.config.architectures or ()):
        return rename
    parts = {name for name, _ in model.named_children()}
    return lambda name: new if (new := rename(name)).partition(".")[0] in parts else ""


def _device_of(model: nn.Module, name: str) -> torch.device:
    """Where the tensors beside a module are."""
    while True:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        for tensor in (*parent.parameters(), *parent.buffers()):
            if not tensor.is_meta:
                return tensor.device
        if not name:
            return torch.device("cpu")


class QlinearQuantizer(HfQuantizer):
    """For checkpoints that are quantized, and for those to be quantized where the method needs no calibration."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._shards: Shards | None = None
        self._plan = Plan()
        self._dtype: torch.dtype | None = None
        if not self.pre_quantized:
            self._quantize = _by_rounding(quantization_config)

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        # That of biases.
        self._dtype = dtype
        return super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        if not checkpoint_files:
            raise ValueError("this transformers does not tell which files it loads: release 5 does")
        paths = [Path(path) for path in checkpoint_files]
        if any(path.suffix != ".safetensors" for path in paths):
            raise ValueError(
                f"{paths[0]}: qlinear loads quantized layers from safetensors files, and from nothing else"
            )
        values = self.quantization_config.to_dict()
        config = QuantizationConfig("config.json", str(values.get("quant_method") or "bitsandbytes"), values)
        self._shards = Shards(paths[0].parent, paths).renamed(_part_of(model))
        self._plan, found, _ = plan_layers(named_modules(model), self._shards, config)
        raise_problems(self._plan, self._shards)
        names, _ = owners(model)
        ignored = [*found.ignored]
        for layer in self._plan.layers:
            pending = _Pending(layer.in_features, layer.out_features)
            places = names[id(model.get_submodule(layer.name))]
            put(model, places, pending)
            for place in places:
                model.all_tied_weights_keys.pop(f"{place}.weight", None)
            ignored += layer.tensors.values()
            # All zero, and the model has none.
            ignored.append(f"{layer.name}.bias")
        known = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{re.escape(name)}$" for name in ignored)}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self._quantize(model)
            return model
        names, _ = owners(model)
        with torch.no_grad():
            for layer in self._plan.layers:
                old = model.get_submodule(layer.name)
                device = _device_of(model, layer.name)
                new = make_layer(self._shards, layer, self._plan.config, device, self._dtype)
                put(model, names[id(old)], new.train(old.training))
        self._shards, self._plan = None, Plan()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """By adapters: the weights themselves do not learn."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state: dict[str, torch.Tensor] = {}
        for prefix, module in model.named_modules():
            state.update(written_of(module, prefix))
        return state, {}


def _by_rounding(config: Any) -> Any:
    """What quantizes a loaded model as a config of transformers' asks. ValueError where that takes calibration."""
    method = str(getattr(config.quant_method, "value", config.quant_method))
    skip = getattr(config, "llm_int8_skip_modules", None) or getattr(config, "modules_to_not_convert", None)
    options: dict[str, Any] = {"skip": ("lm_head",) if skip is None else tuple(skip)}
    if method == "bitsandbytes" and config.load_in_8bit:
        if config.llm_int8_has_fp16_weight:
            raise ValueError("llm_int8_has_fp16_weight: layers that learn are made by Linear8bitLt, not by loading")
        options |= {"quantize": "bitsandbytes", "threshold": config.llm_int8_threshold}
    elif method == "bitsandbytes":
        # bnb_4bit_compute_dtype is not asked: sums run in fp32 for every input.
        options |= {
            "quantize": f"bitsandbytes-{config.bnb_4bit_quant_type}",
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "quant_storage": config.bnb_4bit_quant_storage,
        }
    elif method == "eetq":
        options |= {"quantize": "eetq"}
    elif method == "fbgemm_fp8":
        options |= {"quantize": "fp8", "input_scale_ub": config.activation_scale_ub}
    else:
        raise ValueError(f"{method}: qlinear loads such checkpoints, but does not make them while a model is loaded")
    return lambda model: replace_linear(model, **options)


def entries() -> list[tuple[dict, dict]]:
    """(a mapping of transformers', what it is to hold), of configs and of quantizers."""
    return [
        (AUTO_QUANTIZATION_CONFIG_MAPPING, dict.fromkeys(_METHODS, QlinearConfig)),
        (AUTO_QUANTIZER_MAPPING, dict.fromkeys(_METHODS, QlinearQuantizer)),
    ]
