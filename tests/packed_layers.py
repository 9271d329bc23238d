"""Layers of the formats that can be packed, made of random bits: also those bits that no code fills."""

import numpy as np
import torch

from qlinear import _qlinear


def words(random, *shape):
    return torch.from_numpy(random.integers(-(2**31), 2**31, shape).astype(np.int32))


def random_bytes(random, *shape):
    return torch.from_numpy(random.integers(0, 256, shape).astype(np.uint8))


def floats(random, dtype, *shape):
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32)).to(dtype)


def groups_of(k, group_size):
    size = k if group_size == -1 else min(group_size, k)
    return size, -(-k // size)


def make_gptq(random, n, k, bits, group_size, dtype, act_order, zero_format):
    size, groups = groups_of(k, group_size)
    g_idx = torch.from_numpy(random.permutation(np.arange(k) // size).astype(np.int32)) if act_order else None
    tensors = (
        words(random, -(-k * bits // 32), n),
        words(random, groups, -(-n * bits // 32)),
        floats(random, dtype, groups, n),
    )
    layer = _qlinear.QuantLinear(
        *tensors, g_idx, bits=bits, group_size=group_size, in_features=k, zero_format=zero_format
    )
    return layer, tensors, g_idx


def make_awq(random, n, k, group_size, dtype):
    _, groups = groups_of(k, group_size)
    tensors = (words(random, k, -(-n // 8)), words(random, groups, -(-n // 8)), floats(random, dtype, groups, n))
    return _qlinear.AWQLinear(*tensors, group_size=group_size), tensors


def make_eetq(random, n, k, dtype):
    tensors = (random_bytes(random, k, n).view(torch.int8), floats(random, dtype, n))
    return _qlinear.EETQLinear(*tensors), tensors


def make_fourbit(random, n, k, blocksize, nested_blocksize):
    blocks = n * k // blocksize
    code = floats(random, torch.float32, 16)
    weight = random_bytes(random, n * k // 2, 1)
    options = {"shape": (n, k), "blocksize": blocksize}
    if not nested_blocksize:
        tensors = (weight, floats(random, torch.float32, blocks), code)
        return _qlinear.Linear4bit(*tensors, **options), tensors
    tensors = (
        weight,
        random_bytes(random, blocks),
        code,
        floats(random, torch.float32, -(-blocks // nested_blocksize)),
        floats(random, torch.float32, 256),
    )
    layer = _qlinear.Linear4bit(
        *tensors[:3],
        nested_absmax=tensors[3],
        nested_code=tensors[4],
        nested_offset=0.25,
        nested_blocksize=nested_blocksize,
        **options,
    )
    return layer, tensors
