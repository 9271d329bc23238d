"""The quantizers and packers on a GPU: the bits of the CPU's, whatever the numbers, sizes and strides."""

import pytest
import torch

from qlinear import _qlinear, functional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The elements' bits as integers; every NaN is one."""
    whole = tensor.contiguous().view(BITS[tensor.element_size()])
    if not tensor.is_floating_point():
        return whole
    return whole.masked_fill(tensor.contiguous().float().isnan(), 0x7F)


def check_same(gpu, cpu):
    gpu, cpu = (value if isinstance(value, tuple) else (value,) for value in (gpu, cpu))
    assert len(gpu) == len(cpu)
    for index, (ours, expected) in enumerate(zip(gpu, cpu, strict=True)):
        if expected is None:
            assert ours is None
            continue
        assert ours.device.type == "cuda"
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        different = (bits(ours.cpu()) != bits(expected)).nonzero()
        assert len(different) == 0, (index, len(different), different[0].tolist())


def check(function, x, *tensors, **options):
    expected = function(x, *tensors, **options)
    check_same(function(x.cuda(), *(t.cuda() for t in tensors), **options), expected)


# ---- numbers ----


def normal(shape):
    return torch.randn(shape)


def ties(shape):
    """Half and whole steps of every quantizer's grid, with a largest magnitude of 1 almost everywhere."""
    grid = torch.tensor([1 / 256, 1 / 254, 1 / 30, 1 / 14, 1 / 448])
    steps = torch.randint(-512, 513, shape) * grid[torch.randint(len(grid), shape)]
    return torch.where(torch.rand(shape) < 0.05, torch.randint(0, 2, shape) * 2.0 - 1, steps.clamp(-1, 1))


def thresholds(shape):
    """Thresholds of the 4-bit codes and midpoints of the 8-bit map, and the floats beside them."""
    found = []
    for code in (functional.get_4bit_type("nf4"), functional.get_4bit_type("fp4"), functional.create_dynamic_map()):
        values = code.sort().values
        found.append((values[1:] + values[:-1]) / 2)
    exact = torch.cat([*found, torch.tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333])])
    beside = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (-2.0, 2.0)]
    pool = torch.cat([exact, *beside, torch.tensor([1.0, -1.0])])
    x = pool[torch.randint(len(pool), shape)]
    x.reshape(-1)[::32] = 1.0
    return x


def raw_bits(shape):
    """Every float: denormals, infinities and NaNs among them."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).view(torch.float32)


def finite_bits(shape):
    x = raw_bits(shape)
    return torch.where(x.isfinite(), x, 1.0)


def with_some(value):
    def make(shape):
        x = torch.randn(shape)
        return torch.where(torch.rand(shape) < 0.003, value, x)

    return make


def zero_rows(shape):
    x = torch.randn(shape)
    x[::2] = 0
    return x * torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)


NUMBERS = {
    "normal": normal,
    "ties": ties,
    "thresholds": thresholds,
    "raw bits": raw_bits,
    "finite bits": finite_bits,
    "infinities": with_some(torch.inf),
    "negative infinities": with_some(-torch.inf),
    "NaN": with_some(torch.nan),
    "zero rows": zero_rows,
    "zeros": lambda shape: torch.zeros(shape),
    "negative zeros": lambda shape: -torch.zeros(shape),
    "denormal": lambda shape: torch.randn(shape) * 1e-40,
    "tiny": lambda shape: torch.randn(shape) * 1e-30,
    "huge": lambda shape: torch.randn(shape) * 1e38,
    "fp16's ends": lambda shape: (torch.randn(shape) * 4e4).clamp(-65504, 65504),
    "constant": lambda shape: torch.full(shape, 0.3),
    "one sign": lambda shape: torch.rand(shape) + 3,
}


@pytest.fixture(params=NUMBERS)
def numbers(request):
    torch.manual_seed(7)
    return NUMBERS[request.param]


def layouts(x):
    """x [R, C] as tensors of the same values: contiguous, transposed, in steps, off the alignment, a row repeated."""
    rows, cols = x.shape
    wide = torch.zeros(rows, 2 * cols + 1, dtype=x.dtype)
    wide[:, 1::2] = x
    shifted = torch.zeros(rows * cols + 1, dtype=x.dtype)
    shifted[1:] = x.reshape(-1)
    return {
        "contiguous": x,
        "transposed": x.t().contiguous().t(),
        "steps": wide[:, 1::2],
        "shifted": shifted[1:].view(rows, cols),
        "repeated": x[:1].expand(rows, cols),
    }


SHAPES = [(2, 64), (34, 192), (130, 1088), (4, 8256), (2, 40000)]
ANY_SHAPES = [(1, 1), (3, 5), (5, 31), (7, 130), (33, 257), (66, 1032), (3, 9001)]


def weights(numbers, shapes):
    for shape in shapes:
        for dtype in FLOATS:
            yield numbers(shape).to(dtype)


# ---- EETQ ----


def test_eetq_quantize(numbers):
    for weight in weights(numbers, SHAPES):
        check(_qlinear.eetq_quantize, weight)


def test_eetq_codes(numbers):
    for weight in weights(numbers, [*SHAPES, *ANY_SHAPES]):
        check(_qlinear.eetq_codes, weight)


@pytest.mark.parametrize(("K", "N"), [(64, 2), (192, 34), (128, 66), (64, 4098)])
def test_eetq_pack_and_unpack(K, N):
    codes = torch.randint(-128, 128, (K, N)).to(torch.int8)
    check(_qlinear.eetq_pack, codes)
    check(_qlinear.eetq_pack, codes.t().contiguous().t())
    check(_qlinear.eetq_unpack, codes)


@pytest.mark.parametrize("unprocessed", [False, True])
def test_quant_weights(unprocessed):
    weight = torch.randn(192, 66).half()
    expected = tuple(functional.quant_weights(weight, return_unprocessed=unprocessed))
    check_same(tuple(functional.quant_weights(weight.cuda(), return_unprocessed=unprocessed)), expected)


# ---- LLM.int8() ----


@pytest.mark.parametrize("threshold", [0.0, 1.0, 6.0])
def test_int8_quantize(numbers, threshold):
    for weight in weights(numbers, [(1, 700), *SHAPES, *ANY_SHAPES]):
        check(_qlinear.int8_quantize, weight, threshold=threshold)


# ---- FP8 ----


@pytest.mark.parametrize("mode", ["tensor", "token", "group", "block"])
def test_fp8_quantize(numbers, mode):
    for x in weights(numbers, [(1, 128), (130, 384), (300, 257), (2, 40000), *ANY_SHAPES]):
        check(_qlinear.fp8_quantize, x, mode=mode)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 0.01, 1.0, 3.0, 1e38, torch.inf, torch.nan])
def test_fp8_static(numbers, scale):
    x = numbers((5, 264))
    e8m0 = torch.tensor([130], dtype=torch.uint8)
    check(_qlinear.fp8_quantize, x, e8m0, mode="static")
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        given = torch.tensor([scale]).to(kind)
        expected = _qlinear.fp8_quantize(x, given, mode="static")
        check_same(_qlinear.fp8_quantize(x.cuda(), given.cuda(), mode="static"), expected)
        check_same(_qlinear.fp8_quantize(x.cuda(), given, mode="static"), expected)


@pytest.mark.parametrize("bound", [1e-3, 0.5, 1200.0, torch.inf, torch.nan])
def test_fp8_upper_bound(numbers, bound):
    x = numbers((5, 264)).half()
    for ub in (torch.tensor([bound]), torch.tensor(bound).bfloat16()):
        expected = _qlinear.fp8_quantize(x, mode="token", scale_ub=ub)
        check_same(_qlinear.fp8_quantize(x.cuda(), mode="token", scale_ub=ub.cuda()), expected)
        check_same(_qlinear.fp8_quantize(x.cuda(), mode="token", scale_ub=ub), expected)


def test_scaled_mm_is_that_of_the_cpu_within_rounding():
    a, sa = functional.scaled_fp8_quant(torch.randn(37, 256), use_per_token_if_dynamic=True)
    b, sb = functional.scaled_fp8_quant(torch.randn(48, 256), use_per_token_if_dynamic=True)
    bias = torch.randn(48)
    exact = (a.double() * sa) @ (b.double() * sb).t() + bias
    magnitude = (a.double().abs() * sa) @ (b.double().abs() * sb).t() + bias.abs()
    for out_dtype, unit in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)):
        given = [t.cuda() for t in (a, b.t(), sa, sb)]
        out = functional.scaled_mm(*given, out_dtype=out_dtype, bias=bias.cuda())
        assert out.dtype == out_dtype
        assert out.is_cuda
        bound = 300 * 2.0**-24 * magnitude + unit * exact.abs()
        assert ((out.cpu().double() - exact).abs() <= bound).all()


# ---- bitsandbytes' blocks ----


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096, 2**20])
def test_quantize_4bit(numbers, quant_type, blocksize):
    for x in weights(numbers, [(count,) for count in (1, 31, 64, 65, 1000, 4097, 20011)]):
        check(_qlinear.quantize_4bit, x, quant_type=quant_type, blocksize=blocksize)


def test_every_float_about_the_thresholds_of_nf4():
    """Four of them are ties between two floats, which the decimal decides and not the rounding of a midpoint."""
    values = functional.get_4bit_type("nf4")
    middles = ((values[1:] + values[:-1]) / 2).view(torch.int32)
    x = torch.cat([(middles + step).view(torch.float32) for step in range(-8, 9)] + [torch.tensor([1.0])])
    check(_qlinear.quantize_4bit, x, quant_type="nf4", blocksize=512)


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_quantize_blockwise(numbers, blocksize):
    code = functional.create_dynamic_map()
    for x in weights(numbers, [(1,), (100,), (4097,), (20011,), (3, 5, 70)]):
        expected = _qlinear.quantize_blockwise(x, code, blocksize=blocksize)
        check_same(_qlinear.quantize_blockwise(x.cuda(), code, blocksize=blocksize), expected)
        check_same(_qlinear.quantize_blockwise(x.cuda(), code.cuda(), blocksize=blocksize), expected)


def test_a_map_that_does_not_ascend_is_refused():
    code = functional.create_dynamic_map().flip(0).cuda()
    with pytest.raises(ValueError, match="ascend"):
        _qlinear.quantize_blockwise(torch.randn(64, device="cuda"), code, blocksize=64)


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("count", [1, 63, 4097, 20011])
def test_dequantize(numbers, out, blocksize, count):
    blocks = -(-count // blocksize)
    absmax, code = numbers((blocks,)), torch.randn(16)
    packed = torch.randint(256, ((count + 1) // 2, 1)).to(torch.uint8)
    options = {"blocksize": blocksize, "dtype": out}
    check(_qlinear.dequantize_4bit, packed, absmax, code, count=count, **options)
    shifted = torch.zeros(len(packed) + 1, dtype=torch.uint8)
    shifted[1:] = packed[:, 0]
    expected = _qlinear.dequantize_4bit(packed, absmax, code, count=count, **options)
    ours = _qlinear.dequantize_4bit(shifted.cuda()[1:], absmax.cuda(), code.cuda(), count=count, **options)
    check_same(ours, expected)
    codes = torch.randint(256, (count,)).to(torch.uint8)
    check(_qlinear.dequantize_blockwise, codes, absmax, functional.create_dynamic_map(), **options)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 65536, 65537, 300_000, 20_000_001])
def test_absmax_mean(count):
    x = torch.rand(count) * torch.rand(count).mul(20).exp()
    check(_qlinear.absmax_mean, x)
    if count:
        exact = x.double().mean()
        assert abs(_qlinear.absmax_mean(x).double() - exact) <= 2.0**-24 * exact


def test_double_quantization():
    for count in (100, 70_000, 5_000_001):
        x = torch.randn(count).half()
        packed, state = functional.quantize_nf4(x, compress_statistics=True)
        ours, ours_state = functional.quantize_nf4(x.cuda(), compress_statistics=True)
        check_same(ours, packed)
        for name in ("absmax", "offset", "code"):
            check_same(getattr(ours_state, name), getattr(state, name))
        check_same(ours_state.state2.absmax, state.state2.absmax)
        check_same(functional.dequantize_nf4(ours, ours_state), functional.dequantize_nf4(packed, state))


# ---- GPTQ and AWQ ----


GROUPS = [1, 4, 8, 20, 32, 64, 128, 1000, -1]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_gptq(numbers, nbits, sym):
    for weight in weights(numbers, [(66, 300), (34, 256), (1, 31)]):
        for group_size in GROUPS:
            options = {"bits": nbits, "group_size": group_size}
            check(_qlinear.gptq_find_params, weight, sym=sym, **options)
            scales, zeros = _qlinear.gptq_find_params(weight, sym=sym, **options)
            check(_qlinear.gptq_pack, weight, scales, zeros, **options)


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2"])
def test_gptq_pack_act_order(nbits, zero_format):
    torch.manual_seed(2)
    weight = torch.randn(40, 256).bfloat16()
    options = {"bits": nbits, "group_size": 32}
    scales, zeros = _qlinear.gptq_find_params(weight, **options)
    shuffled = torch.randperm(256) // 32
    for g_idx in (shuffled, shuffled.int(), shuffled - 8, torch.arange(256) // 32, torch.zeros(256, dtype=torch.int32)):
        check(_qlinear.gptq_pack, weight, scales, zeros, g_idx, zero_format=zero_format, **options)
    for kind in (torch.float16, torch.float64):
        check(_qlinear.gptq_pack, weight, scales.t().contiguous().t().to(kind), zeros.to(kind), **options)
    shuffled[3] = 8
    with pytest.raises(ValueError, match="at position 3"):
        _qlinear.gptq_pack(weight.cuda(), scales.cuda(), zeros.cuda(), shuffled.cuda(), **options)


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (64, 40), (101, 130)], ids=str)
def test_gptq_codes(nbits, shape):
    codes = torch.randint(2**nbits, shape).to(torch.uint8)
    packed = _qlinear.gptq_pack_codes(codes, bits=nbits)
    check(_qlinear.gptq_pack_codes, codes, bits=nbits)
    check(_qlinear.gptq_pack_codes, codes.t().contiguous().t(), bits=nbits)
    check(_qlinear.gptq_unpack_codes, packed, bits=nbits, count=shape[0])
    words = torch.randint(-(2**31), 2**31, (nbits * 3, shape[1])).to(torch.int32)
    check(_qlinear.gptq_unplanar, words, bits=nbits)


@pytest.mark.parametrize("pack", [lambda codes: _qlinear.gptq_pack_codes(codes, bits=4), _qlinear.awq_pack])
def test_a_code_too_large_is_told(pack):
    codes = torch.randint(16, (300, 700)).to(torch.uint8)
    codes[17, 650], codes[200, 3] = 99, 255
    with pytest.raises(ValueError, match=r"at most 15, got 99 at \[17, 650\]"):
        pack(codes.cuda())


@pytest.mark.parametrize("group_size", GROUPS)
def test_awq_quantize(numbers, group_size):
    for weight in weights(numbers, [(66, 300), (8, 256), (1, 31), (203, 130)]):
        check(_qlinear.awq_quantize, weight, group_size=group_size)


@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (64, 40), (101, 130)], ids=str)
def test_awq_codes(shape):
    codes = torch.randint(16, shape).to(torch.uint8)
    check(_qlinear.awq_pack, codes)
    check(_qlinear.awq_pack, codes.t().contiguous().t())
    check(_qlinear.awq_unpack, _qlinear.awq_pack(codes), count=shape[1])


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_awq_storages(group_size, kind):
    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape).to(torch.int32)

    n, k = 64, 256
    groups = 1 if group_size == -1 else k // group_size
    padded = -(-groups // 8) + 1
    gemv = words(n, k // 8), words(n, padded), torch.randn(n, 8 * padded).to(kind)
    check(_qlinear.awq_from_gemv, *gemv, group_size=group_size)
    params = [torch.randn(groups + 2, n).to(kind) for _ in range(2)]
    fast = torch.randint(-(2**15), 2**15, (n // 4, k)).to(torch.int16)
    check(_qlinear.awq_from_gemv_fast, fast, *params, group_size=group_size)
    check(_qlinear.awq_from_marlin, words(k // 16, 2 * n), params[0][:groups], group_size=group_size)


# ---- layouts, devices, streams ----


FUNCTIONS = {
    "eetq_quantize": lambda x: _qlinear.eetq_quantize(x),
    "eetq_codes": lambda x: _qlinear.eetq_codes(x),
    "int8_quantize": lambda x: _qlinear.int8_quantize(x, threshold=2.0),
    "fp8 tensor": lambda x: _qlinear.fp8_quantize(x, mode="tensor"),
    "fp8 token": lambda x: _qlinear.fp8_quantize(x, mode="token"),
    "fp8 group": lambda x: _qlinear.fp8_quantize(x, mode="group"),
    "fp8 block": lambda x: _qlinear.fp8_quantize(x, mode="block"),
    "quantize_4bit": lambda x: _qlinear.quantize_4bit(x, quant_type="nf4", blocksize=64),
    "quantize_blockwise": lambda x: _qlinear.quantize_blockwise(x, functional.create_dynamic_map(), blocksize=256),
    "gptq_find_params": lambda x: _qlinear.gptq_find_params(x, bits=4, group_size=64),
    "gptq_pack": lambda x: _qlinear.gptq_pack(
        x, *_qlinear.gptq_find_params(x, bits=3, group_size=128), bits=3, group_size=128
    ),
    "awq_quantize": lambda x: _qlinear.awq_quantize(x, group_size=32),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [*FLOATS, torch.float64], ids=str)
def test_any_layout(name, kind):
    torch.manual_seed(3)
    function = FUNCTIONS[name]
    if name == "int8_quantize" and kind == torch.float64:
        pytest.skip("LLM.int8() takes no fp64")
    for shape in ((66, 192), (2, 128)):
        x = torch.randn(shape).to(kind)
        for view in layouts(x).values():
            # .cuda() keeps the strides only of what is dense, so the view is made there.
            base = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).cuda()
            ours = base.as_strided(view.shape, view.stride(), view.storage_offset())
            check_same(function(ours), function(view))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty(name):
    for shape in ((0, 64), (2, 0)):
        x = torch.empty(shape).half()
        try:
            expected = FUNCTIONS[name](x)
        except ValueError as error:
            with pytest.raises(ValueError, match="^" + str(error)[:12]):
                FUNCTIONS[name](x.cuda())
        else:
            check_same(FUNCTIONS[name](x.cuda()), expected)


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"int8_quantize"}))
def test_captured(name):
    x = torch.randn(66, 192, device="cuda").half()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        FUNCTIONS[name](x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = FUNCTIONS[name](x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(66, 192))
        graph.replay()
        check_same(out, FUNCTIONS[name](x.cpu()))


def test_side_stream():
    weight = torch.randn(2048, 2048, device="cuda").half()
    expected = _qlinear.eetq_quantize(weight.t())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours = _qlinear.eetq_quantize(weight.t())
    stream.synchronize()
    assert all(map(torch.equal, ours, expected))


def test_devices_must_agree():
    weight = torch.randn(64, 64, device="cuda")
    scales, zeros = _qlinear.gptq_find_params(weight, bits=4, group_size=32)
    with pytest.raises(ValueError, match="scales is on the CPU, but weight is on cuda:0"):
        _qlinear.gptq_pack(weight, scales.cpu(), zeros, bits=4, group_size=32)
    packed, absmax = _qlinear.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    code = functional.get_4bit_type("nf4", "cuda")
    with pytest.raises(ValueError, match="absmax is on the CPU, but packed is on cuda:0"):
        _qlinear.dequantize_4bit(packed, absmax.cpu(), code, count=4096, blocksize=64, dtype="float32")


@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    weight = torch.empty(2**15, 2**16 + 512, device="cuda", dtype=torch.float16).normal_()
    last = weight[-130:]
    packed, absmax = _qlinear.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    expected, expected_absmax = _qlinear.quantize_4bit(last.cpu(), quant_type="nf4", blocksize=64)
    check_same(packed[-len(expected) :], expected)
    check_same(absmax[-len(expected_absmax) :], expected_absmax)
    codes, scales = _qlinear.eetq_quantize(weight)
    expected, expected_scales = _qlinear.eetq_quantize(last.cpu())
    check_same(codes.reshape(-1)[-expected.numel() :], expected.reshape(-1))
    check_same(scales[-130:], expected_scales)
    qweight, _, _ = _qlinear.awq_quantize(weight, group_size=128)
    expected, _, _ = _qlinear.awq_quantize(last[2:].cpu(), group_size=128)
    check_same(qweight[:, -16:], expected)
