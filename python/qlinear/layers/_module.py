"""What the six layers share: the way of a call, casts that spare the packed weight, loading, pickling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ._packing import PackingModule, is_real, lock
from ._shortcut import plain_forwards, shortcut


def frozen(tensor: Tensor | None) -> Tensor | None:
    """The tensor without its history: a Parameter becomes the plain tensor that it holds."""
    return None if tensor is None else tensor.detach()


def take(tensors: Mapping[str, Tensor], bias: Tensor | None, *names: str) -> tuple:
    """The named ones of a checkpoint's tensors and the bias: the one given, else theirs, if any. ValueError where one
    of the names is missing, TypeError where what it names is no tensor."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"tensors must have {', '.join(names)}, got {', '.join(map(str, tensors)) or 'none'}")
    bias = tensors.get("bias") if bias is None else bias
    ops.check_tensors(**{name: tensors[name] for name in names}, **({} if bias is None else {"bias": bias}))
    return *(tensors[name] for name in names), bias


def check_bias(bias: Any, out_features: int) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        got = str(bias.dtype) if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a floating-point tensor or None, got {got}")
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have the shape ({out_features},), got {tuple(bias.shape)}")


def check_weight(weight: Any) -> None:
    """A float weight [N, K], as the constructors that quantize take it."""
    ops.check_tensors(weight=weight)
    if weight.dtype not in ops.DTYPE_NAMES:
        raise TypeError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-D [out_features, in_features], got {tuple(weight.shape)}")


def _is_float8(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.itemsize == 1


class QuantizedLinear(PackingModule):
    """A linear layer on a checkpoint's own tensors.

    The tensors are buffers (the weight of the bitsandbytes layers is a Parameter without gradient) under the names that
    they have in the checkpoint, or packed on a GPU. The C layer beside them holds references, is made at the first
    call, made anew when a tensor was replaced, and is never copied or pickled.
    """

    # The tensors whose dtype and bytes the checkpoint fixes: all but the bias. The first of them always exists.
    fixed: ClassVar[tuple[str, ...]]
    # Of those: the ones that a checkpoint may have or lack, and the ones whose shape the file decides.
    optional: ClassVar[frozenset[str]] = frozenset()
    flexible: ClassVar[frozenset[str]] = frozenset()

    weight_dtype: torch.dtype | None

    def __init__(self) -> None:
        super().__init__()
        # What the weight was before it was quantized here, for dequantize(); a checkpoint does not tell.
        self.__dict__["weight_dtype"] = None

    # The call

    def engine(self) -> Any:
        """The C layer of the tensors that the module has now."""
        made = self._made
        tensors = (*self._parameters.values(), *self._buffers.values())
        # Buffers may be replaced past __setattr__: functional_call and loading do.
        if made is None or not all(map(is_, tensors, made[1])):
            with lock:
                self._settle_own()
                tensors = (*self._parameters.values(), *self._buffers.values())
                # One tuple, so that a thread never sees the layer of one weight beside the tensors of another.
                made = self.__dict__["_made"] = (ops.engine(*self._operands()), tensors)
        return made[0]

    def _check(self) -> None:
        """Makes the C layer now, so that wrong tensors are refused at construction; those without data wait."""
        if is_real(*map(self._raw, self.fixed), self._buffers["bias"]):
            self._settle()
            self.engine()

    __call__ = shortcut()

    def forward(self, x: Tensor) -> Tensor:
        """x float32, float16 or bfloat16 [..., K], of any strides -> [..., N] in its dtype, or under autocast in
        autocast's. TypeError or ValueError where x is something else."""
        if ops.is_plain(x):
            return self.engine()(x)
        if torch.compiler.is_compiling():
            operator, arguments = self._operands()
        else:
            with lock:
                self._settle_own()
                operator, arguments = self._operands()
                # A mode or a transform may replace the tensors that are made meanwhile.
                if not ops.dispatch_modes() and ops.functorch_level() is None and not ops.is_tracing():
                    self._keep_engine()
        return ops.linear(operator, x, arguments)

    def _keep_engine(self) -> None:
        """Makes the C layer where it can be, for the operators, which keep none: making one may read from a GPU, which
        costs time and cannot be captured."""
        _, arguments = self._operands()
        if is_real(*(argument for argument in arguments if isinstance(argument, Tensor))):
            with contextlib.suppress(TypeError, ValueError, NotImplementedError):
                self.engine()

    # What is known of it

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K]. dtype: float32, float16 or bfloat16; None is the dtype that the weight had before."""
        return self.engine().dequantize(ops.dtype_name(dtype or self.natural_dtype()))

    def natural_dtype(self) -> torch.dtype:
        """The dtype of a float weight in this layer's place."""
        bias = self._buffers["bias"]
        candidates = (self.weight_dtype, None if bias is None else bias.dtype, self._scale_dtype())
        return next((dtype for dtype in candidates if dtype in ops.DTYPE_NAMES), torch.float32)

    def _scale_dtype(self) -> torch.dtype | None:
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, the bias among them."""
        away = () if self._packing is None else map(self._raw, filter(self._is_away, self._packing.forms))
        placeholders = set(map(id, away))
        tensors = (*self._parameters.values(), *self._buffers.values())
        return sum(t.numel() * t.element_size() for t in tensors if t is not None and id(t) not in placeholders)

    @property
    def device(self) -> torch.device:
        return (self._raw(self.fixed[0]) if self._packing is None else self._buffers["packed"]).device

    def extra_repr(self) -> str:
        bias = self._buffers["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"

    # Casts and moves

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        if self._packing is not None:
            self._packed_move(fn(self._buffers["packed"].new_empty(0)).device)
        away = () if self._packing is None else (*self._packing.forms, "packed")
        kept = {id(self._raw(name)) for name in away}
        fixed = {id(tensor) for name in self.fixed if (tensor := self._raw(name)) is not None}

        def spare(tensor: Tensor) -> Tensor:
            if id(tensor) in kept:
                return tensor
            if id(tensor) not in fixed:
                return fn(tensor)
            # An empty tensor tells what fn does to the dtype without casting the whole weight to throw it away.
            moved = fn(tensor.new_empty(0))
            return fn(tensor) if moved.dtype == tensor.dtype else tensor.to(moved.device)

        try:
            return super()._apply(spare, recurse)
        finally:
            self._forget()
            self._try_to_settle()
            self._keep_engine()

    def __getstate__(self) -> dict:
        state = self._unpacked_state()
        # pickle cannot write a float8 tensor in every torch: its bytes go instead.
        eight_bit = {name: tensor for name, tensor in state["_buffers"].items() if _is_float8(tensor)}
        if eight_bit:
            state["_buffers"] = state["_buffers"] | {
                name: (tensor.view(torch.uint8), tensor.dtype) for name, tensor in eight_bit.items()
            }
        return state

    def __setstate__(self, state: dict) -> None:
        buffers = state["_buffers"]
        for name, value in buffers.items():
            if isinstance(value, tuple):
                buffers[name] = value[0].view(value[1])
        self._start()
        super().__setstate__(state)
        self._try_to_settle()

    def _replicate_for_data_parallel(self):
        """What DataParallel sets in place of parameters, which replicas have none of, is a buffer of the replica."""
        replica = super()._replicate_for_data_parallel()
        replica._buffers.update(dict.fromkeys(self._parameters))
        return replica

    # Loading

    def _adopt(self, state_dict: dict, prefix: str, assign: bool) -> None:
        """Makes room for the file's tensors where it has others than the module: nn.Module would cast them."""
        # Files may be loaded one by one, and a layer begin in one and end in the next: what it may lack is gone where
        # the rest comes without it, unless it came before, by itself.
        came = {name for name in self.fixed if f"{prefix}{name}" in state_dict}
        needed, early = {name for name in self.fixed if name not in self.optional}, self._early
        self.__dict__["_early"] = frozenset() if needed <= early | came else early | came
        for name in (*self.fixed, "bias"):
            here = getattr(self, name)
            there = state_dict.get(f"{prefix}{name}")
            if there is None:
                if name in self.optional and needed <= came and name not in early:
                    self._place(name, None)
                continue
            if not isinstance(there, Tensor):
                continue
            if here is None:
                fits = name not in self.optional
            else:
                fits = here.dtype == there.dtype and (here.shape == there.shape or name not in self.flexible)
            if not fits:
                device = "meta" if assign else self.device
                shape = there.shape if here is None or name in self.flexible else here.shape
                self._place(name, torch.empty(shape, dtype=there.dtype, device=device))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._unpack()
        self._adopt(state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers", False)))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget()
        try:
            self._check()
        except (TypeError, ValueError, NotImplementedError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")


plain_forwards.append(QuantizedLinear.forward)
