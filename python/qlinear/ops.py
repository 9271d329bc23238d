"""The registered operators, one product and one gradient a format.

A layer calls the C type directly where nothing watches the call (`is_plain`). Everything else, autograd, autocast,
`torch.compile`, export, fake and meta tensors, goes through `linear`, which ends in `torch.ops.qlinear.<format>`. Both
operators of a format take the same arguments after the first: the checkpoint's tensors and the numbers of the format.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _qlinear, choices

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# From torch 2.10 on. Without it the C side reads a tensor once, by a capsule: it cannot see a replaced storage, so the
# address is part of who a tensor is, and torch exports neither tensors that want a gradient nor 8-bit floats.
_HAS_EXCHANGE_API = hasattr(Tensor, "__dlpack_c_exchange_api__")

# Bound once: is_plain runs before each product.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled
is_tracing = torch._C._is_tracing

# Both are private to torch and cheap; a torch without one of them has no such mode, or only slower tools notice.
dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
functorch_level = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", lambda: None)


def check_tensors(**arguments: Any) -> None:
    """TypeError where one of the arguments is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def dtype_name(dtype: torch.dtype, argument: str = "dtype") -> str:
    """What the C types call a dtype in which there are products."""
    if dtype not in DTYPE_NAMES:
        raise TypeError(f"{argument} must be float32, float16 or bfloat16, got {dtype}")
    return DTYPE_NAMES[dtype]


class Format(NamedTuple):
    """schema: of the arguments after x; make: the C layer of those; features: (K, N) of those."""

    schema: str
    make: Callable[..., Any]
    features: Callable[..., tuple[int, int]]

    @property
    def names(self) -> list[str]:
        return [said.split()[-1] for said in self.schema.split(", ")]

    def check_data(self, arguments: tuple) -> None:
        """ValueError where one of the tensors is on the meta device: a product of it would be whatever memory held."""
        for at, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.is_meta:
                raise ValueError(f"{self.names[at]} is on the meta device, it has no data: load it first")

    def linear_arguments(self, arguments: Sequence[Any]) -> list[Any]:
        """Those of the product with x as it is, and without the bias."""
        return [_LINEAR.get(name, argument) for name, argument in zip(self.names, arguments, strict=True)]


# With the least threshold that there is every column of LLM.int8() is an outlier, which is not quantized.
_LINEAR = {"bias": None, "threshold": 2.0**-149, "activation": "none", "input_scale": None, "input_scale_ub": None}


def _make_gptq(qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_format, in_features, out_features):
    return _qlinear.QuantLinear(
        qweight,
        qzeros,
        scales,
        g_idx,
        bias,
        bits=bits,
        group_size=group_size,
        zero_format=zero_format,
        in_features=in_features,
    )


def packed_bytes(weight: Tensor) -> Tensor:
    """The bytes of a packed weight that a checkpoint stores as another dtype (bitsandbytes' quant_storage)."""
    return weight if weight.dtype == torch.uint8 else weight.detach().contiguous().view(torch.uint8)


def _make_fourbit(
    weight, absmax, code, bias, nested_absmax, nested_code, n, k, blocksize, nested_offset, nested_blocksize
):
    return _qlinear.Linear4bit(
        packed_bytes(weight),
        absmax,
        code,
        bias,
        shape=(n, k),
        blocksize=blocksize,
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        nested_offset=nested_offset,
        nested_blocksize=nested_blocksize,
    )


def _make_packed(packed, bias, spec):
    if packed.is_cuda:
        choices.load(packed.device.index)
    return _qlinear.PackedLinear(packed, spec, bias)


def exportable(tensor: Tensor) -> Tensor:
    """The tensor as C can read it: without the exchange API a torch refuses to export 8-bit floats."""
    if _HAS_EXCHANGE_API or tensor.itemsize != 1 or not tensor.is_floating_point():
        return tensor
    # e4m3 is known by its bytes; the other 8-bit float, e8m0, is a scale, and fp32 holds it exactly.
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor.float()


def fp8_quantize(x: Tensor, scale: Tensor | None, *, mode: str, scale_ub: Tensor | None) -> tuple[Tensor, Tensor]:
    """_qlinear.fp8_quantize with codes in float8_e4m3fn under every torch."""
    x = x.detach()
    if _HAS_EXCHANGE_API:
        return _qlinear.fp8_quantize(x, scale, mode=mode, scale_ub=scale_ub)
    # As NumPy arrays, on the host: there a torch refuses to import 8-bit floats, too.
    given = (None if t is None else t.detach().float().cpu().numpy() for t in (x, scale, scale_ub))
    array, scale, scale_ub = given
    codes, scale = _qlinear.fp8_quantize(array, scale, mode=mode, scale_ub=scale_ub)
    tensors = torch.from_numpy(codes.view("uint8")).view(torch.float8_e4m3fn), torch.from_numpy(scale)
    return tuple(tensor.to(x.device) for tensor in tensors)


def from_e8m0(scale: Tensor) -> Tensor:
    """The bytes of e8m0, 2^(byte - 127) with NaN for 255, in fp32."""
    value = (scale.to(torch.int32) << 23).view(torch.float32)
    return value.masked_fill(scale == 0, 2.0**-127).masked_fill(scale == 255, torch.nan)


def _make_fp8(weight, weight_scale, bias, input_scale, input_scale_ub, activation, block_n, block_k, promoted=False):
    # On a GPU scales are read where they lie, and as fp32.
    if weight_scale.is_cuda and weight_scale.dtype != torch.float32:
        weight_scale = from_e8m0(weight_scale) if weight_scale.dtype == torch.uint8 else weight_scale.float()
    return _qlinear.Fp8Linear(
        exportable(weight),
        exportable(weight_scale),
        bias,
        activation=activation,
        input_scale=input_scale,
        input_scale_ub=input_scale_ub,
        block_size=(block_n, block_k),
        promoted=promoted,
    )


FORMATS = {
    "eetq": Format(
        "Tensor weight, Tensor weight_scales, Tensor? bias",
        lambda weight, weight_scales, bias: _qlinear.EETQLinear(weight, weight_scales, bias),
        lambda weight, *_: (weight.shape[0], weight.shape[1]),
    ),
    "gptq": Format(
        "Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, Tensor? bias, int bits, int group_size, "
        "str zero_format, int in_features, int out_features",
        _make_gptq,
        lambda *arguments: arguments[-2:],
    ),
    "awq": Format(
        "Tensor qweight, Tensor qzeros, Tensor scales, Tensor? bias, int group_size",
        lambda qweight, qzeros, scales, bias, group_size: _qlinear.AWQLinear(
            qweight, qzeros, scales, bias, group_size=group_size
        ),
        lambda qweight, qzeros, scales, *_: (qweight.shape[0], scales.shape[1]),
    ),
    "int8": Format(
        "Tensor CB, Tensor SCB, Tensor? bias, float threshold",
        lambda CB, SCB, bias, threshold: _qlinear.Linear8bitLt(CB, SCB, bias, threshold=threshold),
        lambda CB, *_: (CB.shape[1], CB.shape[0]),
    ),
    "fourbit": Format(
        "Tensor weight, Tensor absmax, Tensor code, Tensor? bias, Tensor? nested_absmax, Tensor? nested_code, int n, "
        "int k, int blocksize, float nested_offset, int nested_blocksize",
        _make_fourbit,
        lambda *arguments: (arguments[7], arguments[6]),
    ),
    "packed": Format(
        "Tensor packed, Tensor? bias, int[] spec",
        _make_packed,
        lambda packed, bias, spec: (spec[4], spec[3]),
    ),
    "fp8": Format(
        "Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale, Tensor? input_scale_ub, "
        "str activation, int block_n, int block_k, bool promoted",
        _make_fp8,
        lambda weight, *_: (weight.shape[1], weight.shape[0]),
    ),
}

# A C layer holds its tensors, so while it lives no other tensor can have their ids; the modules keep it alive.
_live: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()


def _identity(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return tuple(argument) if isinstance(argument, list) else argument
    return id(argument) if _HAS_EXCHANGE_API else (id(argument), argument.data_ptr())


def engine(name: str, arguments: tuple) -> Any:
    """The C layer of these arguments: one that lives already, or a new one. Raises what the C type raises."""
    key = (name, *map(_identity, arguments))
    found = _live.get(key)
    if found is None:
        FORMATS[name].check_data(arguments)
        found = _live[key] = FORMATS[name].make(*arguments)
    return found


def _define(name: str, made: Format) -> tuple[Any, Any]:
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return engine(name, arguments)(x.detach())

    # torch calls the fakes where any of the tensors is on the meta device, x or not.

    def forward_fake(x: Tensor, *arguments: Any) -> Tensor:
        if x.device.type != "meta":
            made.check_data(arguments)
        in_features, out_features = made.features(*arguments)
        torch._check(x.shape[-1] == in_features, lambda: f"x has {x.shape[-1]} features, the weight has {in_features}")
        return x.new_empty((*x.shape[:-1], out_features))

    def backward(grad_output: Tensor, *arguments: Any) -> Tensor:
        return engine(name, arguments).grad_input(grad_output.detach())

    def backward_cuda(grad_output: Tensor, *arguments: Any) -> Tensor:
        # On tensor cores torch's product of a matrix that lives as long as the call is far ahead of the base kernel.
        weight = engine(name, arguments).dequantize(dtype_name(grad_output.dtype, "grad_output"))
        return grad_output.detach() @ weight

    def backward_fake(grad_output: Tensor, *arguments: Any) -> Tensor:
        if grad_output.device.type != "meta":
            made.check_data(arguments)
        return grad_output.new_empty((*grad_output.shape[:-1], made.features(*arguments)[0]))

    tags = (torch.Tag.pt2_compliant_tag,)
    for op, first, cpu, cuda, fake in (
        (name, "x", forward, forward, forward_fake),
        (f"{name}_grad_input", "grad_output", backward, backward_cuda, backward_fake),
    ):
        _library.define(f"{op}(Tensor {first}, {made.schema}) -> Tensor", tags=tags)
        _library.impl(op, cpu, "CPU")
        _library.impl(op, cuda, "CUDA")
        torch.library.register_fake(f"qlinear::{op}", fake, lib=_library)
    return getattr(torch.ops.qlinear, name).default, getattr(torch.ops.qlinear, f"{name}_grad_input").default


_library = torch.library.Library("qlinear", "DEF")
_OPERATORS = {name: _define(name, made) for name, made in FORMATS.items()}


def _quantize_int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    CB, SCB, _ = _qlinear.int8_quantize(weight.detach().to(torch.float16))
    return CB, SCB


def _quantize_int8_weight_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return codes, weight.new_empty(weight.shape[:1], dtype=torch.float32)


_library.define("int8_quantize_weight(Tensor weight) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
for _device in ("CPU", "CUDA"):
    _library.impl("int8_quantize_weight", _quantize_int8_weight, _device)
torch.library.register_fake("qlinear::int8_quantize_weight", _quantize_int8_weight_fake, lib=_library)

# A float weight [N, K] -> (CB, SCB), rounded to fp16 first as bitsandbytes does.
quantize_int8_weight = torch.ops.qlinear.int8_quantize_weight.default


def product(name: str, x: Tensor, arguments: tuple) -> Tensor:
    """The registered operator alone, for those who bring a gradient of their own."""
    return _OPERATORS[name][0](x, *arguments)


def gradient(name: str, grad_output: Tensor, arguments: tuple) -> Tensor:
    """grad_output [..., N] times the weight: the gradient with respect to x [..., K], which has one of its own."""
    if torch.is_grad_enabled() and grad_output.requires_grad and not _is_compiling():
        return _Gradient.apply(grad_output, name, *arguments)
    return _OPERATORS[name][1](grad_output, *arguments)


def _save(ctx: Any, arguments: Sequence[Any]) -> None:
    """Keeps an operator's arguments for _saved, tensors among them."""
    ctx.save_for_backward(*(argument for argument in arguments if isinstance(argument, Tensor)))
    ctx.numbers = [None if isinstance(argument, Tensor) else (argument,) for argument in arguments]


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if number is None else number[0] for number in ctx.numbers]


class _Linear(torch.autograd.Function):
    """The product with its gradient with respect to x; the packed weight and the bias are frozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, name, *arguments):
        return product(name, x, arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.name, *arguments = inputs
        _save(ctx, arguments)

    @staticmethod
    def backward(ctx, grad_output):
        arguments = _saved(ctx)
        return gradient(ctx.name, grad_output, arguments), None, *(None for _ in arguments)


class _Gradient(torch.autograd.Function):
    """The gradient with its own with respect to grad_output: a product with the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_output, name, *arguments):
        return _OPERATORS[name][1](grad_output, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.name, *arguments = inputs
        _save(ctx, FORMATS[ctx.name].linear_arguments(arguments))

    @staticmethod
    def backward(ctx, grad):
        arguments = _saved(ctx)
        return _Linear.apply(grad, ctx.name, *arguments), None, *(None for _ in arguments)


def is_plain(x: Any) -> bool:
    """Whether x may go to the C type: strided, its values in its memory, and nobody who wants to see the call."""
    kind = type(x)
    if (kind is not Tensor and kind is not Parameter) or _is_compiling():
        return False
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else None
    return not (
        device is None
        or (x.requires_grad and (_is_grad_enabled() or not _HAS_EXCHANGE_API))
        or _is_autocast_enabled(device)
        or dispatch_modes()
        or functorch_level() is not None
        or forward_ad._current_level >= 0
        or is_tracing()
        or x.is_neg()
    )


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that F.linear would compute in here."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or not x.is_floating_point():
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


def linear(name: str, x: Tensor, arguments: tuple) -> Tensor:
    """x [..., K] times the weight that `arguments` hold, through the registered operator."""
    check_tensors(x=x)
    x = autocast(x)
    if (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0:
        return _Linear.apply(x, name, *arguments)
    return product(name, x, arguments)
