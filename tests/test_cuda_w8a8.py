"""FP8 and LLM.int8() on a GPU: products against float64 on what a plain emulation makes of the activations, codes and
scales against the CPU's bits, numbers that are no numbers, outliers of every count, graphs."""

import copy
import math
import os

import forced_kernels
import pytest
import torch

import qlinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
    pytest.mark.usefixtures("poison"),
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 130, 257)
# (K, N): whole tiles, ragged rows, one group, sizes that no tile divides.
SIZES = ((1024, 256), (528, 1001), (128, 48), (4096, 136), (2064, 72))
# Rows of the weight that do not begin at multiples of 16 bytes are left to the base kernels.
ODD_SIZES = ((100, 33), (1, 5), (17, 130), (1030, 64))
KINDS = (
    "int8",
    "int8-0",
    "token",
    "tensor",
    "static",
    "group",
    "blocks-token",
    "blocks-tensor",
    "group-channel",
    "scalar-token",
)


def make(kind, K, N, bias=None, seed=0, **options):
    generator = torch.Generator("cuda").manual_seed(seed)
    random = {"generator": generator, "device": "cuda"}
    if kind.startswith("int8"):
        codes = torch.randint(-127, 128, (N, K), **random).to(torch.int8)
        tensors = {"weight": codes, "SCB": torch.rand(N, **random) + 0.01}
        return qlinear.Linear8bitLt.from_tensors(tensors, bias, threshold=0.0 if kind == "int8-0" else 6.0).cuda()
    weight = (torch.randn(N, K, **random) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = torch.rand(-(-N // 128), -(-K // 128), **random) * 0.01 + 0.001
    channels = torch.rand(N, 1, **random) * 0.01 + 0.001
    scale = blocks if kind in ("group", "blocks-token", "blocks-tensor") else channels
    if kind == "scalar-token":
        scale = channels[:1, 0]
    activation = {
        "blocks-token": "token",
        "blocks-tensor": "tensor",
        "group-channel": "group",
        "scalar-token": "token",
    }.get(kind, kind)
    given = torch.tensor([0.02], device="cuda") if kind == "static" else None
    return qlinear.Fp8Linear(weight, bias, scale, given, activation=activation, **options)


def activations(M, K, dtype, outliers=6, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed * 1000 + M)
    x = torch.randn(M, K, generator=generator, device="cuda").clamp(-5, 5)
    columns = torch.randperm(K, generator=generator, device="cuda")[:outliers]
    x[:, columns] *= 9
    return x.to(dtype)


def quantize_int8(x, threshold):
    """The values that codes and outliers stand for, float64."""
    a = x.float()
    outlier = a.abs() >= threshold if threshold else torch.zeros_like(a, dtype=torch.bool)
    absmax = torch.where(outlier, 0, a.abs()).amax(1, keepdim=True)
    codes = torch.where(outlier, 0, a * (torch.full_like(absmax, 127) / absmax)).round()
    codes = torch.where(absmax > 0, codes, torch.zeros_like(codes))
    seen = codes.double() * absmax.double() / 127
    columns = outlier.any(0)
    return torch.where(columns, x.double(), seen)


def quantize_fp8(x, layer, kind):
    a = x.float()
    most = torch.full((1, 1), 448.0, device=x.device)
    if kind in ("group", "group-channel"):
        M, K = a.shape
        padded = torch.zeros(M, -(-K // 128) * 128, device=x.device)
        padded[:, :K] = a
        scale = padded.view(M, -1, 128).abs().amax(2) / most
        scale = torch.where(scale == 0, torch.ones_like(scale), scale).repeat_interleave(128, 1)[:, :K]
        return (a / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    if kind.endswith("token"):
        scale = (a.abs().amax(1, keepdim=True) / most).clamp_min(1 / (448 * 512))
        codes = a / scale
    else:
        scale = layer.input_scale.reshape(1, 1) if kind == "static" else a.abs().amax().reshape(1, 1) / most
        codes = a * (torch.ones_like(scale) / scale)
    return codes.clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def dense(layer, kind):
    if kind.startswith("int8"):
        return layer.weight.double() * layer.SCB.double()[:, None] / 127
    N, K = layer.weight.shape
    scale = layer.weight_scale.double()
    if scale.numel() == 1:
        return layer.weight.double() * scale
    if scale.shape != (N, 1):
        scale = scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    return layer.weight.double() * scale


def cores_error(seen, W, reference, columns):
    """What e4m3 sums of `columns` columns on the tensor cores may be off by: [M, N].

    An instruction adds 32 products to a sum and cuts all 33 at 13 bits below the largest: a standard deviation of
    sqrt(33 / 12) units of 2^-13 of it, and the largest is no more than the sum on its way, whose own size is the root
    of the squares of all products, or of the result where that is larger. Eight such deviations, twice."""
    walk = ((seen**2) @ (W.t() ** 2)).add_(reference**2).sqrt_()
    return 16 * 2.0**-13 * math.sqrt(max(columns, 32) / 32) * walk


def sums_of(kind, K):
    """Columns that the tensor cores add up by themselves: groups and blocks are added in fp32."""
    return min(K, 128) if "group" in kind or "blocks" in kind else K


def check(layer, kind, x, out):
    assert out.dtype == x.dtype
    seen = quantize_int8(x, layer.threshold) if kind.startswith("int8") else quantize_fp8(x, layer, kind)
    W = dense(layer, kind)
    reference, magnitude = seen @ W.t(), seen.abs() @ W.abs().t()
    if layer.bias is not None:
        reference = reference + layer.bias.double()
    bound = (x.shape[-1] + 8) * 2.0**-24 * magnitude
    if not kind.startswith("int8") and len(x) > 8:
        bound += cores_error(seen, W, reference, sums_of(kind, x.shape[-1]))
    bound = bound + UNIT[x.dtype] * reference.abs() + 2.0**-25
    wrong = ((out.double() - reference).abs() > bound) | out.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES + ODD_SIZES, ids=str)
def test_products(kind, size):
    K, N = size
    for i, M in enumerate(ROWS):
        dtype = DTYPES[i % 3]
        bias = torch.randn(N, device="cuda").to(dtype) if i % 2 else None
        layer = make(kind, K, N, bias, seed=M)
        x = activations(M, K, dtype, outliers=min(6, K // 8))
        out = layer(x)
        check(layer, kind, x, out)
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("kind", ["int8", "token", "group"])
def test_any_number_of_rows(kind):
    K, N = 2064, 264
    layer = make(kind, K, N)
    assert layer(torch.empty(0, K, device="cuda").half()).shape == (0, N)
    for M in range(1, 301):
        x = activations(M, K, DTYPES[M % 2])
        check(layer, kind, x, layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_and_deep(kind, dtype):
    """Clusters that share K, blocks that take many strips."""
    for K, N in ((14336, 64), (28672, 48), (256, 20000)):
        layer = make(kind, K, N, torch.randn(N, device="cuda").to(dtype))
        for M in (1, 4, 8, 16, 40):
            x = activations(M, K, dtype)
            check(layer, kind, x, layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_x(kind):
    K, N = 1024, 144
    layer = make(kind, K, N)
    for M in (1, 4, 9, 40):
        wide = activations(M, 2 * K + 24, torch.float16)
        for x in (
            wide[:, :K],
            wide[:, 3 : K + 3],
            wide[:, 8 : 2 * K + 8 : 2],
            wide[:, : M * K // M].t().contiguous().t(),
        ):
            check(layer, kind, x, layer(x))
        x = activations(M * 3, K, torch.bfloat16).view(M, 3, K)
        assert torch.equal(layer(x).view(-1, N), layer(x.reshape(-1, K)))


def test_strides_of_the_weight():
    """A transposed one, rows with a gap, rows that begin anywhere."""
    K, N = 512, 96
    source = (torch.randn(K, N) * 60).to(torch.float8_e4m3fn)
    padded = (torch.randn(N, K + 48) * 60).to(torch.float8_e4m3fn).cuda()
    scale = torch.rand(N, 1).cuda() * 0.01
    for weight in (source.cuda().t(), padded[:, 16 : K + 16], padded[:, 5 : K + 5]):
        layer = qlinear.Fp8Linear(weight, None, scale, None)
        for M in (1, 6, 16, 50):
            x = activations(M, K, torch.float16)
            check(layer, "token", x, layer(x))


@pytest.mark.parametrize("block", [(64, 128), (128, 64), (16, 256), (1, 32), (200, 128)], ids=str)
@pytest.mark.parametrize("activation", ["token", "group"])
def test_blocks_of_other_sizes(block, activation):
    K, N = 1024, 320
    weight = (torch.randn(N, K) * 60).to(torch.float8_e4m3fn).cuda()
    scale = torch.rand(-(-N // block[0]), -(-K // block[1]), device="cuda") * 0.01 + 0.001
    layer = qlinear.Fp8Linear(weight, None, scale, None, activation=activation, block_size=block)
    W = weight.double() * scale.double().repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    for M in (1, 8, 16, 70):
        x = activations(M, K, torch.float32)
        seen = quantize_fp8(x, layer, activation)
        reference = seen @ W.t()
        bound = (K + 8) * 2.0**-24 * (seen.abs() @ W.abs().t()) + 2.0**-24
        if M > 8:
            bound += cores_error(seen, W, reference, 128)
        assert ((layer(x).double() - reference).abs() <= bound).all()


# ---- the CPU's bits: with a weight that picks columns, out in fp32 is a code by its scale and nothing else ----


def picking(kind, K, **options):
    if kind.startswith("int8"):
        tensors = {"weight": torch.eye(K).mul(127).to(torch.int8), "SCB": torch.ones(K)}
        return qlinear.Linear8bitLt.from_tensors(tensors, threshold=0.0 if kind == "int8-0" else 6.0)
    scale = torch.ones(-(-K // 128), -(-K // 128)) if kind == "group" else torch.ones(K, 1)
    given = torch.tensor([0.02]) if kind == "static" else None
    return qlinear.Fp8Linear(torch.eye(K).to(torch.float8_e4m3fn), None, scale, given, activation=kind, **options)


def numbers(M, K):
    """fp32 of every size, a row each of zeros, of denormals, of one value, of ties between codes."""
    x = torch.randn(M, K) * 2.0 ** torch.randint(-30, 8, (M, 1))
    x[::5] *= 2.0 ** torch.randint(-12, 3, (len(x[::5]), K))
    rows = [torch.zeros(K), torch.full((K,), 1e-41), torch.full((K,), -3.5), torch.arange(K) / 16.0]
    for i, row in enumerate(rows[: M - 1]):
        x[i + 1] = row
    return x


@pytest.mark.parametrize("kind", ["int8", "int8-0", "token", "tensor", "static", "group"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_those_of_the_cpu(kind, dtype):
    K = 512
    for M in (1, 2, 4, 7, 16, 40, 200):
        x = numbers(M, K).to(dtype)
        layer = picking(kind, K)
        expected, out = layer(x), layer.cuda()(x.cuda()).cpu()
        # What outliers give is x itself, but for the order of fp32's roundings.
        marked = (x.abs() >= 6).any(0) & (kind == "int8")
        assert torch.equal(out[:, ~marked], expected[:, ~marked]), M
        assert ((out - expected).abs() <= (2 * UNIT[dtype] + 2.0**-20) * expected.abs() + 1e-37).all(), M


@pytest.mark.parametrize("kind", ["int8", "int8-0"])
@pytest.mark.parametrize("size", [(2064, 72), (4096, 1000), (14336, 136)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_int8_are_those_of_the_cpu(kind, size, dtype):
    """Outputs have the CPU's bits, bias and all. For few rows all but the last ones, where parts of a sum of codes
    become fp32 before others are added: with outliers, here in columns where the weight is 0, and in fp32, where
    thread blocks may share K."""
    K, N = size
    layer = make(kind, K, N, torch.randn(N, device="cuda"))
    for i, M in enumerate((1, 3, 8, 12, 16, 40, 200)):
        outliers = (6, 40, 0)[i % 3]
        x = activations(M, K, dtype, outliers)
        codes = layer.weight.clone()
        codes[:, (x.abs() >= 6).any(0)] = 0
        silent = qlinear.Linear8bitLt.from_tensors(
            {"weight": codes, "SCB": layer.SCB}, layer.bias, threshold=layer.threshold
        )
        out, expected = silent.cuda()(x).cpu(), silent.cpu()(x.cpu())
        wide = dtype == torch.float32
        if (16 if wide else 8) >= M and (wide or (kind == "int8" and outliers)):
            assert ((out - expected).abs() <= 2 * UNIT[dtype] * expected.abs() + 1e-3).all(), M
        else:
            assert torch.equal(out, expected), M


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upper_bound(dtype):
    x = (torch.randn(9, 256) * 100).to(dtype)
    x[3, 7] = float("inf")
    for M in (1, 9):
        for bound in (1.0, 50.0, torch.tensor(20.0)):
            layer = picking("token", 256, input_scale_ub=bound)
            expected = layer(x[-M:])
            assert torch.equal(layer.cuda()(x[-M:].cuda()).cpu(), expected)


# ---- numbers that are no numbers, and outliers of every count ----


@pytest.mark.parametrize("kind", ["int8", "int8-0", "token", "tensor", "static", "group"])
@pytest.mark.parametrize("M", [1, 3, 8, 16, 60])
def test_nan_and_infinity_in_x(kind, M):
    K, N = 512, 80
    layer = make(kind, K, N)
    for value in (float("nan"), float("inf"), -float("inf"), 1e-7, 0.0):
        for dtype in DTYPES:
            x = activations(M, K, dtype, outliers=0)
            x[M // 2, 77] = value
            if value == 0.0:
                x[M // 2] = 0.0
            expected = make(kind, K, N).cpu()(x.cpu())
            out = layer(x).cpu()
            assert torch.equal(out.isnan(), expected.isnan()), (value, dtype)
            near = (out - expected).abs() <= 0.02 * expected.abs() + 0.5
            assert (near | expected.isnan() | (out == expected)).all(), (value, dtype)


@pytest.mark.parametrize("M", [1, 8, 16, 60])
def test_nan_in_the_weight(M):
    layer = make("token", 512, 80)
    layer.weight.view(torch.uint8)[13, 100] = 0x7F
    out = layer(activations(M, 512, torch.float16))
    assert out[:, 13].isnan().all()
    assert not out[:, :13].isnan().any()
    assert not out[:, 14:].isnan().any()


# What a number of each operand is made: of weights in e4m3 a NaN, 0, the least, the largest. Not the end of fp32's
# range: whether a scale of 3e38 overflows on the way to a finite product hangs on the order of factors.
NO_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, 1e-40, -1e-40, 1e30)
CODES = {"weight": (0x7F, 0xFF, 0x00, 0x01, 0x7E), "codes": (-128, 0, 127)}
OPERANDS = [
    *((kind, name) for kind in ("int8", "int8-0") for name in ("codes", "SCB", "bias")),
    *((kind, name) for kind in ("token", "tensor", "static", "group") for name in ("weight", "weight_scale", "bias")),
    ("static", "input_scale"),
]


@pytest.mark.parametrize(("kind", "operand"), OPERANDS, ids=lambda value: value)
@pytest.mark.parametrize("M", [1, 5, 9, 60])
def test_what_is_no_number_in_any_operand(kind, operand, M):
    """What is not finite is so where the CPU has it, all other elements are within the bound."""
    K, N = 512, 264
    for value in CODES.get(operand, NO_NUMBERS):
        for dtype in (torch.float32, torch.bfloat16):
            layer = make(kind, K, N, torch.randn(N, device="cuda"))
            tensor = getattr(layer, "weight" if operand == "codes" else operand)
            if operand in CODES:
                tensor.view(torch.uint8 if operand == "weight" else torch.int8)[13, 100] = value
            else:
                tensor.view(-1)[tensor.numel() // 2] = value
            if operand == "input_scale":
                layer.input_scale = tensor.clone()  # a GPU's layer reads its value once
            x = activations(M, K, dtype)
            x[0, 100] = 1.5
            out, expected = layer(x), copy.deepcopy(layer).cpu()(x.cpu()).cuda()
            finite = out.isfinite()
            assert torch.equal(finite, expected.isfinite()), value
            seen = quantize_int8(x, layer.threshold) if kind.startswith("int8") else quantize_fp8(x, layer, kind)
            W = dense(layer, kind).nan_to_num(0, 0, 0)
            bound = 2 * (K + 8) * 2.0**-24 * (seen.abs() @ W.abs().t()) + 2.0**-24
            if not kind.startswith("int8") and M > 8:
                bound += cores_error(seen, W, expected.double(), sums_of(kind, K))
            bound += 2 * UNIT[dtype] * expected.double().abs()
            assert ((out.double() - expected.double()).abs() <= bound)[finite].all(), value


def test_weights_of_rows_and_blocks_that_are_zero():
    K, N = 1024, 264
    for kind in ("int8", "token", "group"):
        layer = make(kind, K, N)
        layer.weight.view(torch.uint8)[40:56] = 0
        layer.weight.view(torch.uint8)[128:256, 256:384] = 0
        for M in (1, 8, 16, 70):
            x = activations(M, K, torch.float16)
            x[0] = 0
            x[-1, 128:256] = 0
            out = layer(x)
            assert (out[:, 40:56] == 0).all()
            assert (out[0] == 0).all()
            check(layer, kind, x, out)
            assert (layer(torch.zeros_like(x)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["int8-0", "token", "tensor", "group", "blocks-token"])
def test_activations_in_their_own_range(kind, dtype):
    """A power of two changes nothing but the exponent, far beyond fp16's range."""
    K, N = 1024, 200
    layer = make(kind, K, N)
    powers = (90,) if kind.endswith("token") else (90, -60)  # tokens have a least scale
    for M in (1, 8, 16, 70):
        x = activations(M, K, dtype)
        expected = layer(x)
        for power in powers:
            assert torch.equal(layer(x * 2.0**power), expected * 2.0**power), (M, power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outliers_in_their_own_range(dtype):
    layer = make("int8", 1024, 200)
    for M in (1, 8, 16, 70):
        x = activations(M, 1024, dtype)
        x[:, 77] *= 2.0**60
        check(layer, "int8", x, layer(x))
        x *= 2.0**20
        check(layer, "int8", x, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 6, 100, 1500, 2048])
def test_outliers_of_any_count(count, dtype):
    K, N = 2048, 144
    layer = make("int8", K, N)
    for M in (1, 2, 5, 8, 16, 31, 100):
        x = activations(M, K, dtype, outliers=count)
        check(layer, "int8", x, layer(x))
        x[0, :] = 40.0  # every value of one row
        check(layer, "int8", x, layer(x))


@pytest.mark.parametrize("kind", ["int8", "token", "group", "tensor"])
@pytest.mark.parametrize("M", [1, 4, 16, 80])
def test_a_graph_replays_on_other_numbers(kind, M):
    K, N = 1024, 200
    layer = make(kind, K, N)
    x = activations(M, K, torch.float16)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for seed in range(4):
        x.copy_(activations(M, K, torch.float16, outliers=(0, 6, 500, 1)[seed], seed=seed + 2))
        graph.replay()
        check(layer, kind, x, out)
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("kind", ["int8", "token", "group", "tensor"])
def test_the_same_bits_in_any_memory_beside_other_streams(kind):
    K, N = 2048, 512
    layer = make(kind, K, N)
    streams = [torch.cuda.Stream() for _ in range(4)]
    for M in (1, 8, 16, 33, 100, 300):
        x = activations(M, K, torch.bfloat16)
        expected = layer(x)
        torch.cuda.synchronize()
        outs = []
        for turn in range(100):
            poison = [torch.full((1 << 20,), fill, dtype=torch.uint8, device="cuda") for fill in (0xFF, turn, 0x7F)]
            del poison
            with torch.cuda.stream(streams[turn % 4]):
                outs.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in outs)


def rows_of(layer, kind, start, stop):
    """A layer of some rows of the weight, which begin and end with a block."""
    weight = layer.weight[start:stop]
    if kind == "int8":
        tensors = {"weight": weight, "SCB": layer.SCB[start:stop]}
        return qlinear.Linear8bitLt.from_tensors(tensors, None, threshold=layer.threshold)
    step = 128 if kind == "group" else 1
    scale = layer.weight_scale[start // step : stop // step]
    return qlinear.Fp8Linear(weight, None, scale, None, activation=layer.activation)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "token", "group"])
def test_more_than_two_to_the_31_elements(kind):
    """In the weight, then in the output."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    K, N = 32768, 70016
    layer = make(kind, K, N)
    for M in (3, 12, 40, 300):
        x = activations(M, K, torch.float16)
        out = layer(x)
        for start, stop in ((0, 128), (65408, 65664), (N - 512, N)):
            check(rows_of(layer, kind, start, stop), kind, x, out[:, start:stop])
    layer = make(kind, 256, 32768)
    x = activations(70000, 256, torch.float16)
    out = layer(x)
    assert out.numel() > 2**31
    for rows in (slice(0, 16), slice(65526, 65546), slice(69984, 70000)):
        check(layer, kind, x[rows], out[rows])


# ---- accuracy, gradients, the float weight ----


def error_of(layer, x):
    seen = quantize_fp8(x, layer, "token")
    W = dense(layer, "token")
    return ((layer(x).double() - seen @ W.t()).abs() / (seen.abs() @ W.abs().t())).max().item()


def test_promoted_sums_are_those_of_fp32():
    """fp32 out, so that nothing but the sums counts."""
    layer = make("token", 8192, 512)
    x = activations(64, 8192, torch.float32)
    fast = error_of(layer, x)
    layer.promoted = True
    promoted = error_of(layer, x)
    print(f"of |x| |W|: fast 2^{math.log2(fast):.1f}, promoted 2^{math.log2(promoted):.1f}")
    assert fast < 2.0**-12
    assert promoted < 2.0**-15
    assert promoted <= fast


@pytest.mark.parametrize("M", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float_weight_that_learns(M, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 256), torch.randn(96)
    x = torch.randn(M, 256).to(dtype)
    grad = torch.randn(M, 96).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        layer = qlinear.Linear8bitLt(weight.to(dtype).to(device), bias.to(dtype).to(device), threshold=6.0)
        seen = x.detach().to(device).requires_grad_()
        out = layer(seen)
        out.backward(grad.to(device))
        results.append([t.detach().cpu().double() for t in (out, seen.grad, layer.weight.grad)])
    # On a GPU the gradient of x meets the weight rounded to 16 bit: codes times a scale, half a step off the float one.
    most = weight.double().abs() + weight.double().abs().amax(1, keepdim=True) / 254
    rounded = UNIT[dtype] * grad.double().abs() @ most if dtype != torch.float32 else 0
    for cpu, gpu, more in zip(*results, (0, rounded, 0), strict=True):
        assert ((cpu - gpu).abs() <= UNIT[dtype] * 4 * cpu.abs() + 300 * 2.0**-20 + more).all()


def test_apply_fp8_linear():
    layer = make("token", 512, 96, torch.randn(96, device="cuda").half())
    x = activations(5, 512, torch.float16)
    for promoted in (False, True):
        out = qlinear.apply_fp8_linear(x, layer.qweight, layer.weight_scale, qbias=layer.qbias, promoted=promoted)
        assert torch.equal(out, layer(x))


def test_base_kernels_when_they_are_forced():
    if os.environ.get("QLINEAR_KERNELS") == "base":
        pytest.skip("this is that run")
    chosen = "products or strides or blocks or codes or nan or outliers or graph"
    forced_kernels.pass_tests("base", __file__, chosen)
