"""FP8 (e4m3): W[n][k] = weight[n][k] * scale, with a scale for the tensor, a channel or a block of 128x128."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops
from ._module import QuantizedLinear, check_bias, check_weight, frozen, take

# The largest number of e4m3.
MOST = 448.0
_ACTIVATIONS = ("none", "static", "tensor", "token", "group")
# Elements at a time where a float weight is quantized, which bound its fp32 copies; a launch on a GPU wants more.
_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 26


def scale_of(absmax: Tensor) -> Tensor:
    """absmax fp32 / 448; 1 / 448 where all is zero, and never a denormal, by which some devices could not divide."""
    # A tensor, not a number: by a number, torch multiplies with the reciprocal on a GPU.
    scale = absmax / torch.full_like(absmax, MOST)
    return torch.where(absmax > 0, scale, 1 / MOST).clamp_min(2.0**-126)


def codes_of(weight: Tensor, scale: Tensor) -> Tensor:
    """weight fp32 rounded to float8_e4m3fn of its shape; scale broadcasts to it."""
    return (weight / scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn)


def _scalar(value: Tensor | float | None) -> Tensor | None:
    # Without a device it would be on whichever is torch's default at the moment.
    return torch.tensor(float(value), device="cpu") if isinstance(value, (int, float)) else frozen(value)


def apply_fp8_linear(
    input: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    input_scale_ub: Tensor | None = None,
    qbias: Tensor | None = None,
    *,
    promoted: bool = False,
) -> Tensor:
    """input [..., K] times qweight e4m3 [K, N] (a transposed view of the checkpoint's [N, K]) -> [..., N].

    With an input_scale activations are quantized by it, else by a scale for each token, whose absmax input_scale_ub
    bounds. promoted: as of Fp8Linear."""
    ops.check_tensors(qweight=qweight, weight_scale=weight_scale)
    activation = "token" if input_scale is None else "static"
    ub = None if input_scale is not None else _scalar(input_scale_ub)
    arguments = (qweight.t(), weight_scale, qbias, _scalar(input_scale), ub, activation, 128, 128, promoted)
    return ops.linear("fp8", input, arguments)


class Fp8Linear(QuantizedLinear):
    """weight float8_e4m3fn [N, K], weight_scale of one element, [N], [N, 1], [1, N] or a grid of blocks, input_scale.

    activation: how x is quantized. "static" by input_scale, "tensor", "token" or "group" (128 features of a token) by
    its absmax, "none" not at all; None is static where there is an input_scale, group where weight_scale is a grid,
    else token. input_scale_ub bounds the absmax of a token. A file that calls the scale `weight_scale_inv` is loaded
    and saved under that name.

    promoted: how a GPU sums more than 8 rows. False is fast: all of K in the tensor cores' accumulators, which keep
    about 14 bits. True adds the sums of each 128 columns in fp32. Scales of groups or blocks always do. It may be set
    at any time. The largest error over |x| |W| at K = 8192 on an H200: 2^-12.9 and 2^-16.2, where rounding the
    activations to e4m3 costs up to 2^-4 of each of them.
    """

    operator = "fp8"
    fixed = ("weight", "weight_scale", "input_scale")
    optional = frozenset({"input_scale"})
    flexible = frozenset({"weight_scale", "input_scale"})

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_scale: Tensor,
        input_scale: Tensor | None,
        *,
        activation: str | None = None,
        input_scale_ub: Tensor | float | None = None,
        block_size: tuple[int, int] = (128, 128),
        promoted: bool = False,
    ) -> None:
        ops.check_tensors(weight=weight, weight_scale=weight_scale)
        if weight.dtype not in (torch.float8_e4m3fn, torch.uint8):
            raise TypeError(f"weight must be float8_e4m3fn or its bytes, uint8, got {weight.dtype}")
        if weight.dim() != 2:
            raise ValueError(f"weight must be 2-D [out_features, in_features], got {tuple(weight.shape)}")
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be None or one of {_ACTIVATIONS}, got {activation!r}")
        check_bias(bias, weight.shape[0])
        super().__init__()
        block_n, block_k = (int(size) for size in block_size)
        # scale_key: under which name the state dict has the scale; the block-wise files say weight_scale_inv, and
        # multiply by it.
        self._note(activation=activation, promoted=bool(promoted), scale_key="weight_scale")
        self._note(block_n=block_n, block_k=block_k)
        self._hold(
            weight=frozen(weight),
            weight_scale=frozen(weight_scale),
            input_scale=frozen(input_scale),
            bias=frozen(bias),
            # Mostly absent, so the last: see Linear4bit.
            input_scale_ub=_scalar(input_scale_ub),
        )
        self._non_persistent_buffers_set.add("input_scale_ub")
        self._check()

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str | None = None,
        input_scale_ub: Tensor | float | None = None,
    ) -> Fp8Linear:
        """Rounds a float weight [N, K] to e4m3 with one scale a channel, absmax / 448 (1 / 448 for a zero row)."""
        check_weight(weight)
        n, k = weight.shape
        codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
        scale = torch.empty(n, 1, dtype=torch.float32, device=weight.device)
        step = max(1, (_GPU_CHUNK if weight.is_cuda else _CHUNK) // max(k, 1))
        for start in range(0, n, step):
            rows = weight.detach()[start : start + step].float()
            scale[start : start + step] = scale_of(rows.abs().amax(1, keepdim=True))
            codes[start : start + step] = codes_of(rows, scale[start : start + step])
        self = cls(codes, bias, scale, None, activation=activation, input_scale_ub=input_scale_ub)
        self.weight_dtype = weight.dtype
        return self

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None, **options) -> Fp8Linear:
        """From a checkpoint's `weight`, `weight_scale` (or `weight_scale_inv`) and, where there are, `input_scale` and
        `bias`; options as for the constructor."""
        key = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
        weight, scale, bias = take(tensors, bias, "weight", key)
        self = cls(weight, bias, scale, tensors.get("input_scale"), **options)
        self._note(scale_key=key)
        return self

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = True, *, device="meta", dtype=torch.bfloat16, **options
    ) -> Fp8Linear:
        """A layer to load a checkpoint into, whatever the shape of its scales; zero where the device has memory.
        dtype: of the bias; options as for the constructor."""
        return cls(
            torch.zeros(out_features, in_features, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
            torch.zeros(1, dtype=torch.float32, device=device),
            None,
            **options,
        )

    def activation_mode(self) -> str:
        """How x is quantized, where activation leaves it to the tensors too."""
        if self.activation is not None:
            return self.activation
        if self._buffers["input_scale"] is not None:
            return "static"
        return "group" if self.is_blockwise() else "token"

    def is_blockwise(self) -> bool:
        """Whether weight_scale has one element a block, not one for the tensor or a channel."""
        scale, n = self._buffers["weight_scale"], self.out_features
        return scale.dim() == 2 and scale.numel() != 1 and tuple(scale.shape) not in ((n, 1), (1, n))

    def _arguments(self) -> tuple:
        buffers = self._buffers
        mode = self.activation_mode()
        return (
            buffers["weight"],
            buffers["weight_scale"],
            buffers["bias"],
            buffers["input_scale"] if mode == "static" else None,
            buffers["input_scale_ub"] if mode == "token" else None,
            mode,
            self.block_n,
            self.block_k,
            self.promoted,
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scale_key != "weight_scale":
            destination[f"{prefix}{self.scale_key}"] = destination.pop(f"{prefix}weight_scale")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        inverse, plain = f"{prefix}weight_scale_inv", f"{prefix}weight_scale"
        if inverse in state_dict or plain in state_dict:
            self.scale_key = "weight_scale_inv" if inverse in state_dict and plain not in state_dict else "weight_scale"
        if self.scale_key == "weight_scale_inv" and inverse in state_dict:
            state_dict[plain] = state_dict.pop(inverse)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def qweight(self) -> Tensor:
        """The weight as apply_fp8_linear takes it: a view [K, N]."""
        return self.weight.t()

    @property
    def qbias(self) -> Tensor | None:
        return self.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation_mode()}"
