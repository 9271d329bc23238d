"""LoRA on quantized layers by peft: `register()` makes get_peft_model and PeftModel.from_pretrained know our classes.

The forward pass, training and saving are peft's own. Merging puts an nn.Linear in the layer's place, with the
dequantized weight and the adapters' in it, rounded once; unmerging brings back the quantized layer, bit for bit.
Without `register()`, `config._register_custom_module(qlinear.peft.LORA_LAYERS)` does the same for one LoraConfig.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .layers._module import QuantizedLinear
from .model import to_linear

# The initializations that do not read the base weight, which is packed.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


class LoraQuantizedLinear(Linear):
    """peft's LoRA layer around a quantized one. Variants that compute with the base weight (DoRA, PiSSA, ...) are
    refused: their results would need a dequantized copy of it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        # The weight is [N, K] whatever the module was that the layer replaced.
        self.fan_in_fan_out = False
        self._start()

    def _start(self) -> None:
        # While adapters are merged: the quantized layer, which is no submodule, so that the state dict has one weight.
        # _seen: the dtype of the inputs, in which a merged layer must work: what the layer was is not always known.
        self.__dict__.update(_quantized=None, _seen=None)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            self.__dict__["_seen"] = x.dtype
        return super().forward(x, *arguments, **options)

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        if isinstance(base_layer, QuantizedLinear):
            return base_layer.device, base_layer.natural_dtype()
        return super()._get_base_layer_device_and_dtype(base_layer)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        init = config.init_lora_weights
        if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
            raise ValueError(
                f"init_lora_weights={init!r} reads the base weight, which is quantized; use one of {_INITS}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def _merged(self, adapters: list[str]) -> nn.Linear:
        """An nn.Linear with the adapters in it, rounded once to the dtype of its inputs, as far as there were any."""
        quantized: QuantizedLinear = self.__dict__["_quantized"] or self.base_layer
        dtype = self.__dict__["_seen"] or quantized.natural_dtype()
        linear = to_linear(quantized, torch.float32).requires_grad_(False)
        for adapter in adapters:
            delta = self.get_delta_weight(adapter).detach()
            linear.weight += delta.to(linear.weight.device)
            if self.lora_bias[adapter]:
                if linear.bias is None:
                    raise RuntimeError("an adapter with lora_bias=True cannot be merged into a layer without a bias")
                linear.bias += self.lora_B[adapter].bias.detach() * self.scaling[adapter]
        return linear.to(dtype).train(quantized.training)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight; safe_merge refuses those that leave it not finite, and changes nothing then."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        linear = self._merged([*self.merged_adapters, *names])
        if safe_merge and not all(torch.isfinite(tensor).all() for tensor in linear.parameters()):
            raise ValueError(f"the merged weights have NaN or infinities: one of {names} seems to be broken")
        if self.__dict__["_quantized"] is None:
            self.__dict__["_quantized"] = self.base_layer
        self.base_layer = linear
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        quantized = self.__dict__["_quantized"]
        if quantized is None:
            return super().unmerge()  # it warns that there is nothing to do
        # The model may have been moved meanwhile, or set to eval.
        self.base_layer = quantized.to(self.base_layer.weight.device).train(self.base_layer.training)
        self.__dict__["_quantized"] = None
        self.merged_adapters.clear()
        return None


# For LoraConfig._register_custom_module.
LORA_LAYERS = {QuantizedLinear: LoraQuantizedLinear}

_peft_create = LoraModel.__dict__["_create_new_module"]
_peft_include = tuners_utils._maybe_include_all_linear_layers


def _create(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantizedLinear):
        return LoraQuantizedLinear(target, adapter_name, config=lora_config, **options)
    return _peft_create.__func__(lora_config, adapter_name, target, **options)


def _include(peft_config: Any, model: nn.Module) -> Any:
    """target_modules="all-linear" with the quantized layers among them, the one that gives the logits left out."""
    said = getattr(peft_config, "target_modules", None)
    peft_config = _peft_include(peft_config, model)
    if not isinstance(said, str) or said.lower() != "all-linear":
        return peft_config
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wrapped = {id(m) for t in model.modules() if isinstance(t, BaseTunerLayer) for m in t.modules() if m is not t}
    peft_config.target_modules |= {
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module is not head and id(module) not in wrapped
    }
    return peft_config


def register() -> None:
    """Has peft put LoRA on quantized layers, in this process; "all-linear" means them, too."""
    LoraModel._create_new_module = staticmethod(_create)
    tuners_utils._maybe_include_all_linear_layers = _include


def unregister() -> None:
    """Puts peft back as it was."""
    LoraModel._create_new_module = _peft_create
    tuners_utils._maybe_include_all_linear_layers = _peft_include
