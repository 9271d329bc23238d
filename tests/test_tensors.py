"""Tensors of any framework, by every door they can come through, and what is no tensor."""

import gc
import sys
import warnings
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from dlpack_producers import HandMade, OldProducer, Producer

from qlinear import _qlinear


def some_codes(k=128, n=6):
    return np.random.default_rng(0).integers(-128, 128, (k, n)).astype(np.int8)


def some_layer():
    return _qlinear.EETQLinear(_qlinear.eetq_pack(torch.from_numpy(some_codes())), torch.ones(6))


def as_numpy(result):
    """A result of any framework, or the bare DLPack object that a producer without one gets."""
    return result if isinstance(result, np.ndarray) else torch.from_dlpack(result).numpy()


# ---- doors ----


@pytest.mark.parametrize("around", [Producer, OldProducer])
@pytest.mark.parametrize("inner", [torch.from_numpy, np.asarray])
def test_capsules(around, inner):
    codes = some_codes()
    packed = _qlinear.eetq_pack(around(inner(codes)))
    assert np.array_equal(as_numpy(packed), _qlinear.eetq_pack(codes))


@pytest.mark.parametrize("around", [Producer, OldProducer])
def test_a_capsule_is_given_back(around):
    array = some_codes()
    before = sys.getrefcount(array)
    producer = around(array)
    _qlinear.eetq_pack(producer)
    with pytest.raises(TypeError, match="x must be"):
        _qlinear.int8_quantize(producer)
    del producer
    assert sys.getrefcount(array) == before


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("strides", [None, (2, 1)])
def test_a_capsule_by_hand(versioned, strides):
    array = some_codes(64, 2)
    made = HandMade(array, versioned=versioned, strides=strides)
    assert np.array_equal(as_numpy(_qlinear.eetq_pack(made)), _qlinear.eetq_pack(array))
    assert made.deleted == 1
    assert np.array_equal(as_numpy(_qlinear.eetq_pack(HandMade(array, deleter=False))), _qlinear.eetq_pack(array))


def test_byte_offset_and_strides():
    array = np.arange(64 * 3, dtype=np.int64).astype(np.int8).reshape(64, 3)
    made = HandMade(array, shape=(64, 2), strides=(3, 1), byte_offset=1)
    assert np.array_equal(as_numpy(_qlinear.eetq_pack(made)), _qlinear.eetq_pack(np.ascontiguousarray(array[:, 1:])))


def test_torch_subclasses():
    weight = torch.randn(4, 64)
    wanted = _qlinear.int8_quantize(weight)
    for same in (torch.nn.Parameter(weight), torch.nn.Buffer(weight), torch.nn.Parameter(weight.clone())):
        codes, absmax, _ = _qlinear.int8_quantize(same)
        assert type(codes) is torch.Tensor
        assert torch.equal(codes, wanted[0])
        assert torch.equal(absmax, wanted[1])


def test_numpy_subclasses():
    codes = some_codes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = np.asmatrix(codes)
    assert np.array_equal(np.asarray(_qlinear.eetq_pack(matrix)), _qlinear.eetq_pack(codes))


def test_outputs_are_of_the_frameworks_own():
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    codes, absmax, columns = _qlinear.int8_quantize(x, threshold=1.0)
    for array in (codes, absmax, columns):
        assert type(array) is np.ndarray
        assert array.flags.writeable
        assert array.flags.c_contiguous
    for tensor in _qlinear.int8_quantize(torch.from_numpy(x), threshold=1.0):
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        tensor.zero_()


def test_inference_mode():
    layer = some_layer()
    with torch.inference_mode():
        x = torch.ones(2, 128)
        assert torch.equal(layer(x), layer(x.clone()))


# ---- NumPy's own, and ml_dtypes ----


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_numpy_floats(dtype):
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(dtype)
    packed, scales = _qlinear.eetq_quantize(weight)
    assert packed.dtype == np.int8
    assert scales.dtype == (np.float32 if dtype == np.float64 else dtype)
    as_torch = torch.from_numpy(weight.astype(np.float64)).to(torch.float64)
    as_torch = as_torch.to({2: torch.float16, 4: torch.float32, 8: torch.float64}[weight.itemsize])
    if dtype == ml_dtypes.bfloat16:
        as_torch = torch.from_numpy(weight.astype(np.float32)).bfloat16()
    wanted, wanted_scales = _qlinear.eetq_quantize(as_torch)
    assert np.array_equal(packed, wanted.numpy())
    assert np.array_equal(scales.astype(np.float32), wanted_scales.float().numpy())


def test_numpy_float8_and_bfloat16_in_a_layer():
    weight = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    q, scale = _qlinear.fp8_quantize(weight, mode="tensor")
    assert q.dtype == ml_dtypes.float8_e4m3fn
    layer = _qlinear.Fp8Linear(q, scale, activation="none")
    dense = layer.dequantize("bfloat16")
    assert dense.dtype == ml_dtypes.bfloat16
    exact = q.astype(np.float64) * float(scale[0])
    assert (np.abs(dense.astype(np.float64) - exact) <= np.abs(exact) * 2.0**-8).all()
    out = layer(np.ones((2, 16), ml_dtypes.bfloat16))
    assert out.dtype == ml_dtypes.bfloat16
    assert out.shape == (2, 6)


@pytest.mark.parametrize("view", ["readonly", "reversed", "transposed", "broadcast", "sliced", "fortran"])
def test_numpy_views(view):
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    viewed = {
        "readonly": lambda: x.view(),
        "reversed": lambda: x[::-1, ::-1],
        "transposed": lambda: x.T,
        "broadcast": lambda: np.broadcast_to(x[:1], (5, 8)),
        "sliced": lambda: x[1::2, ::3],
        "fortran": lambda: np.asfortranarray(x),
    }[view]()
    if view == "readonly":
        viewed.flags.writeable = False
    for got, wanted in zip(_qlinear.int8_quantize(viewed), _qlinear.int8_quantize(viewed.copy()), strict=True):
        assert np.array_equal(got, wanted)


def test_readonly_tensors_in_a_layer():
    weight, scales = some_codes(), np.ones(6, np.float32)
    weight.flags.writeable = scales.flags.writeable = False
    assert _qlinear.EETQLinear(weight, scales).dequantize().shape == (6, 128)
    made = HandMade(np.zeros((64, 2), np.int8), flags=1)
    _qlinear.EETQLinear(made, np.ones(2, np.float32))


def test_zero_size():
    for shape in ((0, 4), (4, 0), (0, 0)):
        for x in (torch.zeros(shape), np.zeros(shape, np.float32), Producer(np.zeros(shape, np.float32))):
            codes, absmax, _ = _qlinear.int8_quantize(x)
            assert as_numpy(codes).shape == shape
            assert as_numpy(absmax).shape == shape[:1]
    made = HandMade(np.zeros((0, 2), np.int8), data=0)
    assert as_numpy(_qlinear.eetq_pack(made)).shape == (0, 2)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 1, 1, 1)])
def test_leading_dimensions(lead):
    layer = some_layer()
    x = torch.randn(*lead, 128)
    out = layer(x)
    assert out.shape == (*lead, 6)
    if out.numel():
        assert torch.equal(out.reshape(-1, 6), layer(x.reshape(-1, 128)))


@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "expanded", "permuted", "parts", "gaps"])
def test_activations_of_any_strides(view):
    layer = some_layer()
    x = {
        "rows": lambda: torch.randn(10, 128)[::3],
        "columns": lambda: torch.randn(4, 256)[:, ::2],
        "transposed": lambda: torch.randn(128, 5).T,
        "expanded": lambda: torch.randn(128).expand(3, 2, 128),
        "permuted": lambda: torch.randn(3, 128, 2, 4).permute(3, 0, 2, 1),
        "parts": lambda: torch.randn(2, 4, 128)[:, :3],
        "gaps": lambda: torch.randn(2, 4, 3, 128)[:, ::2, :2],
    }[view]()
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_rows_of_two_values_that_are_apart():
    codes, scale = _qlinear.fp8_quantize(torch.randn(6, 2), mode="tensor")
    layer = _qlinear.Fp8Linear(codes, scale, activation="none")
    x = torch.randn(3, 4)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_bias_of_any_stride():
    bias = torch.randn(12)
    tensors = _qlinear.eetq_pack(torch.from_numpy(some_codes())), torch.ones(6)
    x = torch.randn(2, 128)
    for given in (bias[::2], bias.half()[1::2], bias[:1].expand(6)):
        expected = _qlinear.EETQLinear(*tensors)(x).double() + given.double()
        torch.testing.assert_close(_qlinear.EETQLinear(*tensors, given)(x).double(), expected, rtol=1e-5, atol=1e-3)


def test_misaligned_activations_are_refused():
    made = HandMade(np.zeros(129, np.float32), shape=(1, 128), dtype=(2, 32, 1), byte_offset=1)
    with pytest.raises(ValueError, match="x: its data is not aligned to its 4 byte elements"):
        some_layer()(made)
    assert made.deleted == 1


def test_the_stride_of_one_row_does_not_matter():
    row = np.lib.stride_tricks.as_strided(np.arange(16, dtype=np.float32), (1, 3), (2, 4))
    for got, wanted in zip(_qlinear.int8_quantize(row), _qlinear.int8_quantize(row.copy()), strict=True):
        assert np.array_equal(got, wanted)


# ---- JAX ----


def test_jax():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    packed, scales = _qlinear.eetq_quantize(weight)
    assert isinstance(packed, jax.Array)
    assert scales.dtype == jnp.bfloat16
    wanted = _qlinear.eetq_quantize(np.asarray(weight))
    assert np.array_equal(np.asarray(packed), wanted[0])
    layer = _qlinear.EETQLinear(packed, scales)
    assert isinstance(layer(jnp.ones((2, 64), jnp.float32)), jax.Array)
    assert isinstance(layer.dequantize(), jax.Array)
    assert np.array_equal(np.asarray(layer.dequantize()), _qlinear.EETQLinear(*wanted).dequantize())


# ---- no tensors ----


@pytest.mark.parametrize("thing", [None, 1, 1.5, "x", b"bytes", [[1.0]], object(), type, memoryview(b"ab"), torch.int8])
def test_not_a_tensor(thing):
    with pytest.raises(TypeError, match="x must be a tensor"):
        _qlinear.int8_quantize(thing)


def test_a_class_is_not_its_object():
    with pytest.raises(TypeError):
        _qlinear.int8_quantize(torch.Tensor)
    with pytest.raises(TypeError):
        _qlinear.int8_quantize(np.ndarray)


def fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(2, 3)


REFUSED_TORCH = {
    "fake": fake_tensor,
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(2, 3, dtype=torch.complex64),
    "17 dimensions": lambda: torch.zeros([1] * 17),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED_TORCH)
def test_refused_torch_tensors(kind):
    tensor = REFUSED_TORCH[kind]()
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError, BufferError)):
        _qlinear.int8_quantize(tensor)


REFUSED_NUMPY = {
    "byte order": (lambda: np.zeros((2, 3), ">f4" if sys.byteorder == "little" else "<f4"), TypeError),
    "complex": (lambda: np.zeros((2, 3), np.complex64), TypeError),
    "object": (lambda: np.zeros((2, 3), object), TypeError),
    "string": (lambda: np.zeros((2, 3), "U4"), TypeError),
    "structured": (lambda: np.zeros((2, 3), [("a", "f4")]), TypeError),
    "dates": (lambda: np.zeros((2, 3), "M8[s]"), TypeError),
    "long double": (lambda: np.zeros((2, 3), np.longdouble), TypeError),
    "uint64": (lambda: np.zeros((2, 3), np.uint64), TypeError),
    "float8 for a float": (lambda: np.zeros((2, 3), ml_dtypes.float8_e4m3fn), TypeError),
    "17 dimensions": (lambda: np.zeros([1] * 17, np.float32), ValueError),
    "unaligned": (lambda: np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float32).reshape(2, 3), ValueError),
    "stride of half an element": (
        lambda: np.lib.stride_tricks.as_strided(np.zeros(16, np.float32), (2, 3), (12, 2)),
        ValueError,
    ),
}


@pytest.mark.parametrize("kind", REFUSED_NUMPY)
def test_refused_numpy_arrays(kind):
    array, error = REFUSED_NUMPY[kind]
    with pytest.raises(error, match=r"^x\b"):
        _qlinear.int8_quantize(array())


# ---- hostile producers ----

HOSTILE = {
    "negative rank": ({"ndim": -1}, ValueError, " has -1 dimensions, at most 16 are taken"),
    "rank 17": ({"shape": (1,) * 17}, ValueError, " has 17 dimensions, at most 16 are taken"),
    "negative size": ({"shape": (64, -2)}, ValueError, ": size -2 of dimension 1 is out of range"),
    "elements beyond int64": ({"shape": (2**40, 2**40)}, ValueError, ": size 1099511627776 of dimension 0 is out of"),
    "elements beyond int64, one size 0": (
        {"shape": (2**40, 0, 2**40)},
        ValueError,
        ": size 1099511627776 of dimension 0 is out of range",
    ),
    "bytes beyond int64": (
        {"shape": (2**31, 2**31), "dtype": (2, 64, 1)},
        ValueError,
        ": its size in bytes is out of range",
    ),
    "no data": ({"data": 0}, TypeError, " has no data"),
    "lanes": ({"dtype": (0, 8, 4)}, TypeError, r" has a dtype of no use here \(DLPack code 0, 8 bits, 4 lanes\)"),
    "odd bits": ({"dtype": (0, 7, 1)}, TypeError, r" has a dtype of no use here \(DLPack code 0, 7 bits, 1 lanes\)"),
    "unknown code": ({"dtype": (99, 8, 1)}, TypeError, r" has a dtype of no use here \(DLPack code 99"),
    "opaque handle": ({"dtype": (3, 64, 1)}, TypeError, r" has a dtype of no use here \(DLPack code 3"),
    "another device": ({"device": (8, 0)}, NotImplementedError, " is on a device of DLPack type 8"),
    "no device": ({"device": (0, 0)}, NotImplementedError, " is on a device of DLPack type 0"),
    "negative device": ({"device": (-5, 0)}, NotImplementedError, " is on a device of DLPack type -5"),
}


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_descriptions(kind, versioned):
    fields, error, message = HOSTILE[kind]
    made = HandMade(versioned=versioned, **fields)
    with pytest.raises(error, match=f"^codes{message}"):
        _qlinear.eetq_pack(made)
    assert made.deleted == 1


@pytest.mark.parametrize("versioned", [True, False])
def test_a_gpu_that_is_not_there(versioned):
    made = HandMade(versioned=versioned, device=(2, 31))
    with pytest.raises(RuntimeError, match="^CUDA: "):
        _qlinear.eetq_pack(made)
    assert made.deleted == 1


def test_another_major_version():
    made = HandMade(version=(2, 0), shape=(64, -2))
    with pytest.raises(ValueError, match=r"codes: DLPack version 2\.0"):
        _qlinear.eetq_pack(made)
    assert made.deleted == 1


@pytest.mark.parametrize("name", [b"other", b"used_dltensor", b"used_dltensor_versioned", b"dltensor_versioned2"])
def test_a_capsule_of_another_name(name):
    made = HandMade(name=name)
    with pytest.raises(TypeError, match=r"codes: __dlpack__ of .* not a fresh DLPack capsule"):
        _qlinear.eetq_pack(made)
    assert made.deleted == 0


class Returns:
    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **_):
        return self.value


@pytest.mark.parametrize("value", [None, 5, "dltensor", np.zeros(3), object()])
def test_no_capsule(value):
    with pytest.raises(TypeError, match=r"codes: __dlpack__ of .* not a fresh DLPack capsule"):
        _qlinear.eetq_pack(Returns(value))


def test_a_consumed_capsule():
    capsule = torch.zeros(64, 2, dtype=torch.int8).__dlpack__()
    torch.from_dlpack(capsule)
    with pytest.raises(TypeError, match="not a fresh DLPack capsule"):
        _qlinear.eetq_pack(Returns(capsule))
    capsule = torch.zeros(64, 2, dtype=torch.int8).__dlpack__()
    _qlinear.eetq_pack(Returns(capsule))
    with pytest.raises(TypeError, match="not a fresh DLPack capsule"):
        _qlinear.eetq_pack(Returns(capsule))


@pytest.mark.parametrize("error", [RuntimeError, BufferError, TypeError, KeyboardInterrupt, MemoryError])
def test_a_producer_that_raises(error):
    class Raises:
        def __dlpack__(self, **_):
            raise error("as it was raised")

    with pytest.raises(error, match="as it was raised"):
        _qlinear.eetq_pack(Raises())


def test_an_attribute_that_raises():
    class Raises:
        @property
        def __dlpack__(self):
            raise AttributeError("gone")

    with pytest.raises(TypeError, match="codes must be a tensor"):
        _qlinear.eetq_pack(Raises())


def test_a_producer_that_drops_itself():
    """The object goes away while its capsule is read; the memory stays as long as the capsule's tensor."""

    class Fickle:
        def __init__(self):
            self.inner = torch.from_numpy(some_codes())

        def __dlpack__(self, **_):
            capsule = self.inner.__dlpack__(max_version=(1, 0))
            del self.inner
            gc.collect()
            return capsule

    assert np.array_equal(as_numpy(_qlinear.eetq_pack(Fickle())), _qlinear.eetq_pack(some_codes()))


def test_a_misaligned_capsule():
    array = np.zeros(65, np.float32)
    made = HandMade(array, shape=(4, 16), dtype=(2, 32, 1), byte_offset=1)
    with pytest.raises(ValueError, match="x: its data is not aligned"):
        _qlinear.int8_quantize(made)
    assert made.deleted == 1


# ---- what a layer holds ----


def test_a_layer_holds_references_only():
    weight, scales = np.zeros((64, 2), np.int8), np.ones(2, np.float16)
    before = sys.getrefcount(weight), sys.getrefcount(scales)
    layer = _qlinear.EETQLinear(weight, scales)
    assert (sys.getrefcount(weight), sys.getrefcount(scales)) == (before[0] + 1, before[1] + 1)
    weight[:] = _qlinear.eetq_pack(np.full((64, 2), 3, np.int8))
    assert (layer.dequantize() == 3).all()
    del layer
    assert (sys.getrefcount(weight), sys.getrefcount(scales)) == before


def test_a_layer_holds_what_a_producer_lent():
    array = np.zeros((64, 2), np.int8)
    before = sys.getrefcount(array)
    layer = _qlinear.EETQLinear(Producer(array), np.ones(2, np.float16))
    assert sys.getrefcount(array) > before
    del layer
    assert sys.getrefcount(array) == before
    made = HandMade()
    layer = _qlinear.EETQLinear(made, np.ones(2, np.float16))
    assert made.deleted == 0
    del layer
    assert made.deleted == 1


def test_a_layer_that_could_not_be_made_holds_nothing():
    array, scales, made = np.zeros((64, 2), np.int8), np.ones(3, np.float32), HandMade()
    before = sys.getrefcount(array), sys.getrefcount(scales)
    for weight in (array, made, Producer(array)):
        with pytest.raises(ValueError, match="weight_scales must have shape"):
            _qlinear.EETQLinear(weight, scales)
    del weight
    assert made.deleted == 1
    assert (sys.getrefcount(array), sys.getrefcount(scales)) == before


def test_replaced_storage_is_seen():
    weight = _qlinear.eetq_pack(torch.zeros(64, 2, dtype=torch.int8))
    layer = _qlinear.EETQLinear(weight, torch.ones(2))
    weight.data = _qlinear.eetq_pack(torch.full((64, 4), 5, dtype=torch.int8))
    with pytest.raises(ValueError, match="weight_scales must have shape"):
        layer.dequantize()
    assert layer.out_features == 2
    weight.data = _qlinear.eetq_pack(torch.full((128, 2), 7, dtype=torch.int8))
    assert torch.equal(layer.dequantize(), torch.full((2, 128), 7.0))
    assert (layer.in_features, layer.out_features) == (128, 2)
    weight.data = torch.zeros(128, 2)
    with pytest.raises(TypeError, match="weight must be int8"):
        layer(torch.ones(128))


def test_weak_references():
    layer = some_layer()
    called = []
    reference = weakref.ref(layer, called.append)
    assert reference() is layer
    del layer
    assert reference() is None
    assert called == [reference]


def test_a_cycle_is_collected():
    weight = _qlinear.eetq_pack(torch.zeros(64, 2, dtype=torch.int8))
    layer = _qlinear.EETQLinear(weight, torch.ones(2))
    weight.layer = layer
    reference = weakref.ref(layer)
    assert layer in gc.get_referrers(weight)
    del weight, layer
    gc.collect()
    assert reference() is None


def test_types_are_closed():
    with pytest.raises(TypeError):
        _qlinear.Layer()
    with pytest.raises(TypeError):
        type("Sub", (_qlinear.EETQLinear,), {})
    with pytest.raises((AttributeError, TypeError)):
        some_layer().in_features = 3
