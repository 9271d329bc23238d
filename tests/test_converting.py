"""python -m qlinear convert: the same weights in another format, and why some have none."""

import functools
import json

import checkpoint_formats as formats
import numpy as np
import pytest
import torch
from checkpoint_files import write_directory
from layer_cases import exact

import qlinear
from qlinear.__main__ import main
from qlinear.converting import TARGETS, NotExactError, convert_checkpoint
from qlinear.inspection import collect
from qlinear.shards import Shards

GPTQ = {"quant_method": "gptq", "group_size": 32, "bits": 4}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def packed(bits, symmetric=True):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return PACKED | {"config_groups": {"group_0": group}}


# name: (writer, config).
SOURCES = {
    "gptq": (formats.gptq(4), GPTQ),
    "gptq_v2": (formats.gptq(4, version=2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq-sym": (formats.gptq(4, sym=True), GPTQ | {"sym": True}),
    "gptq-no-g_idx": (formats.gptq(4, g_idx=False), GPTQ),
    "gptq-act-order": (formats.gptq(4, act_order=True), GPTQ | {"desc_act": True}),
    "gptq3": (formats.gptq(3), GPTQ | {"bits": 3}),
    "gptq3-planar": (
        formats.gptq(3, version=2, pack=formats.planar), GPTQ | {"bits": 3, "checkpoint_format": "gptq_p"}
    ),
    "gptq8": (formats.gptq(8), GPTQ | {"bits": 8}),
    "gptq-marlin": (formats.marlin("B", "s"), GPTQ | {"is_marlin_format": True}),
    "awq": (formats.awq_gemm, AWQ | {"version": "gemm"}),
    "awq-gemv": (formats.awq_gemv, AWQ | {"version": "gemv"}),
    "awq-gemv_fast": (formats.awq_gemv_fast, AWQ | {"version": "gemv_fast"}),
    "awq-marlin": (formats.marlin(), AWQ | {"version": "marlin", "zero_point": False}),
    "compressed": (formats.compressed(4), packed(4)),
    "compressed-zeros": (formats.compressed(4, sym=False), packed(4, False)),
    "eetq": (formats.eetq, {"quant_method": "eetq"}),
    "int8": (formats.int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (formats.fourbit("nf4", True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp8": (formats.fp8("channel"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
}  # fmt: skip
AFFINE = ["gptq", "gptq_v2", "gptq-sym", "gptq-no-g_idx", "gptq-marlin", "awq", "awq-gemv", "awq-marlin", "compressed",
          "compressed-zeros"]  # fmt: skip
SAME = (
    [(name, to) for name in AFFINE for to in ("gptq", "gptq_v2", "awq")]
    + [
        (name, to)
        for name in ("gptq-act-order", "gptq3", "gptq3-planar", "gptq8", "eetq")
        for to in ("gptq", "gptq_v2")
    ]
    + [("eetq", "eetq"), ("eetq", "int8"), ("int8", "int8")]
)
OTHER = {
    ("gptq-act-order", "awq"): "act-order",
    ("gptq3", "awq"): "3 bits",
    ("gptq8", "awq"): "8 bits",
    ("gptq8", "eetq"): "several groups",
    ("gptq", "int8"): "4 bits, not 8",
    ("awq-gemv_fast", "gptq"): "products",
    ("awq-gemv_fast", "awq"): "products",
    ("awq", "eetq"): "a zero for each",
    ("eetq", "awq"): "8 bits",
    ("int8", "eetq"): "no fp16 numbers",
    ("nf4", "gptq"): "not evenly spaced",
    ("nf4", "awq"): "not evenly spaced",
    ("fp8", "int8"): "steps grow",
}
SIZES = {"up": (64, 128), "down": (128, 64)}


@functools.cache
def tensors_of(name):
    """(the files' tensors, {layer: W [N, K]}): two layers, one with a bias, and what is not quantized."""
    rng = np.random.default_rng(7)
    made, weights = {"embed.weight": torch.from_numpy(rng.normal(size=(9, 128)).astype(np.float32))}, {}
    for layer, (N, K) in SIZES.items():
        own, W = SOURCES[name][0](rng, N, K, 32)
        made |= {f"{layer}.{key}": tensor for key, tensor in own.items()}
        weights[layer] = torch.from_numpy(np.ascontiguousarray(W, np.float32))
    made["up.bias"] = torch.from_numpy(rng.normal(size=64).astype(np.float16))
    return made, weights


def written(directory, name):
    return write_directory(directory, tensors_of(name)[0], SOURCES[name][1])


def loaded(directory):
    with torch.device("meta"):
        modules = {layer: torch.nn.Linear(K, N, bias=layer == "up") for layer, (N, K) in SIZES.items()}
        model = torch.nn.ModuleDict(modules | {"embed": torch.nn.Embedding(9, 128)})
    qlinear.load_checkpoint(model, directory)
    return model


CLASSES = {
    "gptq": qlinear.QuantLinear, "gptq_v2": qlinear.QuantLinear, "awq": qlinear.AWQLinear,
    "int8": qlinear.Linear8bitLt, "eetq": qlinear.EETQLinear,
}  # fmt: skip


@pytest.mark.parametrize(("name", "to"), SAME, ids=str)
def test_the_same_weight_in_another_format(tmp_path, name, to):
    source = written(tmp_path / "src", name)
    (source / "quantize_config.json").write_text(json.dumps(SOURCES[name][1]))
    (source / "tokenizer.json").write_text("{}")
    report = convert_checkpoint(source, tmp_path / "made", to)
    assert [layer.name for layer in report.layers] == ["up", "down"]
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    tensors, weights = tensors_of(name)
    model = loaded(tmp_path / "made")
    for layer, W in weights.items():
        assert type(model[layer]) is CLASSES[to]
        made = model[layer].dequantize(torch.float32)
        # LLM.int8() divides by 127 in fp32, after it has multiplied.
        assert torch.equal(made, W) if to != "int8" else torch.allclose(made, W, rtol=3e-7, atol=0)
    assert exact(model["up"].bias, tensors["up.bias"])
    assert exact(model["embed"].weight.detach(), tensors["embed.weight"])
    if to.startswith("gptq"):
        assert all(model[layer].engine().zero_format == to for layer in SIZES)
    found = collect(tmp_path / "made")
    assert found["refused"] == {}
    method = {"gptq_v2": "gptq", "int8": "bitsandbytes"}.get(to, to)
    assert found["config"]["quant_method"] == method


@pytest.mark.parametrize(("name", "to"), [("gptq", "awq"), ("gptq", "gptq_v2"), ("awq", "gptq"), ("eetq", "gptq")])
def test_there_and_back_are_the_same_bytes(tmp_path, name, to):
    source = written(tmp_path / "src", name)
    convert_checkpoint(source, tmp_path / "there", to)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", name)
    first, last = Shards(source), Shards(tmp_path / "back")
    assert set(first) == set(last)
    assert all(exact(first.tensor(key), last.tensor(key)) for key in first)


@pytest.mark.parametrize(("name", "to"), OTHER, ids=str)
def test_what_is_not_exact_is_explained(tmp_path, name, to):
    source = written(tmp_path / "src", name)
    with pytest.raises(NotExactError, match=r"no exact conversion") as raised:
        convert_checkpoint(source, tmp_path / "made", to)
    text = str(raised.value)
    assert OTHER[name, to] in text
    assert "(up and 1 more)" in text or "(up)" in text or "(down)" in text
    assert "quantize" in text
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_every_pair_is_exact_or_explained(tmp_path):
    exact_pairs, explained = set(), set()
    for name in SOURCES:
        source = written(tmp_path / name, name)
        for to in TARGETS:
            try:
                convert_checkpoint(source, tmp_path / f"{name}-{to}", to)
                exact_pairs.add((name, to))
            except NotExactError:
                explained.add((name, to))
    assert exact_pairs == set(SAME)
    assert explained >= set(OTHER)


def test_int8_with_scales_of_eetq_goes_back_to_it(tmp_path):
    source = written(tmp_path / "src", "eetq")
    convert_checkpoint(source, tmp_path / "int8", "int8")
    convert_checkpoint(tmp_path / "int8", tmp_path / "back", "eetq")
    first, last = Shards(source), Shards(tmp_path / "back")
    assert all(exact(first.tensor(key), last.tensor(key)) for key in first)


def test_zeros_that_v1_cannot_tell_from_v2(tmp_path):
    tensors = dict(tensors_of("awq")[0])
    for layer in SIZES:
        tensors[f"{layer}.qzeros"] = torch.full_like(tensors[f"{layer}.qzeros"], 0x19999999 - 0x80000000)
    source = write_directory(tmp_path / "src", tensors, AWQ)
    with pytest.raises(NotExactError, match="convert to gptq_v2"):
        convert_checkpoint(source, tmp_path / "made", "gptq")
    convert_checkpoint(source, tmp_path / "made", "gptq_v2")
    for layer in SIZES:
        before, after = loaded(source)[layer], loaded(tmp_path / "made")[layer]
        assert torch.equal(before.dequantize(torch.float32), after.dequantize(torch.float32))


def test_zeros_that_other_readers_of_v1_mistake_are_told(tmp_path):
    source = written(tmp_path / "src", "awq")
    assert any("2 layers have zeros of 0" in note for note in convert_checkpoint(source, tmp_path / "v1", "gptq").notes)
    assert convert_checkpoint(source, tmp_path / "v2", "gptq_v2").notes == []
    assert convert_checkpoint(written(tmp_path / "sym", "awq-marlin"), tmp_path / "v1-sym", "gptq").notes == []


def test_refused(tmp_path):
    source = written(tmp_path / "src", "gptq")
    with pytest.raises(ValueError, match="none of gptq, gptq_v2"):
        convert_checkpoint(source, tmp_path / "made", "gguf")
    plain = write_directory(tmp_path / "plain", {"up.weight": torch.randn(64, 128)})
    with pytest.raises(ValueError, match="no quantized layer"):
        convert_checkpoint(plain, tmp_path / "made", "gptq")
    tensors = dict(tensors_of("gptq")[0])
    del tensors["down.scales"]
    with pytest.raises(ValueError, match=r"cannot be loaded: down: lacks down\.scales"):
        convert_checkpoint(write_directory(tmp_path / "broken", tensors, GPTQ), tmp_path / "made", "awq")
    assert not (tmp_path / "made").exists()


def test_the_command(tmp_path, capsys):
    source = written(tmp_path / "src", "awq-gemv")
    assert main(["convert", str(source), str(tmp_path / "made"), "--to", "awq"]) == 0
    assert "every weight the same" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "json"), "--to", "gptq_v2", "--json"]) == 0
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == ["up", "down"]
    assert main(["convert", str(source), str(tmp_path / "other"), "--to", "int8"]) == 2
    assert "a zero for each" in capsys.readouterr().err
