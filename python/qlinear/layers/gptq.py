"""GPTQ: 2, 3, 4 and 8-bit weights with zeros and scales by groups of input channels, in any order of the channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _qlinear, functional, ops, search
from ._module import QuantizedLinear, check_bias, check_weight, frozen, take

_BITS = (2, 3, 4, 8)


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise NotImplementedError(f"Only 2,3,4,8 bits are supported, got {bits!r}.")


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


class QuantLinearFunction(torch.autograd.Function):
    """matmul248 with its gradient with respect to the input."""

    @staticmethod
    def forward(ctx, input, qweight, scales, qzeros, g_idx, bits, maxq):
        output = functional.matmul248(input, qweight, scales, qzeros, g_idx, bits, maxq)
        ctx.save_for_backward(qweight, scales, qzeros, g_idx)
        ctx.bits, ctx.in_features = bits, input.shape[-1]
        return output

    @staticmethod
    def backward(ctx, grad_output):
        grad_input = None
        if ctx.needs_input_grad[0]:
            arguments = functional.gptq_arguments(*ctx.saved_tensors, ctx.bits, ctx.in_features)
            grad_input = ops.gradient("gptq", grad_output, arguments)
        return grad_input, None, None, None, None, None, None


class QuantLinear(QuantizedLinear):
    """qweight int32 [ceil(K * bits / 32), N], qzeros int32 [G, ceil(N * bits / 32)], scales [G, N], g_idx int32 [K].

    groupsize -1 is one group. zero_format: how qzeros store a zero, "gptq" (less one), "gptq_v2" (as it is) or "auto",
    which takes them for v2 where each of them is 2^(bits - 1). in_features tells K where neither g_idx nor the number
    of words does.
    """

    operator = "gptq"
    fixed = ("qweight", "qzeros", "scales", "g_idx")
    packs = ("qweight", "qzeros", "scales")
    optional = frozenset({"g_idx"})

    def __init__(
        self,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None,
        bias: Tensor | None,
        bits: int,
        groupsize: int,
        *,
        zero_format: str = "auto",
        in_features: int | None = None,
    ) -> None:
        _check_bits(bits)
        ops.check_tensors(qweight=qweight, qzeros=qzeros, scales=scales)
        if g_idx is not None:
            ops.check_tensors(g_idx=g_idx)
        if qweight.dim() != 2:
            raise ValueError(f"qweight must be 2-D, got {tuple(qweight.shape)}")
        check_bias(bias, qweight.shape[1])
        super().__init__()
        if in_features is None:
            in_features = qweight.shape[0] * 32 // bits if g_idx is None else g_idx.numel()
        self._note(bits=bits, maxq=2**bits - 1, groupsize=groupsize, zero_format=zero_format)
        self._note(infeatures=in_features, outfeatures=qweight.shape[1])
        self._hold(
            qweight=frozen(qweight),
            qzeros=frozen(qzeros),
            scales=frozen(scales),
            g_idx=frozen(g_idx),
            bias=frozen(bias),
        )
        self._check()

    @classmethod
    def new(
        cls,
        bits: int,
        groupsize: int,
        infeatures: int,
        outfeatures: int,
        bias: bool,
        *,
        zero_format: str = "auto",
        device=None,
        dtype=torch.float16,
    ) -> QuantLinear:
        """A layer to pack into or to load a checkpoint into, all zero. dtype: of scales and bias."""
        _check_bits(bits)
        size = infeatures if groupsize == -1 else groupsize
        if size < 1:
            raise ValueError(f"groupsize must be positive or -1, got {groupsize!r}")
        groups = -(-infeatures // size)
        qweight = torch.zeros(_words(infeatures, bits), outfeatures, dtype=torch.int32, device=device)
        qzeros = torch.zeros(groups, _words(outfeatures, bits), dtype=torch.int32, device=device)
        scales = torch.zeros(groups, outfeatures, dtype=dtype, device=device)
        g_idx = torch.arange(infeatures, dtype=torch.int32, device=device) // size
        made = torch.zeros(outfeatures, dtype=dtype, device=device) if bias else None
        return cls(qweight, qzeros, scales, g_idx, made, bits, groupsize, zero_format=zero_format)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = True, *, bits=4, group_size=128, device="meta", **options
    ) -> QuantLinear:
        """`new` with the arguments in the order that the other layers have."""
        return cls.new(bits, group_size, in_features, out_features, bias, device=device, **options)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = False,
        search_scales: bool = False,
    ) -> QuantLinear:
        """Rounds a float weight [N, K] to the nearest codes, with no calibration. The scales and zeros are those of a
        group's range; search_scales: of the range, clipped or not, that leaves the least squared error."""
        _check_bits(bits)
        check_weight(weight)
        weight = weight.detach()
        scales, zeros = _qlinear.gptq_find_params(weight, bits=bits, group_size=group_size, sym=sym)
        if search_scales:
            if sym:
                raise ValueError("search_scales finds zeros too: it excludes sym")
            scales, zeros = search.find_params(weight, bits=bits, group_size=group_size)
        packed = _qlinear.gptq_pack(weight, scales, zeros, bits=bits, group_size=group_size)
        size = weight.shape[1] if group_size == -1 else group_size
        g_idx = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // size
        self = cls(*packed, g_idx, bias, bits, group_size, zero_format="gptq")
        self.weight_dtype = weight.dtype
        return self

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        zero_format: str = "auto",
        in_features: int | None = None,
    ) -> QuantLinear:
        """From a checkpoint's `qweight`, `qzeros`, `scales` and, where there are, `g_idx` and `bias`. bits and
        group_size None: told from the shapes."""
        qweight, qzeros, scales, bias = take(tensors, bias, "qweight", "qzeros", "scales")
        g_idx = tensors.get("g_idx")
        if bits is None:
            bits = next((b for b in _BITS if qzeros.shape[1] == _words(scales.shape[1], b)), 0)
        _check_bits(bits)
        if group_size is None:
            known = g_idx.numel() if g_idx is not None else in_features or qweight.shape[0] * 32 // bits
            group_size = -(-known // max(scales.shape[0], 1))
        return cls(
            qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_format=zero_format, in_features=in_features
        )

    def pack(self, linear: torch.nn.Module, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> None:
        """Packs linear's weight [N, K] with scales and zeros [N, G]; codes outside [0, maxq] are clamped. The bias is
        copied, in its dtype."""
        weight = linear.weight.detach()
        if tuple(weight.shape) != (self.outfeatures, self.infeatures):
            raise ValueError(
                f"linear.weight must be [{self.outfeatures}, {self.infeatures}], got {tuple(weight.shape)}"
            )
        if (linear.bias is None) != (self.bias is None):
            raise ValueError("linear and this layer must both have a bias, or neither")
        check_bias(linear.bias, self.outfeatures)
        ops.check_tensors(scales=scales, zeros=zeros)
        g_idx = self.g_idx if g_idx is None else g_idx.to(torch.int32)
        scales, zeros = scales.to(weight.device), zeros.to(weight.device)
        g_idx = None if g_idx is None else g_idx.to(weight.device)
        zero_format = "gptq" if self.zero_format == "auto" else self.zero_format
        qweight, qzeros, packed_scales = _qlinear.gptq_pack(
            weight, scales, zeros, g_idx, bits=self.bits, group_size=self.groupsize, zero_format=zero_format
        )
        self.weight_dtype = weight.dtype
        # "auto" could take what was just packed for v2, where every zero happens to be one more than the middle.
        self.zero_format = zero_format
        self.qweight, self.qzeros, self.scales, self.g_idx = qweight, qzeros, packed_scales, g_idx
        if linear.bias is not None:
            self.bias = linear.bias.detach().clone()
        self._check()

    def _arguments(self) -> tuple:
        tensors = self._tensors()
        return (
            tensors["qweight"],
            tensors["qzeros"],
            tensors["scales"],
            tensors["g_idx"],
            tensors["bias"],
            self.bits,
            self.groupsize,
            self.zero_format,
            self.infeatures,
            self.outfeatures,
        )

    def stored_zeros(self) -> str:
        """zero_format, "gptq" or "gptq_v2", as the tensors tell it where that is "auto"."""
        return self.engine().zero_format if self.zero_format == "auto" else self.zero_format

    def _scale_dtype(self) -> torch.dtype:
        return self._buffers["scales"].dtype

    @property
    def in_features(self) -> int:
        return self.infeatures

    @property
    def out_features(self) -> int:
        return self.outfeatures

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, groupsize={self.groupsize}"
