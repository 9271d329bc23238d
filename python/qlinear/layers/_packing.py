"""Packing: a layer whose tensors come to a GPU keeps them in one tensor, laid out as the kernels read them, and gives
the checkpoint's back, bit for bit, to whoever asks."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _qlinear, ops

# Held while a layer changes from one form to the other, and by those who read what belongs together. A call takes it
# only where its C layer has to be made.
lock = threading.RLock()


@functools.cache
def _has_kernels() -> bool:
    return "ql_pack_codes" in _qlinear.cuda_info()["kernels"]


def wanted(device: torch.device) -> bool:
    """Whether layers on this device pack themselves."""
    return device.type == "cuda" and _has_kernels()


def is_real(*tensors: Tensor | None) -> bool:
    """Whether every tensor has data that C can read: no meta, fake or wrapped one among them."""
    return all(t is None or (type(t) in (Tensor, Parameter) and not t.is_meta) for t in tensors)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Packing(NamedTuple):
    """spec: of PackedLinear; forms: dtype and shape of the tensors that were packed, in the order of its unpack()."""

    spec: tuple[int, ...]
    forms: dict[str, tuple[torch.dtype, torch.Size]]


class PackingModule(torch.nn.Module):
    """A module that packs the tensors called `packs` where `wanted` says so.

    While it is packed, the buffer `packed` has the weight, and in its place stand meta tensors of the same dtypes and
    shapes in `_buffers`, in `_parameters` empty ones on the device, as DistributedDataParallel wants all on one kind.
    Asking for one of them by its attribute unpacks the layer, so that what is read or written in place is the layer's
    own; the next call packs it again, into the same memory, which a captured CUDA graph may read. A tensor that stands
    there with data (functional_call puts one there) counts in place of the packed one.
    """

    operator: ClassVar[str]
    # In the order of the C layer's unpack(); those that a layer lacks are None in all of its forms.
    packs: ClassVar[tuple[str, ...]] = ()
    # Attributes that have no part in the product's arguments, or none that is packed.
    _unpacked_attributes: ClassVar[frozenset[str]] = frozenset({"bias", "training", "weight_dtype", "compute_dtype"})

    def __init__(self) -> None:
        super().__init__()
        self._start()
        if self.packs:
            self._hold(packed=None)
            self._non_persistent_buffers_set.add("packed")

    def _start(self) -> None:
        # _unsettled: who the tensors are that are still to be packed. If the module holds others by then, as inside
        # functional_call, those are not its own to pack. _captured: who they are that a CUDA graph reads, which stay.
        # _spare: the memory that was packed into before. _ready: the C layer of tensors that were just unpacked, for
        # a capture that follows: making one reads from the GPU. _early: tensors that came in files which had not all.
        self.__dict__.update(_made=None, _packing=None, _unsettled=None, _captured=None, _spare=None, _ready=None)
        self.__dict__["_early"] = frozenset()

    def _forget(self) -> None:
        self.__dict__.update(_made=None, _ready=None)

    def _arguments(self) -> tuple:
        """The operator's arguments after x, as ops.FORMATS has them, from _tensors()."""
        raise NotImplementedError

    # What is held

    def _hold(self, **tensors: Tensor | None) -> None:
        """Makes the tensors buffers. nn.Module's register_buffer asks for each whether it is an attribute yet, which
        costs more than all the rest of a layer: a model has thousands."""
        self._buffers.update(tensors)

    def _note(self, **numbers: Any) -> None:
        """Sets attributes that are neither tensors nor modules, for which nn.Module looks in each that is set; of a
        layer that is being made, so that nothing is to be unpacked or forgotten."""
        self.__dict__.update(numbers)

    def _raw(self, name: str) -> Tensor | None:
        """A tensor or what stands for it."""
        return self._parameters[name] if name in self._parameters else self._buffers.get(name)

    def _is_away(self, name: str) -> bool:
        """Whether one of the packed tensors is in `packed` alone."""
        tensor = self._raw(name)
        return tensor is not None and (tensor.is_meta or tensor.numel() == 0)

    def _place_stand_ins(self) -> None:
        device = self._buffers["packed"].device
        for name, (dtype, shape) in self._packing.forms.items():
            empty = name in self._parameters
            stand_in = torch.empty(0 if empty else shape, dtype=dtype, device=device if empty else "meta")
            self._place(name, stand_in)

    def _place(self, name: str, tensor: Tensor | None) -> None:
        if name in self._parameters and tensor is not None:
            self._parameters[name] = Parameter(tensor, requires_grad=False)
        else:
            self._buffers[name] = tensor

    def _identities(self) -> tuple[int, ...]:
        return tuple(id(self._raw(name)) for name in self.packs)

    # The tensors made here outlive an inference_mode that the call may be in: they must be no inference tensors.

    @torch.inference_mode(False)
    def _unpacked(self) -> dict[str, Tensor]:
        """The checkpoint's tensors, made anew from the packed one."""
        spec, forms = self._packing
        packed = self._buffers["packed"]
        if _is_capturing(packed.device):
            raise RuntimeError("a packed layer's tensors cannot be had while a CUDA graph is captured")
        made = _qlinear.PackedLinear(packed, spec).unpack()
        return {
            name: tensor.view(-1).view(dtype).view(shape)
            for tensor, (name, (dtype, shape)) in zip(made, forms.items(), strict=True)
        }

    def _tensors(self) -> dict[str, Tensor | None]:
        """All tensors with data, whatever form the layer has."""
        tensors: dict[str, Tensor | None] = {**self._parameters, **self._buffers}
        if self._packing is not None and any(map(self._is_away, self._packing.forms)):
            tensors.update({name: tensor for name, tensor in self._unpacked().items() if self._is_away(name)})
        return tensors

    def _operands(self) -> tuple[str, tuple]:
        """The operator of the form that the layer has, and its arguments after x."""
        packing = self._packing
        if packing is not None and all(map(self._is_away, packing.forms)):
            return "packed", (self._buffers["packed"], self._buffers["bias"], packing.spec)
        return self.operator, self._arguments()

    # From one form to the other

    def _settle(self) -> None:
        """Packs the layer where that is wanted and can be; raises what the C layer raises on its tensors."""
        with lock:
            tensors = [self._raw(name) for name in self.packs]
            if self._packing is not None or not tensors or not is_real(*tensors) or not wanted(tensors[0].device):
                self.__dict__["_unsettled"] = None
                return
            self.__dict__["_unsettled"] = identities = self._identities()
            if identities == self._captured:
                self.__dict__["_unsettled"] = None
            if identities == self._captured or _is_capturing(tensors[0].device):
                return
            with torch.inference_mode(False):
                made = ops.engine(self.operator, self._arguments()).pack()
                self.__dict__["_unsettled"] = None
                if made is not None:
                    self._put_away(*made)

    def _try_to_settle(self) -> None:
        """_settle, but tensors that no layer can have wait for the call to be refused."""
        with contextlib.suppress(TypeError, ValueError, NotImplementedError):
            self._settle()

    def _settle_own(self) -> None:
        """_settle before a call, of what was left to it."""
        if self._unsettled is None or self._unsettled != self._identities():
            return
        if _is_capturing(self._raw(self.packs[0]).device):
            self.__dict__["_captured"] = self._unsettled
        self._settle()

    def _put_away(self, packed: Tensor, spec: tuple[int, ...]) -> None:
        spare = self._spare
        if spare is not None and spare.device == packed.device and spare.shape == packed.shape:
            packed = spare.copy_(packed)
            if packed.is_cuda:
                # Kernels may read weights before they wait for the work that was launched before them.
                torch.cuda.current_stream(packed.device).synchronize()
        self.__dict__["_spare"] = None
        forms = {name: (t.dtype, t.shape) for name in self.packs if (t := self._raw(name)) is not None}
        self._buffers["packed"] = packed
        self.__dict__["_packing"] = Packing(spec, forms)
        self._place_stand_ins()
        self._forget()

    def _drop_packed(self) -> None:
        """Leaves the layer with what stands in `_buffers` and `_parameters` now."""
        self._buffers["packed"] = None
        self.__dict__["_packing"] = None
        self._forget()

    def _unpack(self) -> None:
        """Gives the layer its checkpoint's tensors back; the next call packs it again."""
        with lock:
            if self._packing is None:
                return
            for name, tensor in self._unpacked().items():
                if self._is_away(name):
                    self._place(name, tensor)
            self.__dict__["_spare"] = self._buffers["packed"]
            self._drop_packed()
            self.__dict__["_unsettled"] = self._identities()
            self.__dict__["_ready"] = ops.engine(self.operator, self._arguments())

    # Attributes

    def __getattr__(self, name: str) -> Any:
        if name == "packed" and self.__dict__.get("_packing") is None and self.__dict__.get("_unsettled") is not None:
            # Whoever lists the buffers and then asks for each of them (torch.export does) asks for both forms.
            self._settle_own()
        value = super().__getattr__(name)
        if name in self.packs and isinstance(value, Tensor):
            packing = self.__dict__.get("_packing")
            if packing is not None and name in packing.forms and self._is_away(name):
                with lock:
                    self._unpack()
                    return super().__getattr__(name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # torch sets some of its own: train(), eval() and compile() do. The C layer outlives them.
        is_ours = name not in self._unpacked_attributes and not name.startswith("_")
        if is_ours and self.__dict__.get("_packing") is not None:
            self._unpack()
        if isinstance(value, Parameter) and name in self.__dict__.get("_buffers", ()):
            # As in the constructors: what is frozen stays a buffer, where nn.Module would make it a parameter.
            value = value.detach()
        super().__setattr__(name, value)
        if name in self.packs:
            self.__dict__["_unsettled"] = self._identities()
        if is_ours:
            self._forget()

    # Copies, moves, state

    def _packed_move(self, device: torch.device) -> None:
        """Follows a move of the module to `device`, as far as packed tensors go."""
        packed = self._buffers["packed"]
        if device.type == "meta":
            for name in filter(self._is_away, self._packing.forms):
                dtype, shape = self._packing.forms[name]
                self._place(name, torch.empty(shape, dtype=dtype, device=device))
            self._drop_packed()
        elif not wanted(device) or not all(map(self._is_away, self._packing.forms)):
            self._unpack()
            self.__dict__["_spare"] = None
        elif device != packed.device:
            self._buffers["packed"] = packed.to(device)
            self._place_stand_ins()

    def _unpacked_state(self) -> dict:
        """__dict__ as an unpacked layer has it, to be copied or pickled."""
        with lock:
            state = dict(self.__dict__)
            if self._packing is not None:
                parameters, buffers = dict(self._parameters), {**self._buffers, "packed": None}
                for name, tensor in self._unpacked().items():
                    if name in parameters:
                        parameters[name] = Parameter(tensor, requires_grad=False)
                    else:
                        buffers[name] = tensor
                state["_parameters"], state["_buffers"] = parameters, buffers
        for name in ("_made", "_packing", "_unsettled", "_captured", "_spare", "_ready", "_early"):
            del state[name]
        return state

    def _state_key(self, name: str) -> str:
        """The state dict's name of a packed tensor."""
        return name

    def _write_state(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """What _save_to_state_dict writes, with what stands for packed tensors."""
        torch.nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with lock:
            self._write_state(destination, prefix, keep_vars)
            if self._packing is None:
                return
            for name, tensor in self._unpacked().items():
                if not self._is_away(name):
                    continue
                kept = Parameter(tensor, requires_grad=False) if keep_vars and name in self._parameters else tensor
                destination[f"{prefix}{self._state_key(name)}"] = kept
