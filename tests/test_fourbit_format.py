"""bitsandbytes' 4-bit and 8-bit blockwise formats: every decision point, against an emulation in NumPy, and Linear4bit
against float64 on the weights that it stands for."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear import _qlinear

F = np.float32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TYPES = ["nf4", "fp4"]

NF4 = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 = np.array([*NF4, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1], F)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], F) / F(12)
CODES = {"nf4": NF4, "fp4": FP4}

# (threshold, code at or below it, code above it), of magnitudes for FP4. NF4's are the midpoints of the code by the
# decimals in bitsandbytes' source: four of them are ties between two fp32 numbers, which the rounding of the midpoint
# itself takes the other way. The bits are those in its compiled kernels.
NF4_BITS = [0xBF591CD9, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC, 0xBD3A7871, 0x3D22FAFF]
NF4_BITS += [0x3DF64863, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9, 0x3F006D03, 0x3F248DAF, 0x3F5C89D9]
NF4_STEPS = [(threshold, i, i + 1) for i, threshold in enumerate(np.array(NF4_BITS, np.uint32).view(F))]
FP4_STEPS = [
    (F(0.00260417), 0, 1),
    (F(0.0859375), 1, 6),
    (F(0.20833333), 6, 7),
    (F(0.29166667), 7, 4),
    (F(0.4166667), 4, 5),
    (F(0.583333), 5, 2),
    (F(0.8333333), 2, 3),
]


def name(dtype):
    return str(dtype).removeprefix("torch.")


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def code_tensor(quant_type):
    return tensor(CODES[quant_type])


def emulate_codes(xn, quant_type):
    """Codes of normalized fp32 values: the steps taken one after the other, as a branch each."""
    if quant_type == "nf4":
        q = np.zeros(xn.shape, np.uint8)
        for threshold, _, above in NF4_STEPS:
            q[xn > threshold] = above
        return q
    q = np.zeros(xn.shape, np.uint8)
    for threshold, _, above in FP4_STEPS:
        q[np.abs(xn) > threshold] = above
    return q | np.where(xn < 0, 8, 0).astype(np.uint8)


def emulate_normalized(x, blocksize):
    """x fp32 [n] -> (x * (1 / absmax of its block), absmax [blocks])."""
    blocks = -(-len(x) // blocksize)
    padded = np.zeros(blocks * blocksize, F)
    padded[: len(x)] = x
    with np.errstate(all="ignore"):
        absmax = np.abs(padded.reshape(blocks, blocksize)).max(axis=1, initial=F(0))
        return (padded.reshape(blocks, blocksize) * (F(1) / absmax)[:, None]).reshape(-1), absmax


def emulate_quantize(x, quant_type, blocksize):
    xn, absmax = emulate_normalized(x, blocksize)
    q = emulate_codes(xn, quant_type)[: len(x) + len(x) % 2]
    return (q[::2] << 4 | q[1::2]).astype(np.uint8)[:, None], absmax


def emulate_dequantize(packed, absmax, code, count, blocksize):
    flat = packed.reshape(-1)
    q = np.stack([flat >> 4, flat & 15], 1).reshape(-1)[:count]
    with np.errstate(all="ignore"):
        return code[q] * np.repeat(absmax, blocksize)[:count]


def same_bits(got, wanted):
    """Equal to the bit, but that any NaN is as good as another."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(got), nan)
    unsigned = np.dtype(f"u{got.itemsize}")
    assert np.array_equal(got.view(unsigned)[~nan], wanted.view(unsigned)[~nan])


def nibbles(packed):
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(-1)


def codes_of(values, quant_type):
    """The codes of values of magnitude at most 1, each in a block whose absmax is 1."""
    blocks = torch.zeros(len(values), 32)
    blocks[:, 0] = tensor(np.asarray(values, F))
    blocks[:, 1] = 1
    packed, absmax = _qlinear.quantize_4bit(blocks, quant_type=quant_type, blocksize=32)
    assert torch.equal(absmax, torch.ones(len(values)))
    return nibbles(packed).reshape(-1, 32)[:, 0].tolist()


# ---- code tables and decisions ----


@pytest.mark.parametrize("quant_type", TYPES)
def test_code_table(quant_type):
    same_bits(np.array(_qlinear.fourbit_code(quant_type), F), CODES[quant_type])


def test_golden_nf4():
    golden = {1.0: 15, 0.87: 15, 0.85: 14, 0.04: 8, 0.03: 7, -0.04: 7, -0.05: 6, -0.84: 1, -0.85: 0}
    assert codes_of(list(golden), "nf4") == list(golden.values())


def test_golden_fp4():
    golden = {1.0: 3, 0.84: 3, 0.83: 2, 0.59: 2, 0.58: 5, 0.42: 5, 0.41: 4, 0.30: 4, 0.29: 7, 0.21: 7, 0.20: 6, 0.09: 6}
    golden |= {0.08: 1, 0.003: 1, 0.002: 0, -1e-6: 8, -0.09: 14, -0.30: 12, -1.0: 11}
    assert codes_of(list(golden), "fp4") == list(golden.values())


def test_nf4_steps_are_strict():
    for threshold, at, above in NF4_STEPS:
        around = [np.nextafter(threshold, F(-2)), threshold, np.nextafter(threshold, F(2))]
        assert codes_of(around, "nf4") == [at, at, above]


@pytest.mark.parametrize("sign", [1, -1])
def test_fp4_steps_are_strict(sign):
    bit = 0 if sign > 0 else 8
    for threshold, at, above in FP4_STEPS:
        around = [np.nextafter(threshold, F(0)), threshold, np.nextafter(threshold, F(2))]
        assert codes_of([sign * value for value in around], "fp4") == [at | bit, at | bit, above | bit]


def test_signs_of_zero():
    tiny = F(1e-45)
    assert codes_of([0.0, -0.0, tiny, -tiny], "fp4") == [0, 0, 0, 8]
    assert codes_of([0.0, -0.0, tiny, -tiny], "nf4") == [7, 7, 7, 7]


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_reciprocal_is_rounded_before_the_product(quant_type):
    """Values beside a threshold times an absmax: where quotient and product by the reciprocal fall on its two sides."""
    rng = np.random.default_rng(1)
    absmax = rng.uniform(0.5, 2, 4096).astype(F)
    steps = NF4_STEPS if quant_type == "nf4" else FP4_STEPS
    threshold = np.array([step[0] for step in steps])[rng.integers(0, len(steps), 4096)]
    x = (threshold * absmax).astype(F)
    product, quotient = (x * (F(1) / absmax)).astype(F), (x / absmax).astype(F)
    differ = emulate_codes(product, quant_type) != emulate_codes(quotient, quant_type)
    assert differ.sum() > 100
    blocks = np.zeros((4096, 32), F)
    blocks[:, 0], blocks[:, 31] = x, absmax
    packed, _ = _qlinear.quantize_4bit(tensor(blocks), quant_type=quant_type, blocksize=32)
    assert np.array_equal(nibbles(packed).reshape(-1, 32)[:, 0].numpy(), emulate_codes(product, quant_type))


# ---- blocks that are not numbers, or hardly ----


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_stay_zero(quant_type, dtype):
    x = torch.zeros(3, 64, dtype=dtype)
    x[1] = -0.0
    x[2, 5] = 1
    packed, absmax = _qlinear.quantize_4bit(x, quant_type=quant_type, blocksize=64)
    assert absmax.tolist() == [0, 0, 1]
    assert nibbles(packed)[:128].eq(0).all()
    back = _qlinear.dequantize_4bit(packed, absmax, code_tensor(quant_type), count=192, blocksize=64, dtype=name(dtype))
    assert back[:128].eq(0).all()
    assert back[133] == 1


@pytest.mark.parametrize("quant_type", TYPES)
def test_nan_and_infinity_stay_in_their_block(quant_type):
    x = torch.ones(4, 32)
    x[1, 3] = float("nan")
    x[2, 4] = float("-inf")
    packed, absmax = _qlinear.quantize_4bit(x, quant_type=quant_type, blocksize=32)
    q = nibbles(packed).reshape(4, 32)
    assert absmax[1].isnan()
    assert absmax[2] == float("inf")
    assert q[1].eq(0).all()
    back = _qlinear.dequantize_4bit(packed, absmax, code_tensor(quant_type), count=128, blocksize=32, dtype="float32")
    back = back.reshape(4, 32)
    assert not back[2].isfinite().any() or quant_type == "nf4"
    assert not back[1:3, 3:5].isfinite().all()
    if quant_type == "nf4":
        assert back[1].isnan().all()
        assert back[2, 4] == float("-inf")
    assert back[0].eq(1).all()
    assert back[3].eq(1).all()


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("scale", [1e-38, 2.0**-126, 1e-40, 1e-45, 3e38])
def test_scales_at_the_ends_of_fp32(quant_type, scale):
    x = (np.linspace(-1, 1, 97) * scale).astype(F)
    packed, absmax = _qlinear.quantize_4bit(tensor(x), quant_type=quant_type, blocksize=32)
    wanted_packed, wanted_absmax = emulate_quantize(x, quant_type, 32)
    same_bits(absmax, wanted_absmax)
    assert np.array_equal(packed, wanted_packed)


# ---- shapes, strides, odd counts ----


@pytest.mark.parametrize(("quant_type", "pad"), [("nf4", 7), ("fp4", 0)])
def test_odd_counts(quant_type, pad):
    rng = np.random.default_rng(2)
    for count in range(1, 131):
        x = rng.standard_normal(count).astype(F)
        packed, absmax = _qlinear.quantize_4bit(tensor(x), quant_type=quant_type, blocksize=64)
        wanted_packed, wanted_absmax = emulate_quantize(x, quant_type, 64)
        assert packed.shape == ((count + 1) // 2, 1)
        assert np.array_equal(packed, wanted_packed)
        same_bits(absmax, wanted_absmax)
        if count % 2:
            assert int(packed[-1, 0]) & 15 == pad
        back = _qlinear.dequantize_4bit(
            packed, absmax, code_tensor(quant_type), count=count, blocksize=64, dtype="float32"
        )
        same_bits(back, emulate_dequantize(wanted_packed, wanted_absmax, CODES[quant_type], count, 64))


def test_no_values():
    packed, absmax = _qlinear.quantize_4bit(torch.empty(0, 5), quant_type="nf4", blocksize=64)
    assert packed.shape == (0, 1)
    assert absmax.shape == (0,)
    assert _qlinear.dequantize_4bit(
        packed, absmax, code_tensor("nf4"), count=0, blocksize=64, dtype="float32"
    ).shape == (0,)
    code = torch.tensor(_qlinear.dynamic_map())
    codes, absmax = _qlinear.quantize_blockwise(torch.empty(3, 0), code, blocksize=64)
    assert codes.shape == (3, 0)
    assert absmax.shape == (0,)


@st.composite
def strided_tensors(draw):
    """A float tensor of one to four dimensions as a view: permuted, stepped, expanded or whole."""
    shape = [*draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), draw(st.integers(1, 150))]
    dtype = draw(st.sampled_from([*DTYPES, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    x = torch.randn([size * step for size, step in zip(shape, steps, strict=True)], generator=generator).to(dtype)
    x = x[tuple(slice(None, None, step) for step in steps)].permute(draw(st.permutations(range(len(shape)))))
    return x.expand(3, *x.shape) if draw(st.booleans()) else x


@settings(max_examples=80, deadline=None)
@given(x=strided_tensors(), quant_type=st.sampled_from(TYPES), blocksize=st.sampled_from([32, 64, 256, 4096]))
def test_quantize_any_tensor(x, quant_type, blocksize):
    flat = x.to(torch.float32).contiguous().reshape(-1).numpy()
    packed, absmax = _qlinear.quantize_4bit(x, quant_type=quant_type, blocksize=blocksize)
    wanted_packed, wanted_absmax = emulate_quantize(flat, quant_type, blocksize)
    assert np.array_equal(packed, wanted_packed)
    same_bits(absmax, wanted_absmax)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 700),
    quant_type=st.sampled_from(TYPES),
    blocksize=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_codes_survive_the_round_trip(seed, count, quant_type, blocksize, dtype):
    """Any codes, given one of magnitude 1 in each block; absmax is a power of two, so that 16 bits hold the products of
    the code rounded. FP4's 8 is a zero, whose code is 0."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, count).astype(np.uint8)
    q[::blocksize] = 15 if quant_type == "nf4" else 11
    if quant_type == "fp4":
        q[q == 8] = 0
    padded = np.append(q, [7 if quant_type == "nf4" else 0] * (count % 2)).astype(np.uint8)
    packed = (padded[::2] << 4 | padded[1::2])[:, None]
    absmax = F(2) ** rng.integers(-6, 6, -(-count // blocksize)).astype(F)
    x = _qlinear.dequantize_4bit(
        tensor(packed), tensor(absmax), code_tensor(quant_type), count=count, blocksize=blocksize, dtype=name(dtype)
    )
    assert x.dtype == dtype
    again, again_absmax = _qlinear.quantize_4bit(x, quant_type=quant_type, blocksize=blocksize)
    assert np.array_equal(again, packed)
    same_bits(again_absmax, absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(dtype):
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, 5001).astype(np.uint8)
    absmax = (rng.standard_normal(157) ** 2 * 100).astype(F)
    code = rng.standard_normal(16).astype(F)
    got = _qlinear.dequantize_4bit(
        tensor(packed), tensor(absmax), tensor(code), count=10001, blocksize=64, dtype=name(dtype)
    )
    wanted = tensor(emulate_dequantize(packed, absmax, code, 10001, 64)).to(dtype)
    assert torch.equal(got, wanted)


# ---- the dynamic map and 8-bit blocks ----


def test_dynamic_map():
    code = np.array(_qlinear.dynamic_map(), F)
    golden = {0: -0.99296874, 1: -0.97890627, 31: -0.55703127, 64: -0.09859375, 126: -5.5e-07, 127: 0, 128: 5.5e-07}
    golden |= {191: 0.10703125, 223: 0.55703127, 255: 1}
    for index, value in golden.items():
        assert abs(code[index] - F(value)) <= np.spacing(np.abs(F(value)))
    # All 256 entries to the bit, as bitsandbytes 0.50 makes them on an x86 with FMA.
    assert hashlib.sha256(code.astype("<f4").tobytes()).hexdigest() == MAP_SHA256
    ideal = [0.0, 1.0]
    for i in range(7):
        for j in range(2**i):
            ideal += [sign * 10.0 ** (i - 6) * (0.1 + 0.9 * (2 * j + 1) / 2 ** (i + 1)) for sign in (1, -1)]
    assert np.all(np.abs(code - np.sort(ideal)) <= 2 * np.spacing(np.abs(code)))


MAP_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def fold(lanes):
    """The sum of each row's 256 lanes, the upper half added to the lower until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def in_lanes(values):
    """fp64 sums by i % 256, in ascending order."""
    lanes = np.zeros(256)
    for row in np.pad(values.astype(np.float64), (0, -len(values) % 256)).reshape(-1, 256):
        lanes += row
    return lanes


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 65536, 65537, 300_000, 17_000_001])
def test_absmax_mean_is_summed_in_one_order(count):
    rng = np.random.default_rng(count)
    values = (rng.random(count) * np.exp(20 * rng.random(count))).astype(F)
    chunks = [fold(in_lanes(values[at : at + 65536])) for at in range(0, count, 65536)]
    with np.errstate(invalid="ignore"):
        wanted = F(fold(in_lanes(np.array(chunks))) / np.float64(count))
    got = _qlinear.absmax_mean(tensor(values))
    assert got.shape == ()
    assert np.array_equal(got.numpy(), wanted, equal_nan=True)


def test_absmax_mean_keeps_what_is_not_finite():
    for value in (np.inf, np.nan):
        values = np.ones(70_000, F)
        values[66_000] = value
        assert np.array_equal(_qlinear.absmax_mean(tensor(values)).numpy(), F(value), equal_nan=True)


def test_dynamic_map_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch's linspace has no fused product and sum here, so bitsandbytes' map is another one")
    for total_bits in range(2, 9):
        for max_exponent_bits in range(1, total_bits):
            arguments = (True, max_exponent_bits, total_bits)
            same_bits(np.array(_qlinear.dynamic_map(*arguments), F), functional.create_dynamic_map(*arguments).numpy())
        arguments = (False, total_bits - 1, total_bits)
        same_bits(np.array(_qlinear.dynamic_map(*arguments), F), functional.create_dynamic_map(*arguments).numpy())


def emulate_nearest(xn, code):
    """The nearest of 256 distinct values; on a midpoint the even index, since the bisection ends on even pivots. NaN is
    above nothing."""
    middle = (code[:-1] + code[1:]) * F(0.5)
    q = np.searchsorted(middle, xn, side="left")
    tie = (q < 255) & (xn == middle[np.minimum(q, 254)])
    q = np.where(tie & (q % 2 == 1), q + 1, q)
    return np.where(np.isnan(xn), 0, q).astype(np.uint8)


def test_nearest_on_both_sides_of_every_midpoint():
    code = np.array(_qlinear.dynamic_map(), F)
    middle = (code[:-1] + code[1:]) * F(0.5)
    x = np.stack([np.nextafter(middle, F(-2)), middle, np.nextafter(middle, F(2))], 1).reshape(-1)
    blocks = np.zeros((len(x), 32), F)
    blocks[:, 0], blocks[:, 1] = x, 1
    q, absmax = _qlinear.quantize_blockwise(tensor(blocks), tensor(code), blocksize=32)
    assert absmax.eq(1).all()
    q = q[:, 0].numpy().reshape(-1, 3)
    index = np.arange(255)
    assert np.array_equal(q[:, 0], index)
    assert np.array_equal(q[:, 1], index + index % 2)
    assert np.array_equal(q[:, 2], index + 1)


@settings(max_examples=60, deadline=None)
@given(x=strided_tensors(), blocksize=st.sampled_from([32, 64, 256]))
def test_quantize_blockwise_any_tensor(x, blocksize):
    code = np.array(_qlinear.dynamic_map(), F)
    flat = x.to(torch.float32).contiguous().reshape(-1).numpy()
    q, absmax = _qlinear.quantize_blockwise(x, tensor(code), blocksize=blocksize)
    xn, wanted_absmax = emulate_normalized(flat, blocksize)
    wanted = emulate_nearest(xn[: len(flat)], code)
    assert q.shape == x.shape
    assert np.array_equal(q.reshape(-1), wanted)
    same_bits(absmax, wanted_absmax)
    for dtype in DTYPES:
        back = _qlinear.dequantize_blockwise(q, absmax, tensor(code), blocksize=blocksize, dtype=name(dtype))
        wanted_values = tensor((code[wanted] * np.repeat(wanted_absmax, blocksize)[: len(flat)]).reshape(x.shape))
        assert torch.equal(back, wanted_values.to(dtype))


def test_8_bit_zero_and_nan_blocks():
    code = torch.tensor(_qlinear.dynamic_map())
    x = torch.ones(3, 32)
    x[0] = 0
    x[1, 7] = float("nan")
    q, absmax = _qlinear.quantize_blockwise(x, code, blocksize=32)
    assert q[0].eq(0).all()
    assert q[1].eq(0).all()
    back = _qlinear.dequantize_blockwise(q, absmax, code, blocksize=32, dtype="float32")
    assert back[0].eq(0).all()
    assert back[1].isnan().all()
    assert back[2].eq(1).all()


def test_numpy_in_numpy_out():
    rng = np.random.default_rng(4)
    for dtype in (F, np.float16, ml_dtypes.bfloat16):
        x = rng.standard_normal((7, 33)).astype(dtype)
        packed, absmax = _qlinear.quantize_4bit(x, quant_type="nf4", blocksize=32)
        assert isinstance(packed, np.ndarray)
        wanted_packed, wanted_absmax = emulate_quantize(x.astype(F).reshape(-1), "nf4", 32)
        assert np.array_equal(packed, wanted_packed)
        same_bits(absmax, wanted_absmax)
        back = _qlinear.dequantize_4bit(packed, absmax, NF4, count=231, blocksize=32, dtype=np.dtype(dtype).name)
        assert back.dtype == dtype


# ---- the layer ----


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def make_layer(rng, N, K, blocksize, quant_type="nf4", nested=False, bias=None):
    """A layer of random bytes, and the fp32 weight that they stand for."""
    count, blocks = N * K, -(-N * K // blocksize)
    packed = rng.integers(0, 256, (count + 1) // 2).astype(np.uint8)
    arguments = {"shape": (N, K), "blocksize": blocksize}
    if nested:
        q = rng.integers(0, 256, blocks).astype(np.uint8)
        nested_absmax = rng.uniform(0.01, 0.1, -(-blocks // 256)).astype(F)
        code = np.array(_qlinear.dynamic_map(), F)
        absmax = (code[q] * np.repeat(nested_absmax, 256)[:blocks] + F(0.125)).astype(F)
        arguments |= {"nested_absmax": tensor(nested_absmax), "nested_code": tensor(code), "nested_offset": 0.125}
    else:
        q = absmax = rng.uniform(0.01, 0.1, blocks).astype(F)
    weight = emulate_dequantize(packed, absmax, CODES[quant_type], count, blocksize).reshape(N, K)
    layer = _qlinear.Linear4bit(tensor(packed), tensor(q), code_tensor(quant_type), bias, **arguments)
    return layer, weight


SIZES = [
    (1, 1, 32),
    (3, 5, 32),
    (7, 33, 64),
    (16, 100, 32),
    (64, 96, 128),
    (5, 513, 4096),
    (33, 64, 64),
    (20, 4096, 32),
]


@pytest.mark.parametrize(("N", "K", "blocksize"), SIZES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", TYPES)
def test_layer_dequantizes_exactly(rng, N, K, blocksize, nested, quant_type):
    layer, weight = make_layer(rng, N, K, blocksize, quant_type, nested)
    assert (layer.out_features, layer.in_features) == (N, K)
    assert f"blocksize={blocksize}" in repr(layer)
    for dtype in DTYPES:
        assert torch.equal(layer.dequantize(name(dtype)), tensor(weight).to(dtype))


def check_product(got, x, weight, bias=None):
    """Elementwise: sums in fp32, one rounding of the output, and for bfloat16 one of the weight."""
    reference = x.double().numpy() @ weight.astype(np.float64).T
    size = np.abs(x.double().numpy()) @ np.abs(weight.astype(np.float64)).T
    if bias is not None:
        reference = reference + bias.double().numpy()
        size = size + np.abs(bias.double().numpy())
    half_ulp = torch.finfo(x.dtype).eps / 2
    factor = (weight.shape[1] + 8) * 2.0**-24 + (2.0**-8 if x.dtype == torch.bfloat16 else 0)
    bound = factor * size * (1 + half_ulp) + half_ulp * np.abs(reference) + torch.finfo(x.dtype).smallest_normal
    assert got.dtype == x.dtype
    assert np.all(np.abs(got.double().numpy() - reference) <= bound)


@pytest.mark.parametrize(("N", "K", "blocksize"), SIZES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_multiplies(rng, N, K, blocksize, nested, dtype):
    bias = torch.randn(N)
    layer, weight = make_layer(rng, N, K, blocksize, "fp4", nested, bias)
    for M in (1, 3, 17):
        x = tensor(rng.standard_normal((M, K)).astype(F)).to(dtype)
        check_product(layer(x), x, weight, bias)


def test_layer_takes_bytes_of_any_shape(rng):
    packed = tensor(rng.integers(0, 256, 48).astype(np.uint8))
    absmax = tensor(rng.uniform(0.5, 1, 3).astype(F))
    outputs = [
        _qlinear.Linear4bit(packed.reshape(shape), absmax, code_tensor("nf4"), shape=(6, 16), blocksize=32).dequantize()
        for shape in [(48,), (48, 1), (1, 48), (6, 8), (2, 3, 8)]
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_layer_sees_its_tensors_change(rng):
    packed = tensor(rng.integers(0, 256, 48).astype(np.uint8))
    absmax = torch.ones(3)
    layer = _qlinear.Linear4bit(packed, absmax, code_tensor("nf4"), shape=(6, 16), blocksize=32)
    before = layer.dequantize()
    absmax.mul_(2)
    assert torch.equal(layer.dequantize(), before * 2)
    packed.data = torch.zeros(48, dtype=torch.uint8)
    assert layer.dequantize().eq(-2).all()


# ---- malformed input ----


def bytes_of(count):
    return torch.zeros(count, dtype=torch.uint8)


GOOD = {
    "weight": bytes_of(128),
    "absmax": torch.ones(4),
    "code": code_tensor("nf4"),
    "shape": (4, 64),
    "blocksize": 64,
}
NESTED = GOOD | {
    "absmax": bytes_of(4),
    "nested_absmax": torch.ones(1),
    "nested_code": torch.ones(256),
}
BAD_LAYERS = [
    ({"weight": None}, TypeError, "weight must be a tensor"),
    ({"weight": torch.zeros(128)}, TypeError, "weight must be uint8, got float32"),
    ({"weight": bytes_of(127)}, ValueError, "weight must have 128 elements"),
    ({"weight": bytes_of(129)}, ValueError, "weight must have 128 elements"),
    ({"weight": bytes_of(256)[::2]}, ValueError, "weight must be contiguous"),
    ({"weight": "bytes"}, TypeError, "weight must be a tensor"),
    ({"absmax": None}, TypeError, "absmax must be a tensor"),
    ({"absmax": torch.ones(5)}, ValueError, "absmax must have 4 elements"),
    ({"absmax": torch.ones(4).half()}, TypeError, "absmax must be float32 or uint8, got float16"),
    ({"absmax": torch.ones(8)[::2]}, ValueError, "absmax must be contiguous"),
    ({"code": None}, TypeError, "code must be a tensor"),
    ({"code": torch.ones(15)}, ValueError, "code must have 16 elements"),
    ({"code": torch.ones(16).double()}, TypeError, "code must be float32, got float64"),
    ({"shape": (4, 65)}, ValueError, "weight must have 130 elements"),
    ({"shape": (0, 64)}, ValueError, "shape must be two positive"),
    ({"shape": (-4, 64)}, ValueError, "shape must be two positive"),
    ({"shape": (2**40, 2**40)}, ValueError, "shape must be two positive"),
    ({"shape": (2**61, 1)}, ValueError, "shape must be two positive"),
    ({"shape": (2**70, 1)}, ValueError, r"shape\[0\] is out of range"),
    ({"shape": (4, 64.0)}, TypeError, r"shape\[1\] must be an int"),
    ({"shape": (256,)}, TypeError, "shape must be a pair"),
    ({"shape": 256}, TypeError, "shape must be a pair"),
    ({"blocksize": 0}, ValueError, "blocksize must be a power of two"),
    ({"blocksize": -64}, ValueError, "blocksize must be a power of two"),
    ({"blocksize": 16}, ValueError, "blocksize must be a power of two"),
    ({"blocksize": 96}, ValueError, "blocksize must be a power of two"),
    ({"blocksize": 64.0}, TypeError, "blocksize must be an int"),
    ({"blocksize": 32}, ValueError, "absmax must have 8 elements"),
    ({"nested_absmax": torch.ones(1)}, ValueError, "nested_absmax belongs to an absmax of uint8"),
    ({"nested_code": torch.ones(256)}, ValueError, "nested_code belongs to an absmax of uint8"),
    ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[4\]"),
    ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias must be"),
    ({"quant_type": "nf4"}, TypeError, "has no argument 'quant_type'"),
]
BAD_NESTED = [
    ({"nested_absmax": None}, ValueError, "nested_absmax is missing"),
    ({"nested_code": None}, ValueError, "nested_code is missing"),
    ({"nested_absmax": torch.ones(2)}, ValueError, "nested_absmax must have 1 elements"),
    ({"nested_absmax": torch.ones(1).half()}, TypeError, "nested_absmax must be float32"),
    ({"nested_code": torch.ones(255)}, ValueError, "nested_code must have 256 elements"),
    ({"nested_blocksize": 0}, ValueError, "nested_blocksize must be a power of two"),
    ({"nested_blocksize": 2**70}, ValueError, "nested_blocksize is out of range"),
    ({"nested_offset": "0"}, TypeError, "nested_offset must be a float"),
]


@pytest.mark.parametrize(
    ("base", "change", "error", "message"),
    [(GOOD, *row) for row in BAD_LAYERS] + [(NESTED, *row) for row in BAD_NESTED],
)
def test_malformed_layers(base, change, error, message):
    _qlinear.Linear4bit(**base)
    with pytest.raises(error, match=message) as caught:
        _qlinear.Linear4bit(**base | change)
    assert caught.type is error


@pytest.mark.parametrize("missing", ["weight", "absmax", "code", "shape", "blocksize"])
def test_layer_names_what_is_missing(missing):
    arguments = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(TypeError, match=f"Linear4bit: {missing} is missing"):
        _qlinear.Linear4bit(**arguments)


CODE = torch.tensor(_qlinear.dynamic_map())
X = torch.ones(64)
BAD_CALLS = [
    ("fourbit_code", ["int4"], {}, ValueError, "quant_type must be one of 'nf4', 'fp4'"),
    ("fourbit_code", [4], {}, TypeError, "quant_type must be a str"),
    ("dynamic_map", [1], {}, TypeError, "signed must be True or False"),
    ("dynamic_map", [True, 0, 8], {}, ValueError, "max_exponent_bits"),
    ("dynamic_map", [True, 8, 8], {}, ValueError, "max_exponent_bits"),
    ("dynamic_map", [True, 7, 9], {}, ValueError, "total_bits must be in"),
    ("dynamic_map", [True, 1, 1], {}, ValueError, "total_bits must be in"),
    ("dynamic_map", [False, 6, 8], {}, ValueError, "where signed is False"),
    ("quantize_4bit", [X], {"quant_type": "nf4"}, TypeError, "blocksize is missing"),
    ("quantize_4bit", [X], {"quant_type": "nf4", "blocksize": 48}, ValueError, "blocksize must be a power of two"),
    ("quantize_4bit", [X], {"quant_type": "NF4", "blocksize": 64}, ValueError, "quant_type must be one of"),
    ("quantize_4bit", [X.int()], {"quant_type": "nf4", "blocksize": 64}, TypeError, "x must be float32"),
    ("quantize_4bit", [[1.0]], {"quant_type": "nf4", "blocksize": 64}, TypeError, "x must be a tensor"),
    ("quantize_blockwise", [X, CODE], {"blocksize": 3}, ValueError, "blocksize must be a power of two"),
    ("quantize_blockwise", [X, CODE[:255]], {"blocksize": 64}, ValueError, "code must have 256 elements"),
    ("quantize_blockwise", [X, CODE.double()], {"blocksize": 64}, TypeError, "code must be float32"),
    ("quantize_blockwise", [X, CODE.flip(0)], {"blocksize": 64}, ValueError, "code must ascend"),
    ("quantize_blockwise", [X, CODE * float("nan")], {"blocksize": 64}, ValueError, "code must ascend"),
    ("quantize_blockwise", [X.bool(), CODE], {"blocksize": 64}, TypeError, "x must be float32"),
    ("absmax_mean", [X.double()], {}, TypeError, "absmax must be float32"),
    ("absmax_mean", [torch.zeros(4, 4).t()[:2]], {}, ValueError, "absmax must be contiguous"),
]
DEQUANTIZE_4BIT = {"packed": bytes_of(32), "absmax": torch.ones(1), "code": code_tensor("nf4"), "count": 64}
DEQUANTIZE_4BIT |= {"blocksize": 64, "dtype": "float32"}
BAD_DEQUANTIZE_4BIT = [
    ({"packed": bytes_of(33)}, ValueError, "packed must have 32 elements"),
    ({"packed": torch.zeros(32)}, TypeError, "packed must be uint8"),
    ({"absmax": torch.ones(2)}, ValueError, "absmax must have 1 elements"),
    ({"absmax": bytes_of(1)}, TypeError, "absmax must be float32"),
    ({"code": torch.ones(17)}, ValueError, "code must have 16 elements"),
    ({"count": -1}, ValueError, "count must be at least 0"),
    ({"count": 2**63 - 1}, ValueError, "packed must have"),
    ({"count": 65}, ValueError, "packed must have 33 elements"),
    ({"blocksize": 1}, ValueError, "blocksize must be a power of two"),
    ({"dtype": "float64"}, ValueError, "dtype must be one of"),
    ({"dtype": torch.float32}, TypeError, "dtype must be a str"),
]
DEQUANTIZE_8BIT = {"x": bytes_of(64), "absmax": torch.ones(1), "code": CODE, "blocksize": 64, "dtype": "float32"}
BAD_DEQUANTIZE_8BIT = [
    ({"x": torch.zeros(64)}, TypeError, "x must be uint8"),
    ({"x": bytes_of(128)[::2]}, ValueError, "x must be contiguous"),
    ({"absmax": torch.ones(2)}, ValueError, "absmax must have 1 elements"),
    ({"code": CODE[:16]}, ValueError, "code must have 256 elements"),
    ({"blocksize": 33}, ValueError, "blocksize must be a power of two"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "message"),
    [
        *BAD_CALLS,
        *[("dequantize_4bit", [], DEQUANTIZE_4BIT | change, *rest) for change, *rest in BAD_DEQUANTIZE_4BIT],
        *[("dequantize_blockwise", [], DEQUANTIZE_8BIT | change, *rest) for change, *rest in BAD_DEQUANTIZE_8BIT],
    ],
)
def test_malformed_calls(function, arguments, keywords, error, message):
    with pytest.raises(error, match=message) as caught:
        getattr(_qlinear, function)(*arguments, **keywords)
    assert caught.type is error
