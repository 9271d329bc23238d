"""What a checkpoint's JSON files say of its quantization: the numbers that its tensors cannot tell.

Files are often wrong about it, so that nothing here decides what a tensor is; see detect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shards import parse_json

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
    "compressed-tensors": {"fp8"},
}
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

    def allows(self, form: str) -> bool:
        """Whether the method's files may hold layers of this format."""
        if not self.method:
            return True
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
        dynamic = self.values.get("dynamic")
        for pattern in dynamic if isinstance(dynamic, dict) else ():
            if pattern.startswith("-:") and _matches(pattern[2:], name):
                return f"dynamic: {pattern}"
        return ""

    def fp8_activation(self, name: str) -> tuple[str, str]:
        """(how the file says that activations are quantized, "" where it does not; under which key)."""
        if self.method == "fbgemm_fp8":
            return "token", "quant_method fbgemm_fp8"
        if self.method == "fp8" and self.values.get("activation_scheme") == "static":
            return "static", "activation_scheme static"
        if self.method == "fp8" and self.values.get("activation_scheme") == "dynamic":
            return "dynamic", "activation_scheme dynamic"
        if self.method == "compressed-tensors":
            return self._activation_of_groups(name)
        return "", ""

    def _activation_of_groups(self, name: str) -> tuple[str, str]:
        groups = self.values.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            targets = group.get("targets") if isinstance(group, dict) else None
            if not isinstance(targets, list) or not any(
                isinstance(target, str) and (target == "Linear" or _is_named(target, name)) for target in targets
            ):
                continue
            inputs = group.get("input_activations")
            if not isinstance(inputs, dict):
                return "none", "input_activations null"
            if not inputs.get("dynamic"):
                return "static", "input_activations dynamic false"
            strategy = inputs.get("strategy")
            if strategy not in ("tensor", "token", "group"):
                raise ValueError(f"{self.source}: input_activations: strategy {strategy!r:.60} is not implemented")
            return strategy, f"input_activations {strategy}"
        return "", ""

    def block_size(self) -> tuple[int, int] | None:
        """Rows and columns of an FP8 weight's blocks."""
        said = self.values.get("weight_block_size")
        if said is None:
            return None
        if not isinstance(said, list) or len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
            raise ValueError(f"{self.source}: weight_block_size must be two positive integers, got {said!r:.60}")
        return said[0], said[1]

    def positive(self, key: str, default: float) -> float:
        """A number that must not be negative."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not value >= 0:
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
        values = parse_json(path, path.read_bytes(), "the config")
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
