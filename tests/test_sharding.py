"""Parts of layers hold the bits of the whole's weight, at every place where a part may begin."""

import itertools

import numpy as np
import pytest
import torch
from checkpoint_formats import NF4
from layer_cases import exact, pack_on_the_cpu
from parallel_cases import SPLITS, fp16_rows
from torch import nn

import qlinear
from qlinear import sharding

EVERY = [(split, sizes) for split in SPLITS for sizes in split.sizes]


def named(value):
    return value.name if hasattr(value, "name") else "x".join(map(str, value))


def weight(layer):
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.dequantize(torch.float32)


def bounds(size, step, seed):
    """Places where parts may begin, not evenly, among them the first after 0 and the last before the end."""
    inside = np.arange(step, size, step)
    chosen = np.random.default_rng(seed).choice(inside, min(3, len(inside)), replace=False) if len(inside) else []
    return [0, *sorted({*chosen, *inside[:1], *inside[-1:]}), size]


@pytest.mark.parametrize(("split", "sizes"), EVERY, ids=named)
def test_outputs(split, sizes):
    layer, W = split.layer(*sizes)
    whole = weight(layer)
    np.testing.assert_allclose(whole, W, rtol=1e-6, atol=1e-7)
    places = bounds(sizes[0], sharding.column_step(layer).least, 1)
    for begin, end in itertools.pairwise(map(int, places)):
        part = sharding.column_part(layer, begin, end)
        assert type(part) is type(layer)
        assert (part.in_features, part.out_features) == (sizes[1], end - begin)
        assert exact(weight(part), whole[begin:end]), (begin, end)
        assert exact(part.bias.detach(), layer.bias.detach()[begin:end])
    assert len(places) > 2


@pytest.mark.parametrize(("split", "sizes"), EVERY, ids=named)
def test_inputs(split, sizes):
    layer, _ = split.layer(*sizes)
    whole = weight(layer)
    places = bounds(sizes[1], sharding.row_step(layer).least, 2)
    for begin, end in itertools.pairwise(map(int, places)):
        part = sharding.row_part(layer, begin, end, bias=begin == 0)
        assert type(part) is type(layer)
        assert (part.in_features, part.out_features) == (end - begin, sizes[0])
        assert exact(weight(part), whole[:, begin:end]), (begin, end)
        assert (part.bias is None) == (begin > 0)
    assert len(places) > 2


@pytest.mark.parametrize("split", [split for split in SPLITS if split.name != "dense"], ids=named)
def test_a_part_loads_what_it_saves_and_keeps_its_manners(split):
    layer, _ = split.layer(*split.sizes[0])
    layer.eval()
    for part in (sharding.column_part(layer, 0, 8), sharding.row_part(layer, 0, sharding.row_step(layer).wish, False)):
        assert not part.training
        assert part.weight_dtype == layer.weight_dtype
        assert getattr(part, "scale_key", None) == getattr(layer, "scale_key", None)
        state = part.state_dict()
        assert {key.partition("bitsandbytes")[0] for key in state} <= {
            key.partition("bitsandbytes")[0] for key in layer.state_dict()
        }
        again = type(part).from_tensors(state, **options(part))
        assert exact(weight(again), weight(part))


def options(part):
    if isinstance(part, qlinear.QuantLinear):
        known = {"bits": part.bits, "group_size": part.groupsize, "zero_format": part.zero_format}
        return known | {"in_features": part.in_features}
    if isinstance(part, qlinear.AWQLinear):
        return {"group_size": part.group_size}
    if isinstance(part, qlinear.Fp8Linear):
        return {"activation": part.activation, "block_size": (part.block_n, part.block_k)}
    return {"threshold": part.threshold} if isinstance(part, qlinear.Linear8bitLt) else {}


@pytest.mark.parametrize("name", ["gptq-4", "awq", "eetq", "nf4", "nf4-double"])
def test_a_packed_layer_stays_packed_and_gives_the_same_parts(name, monkeypatch):
    split = next(split for split in SPLITS if split.name == name)
    layer, _ = split.layer(*split.sizes[0])
    parts = [sharding.column_part(layer, 0, 16), sharding.row_part(layer, 64, 192, True)]
    pack_on_the_cpu(monkeypatch)
    packed, _ = split.layer(*split.sizes[0])
    assert packed.packed is not None
    for part, other in zip(
        parts, (sharding.column_part(packed, 0, 16), sharding.row_part(packed, 64, 192, True)), strict=True
    ):
        assert other.packed is not None
        assert exact(weight(part), weight(other))
    assert packed.packed is not None


def test_groups_that_a_part_cuts_become_smaller_ones():
    split = next(split for split in SPLITS if split.name == "gptq-4")
    layer, _ = split.layer(48, 256, 128)
    assert sharding.row_part(layer, 128, 256, False).groupsize == 128
    cut = sharding.row_part(layer, 96, 256, False)
    assert (cut.groupsize, tuple(cut.scales.shape)) == (32, (5, 48))
    # Smaller ones than kernels take are told channel by channel.
    cut = sharding.row_part(layer, 100, 256, False)
    assert (cut.groupsize, tuple(cut.scales.shape)) == (128, (2, 48))


def test_an_act_order_part_has_only_the_groups_of_its_own_inputs():
    split = next(split for split in SPLITS if split.name == "gptq-4-act-order")
    layer, _ = split.layer(48, 256, 32)
    part = sharding.row_part(layer, 0, 4, False)
    assert part.scales.shape[0] == len(set(layer.g_idx[:4].tolist()))


def test_double_quantization_stays_where_blocks_of_32_absmax_follow_each_other():
    layer = qlinear.Linear4bit(torch.randn(16, 8192), None, "nf4")
    part = sharding.row_part(layer, 0, 4096, False)
    assert (part.nested_blocksize, part.absmax.dtype) == (64, torch.uint8)
    assert exact(weight(part), weight(layer)[:, :4096])
    part = sharding.column_part(layer, 2, 4)
    assert (part.nested_blocksize, part.absmax.dtype) == (256, torch.uint8)
    part = sharding.row_part(layer, 64, 192, False)
    assert (part.nested_absmax, part.absmax.dtype) == (None, torch.float32)
    assert exact(weight(part), weight(layer)[:, 64:192])


def test_double_quantization_of_rows_that_cross_its_blocks():
    """160 blocks a row, of which the part's 64 begin anywhere in the 256 that share an outer absmax."""
    layer = qlinear.Linear4bit(torch.randn(8, 10240), None, "nf4")
    part = sharding.row_part(layer, 2048, 6144, False)
    assert part.nested_blocksize == 32
    assert exact(weight(part), weight(layer)[:, 2048:6144])


def test_groups_that_are_counted_from_the_end():
    split = next(split for split in SPLITS if split.name == "gptq-4-act-order")
    layer, _ = split.layer(48, 256, 32)
    index = layer.g_idx.clone()
    index[::3] -= len(layer.scales)
    layer.g_idx = index
    for begin, end in ((0, 64), (64, 160), (160, 256)):
        assert exact(weight(sharding.row_part(layer, begin, end, False)), weight(layer)[:, begin:end])
    # The groups follow each other, whichever end they are counted from.
    layer.g_idx = torch.arange(256, dtype=torch.int32) // 32 - 8
    assert sharding.row_part(layer, 64, 160, False).groupsize == 32


def test_scales_of_outputs_in_a_row():
    codes = torch.randn(16, 64).to(torch.float8_e4m3fn)
    layer = qlinear.Fp8Linear(codes, None, torch.rand(1, 16) + 0.5, None)
    part = sharding.column_part(layer, 4, 12)
    assert part.weight_scale.shape == (1, 8)
    assert exact(weight(part), weight(layer)[4:12])


def test_one_block_of_several_still_quantizes_its_inputs_by_groups():
    codes = torch.randn(256, 256).to(torch.float8_e4m3fn)
    layer = qlinear.Fp8Linear(codes, None, torch.rand(2, 2) + 0.5, None)
    part = sharding.row_part(sharding.column_part(layer, 0, 128), 128, 256, False)
    assert part.weight_scale.numel() == 1
    assert all("activation=group" in repr(one) for one in (layer, part))


def test_zeros_that_tell_their_format_tell_it_for_every_part():
    split = next(split for split in SPLITS if split.name == "gptq-4")
    layer, _ = split.layer(48, 256, 128)
    # v1 by one column alone; a part without it would be taken for v2.
    middle = torch.full((2, 48), 8, dtype=torch.uint8)
    middle[0, 40] = 3
    qzeros = qlinear._qlinear.gptq_pack_codes(middle.t().contiguous(), bits=4).t().contiguous()
    layer = qlinear.QuantLinear(layer.qweight, qzeros, layer.scales, layer.g_idx, None, 4, 128)
    assert exact(weight(sharding.column_part(layer, 0, 16)), weight(layer)[:16])
    assert exact(weight(sharding.row_part(layer, 128, 256, False)), weight(layer)[:, 128:])


def test_a_learning_int8_layer_is_split_by_outputs_only():
    tensors, _ = fp16_rows(np.random.default_rng(0), 16, 64, 0)
    layer = qlinear.Linear8bitLt(tensors["weight"], None)
    part = sharding.column_part(layer, 4, 12)
    assert part.has_fp16_weights
    assert part.weight.requires_grad
    assert exact(part.weight.detach(), layer.weight.detach()[4:12])
    with pytest.raises(ValueError, match="absmax of whole rows"):
        sharding.row_step(layer)


def test_blocks_across_rows_cannot_be_split_along_them():
    layer = qlinear.Linear4bit(torch.randn(64, 100), None, "nf4")
    with pytest.raises(ValueError, match=r"blocks of 64 run on .* 64 or 128 inputs could be split"):
        sharding.row_step(layer)
    # By outputs they can: 16 rows of 100 are 25 blocks.
    assert sharding.column_step(layer).least == 16
    assert exact(weight(sharding.column_part(layer, 16, 32)), weight(layer)[16:32])


def test_nothing_is_made_of_tensors_without_data():
    with pytest.raises(ValueError, match="load them first"):
        sharding.column_part(qlinear.EETQLinear.empty(64, 16), 0, 8)


def test_the_writers_code_is_the_formats():
    assert np.allclose(NF4, qlinear.functional.get_4bit_type("nf4").numpy())


def test_what_is_chosen_beside_a_weight_goes_with_it():
    split = next(split for split in SPLITS if split.name == "fp8-channel")
    layer, _ = split.layer(48, 256, 0)
    layer.promoted = True
    assert sharding.column_part(layer, 0, 16).promoted
    assert sharding.row_part(layer, 0, 64, False).promoted
    layer = qlinear.Linear8bitLt(torch.randn(16, 64), None, has_fp16_weights=False, index=3)
    assert sharding.column_part(layer, 0, 8).index == sharding.row_part(layer, 0, 32, False).index == 3
