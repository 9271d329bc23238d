"""AWQ: 4-bit weights with zeros and scales by groups of input channels, W[n][k] = (q - z) * s."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _qlinear, ops, search
from ._module import QuantizedLinear, check_bias, check_weight, frozen, take


def to_gemm(qweight: Tensor, qzeros: Tensor | None, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The storage that AutoAWQ calls GEMM, from any of its four, which dtypes and shapes tell apart.

    GEMVFast has int16 words; Marlin has no zeros; GEMV has one row of each tensor an output channel. GEMVFast's zeros
    stay the products that they are, of scales' dtype. ValueError where it is none of them.
    """
    ops.check_tensors(qweight=qweight, scales=scales)
    if qzeros is not None:
        ops.check_tensors(qzeros=qzeros)
    if qweight.dim() != 2 or scales.dim() != 2 or (qzeros is not None and qzeros.dim() != 2):
        raise ValueError("qweight, qzeros and scales must be 2-D")
    if qweight.dtype == torch.int16:
        if qzeros is None:
            raise ValueError("qzeros must be given with a GEMVFast qweight (int16)")
        return _qlinear.awq_from_gemv_fast(qweight, qzeros, scales, group_size=group_size)
    if qweight.dtype != torch.int32:
        raise TypeError(f"qweight must be int32 (or GEMVFast's int16), got {qweight.dtype}")
    if qzeros is None:
        return _qlinear.awq_from_marlin(qweight, scales, group_size=group_size)
    words, groups, columns = qweight.shape[1], scales.shape[0], scales.shape[1]
    if columns == 8 * words and qzeros.shape[0] == groups:
        return qweight, qzeros, scales
    if qweight.shape[0] == qzeros.shape[0] == groups and columns == 8 * qzeros.shape[1]:
        return _qlinear.awq_from_gemv(qweight, qzeros, scales, group_size=group_size)
    raise ValueError(
        f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)} and scales {tuple(scales.shape)} are none of "
        "AWQ's storages: GEMM takes [K, N / 8], [G, N / 8] and [G, N]"
    )


def _search(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(qweight, qzeros, scales) with searched scales, by way of GPTQ's packer, whose integers are the same."""
    n, k = weight.shape
    if n % 8:
        raise ValueError(f"out_features must be a multiple of 8, got {n}")
    scales, zeros = search.find_params(weight, bits=4, group_size=group_size)
    options = {"bits": 4, "group_size": group_size, "zero_format": "gptq_v2"}
    qweight, _, stored = _qlinear.gptq_pack(weight, scales, zeros, **options)
    codes = _qlinear.gptq_unpack_codes(qweight, bits=4, count=k)
    return _qlinear.awq_pack(codes), _qlinear.awq_pack(zeros.t().to(torch.uint8).contiguous()), stored


class AWQLinear(QuantizedLinear):
    """qweight int32 [K, N / 8], qzeros int32 [G, N / 8] and scales [G, N]; group_size -1 is K.

    The GEMV, GEMVFast and Marlin storages (the last with qzeros None) are converted, exactly, on the way in.
    """

    operator = "awq"
    fixed = ("qweight", "qzeros", "scales")
    packs = fixed
    flexible = frozenset({"qzeros"})

    def __init__(
        self,
        w_bit: int,
        group_size: int,
        qweight: Tensor,
        qzeros: Tensor | None,
        scales: Tensor,
        bias: Tensor | None,
    ) -> None:
        if w_bit != 4:
            raise NotImplementedError("Only 4-bit are supported for now.")
        if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
            raise ValueError(f"group_size must be positive or -1, got {group_size!r}")
        super().__init__()
        qweight, qzeros, scales = to_gemm(qweight, qzeros, scales, group_size)
        check_bias(bias, scales.shape[1])
        in_features = qweight.shape[0]
        self._note(w_bit=w_bit, group_size=in_features if group_size == -1 else group_size)
        self._note(in_features=in_features, out_features=scales.shape[1])
        self._hold(qweight=frozen(qweight), qzeros=frozen(qzeros), scales=frozen(scales), bias=frozen(bias))
        self._check()

    @classmethod
    def quantize(
        cls, weight: Tensor, bias: Tensor | None, *, group_size: int = 128, search_scales: bool = False
    ) -> AWQLinear:
        """Rounds a float weight [N, K] to the nearest codes. The scales and zeros are AWQ's; search_scales: of the
        group's range, clipped or not, that leaves the least squared error."""
        check_weight(weight)
        weight = weight.detach()
        quantize = _search if search_scales else _qlinear.awq_quantize
        self = cls(4, group_size, *quantize(weight, group_size=group_size), bias)
        self.weight_dtype = weight.dtype
        return self

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None, *, group_size: int | None = None, bits: int = 4
    ) -> AWQLinear:
        """From a checkpoint's `qweight`, `qzeros`, `scales` and, where there is one, `bias`. group_size None: told from
        the number of groups, which only the GEMM storage does."""
        qweight, scales, bias = take(tensors, bias, "qweight", "scales")
        if group_size is None:
            group_size = -(-qweight.shape[0] // max(scales.shape[0], 1))
        return cls(bits, group_size, qweight, tensors.get("qzeros"), scales, bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        device="meta",
        dtype=torch.float16,
    ) -> AWQLinear:
        """A layer to load a checkpoint into; zero where the device has memory. dtype: of scales and bias."""
        if out_features % 8:
            raise ValueError(f"out_features must be a multiple of 8, got {out_features}")
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        return cls(
            4,
            group_size,
            torch.zeros(in_features, out_features // 8, dtype=torch.int32, device=device),
            torch.zeros(groups, out_features // 8, dtype=torch.int32, device=device),
            torch.zeros(groups, out_features, dtype=dtype, device=device),
            torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
        )

    def _arguments(self) -> tuple:
        tensors = self._tensors()
        return (tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["bias"], self.group_size)

    def _adopt(self, state_dict: dict, prefix: str, assign: bool) -> None:
        names = {name: f"{prefix}{name}" for name in self.fixed}
        qweight, scales = state_dict.get(names["qweight"]), state_dict.get(names["scales"])
        if qweight is not None and getattr(qweight, "shape", None) != self.qweight.shape:
            try:
                converted = to_gemm(qweight, state_dict.get(names["qzeros"]), scales, self.group_size)
            except (TypeError, ValueError):
                # nn.Module reports what does not fit, with all the others of the model.
                converted = ()
            state_dict.update(zip(names.values(), converted, strict=False))
        super()._adopt(state_dict, prefix, assign)

    def _scale_dtype(self) -> torch.dtype:
        return self._buffers["scales"].dtype

    @property
    def weight(self) -> Tensor:
        return self.qweight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, w_bit={self.w_bit}, group_size={self.group_size}"
