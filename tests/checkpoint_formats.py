"""Random quantized layers in each format's on-disk form, bit by bit in NumPy, with the weight that they stand for.

Each writer takes (rng, N, K, group size) and gives ({name after the layer's: tensor}, W [N, K] float32).
"""

import json

import numpy as np
import torch

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
FP4 = FP4 + [-value for value in FP4]


def words(array):
    return torch.from_numpy(array.astype(np.uint32).view(np.int32).copy())


def half(array):
    return torch.from_numpy(array.astype(np.float16))


def random_scales(rng, *shape):
    return rng.uniform(0.005, 0.02, shape).astype(np.float16)


def stream(codes, bits):
    """Codes [count, columns] as a little-endian bit stream down each column, in words [words, columns]."""
    count, columns = codes.shape
    packed = np.zeros((-(-count * bits // 32) + 1, columns), np.uint64)
    for i, row in enumerate(codes.astype(np.uint64)):
        word, shift = divmod(bits * i, 32)
        wide = row << np.uint64(shift)
        packed[word] |= wide & np.uint64(0xFFFFFFFF)
        packed[word + 1] |= wide >> np.uint64(32)
    return packed[:-1]


def planar(codes):
    """Codes [count, columns] of 3 bits as gptq_p has them: of each 32 two words of low bits, then one of high ones."""
    blocks = codes.reshape(-1, 32, codes.shape[1]).astype(np.uint64)
    low = ((blocks & 3).reshape(len(blocks), 2, 16, -1) << (2 * np.arange(16, dtype=np.uint64))[:, None]).sum(2)
    high = ((blocks >> 2) << np.arange(32, dtype=np.uint64)[:, None]).sum(1, keepdims=True)
    return np.concatenate([low, high], 1).reshape(-1, codes.shape[1])


def nibbles(codes, order):
    """Codes [rows, columns], eight of a row in a word, nibble i of which holds column order[i]."""
    eights = codes.reshape(len(codes), -1, 8)[:, :, order].astype(np.uint64)
    return (eights << (4 * np.arange(8, dtype=np.uint64))).sum(-1)


def group_of(K, size):
    return np.arange(K) // (K if size == -1 else size)


def gptq(bits, *, version=1, act_order=False, sym=False, g_idx=True, pack=None):
    pack = pack or (lambda codes: stream(codes, bits))

    def write(rng, N, K, size):
        q = rng.integers(0, 2**bits, (K, N))
        group = rng.permutation(group_of(K, size)) if act_order else group_of(K, size)
        G = group.max() + 1
        z = np.full((G, N), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (G, N))
        s = random_scales(rng, G, N)
        stored = (z - 1) % 2**bits if version == 1 else z
        tensors = {
            "qweight": words(pack(q)),
            "qzeros": words(pack(stored.T).T),
            "scales": torch.from_numpy(s),
        }
        if g_idx:
            tensors["g_idx"] = torch.from_numpy(group.astype(np.int32))
        return tensors, ((q - z[group]) * s[group].astype(np.float32)).T

    return write


def awq_codes(rng, N, K, size):
    group = group_of(K, size)
    q, z = rng.integers(0, 16, (K, N)), rng.integers(0, 16, (group.max() + 1, N))
    s = random_scales(rng, group.max() + 1, N)
    return q, z, s, ((q - z[group]) * s[group].astype(np.float32)).T


def awq_gemm(rng, N, K, size):
    q, z, s, W = awq_codes(rng, N, K, size)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": words(nibbles(q, order)), "qzeros": words(nibbles(z, order)), "scales": torch.from_numpy(s)}, W


def padded_groups(groups, size):
    multiple = {64: 2, 32: 4}.get(size, 1)
    words_of_eight = (groups + 7) // 8
    return 8 * ((words_of_eight + multiple - 1) // multiple * multiple)


def awq_gemv(rng, N, K, size):
    q, z, s, W = awq_codes(rng, N, K, size)
    pad = ((0, 0), (0, padded_groups(len(z), size) - len(z)))
    return {
        "qweight": words(nibbles(q.T, range(8))),
        "qzeros": words(nibbles(np.pad(z.T, pad), range(8))),
        "scales": torch.from_numpy(np.pad(s.T, pad).copy()),
    }, W


def awq_gemv_fast(rng, N, K, size):
    q, z, s, _ = awq_codes(rng, N, K, size)
    group = group_of(K, size)
    qweight = np.zeros((N // 4, K), np.uint16)
    n, k = np.meshgrid(np.arange(N), np.arange(K), indexing="ij")
    column = 64 * (k // 64) + 16 * (n % 4) + 8 * ((k % 64) // 32) + 2 * ((k % 8) // 2) + (k & 1)
    np.bitwise_or.at(qweight, (n // 4, column), (q.T << (4 * ((k % 32) // 8))).astype(np.uint16))
    products = -(s.astype(np.float32) * z).astype(np.float16)
    W = q * s[group].astype(np.float32) + products[group].astype(np.float32)
    pad = ((0, padded_groups(len(z), size) - len(z)), (0, 0))
    return {
        "qweight": torch.from_numpy(qweight.view(np.int16)),
        "qzeros": torch.from_numpy(np.pad(products, pad)),
        "scales": torch.from_numpy(np.pad(s, pad)),
    }, W.T


def marlin(codes="qweight", scales="scales"):
    def write(rng, N, K, size):
        group = group_of(K, size)
        q, s = rng.integers(0, 16, (K, N)), random_scales(rng, group.max() + 1, N)
        packed = np.zeros((K // 16, 2 * N), np.uint32)
        k, n = np.meshgrid(np.arange(K), np.arange(N), indexing="ij")
        word = 128 * (n // 64) + 16 * (n % 8) + 4 * ((k % 8) // 2) + (n % 64) // 16
        nibble = 4 * (k & 1) + 2 * ((n % 16) // 8) + (k % 16) // 8
        np.bitwise_or.at(packed, (k // 16, word), (q << (4 * nibble)).astype(np.uint32))
        stored = np.empty_like(s)
        position = np.arange(N)
        if len(s) > 1:
            column = position // 64 * 64 + position % 64 // 8 + 8 * (position % 8)
        else:
            t = np.array([0, 1, 8, 9, 16, 17, 24, 25])
            column = position // 32 * 32 + 2 * (position % 32 // 8) + t[position % 8]
        stored[:, position] = s[:, column]
        return {codes: words(packed), scales: torch.from_numpy(stored)}, ((q - 8) * s[group].astype(np.float32)).T

    return write


def marlin_row(rng, N, K, size):
    """Marlin with one group, whose scales are in another order."""
    return marlin()(rng, N, K, -1)


def eetq(rng, N, K, size):
    q, s = rng.integers(-128, 128, (K, N)), random_scales(rng, N) / np.float16(8)
    k, n = np.meshgrid(np.arange(K), np.arange(N), indexing="ij")
    at = (n >> 1) * 2 * K + (k >> 6) * 128 + (n & 1) * 64 + (k & 48) + (((k & 7) << 1) | ((k >> 3) & 1))
    stored = np.empty(K * N, np.uint8)
    stored[at] = (q + 128) & 255
    weight = torch.from_numpy(stored.view(np.int8).reshape(K, N))
    return {"weight": weight, "weight_scales": torch.from_numpy(s)}, (q * s.astype(np.float32)).T


def int8(rng, N, K, size):
    q, SCB = rng.integers(-127, 128, (N, K)), rng.uniform(0.05, 0.2, N).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(q.astype(np.int8)),
        "SCB": torch.from_numpy(SCB),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, (q * SCB[:, None].astype(np.float64) / 127).astype(np.float32)


def fourbit(kind, nested, storage=torch.uint8):
    def write(rng, N, K, size):
        code = np.array(NF4 if kind == "nf4" else FP4, np.float32)
        q, blocks = rng.integers(0, 16, N * K), -(-N * K // 64)
        packed = torch.from_numpy((q[::2] << 4 | q[1::2]).astype(np.uint8)).reshape(-1, 1)
        numbers = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [N, K]}
        tensors = {"weight": packed.reshape(-1, storage.itemsize).view(storage)}
        if nested:
            inner, outer = np.linspace(-1, 1, 256, dtype=np.float32), rng.uniform(0.05, 0.1, -(-blocks // 256))
            at, outer = rng.integers(0, 256, blocks), outer.astype(np.float32)
            absmax = inner[at] * outer[np.arange(blocks) // 256] + np.float32(0.25)
            numbers |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            tensors |= {
                "weight.absmax": torch.from_numpy(at.astype(np.uint8)),
                "weight.nested_absmax": torch.from_numpy(outer),
                "weight.nested_quant_map": torch.from_numpy(inner),
            }
        else:
            absmax = rng.uniform(0.1, 0.3, blocks).astype(np.float32)
            tensors["weight.absmax"] = torch.from_numpy(absmax)
        tensors["weight.quant_map"] = torch.from_numpy(code)
        state = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = state
        return tensors, (code[q] * absmax[np.arange(N * K) // 64]).reshape(N, K)

    return write


def fp8(kind, key="weight_scale", dtype=torch.float32, input_scale=False):
    def write(rng, N, K, size):
        wide = torch.from_numpy(rng.normal(size=(N, K)).astype(np.float32) * 100)
        # Some versions of torch make NaN of what is larger.
        weight = wide.clamp(-448, 448).to(torch.float8_e4m3fn)
        shape = {"scalar": (), "tensor": (1,), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}[kind]
        scale = torch.from_numpy(rng.uniform(0.0005, 0.001, shape).astype(np.float32)).to(dtype)
        wide = scale.float()
        if kind == "block":
            wide = wide.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
        tensors = {"weight": weight, key: scale}
        if input_scale:
            tensors["input_scale"] = torch.tensor(0.01)
        return tensors, (weight.float() * wide).numpy()

    return write


def compressed(bits, *, sym=True, act_order=False, zeros="packed", scalar=False, dtype=torch.float16):
    """compressed-tensors' pack-quantized: signed integers, to which half the range is added in the words."""

    def write(rng, N, K, size):
        half, group = 2 ** (bits - 1), group_of(K, -1 if scalar else size)
        group = rng.permutation(group) if act_order else group
        G = group.max() + 1
        q, z = rng.integers(-half, half, (N, K)), np.zeros((N, G), np.int64)
        if not sym:
            z = rng.integers(-half, half, (N, G))
        s = torch.from_numpy(random_scales(rng, *((1,) if scalar else (N, G)))).to(dtype)
        tensors = {
            "weight_packed": words(stream((q + half).T, bits).T),
            "weight_scale": s,
            "weight_shape": torch.tensor([N, K]),
        }
        if not sym:
            packed = words(stream(z + half, bits))
            tensors["weight_zero_point"] = packed if zeros == "packed" else torch.from_numpy(z.astype(np.int8))
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
        elif zeros == "unordered":
            tensors["weight_g_idx"] = torch.full((K,), -1, dtype=torch.int32)
        wide = s.float().numpy() * np.ones((N, G), np.float32)
        return tensors, (q - z[:, group]) * wide[:, group]

    return write


def integers(kind, dtype=torch.bfloat16):
    """compressed-tensors' int-quantized."""

    def write(rng, N, K, size):
        shape, group = {"tensor": ((1,), 0), "channel": ((N, 1), 0), "group": ((N, K // size), np.arange(K) // size)}[
            kind
        ]
        q = rng.integers(-128, 128, (N, K))
        s = torch.from_numpy(rng.uniform(0.0005, 0.002, shape).astype(np.float32)).to(dtype)
        wide = s.float().numpy() * np.ones((N, shape[-1] if kind == "group" else 1), np.float32)
        return {"weight": torch.from_numpy(q.astype(np.int8)), "weight_scale": s}, q * wide[:, group].reshape(N, -1)

    return write


def with_bound(write):
    """fbgemm's files with the bound of activations beside each weight."""

    def wrapped(rng, N, K, size):
        tensors, W = write(rng, N, K, size)
        return tensors | {"input_scale_ub": torch.tensor([1200.0])}, W

    return wrapped


def with_dimensions(write):
    """modelopt's blocks: the grid of scales has a dimension of one element after each of its two."""

    def wrapped(rng, N, K, size):
        tensors, W = write(rng, N, K, size)
        return tensors | {"weight_scale": tensors["weight_scale"][:, None, :, None]}, W

    return wrapped


def with_bytes(write):
    """Scales of e8m0 under the name of their bytes."""

    def wrapped(rng, N, K, size):
        tensors, W = write(rng, N, K, size)
        return tensors | {"weight_scale_inv": tensors["weight_scale_inv"].view(torch.uint8)}, W

    return wrapped
