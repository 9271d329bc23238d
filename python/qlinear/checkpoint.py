"""load_checkpoint: a directory of safetensors files into any nn.Module, quantized layers as what they are.

Everything is planned from the headers of the files before the model is touched, loaded beside the model, and put into
it at the end: an error leaves the model as it was. A model on the meta device takes no memory meanwhile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from .detect import Found, detect
from .detect_group import Layer
from .layers._module import QuantizedLinear
from .layers.awq import AWQLinear
from .layers.bnb import Linear4bit, Linear8bitLt
from .layers.eetq import EETQLinear
from .layers.fp8 import Fp8Linear
from .layers.gptq import QuantLinear
from .model import Bar, Report, is_conv1d, nbytes, to_linear, weights_of_attention
from .quantization_config import QuantizationConfig, read_config
from .shards import Shards
from .storages import ON_DEVICE, Origin, convert, set_origin

_CLASSES: dict[str, type[QuantizedLinear]] = {
    "gptq": QuantLinear,
    "awq": AWQLinear,
    "eetq": EETQLinear,
    "bitsandbytes": Linear8bitLt,
    "bitsandbytes-nf4": Linear4bit,
    "bitsandbytes-fp4": Linear4bit,
    "fp8": Fp8Linear,
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of the problems of one directory.
_SHOWN = 20


@dataclass
class _Slot:
    """A tensor of the model that is no quantized layer's: wherever it is held, and its name in the files."""

    tensor: Tensor
    places: list[tuple[dict, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    source: str = ""


@dataclass
class Plan:
    """What is to be loaded; problems: why it cannot be."""

    config: QuantizationConfig = field(default_factory=QuantizationConfig)
    layers: list[Layer] = field(default_factory=list)
    slots: list[_Slot] = field(default_factory=list)
    # Buffers that no file has, and that only move.
    moved: list[_Slot] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(K, N) of what a quantized layer may replace."""
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if is_conv1d(module) else None


def _obstacle(module: nn.Module) -> str:
    """Why a linear-like module must stay; an empty string where nothing speaks against replacing it."""
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose users may read its weight"
    # Parametrizations are a child.
    if module._modules and nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if any(map(vars(module).get, _HOOKS)):
        return "it has hooks, which its replacement would lose"
    return ""


def _plan_layer(plan: Plan, layer: Layer, module: nn.Module | None, shards: Shards, reserved: dict[int, str]) -> None:
    problem = _problem(layer, module, shards, reserved)
    if problem:
        plan.problems.append(problem)
    else:
        plan.layers.append(layer)


def _problem(layer: Layer, module: nn.Module | None, shards: Shards, reserved: dict[int, str]) -> str:
    """Why the layer cannot be put in the module's place; an empty string where it can."""
    what = f"{layer.name}: {layer.format}"
    if module is None or not layer.name:
        return f"{what}: the model has no such module" if layer.name else f"{what}: it is the model itself"
    size = _size(module)
    if size is None:
        return f"{what}: in the model it is a {type(module).__name__}, which is no linear layer"
    if size != (layer.in_features, layer.out_features):
        return (
            f"{what}: has {layer.in_features} inputs and {layer.out_features} outputs, "
            f"the model's {size[0]} and {size[1]}"
        )
    if obstacle := _obstacle(module) or reserved.get(id(module), ""):
        return f"{what}: cannot be replaced: {obstacle}"
    bias = layer.tensors.get("bias")
    if bias is None:
        return "" if module.bias is None else f"missing: {layer.name}.bias"
    # Some writers give each layer a bias, zero where there was none.
    if module.bias is None and shards.tensor(bias).any():
        return f"unexpected: {bias} is not zero, the model's layer has no bias"
    return ""


def _slots(modules: dict[str, nn.Module], replaced: set[int]) -> tuple[list[_Slot], list[_Slot]]:
    """(the tensors that the files must have, the buffers that no file has), each once however often it is held."""
    kept: dict[int, _Slot] = {}
    moved: dict[int, _Slot] = {}
    for prefix, module in modules.items():
        if id(module) in replaced:
            continue
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                to = moved if store is module._buffers and key in module._non_persistent_buffers_set else kept
                slot = to.setdefault(id(tensor), _Slot(tensor))
                slot.names.append(f"{prefix}.{key}" if prefix else key)
                if not any(held is store and name == key for held, name in slot.places):
                    slot.places.append((store, key))
    return list(kept.values()), list(moved.values())


def _plan_slot(plan: Plan, slot: _Slot, shards: Shards) -> None:
    there = [name for name in dict.fromkeys(slot.names) if name in shards]
    if not there:
        plan.problems.append(f"missing: {slot.names[0]}")
        return
    slot.source = there[0]
    entry, tensor = shards[slot.source], slot.tensor
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if entry.dtype != tensor.dtype and not (entry.dtype in floats and tensor.dtype in floats):
        plan.problems.append(f"{entry.path.name}: {slot.source} is {entry.dtype}, the model's is {tensor.dtype}")
    elif entry.shape != tuple(tensor.shape):
        plan.problems.append(
            f"{entry.path.name}: {slot.source} has the shape {list(entry.shape)}, the model's has {list(tensor.shape)}"
        )
    elif any(shards[name].shape != entry.shape or not _is_same(shards, name, slot.source) for name in there[1:]):
        plan.problems.append(f"{' and '.join(there)} are one tensor in the model, but differ in the files")
    else:
        plan.slots.append(slot)


def _is_same(shards: Shards, name: str, other: str) -> bool:
    left, right = shards.tensor(name), shards.tensor(other)
    return left.dtype == right.dtype and torch.equal(left, right)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by each of its names."""
    return dict(model.named_modules(remove_duplicate=False))


def plan_layers(
    modules: dict[str, nn.Module], shards: Shards, config: QuantizationConfig
) -> tuple[Plan, Found, dict[int, str]]:
    """(the plan of a model's quantized layers, all that was found, the names by id of what they replace or refuse)."""
    plan = Plan(config)
    sizes = {name: size for name, module in modules.items() if (size := _size(module)) is not None}
    found = detect(shards, plan.config, sizes)
    plan.problems += [f"{name}: {reason}" for name, reason in found.refused.items()]
    reserved = weights_of_attention(modules.values())
    replaced: dict[int, str] = {}
    for layer in found.layers.values():
        module = modules.get(layer.name)
        if module is not None and id(module) in replaced:
            plan.problems.append(f"{layer.name} and {replaced[id(module)]} are one module in the model")
            continue
        if module is not None:
            replaced[id(module)] = layer.name
        _plan_layer(plan, layer, module, shards, reserved)
    for name, module in modules.items():
        if isinstance(module, QuantizedLinear) and id(module) not in replaced:
            plan.problems.append(f"{name}: is quantized in the model, but not in the files")
            replaced[id(module)] = name
    replaced |= {id(modules[name]): name for name in found.refused if name in modules}
    return plan, found, replaced


def _plan(model: nn.Module, modules: dict[str, nn.Module], shards: Shards) -> Plan:
    plan, found, replaced = plan_layers(modules, shards, read_config(shards.directory))
    slots, moved = _slots(modules, set(replaced))
    for slot in slots:
        _plan_slot(plan, slot, shards)
    known = {name for slot in (*slots, *moved) for name in slot.names}
    # Of tensors that earlier versions of its class had, a transformers model says so.
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [name for name in found.plain if name not in known]
    plan.problems += [
        f"unexpected: {name}" for name in unexpected if not any(re.search(pattern, name) for pattern in patterns)
    ]
    for slot in moved:
        if slot.tensor.is_meta:
            plan.problems.append(f"{slot.names[0]}: is a buffer on the meta device that no file has: compute it first")
        else:
            plan.moved.append(slot)
    return plan


def _device(modules: Iterable[nn.Module]) -> torch.device:
    """That of the first parameter, else buffer, that has memory."""
    modules = list(modules)
    stores = chain((module._parameters for module in modules), (module._buffers for module in modules))
    tensors = (tensor for store in stores for tensor in store.values() if tensor is not None and not tensor.is_meta)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _holders(modules: dict[str, nn.Module]) -> dict[int, list[tuple[dict, str]]]:
    """By a module's id: the _modules that hold it, and its name in each."""
    holders: dict[int, list[tuple[dict, str]]] = {}
    for parent in {id(module): module for module in modules.values()}.values():
        for name, child in parent._modules.items():
            holders.setdefault(id(child), []).append((parent._modules, name))
    return holders


def make_layer(
    shards: Shards, layer: Layer, config: QuantizationConfig, device: torch.device, dtype: torch.dtype | None
) -> QuantizedLinear:
    """The layer on its device; on the way there it is checked by the C types, on mapped tensors where it can be."""
    tensors = {key: shards.tensor(name) for key, name in layer.tensors.items()}
    kept: dict[str, Tensor] = {}
    try:
        if layer.conversion:
            mapped = tensors
            if layer.conversion in ON_DEVICE:
                tensors = {key: tensor.to(device) for key, tensor in mapped.items()}
            tensors, kept = convert(layer.conversion, tensors, layer.options)
            kept = {key: mapped.get(key, tensor) for key, tensor in kept.items()}
        made = _CLASSES[layer.format].from_tensors(tensors, **layer.options)
    except (ValueError, TypeError, NotImplementedError) as error:
        path = shards[next(iter(layer.tensors.values()))].path
        raise ValueError(f"{path}: {layer.name}: {error}") from error
    set_origin(made, Origin(config, layer.conversion, kept))
    # Mapped tensors are on the CPU, where a move costs more than all that came before it.
    return made if device.type == "cpu" and dtype is None else made.to(device=device, dtype=dtype)


def _place(changes: list[tuple[dict, str, object]]) -> None:
    """Sets key in each store; on an error or an interrupt every store is as before."""
    before = [(store, key, store[key]) for store, key, _ in changes]
    try:
        for store, key, value in changes:
            store[key] = value
    except BaseException:
        for store, key, value in before:
            store[key] = value
        raise


def raise_problems(plan: Plan, shards: Shards) -> None:
    """ValueError that names what is wrong, where something is."""
    if plan.problems:
        shown = [f"  {problem}" for problem in plan.problems[:_SHOWN]]
        more = [f"  and {len(plan.problems) - _SHOWN} more"] if len(plan.problems) > _SHOWN else []
        raise ValueError("\n".join([f"{shards.directory} cannot be loaded into this model:", *shown, *more]))


def load_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip: Iterable[str] = (),
    progress: bool | None = None,
) -> Report:
    """Loads a directory of safetensors files into model: quantized layers replace the model's linear ones (nn.Linear,
    transformers' Conv1D), everything else is loaded as it is in the files.

    Which layers are quantized and how is told by their tensors; config.json, quantize_config.json or quant_config.json
    decides what tensors leave open. device: None is the model's own, the CPU for a model on the meta device. dtype: of
    biases and of whatever is not quantized, None is the files'. skip: names of modules, or parts of dotted names, that
    are to be nn.Linear with the dequantized weight. progress: as for replace_linear.

    On the CPU tensors are mapped: they take memory as they are used, and the files must not be written in place.
    ValueError names every tensor that is missing, unexpected or wrong; after any error the model is as it was.
    """
    return load_shards(model, Shards(directory), device=device, dtype=dtype, skip=skip, progress=progress)


def load_shards(
    model: nn.Module,
    shards: Shards,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    skip: Iterable[str],
    progress: bool | None,
) -> Report:
    """load_checkpoint of files that are open, under the model's names for their tensors."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype!r}")
    if isinstance(skip, str):
        raise TypeError("skip must be a collection of names, not a string")
    skip = tuple(skip)
    modules = named_modules(model)
    plan = _plan(model, modules, shards)
    raise_problems(plan, shards)
    device = _device(modules.values()) if device is None else torch.device(device)
    holders = _holders(modules)
    report = Report()
    changes: list[tuple[dict, str, object]] = []
    bar = Bar(len(plan.layers) + len(plan.slots), "qlinear: load", progress)
    try:
        with torch.no_grad(), torch.inference_mode(False):
            for layer in plan.layers:
                old, new = modules[layer.name], make_layer(shards, layer, plan.config, device, dtype)
                kept = next((key for key in skip if f".{key}." in f".{layer.name}."), None)
                if kept is None:
                    report.replaced.append(layer.name)
                    report.bytes_before += nbytes(old)
                    report.bytes_after += nbytes(new)
                else:
                    report.skipped.append((layer.name, f"in skip: {kept}"))
                    new = to_linear(new, dtype)
                if new.training != old.training:
                    new.train(old.training)
                changes += [(holder, name, new) for holder, name in holders[id(old)]]
                bar.step()
            for slot in plan.slots:
                changes += _changes(slot, _converted(shards.tensor(slot.source), device, dtype))
                bar.step()
            for slot in plan.moved:
                changes += _changes(slot, slot.tensor.to(device))
    finally:
        bar.close()
    _place(changes)
    return report


def _converted(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _changes(slot: _Slot, tensor: Tensor) -> list[tuple[dict, str, object]]:
    """One new Parameter or buffer for all the places that shared the old one."""
    if isinstance(slot.tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad and tensor.is_floating_point())
    return [(store, key, tensor) for store, key in slot.places]
