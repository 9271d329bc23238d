"""What a checkpoint's JSON files say of its quantization: the numbers that its tensors cannot tell.

Files are often wrong about it, so that nothing here decides what a tensor is; see detect.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .shards import read_json

# The formats, as detect calls them, that the files of each method may hold.
_FORMATS = {
    "gptq": {"gptq"},
    "awq": {"awq"},
    "auto-round": {"gptq", "awq"},
    "intel/auto-round": {"gptq", "awq"},
    "eetq": {"eetq"},
    "bitsandbytes": {"bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"},
    "fp8": {"fp8"},
    "fbgemm_fp8": {"fp8"},
    "modelopt": {"fp8"},
    "compressed-tensors": {"fp8", "gptq", "bitsandbytes"},
    "qlinear": {"gptq", "awq", "eetq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8"},
}
# Said in checkpoint_format or format: how GPTQ's layers store zeros and 3-bit codes.
_GPTQ_FORMATS = ("gptq", "gptq_v2", "gptq_p")
_ACTIVATIONS = ("none", "static", "tensor", "token", "group")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# One meaning under several names.
_SPELLINGS = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
}
# Where the modules stand that were left as they are.
_KEPT = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules")


@dataclass(frozen=True)
class QuantizationConfig:
    """source: the file that says it, "" where none does; method: its quant_method, "" where it says nothing."""

    source: str = ""
    method: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """ValueError where the file asks for what changes the model beyond its layers' weights."""
        for key in ("transform_config", "sparsity_config"):
            said = self.values.get(key)
            if isinstance(said, dict) and said and said.get("format") != "dense":
                raise ValueError(f"{self.source}: {key} is not implemented: {json.dumps(said):.60}")

    def allows(self, form: str, name: str) -> bool:
        """Whether the method's files may hold a layer of this format under this name."""
        if not self.method:
            return True
        if self.method == "qlinear":
            layers = self.values.get("layers")
            return (
                isinstance(layers, dict) and isinstance(layers.get(name), dict) and layers[name].get("format") == form
            )
        if "auto-round" in self.method and "auto_awq" in (packing := str(self.values.get("packing_format"))):
            return form == "awq"
        if "auto-round" in self.method and "gptq" in packing:
            return form == "gptq"
        if self.method == "bitsandbytes" and self.values.get("load_in_4bit") is not self.values.get("load_in_8bit"):
            allowed = {"bitsandbytes"} if self.values.get("load_in_8bit") else _FORMATS[self.method] - {"bitsandbytes"}
            return form in allowed
        return form in _FORMATS[self.method]

    def number(self, key: str, name: str) -> int | None:
        """bits or group_size of the module `name`, None where nothing is said."""
        values = self._of_module(name)
        found = next((values[spelling] for spelling in _SPELLINGS[key] if values.get(spelling) is not None), None)
        if found is not None and (type(found) is not int or found == 0 or found < -1):
            raise ValueError(f"{self.source}: {key} must be positive (group_size also -1), got {found!r:.60}")
        return found

    def _of_module(self, name: str) -> Mapping[str, Any]:
        """The values with those that hold for one module alone put over them."""
        if self.method == "compressed-tensors":
            weights = self._group_of(name).get("weights")
            weights = weights if isinstance(weights, dict) else {}
            # null is a scale for each channel, as -1 is.
            size = weights.get("group_size", -1) if weights.get("strategy") in ("channel", "tensor") else None
            return {**self.values, "bits": weights.get("num_bits"), "group_size": weights.get("group_size") or size}
        layers = self.values.get("layers")
        if self.method == "qlinear" and isinstance(layers, dict) and isinstance(layers.get(name), dict):
            return {**self.values, **layers[name]}
        dynamic, extra = self.values.get("dynamic"), self.values.get("extra_config")
        if isinstance(extra, dict) and isinstance(extra.get(name), dict):
            return {**self.values, **extra[name]}
        for pattern, changes in dynamic.items() if isinstance(dynamic, dict) else ():
            if (
                not pattern.startswith("-:")
                and isinstance(changes, dict)
                and _matches(pattern.removeprefix("+:"), name)
            ):
                return {**self.values, **changes}
        return self.values

    def keeps(self, name: str) -> str:
        """The entry by which the module stays unquantized, or an empty string."""
        for key in _KEPT:
            entries = self.values.get(key)
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, str) and entry and _is_named(entry, name):
                    return f"{key}: {entry}"
        extra = self.values.get("extra_config")
        own = extra.get(name) if isinstance(extra, dict) else None
        if isinstance(own, dict) and type(own.get("bits")) is int and own["bits"] > 8:
            return f"extra_config: {name}"
        dynamic = self.values.get("dynamic")
        for pattern in dynamic if isinstance(dynamic, dict) else ():
            if pattern.startswith("-:") and _matches(pattern[2:], name):
                return f"dynamic: {pattern}"
        return ""

    def gptq_format(self, name: str) -> str:
        """checkpoint_format of GPTQ's files."""
        if self.method not in ("", "gptq"):
            return "gptq"
        said = str(self.values.get("checkpoint_format") or self.values.get("format") or "gptq")
        if said not in _GPTQ_FORMATS:
            raise ValueError(f"{self.source} says checkpoint_format {said:.60}, which is not implemented")
        return said

    def zero_format(self, name: str) -> str:
        """How a layer's zeros are stored, where a list of layers tells; an empty string where none does."""
        said = self._of_module(name).get("zero_format") if self.method == "qlinear" else None
        if said not in (None, "gptq", "gptq_v2"):
            raise ValueError(f"{self.source}: zero_format must be gptq or gptq_v2, got {said!r:.60}")
        return said or ""

    def compute_dtype(self, name: str) -> torch.dtype | None:
        """The dtype that a 4-bit layer computes in, where a list of layers tells; other files mean x's."""
        said = self._of_module(name).get("compute_dtype") if self.method == "qlinear" else None
        if said is not None and (not isinstance(said, str) or said not in _DTYPES):
            raise ValueError(f"{self.source}: compute_dtype must be one of {', '.join(_DTYPES)}, got {said!r:.60}")
        return None if said is None else _DTYPES[said]

    def is_symmetric(self, name: str) -> bool | None:
        """Whether compressed-tensors' weights have no zeros; None where nothing is said."""
        weights = self._group_of(name).get("weights")
        said = weights.get("symmetric") if isinstance(weights, dict) else None
        return said if isinstance(said, bool) else None

    def activation(self, name: str) -> tuple[str, str]:
        """(how the file says that activations are quantized, "" where it does not; under which key)."""
        said = self._of_module(name).get("activation") if self.method == "qlinear" else None
        if said is not None:
            if said not in _ACTIVATIONS:
                raise ValueError(
                    f"{self.source}: activation must be one of {', '.join(_ACTIVATIONS)}, got {said!r:.60}"
                )
            return said, f"activation {said}"
        if self.method == "modelopt" and self.values.get("quant_algo") == "FP8_PB_WO":
            return "none", "quant_algo FP8_PB_WO"
        if self.method == "fbgemm_fp8":
            return "token", "quant_method fbgemm_fp8"
        if self.method == "fp8" and self.values.get("activation_scheme") == "static":
            return "static", "activation_scheme static"
        if self.method == "fp8" and self.values.get("activation_scheme") == "dynamic":
            return "dynamic", "activation_scheme dynamic"
        if self.method == "compressed-tensors":
            return self._activation_of_groups(name)
        return "", ""

    def _group_of(self, name: str) -> Mapping[str, Any]:
        """What compressed-tensors' config_groups say of a module."""
        groups = self.values.get("config_groups")
        found: Mapping[str, Any] = {}
        for group in groups.values() if isinstance(groups, dict) else ():
            targets = group.get("targets") if isinstance(group, dict) else None
            named = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
            # A group that names the module counts before one for all linear layers.
            if any(target != "Linear" and _is_named(target, name) for target in named):
                return group
            found = found or (group if "Linear" in named else {})
        return found

    def _activation_of_groups(self, name: str) -> tuple[str, str]:
        group = self._group_of(name)
        if not group:
            return "", ""
        inputs = group.get("input_activations")
        if not isinstance(inputs, dict):
            return "none", "input_activations null"
        if not inputs.get("dynamic"):
            return "static", "input_activations dynamic false"
        strategy = inputs.get("strategy")
        if strategy not in ("tensor", "token", "group"):
            raise ValueError(f"{self.source}: input_activations: strategy {strategy!r:.60} is not implemented")
        return strategy, f"input_activations {strategy}"

    def block_size(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of an FP8 weight's blocks."""
        said = self._of_module(name).get("weight_block_size")
        if self.method == "compressed-tensors":
            weights = self._group_of(name).get("weights")
            said = weights.get("block_structure") if isinstance(weights, dict) else None
        if said is None:
            return None
        if not isinstance(said, list) or len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
            raise ValueError(f"{self.source}: weight_block_size must be two positive integers, got {said!r:.60}")
        return said[0], said[1]

    def positive(self, key: str, default: float, name: str) -> float:
        """A number of the module `name` that must not be negative."""
        value = self._of_module(name).get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{self.source}: {key} must be a number that is not negative, got {value!r:.60}")
        return float(value)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r:.100} is not a regular expression: {error}") from None


def _is_named(entry: str, name: str) -> bool:
    """Whether an entry of a list of modules names this one or one that holds it."""
    if entry.startswith("re:"):
        return _matches(entry[3:], name)
    if "*" in entry:
        return re.fullmatch(re.escape(entry).replace(r"\*", ".*"), name) is not None
    return f".{entry}." in f".{name}."


def read_config(directory: Path) -> QuantizationConfig:
    """What the files of a directory say; an empty config where none speaks of quantization."""
    for file, keys, default in (
        ("config.json", ("quantization_config", "compression_config"), ""),
        ("quantize_config.json", (), "gptq"),
        ("quant_config.json", (), "awq"),
        ("hf_quant_config.json", ("quantization",), "modelopt"),
    ):
        path = directory / file
        if not path.is_file():
            continue
        values = read_json(path, "the config")
        for key in keys:
            if values.get(key) is not None:
                values = values[key]
                break
        else:
            if keys:
                continue
        if not isinstance(values, dict):
            raise ValueError(f"{path}: its quantization must be a JSON object, got {values!r:.60}")
        method = values.get("quant_method") or values.get("method") or default
        if file == "quantize_config.json" and "zero_point" in values and "quant_method" not in values:
            method = "awq"
        if not isinstance(method, str) or method not in _FORMATS:
            raise ValueError(
                f"{path}: quant_method {method!r:.60} is not among those that can be loaded: {', '.join(_FORMATS)}"
            )
        return QuantizationConfig(file, method, values)
    return QuantizationConfig()
