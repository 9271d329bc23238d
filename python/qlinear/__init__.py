"""Quantized linear layers for PyTorch.

Names are loaded when they are first asked for, so that `qlinear._qlinear`, the C extension, can be used without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "layers.eetq": ("EETQLinear",),
    "layers.gptq": ("QuantLinear", "QuantLinearFunction"),
    "layers.awq": ("AWQLinear",),
    "layers.bnb": ("Linear4bit", "Linear8bitLt", "warn_deprecate_bnb"),
    "layers.fp8": ("Fp8Linear", "apply_fp8_linear"),
    "layers.linear": ("FastLinear", "get_linear"),
    "checkpoint": ("load_checkpoint",),
    "hf": ("from_pretrained",),
    "saving": ("save_pretrained",),
    "model": ("Report", "dequantize", "replace_linear", "to_linear"),
    "parallel": ("parallelize",),
    "quantizing": ("quantize_checkpoint",),
    "converting": ("convert_checkpoint",),
    "tuning": ("autotune",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("functional", "hf", "layers", "model", "ops")

__all__ = [
    "AWQLinear",
    "EETQLinear",
    "FastLinear",
    "Fp8Linear",
    "Linear4bit",
    "Linear8bitLt",
    "QuantLinear",
    "QuantLinearFunction",
    "Report",
    "apply_fp8_linear",
    "autotune",
    "convert_checkpoint",
    "dequantize",
    "from_pretrained",
    "functional",
    "get_linear",
    "hf",
    "layers",
    "load_checkpoint",
    "model",
    "parallelize",
    "quantize_checkpoint",
    "replace_linear",
    "save_pretrained",
    "to_linear",
    "warn_deprecate_bnb",
]

if TYPE_CHECKING:
    from . import functional, hf, layers, model
    from .checkpoint import load_checkpoint
    from .converting import convert_checkpoint
    from .hf import from_pretrained
    from .layers.awq import AWQLinear
    from .layers.bnb import Linear4bit, Linear8bitLt, warn_deprecate_bnb
    from .layers.eetq import EETQLinear
    from .layers.fp8 import Fp8Linear, apply_fp8_linear
    from .layers.gptq import QuantLinear, QuantLinearFunction
    from .layers.linear import FastLinear, get_linear
    from .model import Report, dequantize, replace_linear, to_linear
    from .parallel import parallelize
    from .quantizing import quantize_checkpoint
    from .saving import save_pretrained
    from .tuning import autotune


def __getattr__(name: str):
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    elif name == "__version__":
        value = importlib.import_module("._qlinear", __name__).__version__
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, "__version__"})
