"""Products with packed weights on a GPU: every kernel that could run one, at every edge, against float64."""

import copy
import itertools
import os

import forced_kernels
import packed_forms
import pytest
import torch

import qlinear
from qlinear import _qlinear, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
    pytest.mark.usefixtures("poison"),
]

DTYPES = (torch.float16, torch.bfloat16)
# Half an ulp of a number, as a part of it.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device="cuda").to(torch.int32)


def shuffled(g_idx):
    return g_idx[torch.randperm(len(g_idx), device="cuda")]


def gptq(bits, group_size, scales=torch.float16, order=None):
    def make(N, K):
        size = K if group_size == -1 else group_size
        groups = -(-K // size)
        g_idx = torch.arange(K, device="cuda", dtype=torch.int32) // size
        if order:
            g_idx = order(g_idx)
        return qlinear.QuantLinear(
            words(-(-K * bits // 32), N),
            words(groups, -(-N * bits // 32)),
            (torch.rand(groups, N, device="cuda") * 2**-bits + 2**-10).to(scales),
            g_idx,
            torch.randn(N, device="cuda").half(),
            bits,
            group_size,
            zero_format="gptq",
            in_features=K,
        )

    return make


def awq(group_size):
    def make(N, K):
        groups = -(-K // group_size)
        scales = torch.rand(groups, N, device="cuda").half() / 16
        return qlinear.AWQLinear(4, group_size, words(K, N // 8), words(groups, N // 8), scales, None)

    return make


def eetq(N, K):
    return qlinear.EETQLinear(torch.randn(N, K, device="cuda").half(), torch.randn(N, device="cuda"))


def fourbit(quant_type, blocksize, nested):
    def make(N, K):
        weight = torch.randn(N, K, device="cuda")
        bias = torch.randn(N, device="cuda").bfloat16()
        return qlinear.Linear4bit(weight, bias, quant_type, blocksize=blocksize, compress_statistics=nested)

    return make


# name: (make(N, K), what K and N must be multiples of)
FORMATS = {
    "gptq2-g64": (gptq(2, 64), 16, 16),
    "gptq2-g32": (gptq(2, 32), 16, 16),
    "gptq3-g128": (gptq(3, 128), 32, 32),
    "gptq3-g32": (gptq(3, 32), 32, 32),
    "gptq4-g32": (gptq(4, 32), 8, 8),
    "gptq4-g128": (gptq(4, 128), 8, 8),
    "gptq4-g32-fp32": (gptq(4, 32, torch.float32), 8, 8),
    "gptq4-g48-bf16": (gptq(4, 48, torch.bfloat16), 8, 8),
    "gptq4-order": (gptq(4, 64, order=shuffled), 64, 8),
    "gptq8-one": (gptq(8, -1), 4, 4),
    "gptq8-g128": (gptq(8, 128), 4, 4),
    "gptq8-g32": (gptq(8, 32), 4, 4),
    "awq-g64": (awq(64), 8, 8),
    "eetq": (eetq, 64, 2),
    "nf4": (fourbit("nf4", 64, True), 64, 1),
    "nf4-b32": (fourbit("nf4", 32, True), 32, 1),
    "fp4-b32": (fourbit("fp4", 32, False), 32, 1),
}


@pytest.fixture(params=FORMATS)
def form(request):
    torch.manual_seed(len(request.param))
    return FORMATS[request.param]


def fitting(form, N, K):
    _, k_of, n_of = form
    return max(N // n_of, 1) * n_of, max(K // k_of, 1) * k_of


class Oracle:
    """The product in float64, with the weight as the CPU gives it from the checkpoint's tensors."""

    def __init__(self, layer):
        cpu = copy.deepcopy(layer).cpu()
        self.weight = cpu.dequantize(torch.float32).cuda().double()
        self.bias = 0 if cpu.bias is None else cpu.bias.cuda().double()

    def check(self, x, out):
        """Every element within fp32's summing error and half an ulp of a 16-bit weight of |x| @ |W|, and half an ulp of
        the output."""
        reference, magnitude = x.double() @ self.weight.T + self.bias, x.double().abs() @ self.weight.abs().T
        c = (x.shape[-1] + 64) * 2.0**-24 + (0 if x.dtype == torch.float32 else UNIT[x.dtype])
        bound = c * magnitude + UNIT[x.dtype] * reference.abs() + torch.finfo(x.dtype).tiny
        assert out.shape == reference.shape
        assert out.dtype == x.dtype
        wrong = ~((out.double() - reference).abs() <= bound)
        assert not wrong.any(), f"{int(wrong.sum())} wrong, the first at {wrong.nonzero()[0].tolist()}"


def problem(layer, dtype):
    return (*layer.engine().problem, ops.DTYPE_NAMES[dtype])


def try_every_candidate(layer, dtype, rows):
    """How many products that were."""
    oracle, tried = Oracle(layer), 0
    for m in rows:
        x = torch.randn(m, layer.in_features, device="cuda").to(dtype)
        for candidate in _qlinear.candidates(0, *problem(layer, dtype), m):
            _qlinear.set_choice(0, *problem(layer, dtype), m, *candidate)
            out = layer(x)
            try:
                oracle.check(x, out)
            except AssertionError as error:
                raise AssertionError(f"{candidate} of {layer}, M {m}: {error}") from None
            assert torch.equal(out, layer(x)), candidate
            tried += 1
        _qlinear.set_choice(0, *problem(layer, dtype), m, None, 0)
    return tried


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(form, dtype):
    sizes = [fitting(form, N, K) for N, K in ((272, 1152), (72, 320), (1000, 1088))]
    assert sum(try_every_candidate(form[0](N, K), dtype, packed_forms.ROWS) for N, K in sizes) >= 27


# What g_idx becomes of one that has columns in order, in groups of 64.
ORDERS = {
    "same": lambda g_idx: g_idx,
    "reversed": lambda g_idx: g_idx.flip(0),
    "interleaved": lambda g_idx: g_idx.reshape(-1, 64).t().reshape(-1),
    "random": shuffled,
}


@pytest.mark.parametrize("K", [1344, 4096, 14336, 28672, 53248, 70016])
@pytest.mark.parametrize("order", ORDERS)
def test_columns_in_another_order(order, K):
    """In the product's own blocks, a row at a time, four at a time, and of rows too long for shared memory."""
    torch.manual_seed(K)
    layer = gptq(4, 64, order=ORDERS[order])(48, K)
    oracle = Oracle(layer)
    for m, dtype in itertools.product((1, 2, 4, 8, 9, 130, 300, 1030), DTYPES):
        for offset, pad in ((0, 0), (8, 8), (1, 3)):
            x = torch.randn(offset + m * (K + pad), device="cuda").to(dtype)
            x = x[offset:].as_strided((m, K), (K + pad, 1), offset)
            oracle.check(x, layer(x))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_few_rows_of_columns_in_another_order(bits, size):
    """As many columns as a block puts in order itself, fewer than a batch of its warps, more, and between."""
    torch.manual_seed(bits + size)
    for K in (128, 2176, 4096, 7168, 8192, 8320):
        layer = gptq(bits, size, order=shuffled)(96, K)
        oracle = Oracle(layer)
        for m, dtype in itertools.product(range(1, 9), DTYPES):
            x = torch.randn(m, K, device="cuda").to(dtype)
            oracle.check(x, layer(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_integers(bits, dtype):
    torch.manual_seed(bits)
    for _, size, scales in (one for one in packed_forms.GPTQ if one[0] == bits):
        # 32 outputs have whole words of zeros in every number of bits.
        layer = gptq(bits, size, getattr(torch, scales))(packed_forms.N // 32 * 32, packed_forms.K)
        try_every_candidate(layer, dtype, packed_forms.ROWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_tables(dtype):
    torch.manual_seed(4)
    for size, nested in packed_forms.FOURBIT:
        layer = fourbit("nf4", size, nested)(packed_forms.N, packed_forms.columns(size, nested))
        try_every_candidate(layer, dtype, packed_forms.ROWS)


@pytest.mark.parametrize("name", ["gptq4-g128", "eetq", "nf4"])
def test_any_number_of_rows(name):
    torch.manual_seed(0)
    layer = FORMATS[name][0](136, 448)
    oracle = Oracle(layer)
    for m in range(301):
        x = torch.randn(m, 448, device="cuda").half()
        oracle.check(x, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_just_off_every_tile(form, dtype):
    seen = set()
    for N, K in itertools.product((1, 8, 15, 17, 63, 65, 127, 129, 257), (8, 16, 63, 65, 127, 129, 257, 521, 1031)):
        N, K = fitting(form, N, K)
        if (N, K) in seen:
            continue
        seen.add((N, K))
        layer = form[0](N, K)
        oracle = Oracle(layer)
        for m in (1, 7, 13, 33, 67):
            x = torch.randn(m, K, device="cuda").to(dtype)
            oracle.check(x, layer(x))


def test_a_hundred_runs_give_the_same_bits(form):
    N, K = fitting(form, 1040, 4096)
    layer = form[0](N, K)
    for m in (1, 5, 16, 64, 200):
        x = torch.randn(m, K, device="cuda").half()
        first = layer(x)
        assert all(torch.equal(first, layer(x)) for _ in range(100))


def test_inputs_of_any_stride_and_address(form):
    N, K = fitting(form, 200, 576)
    layer = form[0](N, K)
    oracle = Oracle(layer)
    for m, offset, pad in itertools.product((1, 6, 20, 70), (0, 1, 8), (0, 3, 8)):
        buffer = torch.randn(offset + m * (K + pad) + 16, device="cuda").half()
        x = buffer[offset:].as_strided((m, K), (K + pad, 1), offset)
        oracle.check(x, layer(x))
        x = torch.randn(K, m, device="cuda").half().t()
        oracle.check(x, layer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_in_its_row(form, value):
    N, K = fitting(form, 136, 320)
    layer = form[0](N, K)
    oracle = Oracle(layer)
    for m in (2, 8, 16, 24, 70):
        x = torch.randn(m, K, device="cuda").half()
        x[1, K // 2] = value
        out = layer(x)
        used = oracle.weight[:, K // 2] != 0
        assert not torch.isfinite(out[1, used]).any()
        x, out = (torch.cat([tensor[:1], tensor[2:]]) for tensor in (x, out))
        oracle.check(x, out)


def test_fp32_input(form):
    N, K = fitting(form, 130, 320)
    layer = form[0](N, K)
    x = torch.randn(9, K, device="cuda")
    Oracle(layer).check(x, layer(x))


def test_denormal_and_tiny_scales():
    torch.manual_seed(0)
    for dtype, scales in itertools.product(DTYPES, (torch.float16, torch.bfloat16, torch.float32)):
        layer = gptq(4, 64, scales)(64, 256)
        tiny = copy.deepcopy(layer)
        tiny.scales = (layer.scales.float() * 2.0**-16).to(scales)
        tiny.bias = None
        oracle = Oracle(tiny)
        for m in (1, 16, 40):
            x = (torch.randn(m, 256, device="cuda") * 64).to(dtype)
            reference, magnitude = x.double() @ oracle.weight.T, x.double().abs() @ oracle.weight.abs().T
            # A 16-bit weight this small has an absolute error too, half of the least number of its type.
            least = x.double().abs().sum(1, keepdim=True) * (2.0**-25 if dtype == torch.float16 else 0)
            bound = (UNIT[dtype] + 320 * 2.0**-24) * magnitude + UNIT[dtype] * reference.abs() + least + 2.0**-24
            assert ((tiny(x).double() - reference).abs() <= bound).all()


def test_streams_that_race(form):
    N, K = fitting(form, 528, 2048)
    layer = form[0](N, K)
    xs = [torch.randn(m, K, device="cuda").half() for m in (1, 16, 40, 130)]
    expected = [layer(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    outs = [[] for _ in xs]
    for _ in range(50):
        for stream, x, out in zip(streams, xs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(layer(x))
    torch.cuda.synchronize()
    for want, out in zip(expected, outs, strict=True):
        assert all(torch.equal(want, one) for one in out)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    layer = gptq(2, 128)(70000, 32768)
    assert layer.in_features * layer.out_features > 2**31
    rows = torch.tensor([0, 1, 35001, 65534, 69999], device="cuda")
    weight = layer.dequantize(torch.float16)[rows].double()
    for m in (3, 40, 300):
        x = torch.randn(m, 32768, device="cuda").half()
        reference = x.double() @ weight.T + layer.bias.double()[rows]
        bound = 2.0**-9 * (x.double().abs() @ weight.abs().T + reference.abs())
        assert ((layer(x)[:, rows].double() - reference).abs() <= bound).all()
    layer = gptq(4, 128)(32768, 256)
    x = torch.randn(70000, 256, device="cuda").half()
    out = layer(x)
    assert out.numel() > 2**31
    some = torch.tensor([0, 65535, 65536, 69999], device="cuda")
    Oracle(layer).check(x[some], out[some])


def test_base_kernels_when_they_are_forced():
    """The same tests on the kernels that are there for every GPU."""
    if os.environ.get("QLINEAR_KERNELS") == "base":
        assert _qlinear.candidates(0, "int4", 256, 256, 128, "float16", 4) == []
        pytest.skip("this is that run")
    chosen = "(sizes or rows or stride or number or fp32_input or forced) and not candidate"
    forced_kernels.pass_tests("base", __file__, chosen)
