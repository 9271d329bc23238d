"""The layer classes as test cases, and independent decoders of their formats: float64 from a state dict's bytes."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import qlinear
from qlinear import functional
from qlinear.layers import _packing

FP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def array(tensor):
    """A tensor's values as NumPy; bfloat16 and float8 by way of float32, which holds them exactly."""
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tensor = tensor.float()
    return tensor.detach().numpy()


def in_framework(framework, arguments):
    """Keyword arguments whose arrays are NumPy's, or torch's on the same memory."""
    if framework == "numpy":
        return arguments
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()
    }


def stream(words, bits, count):
    """Codes [count, columns] of a little-endian bit stream down each column of int32 words."""
    words = words.astype(np.uint32).astype(np.uint64)
    padded = np.vstack([words, np.zeros((1, words.shape[1]), np.uint64)])
    at = np.arange(count) * bits
    pair = padded[at // 32] | (padded[at // 32 + 1] << np.uint64(32))
    return ((pair >> (at % 32).astype(np.uint64)[:, None]) & np.uint64(2**bits - 1)).astype(np.int64)


def decode_eetq(state, layer):
    weight, scales = array(state["weight"]), array(state["weight_scales"]).astype(np.float64)
    K, N = weight.shape
    k, n = np.meshgrid(np.arange(K), np.arange(N), indexing="ij")
    offset = (n >> 1) * 2 * K + (k >> 6) * 128 + (n & 1) * 64 + (k & 48) + (((k & 7) << 1) | ((k >> 3) & 1))
    codes = weight.reshape(-1).view(np.uint8)[offset].astype(np.int64) - 128
    return (codes * scales).T


def decode_gptq(state, layer):
    scales = array(state["scales"]).astype(np.float64)
    K, N, bits = layer.infeatures, layer.outfeatures, layer.bits
    q = stream(array(state["qweight"]), bits, K)
    z = stream(array(state["qzeros"]).T.copy(), bits, N).T
    if layer.engine().zero_format == "gptq":
        z = (z + 1) & (2**bits - 1)
    group = np.arange(K) // (K if layer.groupsize == -1 else layer.groupsize)
    g_idx = state.get("g_idx")
    if g_idx is not None and (scales.shape[0] == 1 or g_idx.any()):
        group = array(g_idx).astype(np.int64) % scales.shape[0]
    return ((q - z[group]) * scales[group]).T


def awq_nibbles(words):
    """int32 [R, W] -> codes [R, 8 W] in logical order."""
    inverse = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    return ((words.astype(np.uint32)[:, :, None] >> (4 * inverse).astype(np.uint32)) & 15).reshape(len(words), -1)


def decode_awq(state, layer):
    scales = array(state["scales"]).astype(np.float64)
    q = awq_nibbles(array(state["qweight"])).astype(np.int64)
    group = np.arange(layer.in_features) // layer.group_size
    if state["qzeros"].dtype == torch.int32:
        return ((q - awq_nibbles(array(state["qzeros"])).astype(np.int64)[group]) * scales[group]).T
    return (q * scales[group] + array(state["qzeros"]).astype(np.float64)[group]).T


def decode_int8(state, layer):
    return array(state["weight"]).astype(np.float64) * array(state["SCB"]).astype(np.float64)[:, None] / 127


def decode_fourbit(state, layer):
    (marker,) = [key for key in state if key.startswith("weight.quant_state.bitsandbytes__")]
    numbers = json.loads(bytes(state[marker].tolist()))
    N, K = numbers["shape"]
    packed = state["weight"].view(torch.uint8).numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: N * K]
    absmax = array(state["weight.absmax"])
    if "nested_offset" in numbers:
        outer = array(state["weight.nested_absmax"])[np.arange(len(absmax)) // numbers["nested_blocksize"]]
        inner = array(state["weight.nested_quant_map"])[absmax]
        absmax = (inner * outer + np.float32(numbers["nested_offset"])).astype(np.float32)
    blocks = absmax.astype(np.float64)[np.arange(N * K) // numbers["blocksize"]]
    return (array(state["weight.quant_map"]).astype(np.float64)[codes] * blocks).reshape(N, K)


def decode_fp8(state, layer):
    weight = array(state["weight"].view(torch.float8_e4m3fn)).astype(np.float64)
    scale = array(state.get("weight_scale", state.get("weight_scale_inv"))).astype(np.float64)
    N, K = weight.shape
    if scale.size == 1:
        return weight * scale.reshape(())
    if scale.size == N and (scale.ndim == 1 or 1 in scale.shape):
        return weight * scale.reshape(N, 1)
    return weight * scale.repeat(128, 0)[:N].repeat(128, 1)[:, :K]


def see_plain(x, layer):
    return array(x).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """make(weight, bias) quantizes; empty(K, N, bias, device) is a layer to load into; decode gives W as float64."""

    name: str
    make: Any
    empty: Any
    decode: Any
    # How x is seen by the product: itself, or what the format's activation quantizer makes of it.
    see: Any = see_plain
    # Whether its layers are to be packed, as they are on a GPU.
    packed: bool = False

    def __repr__(self):
        return self.name

    def reference(self, layer, x):
        """(the product, the product of absolute values), float64, with the bias in the first."""
        W, seen = self.decode(layer.state_dict(), layer), self.see(x, layer)
        bias = 0 if layer.bias is None else array(layer.bias).astype(np.float64)
        return seen @ W.T + bias, np.abs(seen) @ np.abs(W).T + np.abs(bias)


def see_int8(x, layer):
    a = array(x.reshape(-1, x.shape[-1])).astype(np.float32)
    outliers = np.abs(a) >= layer.threshold if layer.threshold > 0 else np.zeros_like(a, bool)
    absmax = np.abs(np.where(outliers, 0, a)).max(1, initial=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.nan_to_num(np.rint(a * (np.float32(127) / absmax)))
    columns = outliers.any(0)
    seen = np.where(columns, a.astype(np.float64), q.astype(np.float64) * absmax / 127)
    return seen.reshape(x.shape)


def see_fp8(x, layer):
    flat = x.reshape(-1, x.shape[-1])
    if layer.input_scale is not None:
        q, scale = functional.scaled_fp8_quant(flat, layer.input_scale)
    else:
        q, scale = functional.scaled_fp8_quant(flat, use_per_token_if_dynamic=True)
    return (array(q).astype(np.float64) * array(scale).astype(np.float64)).reshape(x.shape)


def gptq(bits, group_size, sym=False):
    return Case(
        f"gptq{bits}-g{group_size}",
        lambda w, b: qlinear.QuantLinear.quantize(w, b, bits=bits, group_size=group_size, sym=sym),
        lambda K, N, b, device: qlinear.QuantLinear.empty(
            K, N, b, bits=bits, group_size=group_size, zero_format="gptq", device=device
        ),
        decode_gptq,
    )


def fourbit(quant_type, blocksize, nested, storage=torch.uint8):
    return Case(
        f"{quant_type}-{blocksize}{'-nested' if nested else ''}{'' if storage == torch.uint8 else '-bf16'}",
        lambda w, b: qlinear.Linear4bit(
            w, b, quant_type, blocksize=blocksize, compress_statistics=nested, quant_storage=storage
        ),
        lambda K, N, b, device: qlinear.Linear4bit.empty(K, N, b, quant_type=quant_type, device=device),
        decode_fourbit,
    )


def int8(threshold):
    return Case(
        f"int8-t{threshold:g}",
        lambda w, b: qlinear.Linear8bitLt(w, b, has_fp16_weights=False, threshold=threshold),
        lambda K, N, b, device: qlinear.Linear8bitLt.empty(K, N, b, threshold=threshold, device=device),
        decode_int8,
        see_int8,
    )


def fp8_static(w, b):
    layer = qlinear.Fp8Linear.quantize(w, b)
    return qlinear.Fp8Linear(layer.weight, b, layer.weight_scale, torch.tensor(0.01, device=w.device))


CASES = (
    Case(
        "eetq",
        qlinear.EETQLinear,
        lambda K, N, b, device: qlinear.EETQLinear.empty(K, N, b, device=device),
        decode_eetq,
    ),
    gptq(2, 32),
    gptq(3, 64),
    gptq(4, 32),
    gptq(8, -1),
    Case(
        "awq",
        lambda w, b: qlinear.AWQLinear.quantize(w, b, group_size=32),
        lambda K, N, b, device: qlinear.AWQLinear.empty(K, N, b, group_size=32, device=device),
        decode_awq,
    ),
    int8(0.0),
    int8(2.5),
    fourbit("nf4", 64, True),
    fourbit("fp4", 128, False),
    fourbit("nf4", 32, False, torch.bfloat16),
    Case(
        "fp8-token",
        qlinear.Fp8Linear.quantize,
        lambda K, N, b, device: qlinear.Fp8Linear.empty(K, N, b, device=device),
        decode_fp8,
        see_fp8,
    ),
    Case(
        "fp8-static",
        fp8_static,
        lambda K, N, b, device: qlinear.Fp8Linear.empty(K, N, b, device=device),
        decode_fp8,
        see_fp8,
    ),
    Case(
        "fp8-weight-only",
        lambda w, b: qlinear.Fp8Linear.quantize(w, b, activation="none"),
        lambda K, N, b, device: qlinear.Fp8Linear.empty(K, N, b, device=device, activation="none"),
        decode_fp8,
    ),
)

PACKED_CASES = tuple(
    replace(case, name=f"{case.name}-packed", packed=True)
    for case in CASES
    if case.name.startswith(("eetq", "gptq", "awq", "nf4", "fp4"))
)

K, N = 128, 48


def pack_on_the_cpu(monkeypatch):
    """Has layers pack themselves here as they do on a GPU: the CPU reads them too, slowly."""
    monkeypatch.setattr(_packing, "wanted", lambda device: device.type == "cpu")


def make(case, bias=True, dtype=torch.float32, K=K, N=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator).to(dtype) / 8
    return case.make(weight, torch.randn(N, generator=generator).to(dtype) if bias else None)


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(out, reference, magnitude, k):
    """|out - reference| <= c * magnitude + half an ulp of the output, for every element.

    c: fp32 accumulation of k products, and half an ulp of a 16-bit weight where the product is in 16 bit.
    """
    eps = torch.finfo(out.dtype).eps
    c = (k + 16) * 2.0**-24 + (0 if out.dtype == torch.float32 else eps / 2)
    bound = c * magnitude + eps / 2 * np.abs(reference) + torch.finfo(out.dtype).tiny
    error = np.abs(array(out).astype(np.float64) - reference)
    assert out.shape == reference.shape
    assert (error <= bound).all(), f"worst {np.nanmax(error / bound):.2f} of the bound"


def exact(a, b):
    """Whether two tensors hold the same bytes, dtype, and shape."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(*(t.detach().contiguous().view(-1).view(torch.uint8).numpy() for t in (a, b)))


def assert_same_state(one, other):
    assert list(one) == list(other)
    for key in one:
        assert exact(one[key], other[key]), key
