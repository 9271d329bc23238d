"""EETQ: 8-bit weights with one scale a channel, W[n][k] = q[k][n] * weight_scales[n]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _qlinear
from ._module import QuantizedLinear, check_bias, check_weight, frozen, take


class EETQLinear(QuantizedLinear):
    """weight int8 [K, N] in EETQ's interleaved layout, weight_scales [N]. K must be a multiple of 64, N of 2.

    EETQLinear(weight, bias) quantizes a float weight [N, K], as fp16: the scales of EETQ's files are fp16.
    """

    operator = "eetq"
    fixed = ("weight", "weight_scales")
    packs = fixed

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        check_weight(weight)
        check_bias(bias, weight.shape[0])
        self._fill(*_qlinear.eetq_quantize(weight.detach().to(torch.float16)), bias)
        self.weight_dtype = weight.dtype

    def _fill(self, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> None:
        QuantizedLinear.__init__(self)
        self._hold(weight=frozen(weight), weight_scales=frozen(weight_scales), bias=frozen(bias))
        self._check()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> EETQLinear:
        """From a checkpoint's `weight` (int8, interleaved), `weight_scales` and, where there is one, `bias`."""
        self = cls.__new__(cls)
        self._fill(*take(tensors, bias, "weight", "weight_scales"))
        return self

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = True, *, device="meta", dtype=torch.float16
    ) -> EETQLinear:
        """A layer to load a checkpoint into; zero where the device has memory. dtype: of scales and bias."""
        return cls.from_tensors(
            {
                "weight": torch.zeros(in_features, out_features, dtype=torch.int8, device=device),
                "weight_scales": torch.zeros(out_features, dtype=dtype, device=device),
            },
            torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
        )

    def _arguments(self) -> tuple:
        tensors = self._tensors()
        return (tensors["weight"], tensors["weight_scales"], tensors["bias"])

    def _scale_dtype(self) -> torch.dtype:
        return self._buffers["weight_scales"].dtype

    @property
    def scale(self) -> Tensor:
        return self.weight_scales

    @property
    def in_features(self) -> int:
        return self._buffers["weight"].shape[0]

    @property
    def out_features(self) -> int:
        return self._buffers["weight"].shape[1]
