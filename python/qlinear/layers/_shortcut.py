"""The short way of a module's call: a `__call__` in C in place of nn.Module.__call__ and forward, for calls that nobody
watches. It asks what they ask, of the same functions, at each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.modules.module
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import _qlinear, ops

_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

# What a class may have as forward to be called so: it gives the product of the C layer, with x in the module's
# compute_dtype where it has one.
plain_forwards: list[Callable] = []


def shortcut() -> Callable:
    """For a class body's `__call__`. C must see what a tensor is at each call: without the exchange API, or in a torch
    that keeps its state elsewhere, it is nn.Module's."""
    module, compiler, forward_mode = vars(torch.nn.modules.module), vars(torch.compiler), vars(forward_ad)
    known = all(name in module for name in _HOOKS) and "_is_compiling_flag" in compiler
    if not hasattr(Tensor, "__dlpack_c_exchange_api__") or not known or "_current_level" not in forward_mode:
        return torch.nn.Module.__call__
    return _qlinear.Shortcut(
        module=torch.nn.Module,
        types=(Tensor, Parameter),
        forwards=plain_forwards,
        empty=tuple((module, name) for name in _HOOKS),
        constant=((compiler, "_is_compiling_flag", False), (forward_mode, "_current_level", -1)),
        silent=(ops.dispatch_modes, ops.functorch_level, ops.is_tracing),
        is_grad_enabled=torch.is_grad_enabled,
        is_autocast_enabled=torch.is_autocast_enabled,
    )
