"""Whole models: replace_linear swaps the linear layers for quantized ones, dequantize undoes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .layers._module import QuantizedLinear
from .layers.awq import AWQLinear
from .layers.bnb import Linear4bit, Linear8bitLt
from .layers.eetq import EETQLinear
from .layers.fp8 import Fp8Linear
from .layers.gptq import QuantLinear
from .layers.linear import FastLinear

_PROGRESS_AFTER_SECONDS = 2.0


@dataclass
class Report:
    """What replace_linear, dequantize or parallelize did. Bytes are those of the layers replaced, bias included. sums:
    where a model was split over GPUs, how the parts of a row-parallel layer are summed."""

    replaced: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    sums: str = ""

    def __str__(self) -> str:
        mb = 1e-6
        lines = [
            f"{len(self.replaced)} layers replaced, {self.bytes_before * mb:.1f} -> {self.bytes_after * mb:.1f} MB; "
            f"{len(self.skipped)} skipped"
        ]
        lines += [f"  sums: {self.sums}"] if self.sums else []
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped])


def makers(
    *,
    bits: int = 4,
    group_size: int = 128,
    search_scales: bool = False,
    threshold: float = 6.0,
    blocksize: int = 64,
    compress_statistics: bool = True,
    quant_storage: torch.dtype = torch.uint8,
    input_scale_ub: float | None = None,
) -> dict[str, Callable[[Tensor, Tensor | None], QuantizedLinear]]:
    """Of each of FORMATS what makes its layer of a weight and a bias, with the options that are the format's."""
    affine = {"group_size": group_size, "search_scales": search_scales}
    blocks = {
        "blocksize": blocksize,
        "search_scales": search_scales,
        "compress_statistics": compress_statistics,
        "quant_storage": quant_storage,
    }
    return {
        "eetq": EETQLinear,
        "gptq": lambda w, b: QuantLinear.quantize(w, b, bits=bits, **affine),
        "awq": lambda w, b: AWQLinear.quantize(w, b, **affine),
        "bitsandbytes": lambda w, b: Linear8bitLt(w, b, has_fp16_weights=False, threshold=threshold),
        "bitsandbytes-nf4": lambda w, b: Linear4bit(w, b, "nf4", **blocks),
        "bitsandbytes-fp4": lambda w, b: Linear4bit(w, b, "fp4", **blocks),
        "fp8": lambda w, b: Fp8Linear.quantize(w, b, input_scale_ub=input_scale_ub),
    }


FORMATS = tuple(makers())


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer with its weight [K, N]; by its shape, so that nothing has to be imported."""
    if type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]


def _reason_to_skip(name: str, module: nn.Module, skip: tuple[str, ...], shared: set[int]) -> str:
    """Why a linear-like module stays as it is; an empty string where nothing speaks against it."""
    for key in skip:
        if f".{key}." in f".{name}.":
            return f"in skip: {key}"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose users may read its weight"
    if nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if any(
        hooks
        for key, hooks in vars(module).items()
        if key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ):
        return "it has hooks"
    if id(module.weight) in shared:
        return "its weight is tied to another module's"
    if module.weight.device.type == "meta":
        return "its weight is on the meta device"
    return ""


def owners(model: nn.Module) -> tuple[dict[int, list[str]], set[int]]:
    """(the names of every module by its id; the ids of the parameters that several modules hold)."""
    names: dict[int, list[str]] = {}
    holders: dict[int, set[int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return names, {key for key, modules in holders.items() if len(modules) > 1}


def weights_of_attention(modules: Iterable[nn.Module]) -> dict[int, str]:
    """The linear layers whose weight their parent, one of the modules, reads itself, past their forward."""
    found = {}
    for module in modules:
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            for child in module.children():
                if isinstance(child, nn.Linear):
                    found[id(child)] = f"{type(module).__name__} reads its weight itself"
    return found


def nbytes(module: nn.Module) -> int:
    if isinstance(module, QuantizedLinear):
        return module.nbytes
    if module._modules:
        tensors = (*module.parameters(), *module.buffers())
    else:
        # As linear layers are: no walk through a tree of one.
        tensors = (*module._parameters.values(), *module._buffers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def put(model: nn.Module, places: Iterable[str], new: nn.Module) -> None:
    """Makes `new` the module of each of these names."""
    for place in places:
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def swap(model: nn.Module, name: str, names: dict[int, list[str]], new: nn.Module, report: Report) -> None:
    """Puts `new` wherever the module called `name` is in the model."""
    old = model.get_submodule(name)
    report.bytes_before += nbytes(old)
    report.bytes_after += nbytes(new)
    put(model, names[id(old)], new)
    report.replaced.append(name)


class Bar:
    """A progress bar that shows itself when the work takes long; progress True or False decides at once."""

    def __init__(self, total: int, what: str, progress: bool | None) -> None:
        self._total, self._what, self._progress = total, what, progress
        self._start, self._done, self._bar = time.monotonic(), 0, None

    def step(self) -> None:
        self._done += 1
        late = time.monotonic() - self._start > _PROGRESS_AFTER_SECONDS
        if self._bar is None and (self._progress or (self._progress is None and late)):
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._total, desc=self._what, unit="layer")
            self._bar.update(self._done)
        elif self._bar is not None:
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def replace_linear(
    model: nn.Module,
    quantize: str,
    skip: Iterable[str] = ("lm_head",),
    *,
    filter: Callable[[str, nn.Module], bool] | None = None,
    bits: int = 4,
    group_size: int = 128,
    search_scales: bool = False,
    threshold: float = 6.0,
    blocksize: int = 64,
    compress_statistics: bool = True,
    quant_storage: torch.dtype = torch.uint8,
    input_scale_ub: float | None = None,
    progress: bool | None = None,
) -> Report:
    """Swaps model's nn.Linear layers (and transformers' Conv1D) in place for `quantize`, one of FORMATS.

    skip: names of modules, or parts of dotted names, that stay; filter(name, module) False keeps one too. bits
    (2, 3, 4 or 8) and group_size are gptq's and awq's, search_scales is theirs, nf4's and fp4's (the search takes ten
    times as long and helps most below 8 bits), threshold is LLM.int8()'s; blocksize, compress_statistics (double
    quantization) and quant_storage are those of nf4 and fp4, input_scale_ub fp8's bound of a token's absmax. progress:
    True or False shows a bar or none; None when it takes long.

    Each layer's float weight is freed before the next is quantized. A layer that the format cannot hold stays, and the
    report says why. Wrong options are refused before anything is changed. On any other error (memory, an interrupt) the
    layer at hand is as it was, those before it stay replaced, and the error is raised: every layer works at all times.
    """
    if quantize not in FORMATS:
        raise NotImplementedError(f"Quantization `{quantize}` is not implemented yet.")
    if isinstance(skip, str):
        raise TypeError("skip must be a collection of names, not a string")
    skip = tuple(skip)
    make = makers(
        bits=bits,
        group_size=group_size,
        search_scales=search_scales,
        threshold=threshold,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_storage=quant_storage,
        input_scale_ub=input_scale_ub,
    )[quantize]
    # Options that no weight goes with fail here, not as one reason to skip for each layer.
    make(torch.zeros(128, 128, device="cpu"), None)
    names, shared = owners(model)
    reserved = weights_of_attention(model.modules())
    report = Report()
    todo: list[str] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        reason = _reason_to_skip(name, module, skip, shared) or reserved.get(id(module), "")
        if not reason and filter is not None and not filter(name, module):
            reason = "filter"
        if not reason and not name:
            reason = "it is the model itself, which cannot be replaced in place"
        if reason:
            report.skipped.append((name, reason))
        elif id(module) not in seen:
            seen.add(id(module))
            todo.append(name)
    module = None
    bar = Bar(len(todo), f"qlinear: {quantize}", progress)
    try:
        for name in todo:
            _replace_one(model, name, names, make, report)
            bar.step()
    finally:
        bar.close()
    return report


@torch.no_grad()
def _replace_one(model: nn.Module, name: str, names: dict[int, list[str]], make: Callable, report: Report) -> None:
    old = model.get_submodule(name)
    weight = old.weight.t() if is_conv1d(old) else old.weight
    try:
        new = make(weight, None if old.bias is None else old.bias.detach().clone())
    except (ValueError, TypeError, NotImplementedError) as error:
        report.skipped.append((name, str(error)))
        return
    swap(model, name, names, new.train(old.training), report)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None, *, progress: bool | None = None) -> Report:
    """Turns every quantized layer of model into an nn.Linear with the dequantized weight, in place.

    dtype: of the weights and biases; None is what they had before, or the scales' where a checkpoint does not tell.
    """
    names, _ = owners(model)
    report = Report()
    todo = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and not name:
            report.skipped.append((name, "it is the model itself, which cannot be replaced in place"))
        elif isinstance(module, (QuantizedLinear, FastLinear)) and name:
            todo.append(name)
    bar = Bar(len(todo), "qlinear: dequantize", progress)
    module = None
    try:
        for name in todo:
            old = model.get_submodule(name)
            swap(model, name, names, to_linear(old, dtype), report)
            del old
            bar.step()
    finally:
        bar.close()
    return report


def to_linear(layer: QuantizedLinear | FastLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """An nn.Linear with the layer's dequantized weight; its parameters learn."""
    with torch.no_grad():
        if isinstance(layer, FastLinear):
            weight = layer.weight.detach().to(dtype or layer.weight.dtype)
        else:
            weight = layer.dequantize(dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype, copy=True))
    return linear.train(layer.training)
