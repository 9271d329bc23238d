"""Layers to split, from the writers of checkpoint_formats.py: (name, how to make one of N outputs and K inputs)."""

from dataclasses import dataclass, field
from typing import Any

import checkpoint_formats as formats
import numpy as np
import torch
from torch import nn

import qlinear


@dataclass(frozen=True)
class Split:
    """write is one of checkpoint_formats'; sizes are the (N, K, group size) to try; x: how the product quantizes x."""

    name: str
    make: Any
    write: Any
    sizes: tuple[tuple[int, int, int], ...] = ((48, 256, 32), (40, 192, 64))
    options: dict = field(default_factory=dict)
    grouped: bool = False
    x: str = "none"

    def layer(self, N, K, size, bias=True, seed=0):
        """(the layer, W [N, K] as float32 by the writer, which shares no code with the layer)."""
        rng = np.random.default_rng(seed)
        tensors, W = self.write(rng, N, K, size)
        options = self.options | ({"group_size": size} if self.grouped else {})
        made = torch.from_numpy(rng.normal(size=N).astype(np.float32)) if bias else None
        return self.make(tensors, made, **options), W


def gptq(name, bits, sizes=((48, 256, 32), (40, 192, 64), (24, 208, -1), (33, 130, 48)), **how):
    def make(tensors, bias, group_size):
        zeros = "gptq_v2" if how.get("version") == 2 else "gptq"
        return qlinear.QuantLinear.from_tensors(
            tensors,
            bias,
            bits=bits,
            group_size=group_size,
            zero_format="auto" if how.get("sym") else zeros,
            in_features=in_features(tensors, bits),
        )

    def in_features(tensors, bits):
        return None if "g_idx" in tensors else tensors["qweight"].shape[0] * 32 // bits

    if not how.get("g_idx", True):
        sizes = ((48, 256, 32), (40, 192, 64))
    return Split(name, make, formats.gptq(bits, **how), sizes, grouped=True)


def awq(name, write, sizes=((48, 256, 32), (64, 192, 64))):
    return Split(name, qlinear.AWQLinear.from_tensors, write, sizes, grouped=True)


def fourbit(name, *how, sizes=((48, 256, 0), (40, 192, 0), (7, 4096, 0))):
    return Split(name, qlinear.Linear4bit.from_tensors, formats.fourbit(*how), sizes)


def fp8(name, kind, sizes=((48, 256, 0), (40, 192, 0)), key="weight_scale", x="none", **how):
    write = formats.fp8(kind, key, input_scale=x == "static", **how)
    options = {} if x == "static" else {"activation": x}
    return Split(name, qlinear.Fp8Linear.from_tensors, write, sizes, options, x=x)


def dense(name):
    def write(rng, N, K, size):
        W = rng.normal(size=(N, K)).astype(np.float32)
        return {"weight": torch.from_numpy(W.copy())}, W

    def make(tensors, bias):
        made = nn.Linear(*tensors["weight"].shape[::-1], bias=bias is not None)
        made.weight.data = tensors["weight"]
        if bias is not None:
            made.bias.data = bias
        return made

    return Split(name, make, write, ((48, 256, 0), (13, 30, 0)))


def fp16_rows(rng, N, K, size):
    W = rng.normal(size=(N, K)).astype(np.float16)
    return {"weight": torch.from_numpy(W.astype(np.float32))}, W.astype(np.float32)


BLOCKS = ((256, 512, 0), (300, 640, 0))
SPLITS = (
    *(gptq(f"gptq-{bits}", bits) for bits in (2, 3, 4, 8)),
    *(gptq(f"gptq-{bits}-act-order", bits, act_order=True) for bits in (2, 3, 4, 8)),
    gptq("gptq-4-v2", 4, version=2),
    gptq("gptq-4-auto", 4, version=2, sym=True),
    gptq("gptq-4-without-g_idx", 4, g_idx=False),
    awq("awq", formats.awq_gemm, ((48, 256, 32), (64, 192, 64), (48, 208, -1), (40, 176, 48))),
    awq("awq-products", formats.awq_gemv_fast, ((48, 256, 128), (64, 192, 64))),
    awq("awq-gemv", formats.awq_gemv),
    awq("awq-marlin", formats.marlin(), ((64, 256, 32), (128, 192, 64))),
    Split("eetq", qlinear.EETQLinear.from_tensors, formats.eetq, ((48, 256, 0), (10, 320, 0))),
    Split("int8", qlinear.Linear8bitLt.from_tensors, formats.int8, options={"threshold": 2.5}, x="int8"),
    fourbit("nf4", "nf4", False),
    fourbit("fp4", "fp4", False, torch.bfloat16),
    fourbit("nf4-double", "nf4", True),
    fourbit("fp4-double", "fp4", True),
    fp8("fp8-tensor", "tensor"),
    fp8("fp8-channel", "channel", x="token"),
    fp8("fp8-static", "scalar", x="static"),
    fp8("fp8-blocks", "block", BLOCKS, "weight_scale_inv", x="group"),
    fp8("fp8-blocks-weight-only", "block", BLOCKS),
    dense("dense"),
)
