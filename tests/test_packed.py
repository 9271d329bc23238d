"""Packed weights: the layout against its tables, the way there and back, hostile descriptions, and what a module in
packed form gives to those who ask for its tensors."""

import copy
import gc
import threading
import weakref

import numpy as np
import packed_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import (
    CASES,
    PACKED_CASES,
    K,
    N,
    array,
    assert_close,
    awq_nibbles,
    exact,
    inputs,
    make,
    pack_on_the_cpu,
    stream,
)
from packed_layers import floats, groups_of, make_awq, make_eetq, make_fourbit, make_gptq, words

import qlinear
from qlinear import _qlinear, ops
from qlinear.layers import _packing

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_both_ways(layer, tensors, sections):
    """sections: what the oracle says of the layout. The rest is a matter of the way back."""
    packed, spec = layer.pack()
    found = oracle.sections(spec, packed.numpy())
    for name, expected in sections.items():
        assert np.array_equal(found[name], expected.reshape(-1).view(np.uint8)), name
    twin = _qlinear.PackedLinear(packed, spec)
    unpacked = twin.unpack()
    assert len(unpacked) == len(tensors)
    for one, other in zip(unpacked, tensors, strict=True):
        assert exact(one, other)
    for dtype in ("float32", "float16", "bfloat16"):
        # Bit patterns: a NaN is as good as another of its bits only.
        assert exact(twin.dequantize(dtype), layer.dequantize(dtype))
    assert (twin.in_features, twin.out_features) == (layer.in_features, layer.out_features)
    return found, spec


sizes = st.integers(1, 70)
dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=120, deadline=None)
@given(
    seed=seeds,
    n=sizes,
    k=st.integers(1, 300),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32, 48, 64, 128]),
    dtype=dtypes,
    act_order=st.booleans(),
    zero_format=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_gptq(seed, n, k, bits, group_size, dtype, act_order, zero_format):
    random = np.random.default_rng(seed)
    layer, tensors, g_idx = make_gptq(random, n, k, bits, group_size, dtype, act_order, zero_format)
    _, groups = groups_of(k, group_size)
    order = np.arange(k)
    if g_idx is not None and groups > 1:
        order = oracle.order(g_idx.numpy())
    q = stream(tensors[0].numpy(), bits, k).T[:, order]
    z = stream(tensors[1].numpy().T.copy(), bits, n)
    if zero_format == "gptq":
        z = (z + 1) % 2**bits
    zeros = oracle.entries(n, groups, z.astype(np.uint8))
    code = {2: 0, 3: 1, 4: 2, 8: 3}[bits]
    scales = tensors[2].view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
    expected = {
        "codes": oracle.tiles(code, n, k, q),
        "scales": oracle.entries(n, groups, scales.T),
        "zeros": zeros if bits == 8 else oracle.nibbles(zeros),
    }
    found, spec = check_both_ways(layer, tensors, expected)
    if oracle.named(spec)["has_order"]:
        assert np.array_equal(found["order"].view(np.int32), order)
        assert np.array_equal(found["inverse"].view(np.int32), np.argsort(order))
    else:
        assert g_idx is None or np.array_equal(order, np.arange(k))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=sizes, k=st.integers(1, 300), group_size=st.sampled_from([-1, 16, 32, 48, 128]), dtype=dtypes)
def test_awq(seed, n, k, group_size, dtype):
    layer, tensors = make_awq(np.random.default_rng(seed), n, k, group_size, dtype)
    _, groups = groups_of(k, group_size)
    q, z = (awq_nibbles(tensor.numpy())[:, :n].T for tensor in tensors[:2])
    expected = {
        "codes": oracle.tiles(2, n, k, q),
        "zeros": oracle.nibbles(oracle.entries(n, groups, z.astype(np.uint8))),
    }
    check_both_ways(layer, tensors, expected)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, pairs=st.integers(1, 35), tiles=st.integers(1, 5), dtype=dtypes)
def test_eetq(seed, pairs, tiles, dtype):
    n, k = 2 * pairs, 64 * tiles
    layer, tensors = make_eetq(np.random.default_rng(seed), n, k, dtype)
    codes = _qlinear.eetq_unpack(tensors[0]).numpy().T.astype(np.int64) + 128
    scales = tensors[1].view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
    expected = {"codes": oracle.tiles(3, n, k, codes), "scales": oracle.entries(n, 1, scales[:, None])}
    check_both_ways(layer, tensors, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    n=sizes,
    blocks=st.integers(1, 9),
    blocksize=st.sampled_from([32, 64, 128]),
    nested_blocksize=st.sampled_from([0, 32, 256]),
)
def test_fourbit(seed, n, blocks, blocksize, nested_blocksize):
    k = blocks * blocksize
    layer, tensors = make_fourbit(np.random.default_rng(seed), n, k, blocksize, nested_blocksize)
    packed = tensors[0].numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(n, k)
    scales = tensors[1].numpy().reshape(n, blocks)
    expected = {
        "codes": oracle.tiles(4, n, k, codes),
        "scales": oracle.entries(n, blocks, scales if nested_blocksize else scales.view(np.int32)),
        "table": tensors[2].numpy(),
    }
    if nested_blocksize:
        expected |= {"nested_absmax": tensors[3].numpy(), "nested_table": tensors[4].numpy()}
    check_both_ways(layer, tensors, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_product_and_gradient_of_the_packed_form(dtype):
    random = np.random.default_rng(3)
    for layer in (
        make_gptq(random, 33, 200, 3, 48, torch.bfloat16, True, "gptq")[0],
        make_awq(random, 40, 96, 32, torch.float16)[0],
        make_eetq(random, 34, 128, torch.float32)[0],
        make_fourbit(random, 17, 256, 64, 256)[0],
    ):
        bias = torch.randn(layer.out_features).to(dtype)
        twin = _qlinear.PackedLinear(*layer.pack(), bias)
        W = layer.dequantize("float32").double()
        for m in (0, 1, 5, 40):
            for make_out, x, weight, shift in (
                (twin, inputs(m, layer.in_features, dtype=dtype), W.T, bias.double()),
                (twin.grad_input, inputs(m, layer.out_features, dtype=dtype), W, 0),
            ):
                reference = x.double() @ weight + shift
                assert_close(make_out(x), reference.numpy(), (x.double().abs() @ weight.abs()).numpy(), len(weight))


# What is not packed


def test_obstacles():
    random = np.random.default_rng(0)
    weight = torch.randn(32, 64)
    even = torch.arange(64, dtype=torch.int32) // 16
    for layer, reason in (
        (make_gptq(random, 8, 64, 4, 24, torch.float16, False, "gptq")[0], "24 columns"),
        (make_fourbit(random, 4, 96, 64, 0)[0], "whole number of blocks"),
        (
            _qlinear.AWQLinear(
                words(random, 64, 1), floats(random, torch.half, 4, 8), floats(random, torch.half, 4, 8), group_size=16
            ),
            "products",
        ),
        (
            _qlinear.QuantLinear(
                *make_gptq(random, 8, 64, 4, 16, torch.half, False, "gptq")[1],
                torch.where(even == 1, 0, even),
                bits=4,
                group_size=16,
            ),
            "act-order",
        ),
        (
            # Groups of no more columns than they may have, but the short one is not the last.
            _qlinear.QuantLinear(
                *make_gptq(random, 8, 80, 4, 32, torch.half, False, "gptq")[1],
                torch.tensor([0] * 32 + [1] * 16 + [2] * 32, dtype=torch.int32),
                bits=4,
                group_size=32,
            ),
            "act-order",
        ),
        (_qlinear.Linear8bitLt(*_qlinear.int8_quantize(weight)[:2]), "only quantizes the weight"),
        (_qlinear.Fp8Linear(*_qlinear.fp8_quantize(weight, mode="tensor")), "only quantizes the weight"),
    ):
        assert reason in layer.pack_obstacle
        assert layer.pack() is None
    layer = make_eetq(random, 8, 64, torch.float16)[0]
    assert layer.pack_obstacle == ""
    twin = _qlinear.PackedLinear(*layer.pack())
    assert twin.pack() is None
    assert "already" in twin.pack_obstacle


def test_hostile_descriptions_are_refused():
    random = np.random.default_rng(1)
    for layer in (
        make_gptq(random, 17, 128, 4, 32, torch.float16, True, "gptq")[0],
        make_fourbit(random, 16, 128, 32, 256)[0],
        make_eetq(random, 16, 128, torch.float16)[0],
    ):
        packed, spec = layer.pack()
        for index, name in enumerate(oracle.NAMES):
            for value in (-(2**63), -1, 0, 1, 2, 3, 7, 15, 31, 2**31, 2**32, 2**40, 2**62, 2**63 - 1):
                changed = (*spec[:index], value, *spec[index + 1 :])
                if changed == spec:
                    continue
                try:
                    twin = _qlinear.PackedLinear(packed, changed)
                except ValueError:
                    continue
                # What has the same size is as good as another weight of it: it is read within its bounds.
                assert name not in ("version", "groups", "has_zeros", "has_order")
                assert twin.dequantize().shape == (twin.out_features, twin.in_features)
                twin.unpack()
        with pytest.raises(TypeError, match="spec"):
            _qlinear.PackedLinear(packed, spec[:-1])
        with pytest.raises(TypeError, match="spec"):
            _qlinear.PackedLinear(packed, None)
        with pytest.raises(TypeError, match="a number of spec"):
            _qlinear.PackedLinear(packed, (*spec[:-1], 1.5))
        with pytest.raises(ValueError, match="packed"):
            _qlinear.PackedLinear(packed[:-1], spec)
        with pytest.raises(TypeError, match="packed"):
            _qlinear.PackedLinear(packed.view(torch.int8), spec)
        with pytest.raises(ValueError, match="16 bytes"):
            _qlinear.PackedLinear(torch.empty(len(packed) + 32, dtype=torch.uint8)[1:][: len(packed)], spec)
        with pytest.raises(ValueError, match="bias"):
            _qlinear.PackedLinear(packed, spec, torch.zeros(3))


def test_an_order_that_lies_is_not_followed_out_of_bounds():
    layer = make_gptq(np.random.default_rng(2), 16, 128, 4, 32, torch.float16, True, "gptq")[0]
    packed, spec = layer.pack()
    oracle.sections(spec, packed.numpy())["inverse"].view(np.int32)[:] = np.array([-(2**31), 2**31 - 1] * 64)
    twin = _qlinear.PackedLinear(packed, spec)
    assert twin.dequantize().shape == (16, 128)
    twin.unpack()


def test_the_packed_tensor_is_new():
    random = np.random.default_rng(4)
    layer, tensors, _ = make_gptq(random, 16, 128, 4, 32, torch.float16, False, "gptq")
    before = [tensor.clone() for tensor in tensors]
    layer.pack()[0].fill_(0)
    for one, other in zip(tensors, before, strict=True):
        assert exact(one, other)


# The modules


@pytest.fixture
def packs(monkeypatch):
    pack_on_the_cpu(monkeypatch)


@pytest.fixture(params=PACKED_CASES, ids=repr)
def case(request):
    return request.param


def is_packed(layer):
    packing = layer._packing
    held = packing is not None and all(map(layer._is_away, packing.forms))
    assert held == (layer._buffers["packed"] is not None) == (packing is not None)
    return held


def test_layers_on_the_cpu_stay_as_they_are():
    for case in CASES:
        layer = make(case)
        layer(inputs(1, K))
        assert layer._packing is None
        assert layer._buffers.get("packed") is None


def test_packed_at_construction_and_by_every_call(case, packs, monkeypatch):
    layer = make(case)
    assert is_packed(layer)
    assert type(layer.engine()) is _qlinear.PackedLinear
    called = []
    monkeypatch.setitem(
        ops._OPERATORS,
        "packed",
        tuple(lambda *a, op=op: called.append(op) or op(*a) for op in ops._OPERATORS["packed"]),
    )
    x = inputs(2, K).requires_grad_()
    layer(x).sum().backward()
    assert called == [torch.ops.qlinear.packed.default, torch.ops.qlinear.packed_grad_input.default]
    assert is_packed(layer)


def test_the_checkpoints_tensors_are_dropped(case, packs):
    plain = make(case)
    plain._unpack()
    tensors = {name: plain._raw(name) for name in plain.packs}
    gone = [weakref.ref(tensor) for tensor in tensors.values() if tensor is not None]
    kept = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    del tensors
    plain(inputs(1, K))
    gc.collect()
    assert is_packed(plain)
    assert [ref() for ref in gone] == [None] * len(gone)
    assert all(exact(tensor, kept[name]) for name, tensor in plain.state_dict().items())


def test_nbytes_device_and_repr(case, packs):
    layer = make(case)
    text = repr(layer)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert is_packed(layer)
    assert layer.device == torch.device("cpu")
    assert 0.8 * stored < layer.nbytes < 1.2 * stored + 4096
    layer._unpack()
    assert repr(layer) == text
    assert layer.nbytes >= layer._raw(layer.fixed[0]).nbytes


def test_asking_for_a_tensor_unpacks_and_a_call_packs_again(case, packs):
    x = inputs(3, K)
    layer, other = make(case), make(case, seed=5)
    before, after = layer(x), other(x)
    name = layer.packs[0]
    tensor = getattr(layer, name)
    assert not is_packed(layer)
    assert tensor.device.type == "cpu"
    assert torch.equal(layer(x), before)
    assert is_packed(layer)
    # Written in place: what was handed out is the layer's own, until a call packs it.
    for name in layer.packs:
        if layer._raw(name) is not None:
            getattr(layer, name).copy_(getattr(other, name))
    if layer.operator == "fourbit":
        layer.nested_offset = other.nested_offset
    layer.bias.copy_(other.bias)
    assert torch.equal(layer(x), after)
    assert is_packed(layer)


def test_a_replaced_tensor_takes_effect(case, packs):
    x = inputs(3, K)
    layer, other = make(case), make(case, seed=5)
    expected = other(x)
    for name in layer.packs:
        if other._raw(name) is not None:
            value = getattr(other, name)
            setattr(layer, name, value)
    if layer.operator == "fourbit":
        layer.nested_offset = other.nested_offset
    layer.bias = other.bias
    assert torch.equal(layer(x), expected)
    assert is_packed(layer)


def test_a_changed_number_takes_effect(packs):
    layer = qlinear.QuantLinear.quantize(torch.randn(N, K), None, bits=4, group_size=32)
    x = inputs(3, K)
    before = layer(x)
    layer.zero_format = "gptq_v2"
    assert not torch.allclose(layer(x), before)
    layer.zero_format = "gptq"
    assert torch.equal(layer(x), before)
    assert is_packed(layer)


def test_functional_call_with_the_state_dict_and_with_a_part_of_it(case, packs):
    x = inputs(3, K)
    layer, other = make(case), make(case, seed=5)
    mine, theirs = layer(x), other(x)
    tensors = {name: t for name in layer.packs if (t := other._tensors()[name]) is not None} | {"bias": other.bias}
    if layer.operator != "fourbit" or layer.nested_offset == other.nested_offset:
        out = torch.func.functional_call(layer, tensors, (x,))
        assert torch.allclose(out, theirs, rtol=1e-5, atol=1e-5)
    assert is_packed(layer)
    scale = {"eetq": "weight_scales", "fourbit": "quant_map"}.get(layer.operator, "scales")
    out = torch.func.functional_call(layer, {scale: 2 * layer._tensors()[scale], "bias": 0 * layer.bias}, (x,))
    assert torch.allclose(out, 2 * (mine - layer.bias), rtol=1e-4, atol=1e-4)
    assert is_packed(layer)
    assert torch.equal(layer(x), mine)


def test_functional_call_does_not_pack_what_is_not_the_modules(packs):
    """The tensors of the call are gone after it: a meta layer must not keep them, an unpacked one not its own less."""
    source = make(CASES[0])
    tensors = {name: source._tensors()[name] for name in ("weight", "weight_scales", "bias")}
    empty = CASES[0].empty(K, N, True, "meta")
    x = inputs(2, K)
    assert torch.allclose(torch.func.functional_call(empty, tensors, (x,)), source(x), rtol=1e-5, atol=1e-5)
    assert empty._packing is None
    assert empty(x.to("meta")).is_meta
    unpacked = make(CASES[0], seed=6)
    expected = unpacked(x)
    assert unpacked.weight.is_cpu
    torch.func.functional_call(unpacked, tensors, (x,))
    assert not is_packed(unpacked)
    assert torch.equal(unpacked(x), expected)
    assert is_packed(unpacked)


def test_moves(case, packs, monkeypatch):
    layer = make(case)
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = inputs(3, K)
    expected = layer(x)
    packed = layer._buffers["packed"]
    layer.half().float()
    assert layer._buffers["packed"] is packed
    monkeypatch.setattr(_packing, "wanted", lambda device: False)
    layer.cpu()  # where nothing is to be packed
    assert not is_packed(layer)
    assert all(exact(t, saved[name]) for name, t in layer.state_dict().items() if name != "bias")
    assert torch.allclose(layer(x), expected, rtol=1e-3, atol=1e-3)
    pack_on_the_cpu(monkeypatch)
    layer.cpu()
    assert is_packed(layer)
    assert torch.allclose(layer(x), expected, rtol=1e-3, atol=1e-3)
    layer.to("meta")
    assert layer._packing is None
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.to_empty(device="cpu").load_state_dict(saved)
    assert is_packed(layer)
    assert torch.equal(layer(x), expected)


def test_tensors_put_past_setattr_count_and_move(packs):
    """As loaders do that fill a model's dictionaries themselves."""
    layer, other = make(CASES[0]), make(CASES[0], seed=5)
    x = inputs(3, K)
    expected = other(x)
    for name in (*layer.packs, "bias"):
        layer._buffers[name] = other._tensors()[name]
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert all(exact(t, other.state_dict()[name]) for name, t in layer.state_dict().items())
    layer.cpu()
    assert is_packed(layer)
    assert torch.equal(layer(x), expected)


def test_moving_to_empty_memory_leaves_no_order_to_follow(packs):
    """to_empty makes contents undefined; columns that a kernel gathers by are none of them."""
    weight = torch.randn(N, K)
    g_idx = torch.arange(K, dtype=torch.int32).flip(0) // 32
    plain = qlinear.QuantLinear.quantize(weight, None, bits=4, group_size=32)
    layer = qlinear.QuantLinear(plain.qweight, plain.qzeros, plain.scales, g_idx, None, 4, 32)
    assert is_packed(layer)
    assert oracle.named(layer._packing.spec)["has_order"]
    layer.to_empty(device="cpu")
    if is_packed(layer):
        found = oracle.sections(layer._packing.spec, layer._buffers["packed"].numpy())
        if oracle.named(layer._packing.spec)["has_order"]:
            assert sorted(found["order"].view(np.int32)) == list(range(K))


def test_a_state_dict_in_use_and_a_shared_tensor_stay_as_they_are(case, packs):
    source = make(case)
    state = source.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    x = inputs(2, K)
    one, other = case.empty(K, N, True, "meta"), case.empty(K, N, True, "meta")
    one.load_state_dict(state, assign=True)
    other.load_state_dict(state, assign=True)
    assert is_packed(one)
    assert is_packed(other)
    assert torch.equal(one(x), other(x))
    getattr(one, one.packs[0]).zero_()
    assert not torch.equal(one(x), other(x))
    assert all(exact(state[name], kept[name]) for name in kept)
    twin = copy.deepcopy(other)
    getattr(twin, twin.packs[0]).zero_()
    twin(x)
    assert torch.equal(other(x), source(x))


def test_what_cannot_be_packed_works_unpacked(packs):
    layer = qlinear.QuantLinear.quantize(torch.randn(N, 120), None, bits=4, group_size=24)
    assert not is_packed(layer)
    assert type(layer.engine()) is _qlinear.QuantLinear
    assert layer._unsettled is None


def test_wrong_tensors_are_refused_at_loading_and_at_each_call(packs):
    plain = qlinear.QuantLinear.quantize(torch.randn(N, K), None, bits=4, group_size=32)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    state["g_idx"][3] = 1000
    with pytest.raises(RuntimeError, match="g_idx must be in"):
        plain.load_state_dict(state)
    assert not is_packed(plain)
    with pytest.raises(ValueError, match="g_idx"):
        plain(inputs(1, K))
    with pytest.raises(ValueError, match="g_idx"):
        plain(inputs(1, K).requires_grad_())
    plain.g_idx[3] = 0
    plain(inputs(1, K))
    assert is_packed(plain)


def test_what_a_captured_graph_reads_stays(case, packs, monkeypatch):
    """A graph reads the memory of the tensors that it was captured with: they must not be given back."""
    layer = make(case)
    x = inputs(2, K)
    expected = layer(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    packed = layer._buffers["packed"]
    monkeypatch.setattr(_packing, "_is_capturing", lambda device: True)
    assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="captured"):
        getattr(layer, layer.packs[0])
    assert is_packed(layer)
    monkeypatch.setattr(_packing, "_is_capturing", lambda device: False)
    # Packed: the memory is kept and taken again.
    first = getattr(layer, layer.packs[0])
    assert packed.data_ptr() == layer._spare.data_ptr()
    layer(x)
    assert is_packed(layer)
    assert layer._buffers["packed"] is packed
    layer.load_state_dict(state)
    assert layer._buffers["packed"] is packed
    assert layer._spare is None
    # Unpacked: what was called while a graph was captured is not packed any more.
    first = getattr(layer, layer.packs[0])
    monkeypatch.setattr(_packing, "_is_capturing", lambda device: True)
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(_packing, "_is_capturing", lambda device: False)
    layer(x)
    layer.float()
    layer(x)
    assert not is_packed(layer)
    assert getattr(layer, layer.packs[0]) is first
    for name in layer.packs:
        if layer._raw(name) is not None:
            copied = getattr(layer, name).clone()
            setattr(layer, name, torch.nn.Parameter(copied, False) if name in layer._parameters else copied)
    assert torch.equal(layer(x), expected)
    assert is_packed(layer)


def test_a_layer_made_while_a_graph_is_captured(case, packs, monkeypatch):
    monkeypatch.setattr(_packing, "_is_capturing", lambda device: True)
    layer = make(case)
    assert not is_packed(layer)
    assert layer(inputs(2, K)).shape == (2, N)
    assert not is_packed(layer)


def test_linear4bit_keeps_its_parameter_and_its_view(packs):
    layer = qlinear.Linear4bit(torch.randn(N, K), None, "nf4", quant_storage=torch.bfloat16)
    assert is_packed(layer)
    # DistributedDataParallel takes parameters that are all on the same kind of device.
    stand_ins = [(name, p.requires_grad, p.device.type) for name, p in layer.named_parameters()]
    assert stand_ins == [("weight", False, "cpu")]
    assert layer.quant_storage == torch.bfloat16
    assert is_packed(layer)
    state = layer.quant_state
    assert state.absmax is layer.absmax
    assert state.absmax.dtype == torch.uint8
    assert not is_packed(layer)
    assert type(layer.weight) is torch.nn.Parameter
    assert layer.weight.dtype == torch.bfloat16
    dense = qlinear.functional.dequantize_4bit(layer.weight.data, state)
    layer(inputs(1, K))
    assert is_packed(layer)
    assert torch.equal(layer.dequantize(dense.dtype), dense)


def test_operators_of_the_packed_form_pass_opcheck(case, packs):
    layer = make(case)
    operator, arguments = layer._operands()
    assert operator == "packed"
    product, gradient = ops._OPERATORS["packed"]
    torch.library.opcheck(product, (inputs(3, K), *arguments), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(gradient, (inputs(3, N), *arguments), test_utils=("test_schema", "test_faketensor"))


def test_packing_inside_inference_mode_leaves_no_inference_tensors(case, packs):
    layer = make(case)
    with torch.inference_mode():
        getattr(layer, layer.packs[0])
        layer._unpack()
        assert not any(t.is_inference() for t in (*layer.parameters(), *layer.buffers()))
        assert layer(inputs(2, K)).is_inference()
    assert is_packed(layer)
    assert not any(t.is_inference() for t in (*layer.parameters(), *layer.buffers()))
    x = inputs(2, K).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_threads_that_pack_unpack_and_call(case, packs):
    layer = make(case)
    xs = [inputs(m, K, seed=m) for m in range(1, 5)]
    expected = [layer(x) for x in xs]
    failures = []

    def call(x, want):
        try:
            for _ in range(30):
                if not torch.allclose(layer(x), want, rtol=1e-4, atol=1e-4):
                    failures.append(x.shape)
        except Exception as error:
            failures.append(error)

    def ask():
        try:
            for _ in range(30):
                assert not getattr(layer, layer.packs[0]).is_meta
                layer.state_dict()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(xs, expected, strict=True)]
    threads += [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_replace_linear_counts_a_packed_weight_once(packs):
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    report = qlinear.replace_linear(model, "gptq")
    assert is_packed(model[0])
    assert report.bytes_after == model[0].nbytes < report.bytes_before / 5
    qlinear.dequantize(model)
    assert type(model[0]) is torch.nn.Linear


def test_array_of_the_layout_is_what_the_oracle_reads(case, packs):
    """decode of layer_cases sees only the state dict: what the packed layer computes must be the same weight."""
    layer = make(case)
    W = case.decode(layer.state_dict(), layer)
    assert is_packed(layer)
    assert np.abs(array(layer.dequantize(torch.float32)) - W).max() <= 2.0**-22 * np.abs(W).max()
