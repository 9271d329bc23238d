"""bitsandbytes: LLM.int8() and the 4-bit blockwise layers, with bitsandbytes' checkpoint keys."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import functional, ops
from ..functional import QuantState
from ._module import QuantizedLinear, check_bias, check_weight, frozen, is_real, take
from ._shortcut import plain_forwards

_logger = logging.getLogger("qlinear")


@functools.cache
def warn_deprecate_bnb() -> None:
    """Says once in a process that EETQ serves 8-bit weights better."""
    _logger.warning(
        "Bitsandbytes 8bit is deprecated, using `eetq` is a drop-in replacement, and has much better performance"
    )


class Int8State:
    """bitsandbytes' MatmulLtState as a view of a Linear8bitLt: what is written here is the layer's."""

    __slots__ = ("_layer",)

    # The layouts of older GPUs, which nothing here has.
    CxB = None
    formatB = "row"  # noqa: N815
    memory_efficient_backward = False

    def __init__(self, layer: Linear8bitLt) -> None:
        self._layer = layer

    @property
    def CB(self) -> Tensor | None:  # noqa: N802
        """The codes int8 [N, K]; None while the weight is a float."""
        return None if self._layer.has_fp16_weights else self._layer.weight.data

    @property
    def SCB(self) -> Tensor | None:  # noqa: N802
        """The rows' absmax fp32 [N]; None while the weight is a float."""
        return self._layer.SCB

    @property
    def has_fp16_weights(self) -> bool:
        return self._layer.has_fp16_weights

    @property
    def threshold(self) -> float:
        return self._layer.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._layer.threshold = _check_threshold(value)

    @property
    def use_pool(self) -> bool:
        return self._layer.threshold > 0.0

    @property
    def is_training(self) -> bool:
        return self._layer.training

    def reset_grads(self) -> None:
        """Nothing is kept from one call to the next."""


def _check_threshold(value: float) -> float:
    value = float(value)
    if not value >= 0.0:
        raise ValueError(f"threshold must not be negative, got {value}")
    return value


def _absent_last(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """torch.export loses count of a root module's buffers where absent ones stand before others."""
    return dict(sorted(buffers.items(), key=lambda item: item[1] is None))


class _Int8Training(torch.autograd.Function):
    """The product with a float weight, quantized for this call; the gradients see the codes, straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, threshold):
        CB, SCB = ops.quantize_int8_weight(weight)
        return ops.product("int8", x, (CB, SCB, bias, threshold)), CB, SCB

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, CB, SCB = output
        ctx.mark_non_differentiable(CB, SCB)
        ctx.save_for_backward(inputs[0], CB, SCB)

    @staticmethod
    def backward(ctx, grad_output, *_):
        x, CB, SCB = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.gradient("int8", grad_output, (CB, SCB, None, 0.0))
        if ctx.needs_input_grad[1]:
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_weight, None, None


class Linear8bitLt(QuantizedLinear):
    """LLM.int8(): weight int8 [N, K] with SCB fp32 [N], activations quantized by row, columns with an entry of at least
    `threshold` kept as they are (0.0: none).

    With has_fp16_weights the weight stays a float Parameter that learns, quantized anew at each call.
    """

    operator = "int8"
    fixed = ("weight", "SCB", "weight_format")
    # Files from before bitsandbytes wrote it have no weight_format; it is 0, row-major, in all the others.
    optional = frozenset({"weight_format"})

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        has_fp16_weights: bool = True,
        memory_efficient_backward: bool = False,
        threshold: float = 0.0,
        index: Any = None,
    ) -> None:
        if memory_efficient_backward:
            raise ValueError("memory_efficient_backward is no longer required and the argument is deprecated")
        check_weight(weight)
        check_bias(bias, weight.shape[0])
        if has_fp16_weights:
            self._fill(Parameter(weight.detach()), None, bias, threshold, index)
        else:
            self._fill(*ops.quantize_int8_weight(weight.detach()), bias, threshold, index)
        self.weight_dtype = weight.dtype

    def _fill(self, weight: Tensor, SCB: Tensor | None, bias: Tensor | None, threshold: float, index: Any) -> None:
        QuantizedLinear.__init__(self)
        self._note(index=index, threshold=_check_threshold(threshold), has_fp16_weights=SCB is None)
        self._parameters["weight"] = weight if SCB is None else Parameter(frozen(weight), requires_grad=False)
        marker = None if SCB is None else torch.zeros((), dtype=torch.uint8, device=weight.device)
        buffers = {"SCB": frozen(SCB), "weight_format": marker, "bias": frozen(bias)}
        self._hold(**_absent_last(buffers))
        self.init_8bit_state()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None, *, threshold: float = 6.0, index: Any = None
    ) -> Linear8bitLt:
        """From a checkpoint's `weight` (int8), `SCB` and, where there are, `weight_format` and `bias`."""
        _check_format(tensors.get("weight_format"), "weight_format")
        self = cls.__new__(cls)
        self._fill(*take(tensors, bias, "weight", "SCB"), threshold, index)
        return self

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        device="meta",
        dtype=torch.float16,
    ) -> Linear8bitLt:
        """A layer to load a checkpoint into; zero where the device has memory. dtype: of the bias."""
        tensors = {
            "weight": torch.zeros(out_features, in_features, dtype=torch.int8, device=device),
            "SCB": torch.zeros(out_features, dtype=torch.float32, device=device),
        }
        made = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        return cls.from_tensors(tensors, made, threshold=threshold)

    def init_8bit_state(self) -> None:
        """Makes the C layer; `state` is a view of the module's own tensors and needs nothing moved."""
        if not self.has_fp16_weights:
            self._check()

    def _arguments(self) -> tuple:
        return (self._raw("weight"), self._buffers["SCB"], self._buffers["bias"], self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_fp16_weights:
            return super().forward(x)
        ops.check_tensors(x=x)
        out, _, _ = _Int8Training.apply(ops.autocast(x), self.weight, self.bias, self.threshold)
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        if self.has_fp16_weights:
            if dtype is not None:
                ops.dtype_name(dtype)
            return self.weight.detach().to(dtype or self.weight.dtype)
        return super().dequantize(dtype)

    def _apply(self, fn, recurse: bool = True):
        # A float weight is cast like any other Parameter.
        if self.has_fp16_weights:
            return torch.nn.Module._apply(self, fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        marker = f"{prefix}weight_format"
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and (weight.dtype == torch.int8) == self.has_fp16_weights:
            held, kind = ("a float", "int8") if self.has_fp16_weights else ("an int8", str(weight.dtype))
            error_msgs.append(f"{prefix}weight: a layer with {held} weight cannot load {kind}")
            return
        _check_format(state_dict.get(marker), marker)
        if isinstance(weight, Tensor) and not self.has_fp16_weights and not isinstance(state_dict.get(marker), Tensor):
            state_dict[marker] = torch.zeros((), dtype=torch.uint8, device=weight.device)
        rest = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # A float weight is loaded like any other Parameter: into its own dtype, and it goes on learning.
        if self.has_fp16_weights:
            torch.nn.Module._load_from_state_dict(self, *rest)
        else:
            super()._load_from_state_dict(*rest)

    @property
    def state(self) -> Int8State:
        return Int8State(self)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}, has_fp16_weights={self.has_fp16_weights}"


def _check_format(value: Any, name: str) -> None:
    """ValueError where bitsandbytes' weight_format is one of the tiled layouts that it wrote for older GPUs."""
    if value is None or (isinstance(value, Tensor) and not is_real(value)):
        return
    if value.numel() != 1 or int(value) != 0 if isinstance(value, Tensor) else value not in (0, "row"):
        raise ValueError(f"{name} must be 0 (row-major), got {value}")


_PREFIX = "weight.quant_state.bitsandbytes__"
# The state dict's names of the tensors that stand beside the packed weight, and the buffers that hold them.
_STATE_KEYS = {
    "weight.absmax": "absmax",
    "weight.quant_map": "quant_map",
    "weight.nested_absmax": "nested_absmax",
    "weight.nested_quant_map": "nested_quant_map",
}


class Linear4bit(QuantizedLinear):
    """weight uint8 [(N * K + 1) // 2, 1]: NF4 or FP4 in blocks along the flat [N, K], each with its absmax.

    The numbers of the format (block size, shape, ...) are in the state dict too, as bitsandbytes' JSON; a layer that
    loads one takes them from there, whatever it was made with. compute_dtype: x is cast to it, the result back; None
    computes in x's dtype. quant_storage: the dtype under which the packed bytes are stored.
    """

    operator = "fourbit"
    fixed = ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "packed_state")
    packs = fixed[:-1]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        quant_type: str,
        *,
        blocksize: int = 64,
        compress_statistics: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        search_scales: bool = False,
    ) -> None:
        check_weight(weight)
        check_bias(bias, weight.shape[0])
        data, state = functional.quantize_4bit(
            weight,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            search_scales=search_scales,
        )
        tensors = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        self._fill(tensors | {"weight": data}, bias, compute_dtype)

    def _fill(self, tensors: Mapping[str, Tensor], bias: Tensor | None, compute_dtype: torch.dtype | None) -> None:
        if compute_dtype is not None:
            ops.dtype_name(compute_dtype, "compute_dtype")
        keys = [key for key in tensors if key.startswith(_PREFIX)]
        if len(keys) != 1:
            raise ValueError(f"there should be exactly one {_PREFIX}* entry, got {keys or 'none'}")
        QuantizedLinear.__init__(self)
        self._note(compute_dtype=compute_dtype)
        self._parameters["weight"] = Parameter(frozen(tensors["weight"]), requires_grad=False)
        buffers = {name: tensors.get(key) for key, name in _STATE_KEYS.items()}
        buffers |= {"packed_state": tensors[keys[0]], "bias": bias}
        self._hold(**{name: frozen(buffer) for name, buffer in _absent_last(buffers).items()})
        self._non_persistent_buffers_set.update(buffers.keys() - {"bias"})
        numbers = _numbers(functional.state_bytes(tensors[keys[0]]))
        _check_nested(numbers, tensors)
        self._note(**numbers)
        check_bias(bias, self.out_features)
        self._check()

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """From a checkpoint's `weight`, `weight.absmax`, `weight.quant_map`, ... and, where there is one, `bias`."""
        self = cls.__new__(cls)
        self._fill(tensors, take(tensors, bias, "weight", "weight.absmax", "weight.quant_map")[-1], compute_dtype)
        return self

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        device="meta",
        dtype=torch.float16,
    ) -> Linear4bit:
        """A layer to load a checkpoint into; zero where the device has memory. dtype: of weight and bias."""
        blocksize = 64
        count = in_features * out_features
        state = QuantState(
            absmax=torch.zeros(-(-count // blocksize), device=device),
            shape=torch.Size((out_features, in_features)),
            code=functional.get_4bit_type(quant_type, device),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=dtype,
        )
        tensors = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors["weight"] = torch.zeros((count + 1) // 2, 1, dtype=torch.uint8, device=device)
        made = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        return cls.from_tensors(tensors, made, compute_dtype=compute_dtype)

    def _arguments(self) -> tuple:
        tensors = self._tensors()
        return (
            tensors["weight"],
            tensors["absmax"],
            tensors["quant_map"],
            tensors["bias"],
            tensors["nested_absmax"],
            tensors["nested_quant_map"],
            self.out_features,
            self.in_features,
            self.blocksize,
            self.nested_offset,
            self.nested_blocksize,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None or not isinstance(x, Tensor) or x.dtype == self.compute_dtype:
            return super().forward(x)
        return super().forward(x.to(self.compute_dtype)).to(x.dtype)

    @property
    def quant_state(self) -> QuantState:
        """bitsandbytes' view of the tensors beside the weight; they are the layer's own, not copies."""
        state2 = offset = None
        if self.nested_absmax is not None:
            offset = torch.tensor(self.nested_offset, device=self.weight.device)
            state2 = QuantState(
                absmax=self.nested_absmax,
                code=self.nested_quant_map,
                blocksize=self.nested_blocksize,
                dtype=torch.float32,
            )
        return QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.quant_map,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.weight_dtype,
            offset=offset,
            state2=state2,
        )

    @property
    def quant_storage(self) -> torch.dtype:
        return self._raw("weight").dtype

    # The names with a dot cannot be those of buffers, so the state dict is written and read here.

    def _state_key(self, name):
        return next((key for key, buffer in _STATE_KEYS.items() if buffer == name), name)

    def _write_state(self, destination, prefix, keep_vars):
        super()._write_state(destination, prefix, keep_vars)
        for key, name in (*_STATE_KEYS.items(), (f"{_PREFIX}{self.quant_type}", "packed_state")):
            tensor = self._buffers[name]
            if tensor is not None:
                destination[f"{prefix}{key}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._unpack()
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        found = {key[len(prefix) :]: own.pop(key) for key in list(own) if key[len(prefix) :].startswith("weight.")}
        markers = [key for key in found if key.startswith(_PREFIX)]
        required = ("weight.absmax", "weight.quant_map", *(() if markers else (f"{_PREFIX}{self.quant_type}",)))
        missing = [f"{prefix}{key}" for key in required if key not in found]
        unknown = [f"{prefix}{key}" for key in found if key not in _STATE_KEYS and key not in markers]
        unexpected_keys.extend(unknown if strict else ())
        if missing:
            missing_keys.extend(missing if strict else ())
        elif len(markers) > 1:
            error_msgs.append(f"{prefix}weight: there should be exactly one {_PREFIX}* entry, got {markers}")
            return
        else:
            error = self._load_state(found, found[markers[0]], own.get(f"{prefix}weight"), local_metadata)
            if error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _load_state(self, found: dict[str, Tensor], marker: Tensor, weight: Tensor | None, local_metadata: dict) -> str:
        """Takes the tensors beside the weight and makes room for it; the error, or an empty string."""
        shape = [self.out_features, self.in_features]
        count = -(-shape[0] * shape[1] // 2)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        is_other = isinstance(weight, Tensor) and (weight.shape, weight.dtype) != (self.weight.shape, self.weight.dtype)
        if is_other and weight.nbytes != count:
            return f"size mismatch: {shape} has {count} bytes, the checkpoint's {weight.dtype} {weight.nbytes}"
        try:
            ops.check_tensors(**found)
            numbers = _numbers(functional.state_bytes(marker))
            there = [numbers["out_features"], numbers["in_features"]]
            if there != shape:
                return f"size mismatch: the checkpoint's is {there}, the layer's {shape}"
            _check_nested(numbers, found)
            self._note(**numbers)
        except (ValueError, TypeError) as error:
            return str(error)
        device = self.weight.device
        for key, name in (*_STATE_KEYS.items(), (None, "packed_state")):
            tensor = marker if key is None else found.get(key)
            # A copy, as load_state_dict makes it, in a tensor of the file's own dtype and shape.
            taken = tensor if tensor is None or assign else tensor.detach().to(device, copy=True)
            self._buffers[name] = taken
        if is_other:
            place = torch.empty(weight.shape, dtype=weight.dtype, device="meta" if assign else device)
            self._parameters["weight"] = Parameter(place, requires_grad=False)
        return ""

    def _adopt(self, state_dict: dict, prefix: str, assign: bool) -> None:
        """The weight and what stands beside it are placed already; the bias keeps the file's dtype."""
        there = state_dict.get(f"{prefix}bias")
        if self.bias is not None and isinstance(there, Tensor) and there.dtype != self.bias.dtype:
            device = "meta" if assign else self.bias.device
            self.bias = torch.empty(self.bias.shape, dtype=there.dtype, device=device)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, quant_type={self.quant_type}, blocksize={self.blocksize}, "
            f"compress_statistics={self.compress_statistics}"
        )


_TOGETHER = "nested_absmax, nested_quant_map and nested_offset go together"


@functools.lru_cache(maxsize=256)
def _numbers(text: bytes) -> Mapping[str, Any]:
    """A layer's attributes of a quant state's JSON. ValueError where a number is missing or wrong."""
    parts = functional.parse_state(text)
    nested = "nested_offset" in parts
    if not nested and any(name.startswith("nested_") for name in parts):
        raise ValueError(_TOGETHER)
    keys = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ()))
    state = QuantState.from_dict(dict.fromkeys(keys, torch.empty(0, device="cpu")) | dict(parts))
    if state.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be nf4 or fp4, got {state.quant_type!r:.60}")
    if len(state.shape) != 2:
        raise ValueError(f"shape must be [out_features, in_features], got {parts['shape']!r:.60}")
    sizes = (state.blocksize, state.state2.blocksize if state.state2 else 256)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"blocksize and nested_blocksize must be positive integers, got {sizes}")
    return {
        "quant_type": state.quant_type,
        "blocksize": sizes[0],
        "nested_blocksize": sizes[1],
        "out_features": int(state.shape[0]),
        "in_features": int(state.shape[1]),
        "compress_statistics": state.nested,
        "nested_offset": float(state.offset) if state.nested else 0.0,
        "weight_dtype": state.dtype,
    }


def _check_nested(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError where the numbers and the tensors do not say the same of double quantization."""
    nested = numbers["compress_statistics"]
    if any(nested != (f"weight.{key}" in tensors) for key in ("nested_absmax", "nested_quant_map")):
        raise ValueError(_TOGETHER)


# Both leave the short way where it is not theirs: weights that learn make no C layer, compute_dtype is asked for.
plain_forwards += [Linear8bitLt.forward, Linear4bit.forward]
