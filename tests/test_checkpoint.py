"""load_checkpoint and inspect: each format written by the tests' own writers, into models as they may be."""

import json

import checkpoint_formats as formats
import numpy as np
import pytest
import torch
from checkpoint_cases import (
    FORMATS,
    GPTQ,
    HIDDEN,
    INNER,
    TOLERANCES,
    Small,
    added,
    empty,
    held,
    quantized_files,
    real,
    renamed,
    unchanged,
    written,
)
from checkpoint_files import write_directory
from torch import nn

import qlinear
from qlinear.__main__ import main
from qlinear.checkpoint import load_checkpoint


def agree(model, dense, tolerance):
    """Every quantized layer's weight is the dense one, and so, as far as activations are not quantized, the outputs."""
    for name, module in model.named_modules():
        if isinstance(module, qlinear.layers._module.QuantizedLinear):
            expected = dense.get_submodule(name).weight
            torch.testing.assert_close(module.dequantize(torch.float32), expected, rtol=2e-6, atol=1e-7)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        out, expected = model(ids), dense(ids)
    assert (out - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("name", "files"), [(name, 1 + at % 3) for at, name in enumerate(FORMATS)])
def test_a_loaded_model_is_the_dense_one_of_its_weights(tmp_path, name, files):
    write, config, kind = FORMATS[name]
    dense, tensors = quantized_files(write)
    write_directory(tmp_path, tensors, config, files=files)
    model = empty()
    report = load_checkpoint(model, tmp_path, progress=False)
    assert len(report.replaced) == 8
    assert all(type(model.get_submodule(layer)) is kind for layer in report.replaced)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    agree(model, dense, TOLERANCES.get(name, 1e-5))
    kept = {key: tensor for key, tensor in model.state_dict().items() if key in tensors}
    if not any(converted in name for converted in ("gemv", "marlin", "planar", "packed", "integers", "bound", "opt-b")):
        assert kept.keys() == tensors.keys()
        for key, tensor in kept.items():
            assert tensor.dtype == tensors[key].dtype
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[key].reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(tmp_path, monkeypatch, error):
    _, directory = written(tmp_path)
    model = real()
    made, calls = qlinear.QuantLinear.from_tensors, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 5:
            raise error("in the middle")
        return made(*arguments, **options)

    monkeypatch.setattr(qlinear.QuantLinear, "from_tensors", failing)
    modules, before = held(model)
    with pytest.raises(error, match="in the middle"):
        load_checkpoint(model, directory)
    now, after = held(model)
    assert now == modules
    assert all(after[name][0] == identity for name, (identity, _) in before.items())


def test_an_interrupt_while_tensors_are_put_in_their_places_leaves_them_all(tmp_path):
    class Interrupted(dict):
        told = False

        def __setitem__(self, key, value):
            if not self.told:
                self.told = True
                raise KeyboardInterrupt
            super().__setitem__(key, value)

    _, directory = written(tmp_path)
    model = real()
    model.norm.__dict__["_parameters"] = Interrupted(model.norm._parameters)
    modules, before = held(model)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(model, directory)
    now, after = held(model)
    assert now == modules
    assert all(after[name][0] == identity for name, (identity, _) in before.items())


def test_a_model_with_memory_of_its_own_is_loaded_too(tmp_path):
    dense, directory = written(tmp_path)
    model = Small().train()
    model.embed.weight.requires_grad_(False)
    assert load_checkpoint(model, directory).replaced
    assert model.layers[0].q_proj.training
    assert not model.embed.weight.requires_grad
    assert model.norm.weight.requires_grad
    agree(model.eval(), dense, 1e-5)
    model = real()
    load_checkpoint(model, directory)
    assert not any(module.training for module in model.modules())


def test_dtype_is_that_of_biases_and_of_what_is_not_quantized(tmp_path):
    _, directory = written(tmp_path)
    model = empty()
    load_checkpoint(model, directory, dtype=torch.bfloat16)
    assert model.embed.weight.dtype == model.norm.weight.dtype == torch.bfloat16
    assert model.layers[0].q_proj.bias.dtype == torch.bfloat16
    assert model.layers[0].q_proj.scales.dtype == torch.float16
    for dtype in (torch.int8, torch.float8_e4m3fn, "float16"):
        with pytest.raises(TypeError, match="dtype must be a floating-point dtype or None"):
            load_checkpoint(empty(), directory, dtype=dtype)


def test_a_quantized_lm_head_is_no_longer_tied(tmp_path):
    dense, directory = written(tmp_path, tied=False, skip=())
    model = empty(tied=True)
    load_checkpoint(model, directory)
    assert type(model.lm_head) is qlinear.QuantLinear
    agree(model, dense, 1e-5)


def test_tied_tensors_may_be_in_the_files_twice_if_they_are_the_same(tmp_path):
    dense, directory = written(
        tmp_path, change=lambda tensors, _: tensors | {"lm_head.weight": tensors["embed.weight"]}
    )
    model = empty()
    load_checkpoint(model, directory)
    agree(model, dense, 1e-5)
    written(tmp_path, change=lambda tensors, _: tensors | {"lm_head.weight": tensors["embed.weight"] + 1})
    unchanged(real(), directory, "embed.weight and lm_head.weight are one tensor in the model, but differ in the files")


def test_formats_may_be_mixed_and_layers_left_as_they_are(tmp_path):
    rng = np.random.default_rng(3)
    dense, tensors = Small(), {}
    writers = {
        "layers.0.q_proj": formats.gptq(8), "layers.0.v_proj": formats.awq_gemm, "layers.0.gate_proj": formats.eetq,
        "layers.1.q_proj": formats.fourbit("nf4", True), "layers.1.down_proj": formats.gptq(3, act_order=True),
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    for name, write in writers.items():
        module = dense.get_submodule(name)
        made, W = write(rng, *module.weight.shape, 32)
        module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(W, np.float32)))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    model = empty()
    report = load_checkpoint(model, write_directory(tmp_path, tensors))
    assert sorted(report.replaced) == sorted(writers)
    agree(model.eval(), dense.eval(), 1e-5)


def test_a_zero_bias_that_the_model_lacks_and_a_plain_model(tmp_path):
    dense, directory = written(tmp_path, change=added("layers.0.v_proj.bias", torch.zeros(HIDDEN)))
    model = empty()
    load_checkpoint(model, directory)
    agree(model, dense, 1e-5)
    plain = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    model = empty()
    assert load_checkpoint(model, write_directory(tmp_path / "plain", plain)).replaced == []
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), dense(ids))
    with pytest.raises(ValueError, match="says quant_method gptq, but no tensor is quantized"):
        load_checkpoint(model, write_directory(tmp_path / "plain", plain, GPTQ))


def test_modules_that_cannot_be_replaced(tmp_path):
    _, directory = written(tmp_path)

    def refused(change, error):
        model = empty()
        change(model)
        with pytest.raises(ValueError, match=error):
            load_checkpoint(model, directory)

    class Other(nn.Linear):
        pass

    block = "layers.0.q_proj: gptq: "
    refused(lambda m: m.layers[0].q_proj.register_forward_hook(print), f"{block}cannot be replaced: it has hooks")
    refused(lambda m: setattr(m.layers[0], "q_proj", Other(64, 64)), f"{block}cannot be replaced: Other is a subclass")
    refused(lambda m: setattr(m.layers[0], "q_proj", nn.Identity()), f"{block}in the model it is a Identity")
    refused(lambda m: setattr(m.layers[0], "q_proj", nn.Linear(64, 32)), f"{block}has 64 inputs and 64 outputs")
    refused(lambda m: delattr(m.layers[0], "q_proj"), f"{block}the model has no such module")
    refused(lambda m: setattr(m.layers[1], "q_proj", m.layers[0].q_proj), "layers.1.q_proj and layers.0.q_proj are one")
    refused(
        lambda m: m.register_buffer("table", torch.empty(2, device="meta"), persistent=False), "table: is a buffer on"
    )


def test_one_layer_under_two_names_is_replaced_under_both(tmp_path):
    _, directory = written(tmp_path)
    model = empty()
    model.also = model.layers[0].q_proj
    load_checkpoint(model, directory)
    assert model.also is model.layers[0].q_proj
    assert type(model.also) is qlinear.QuantLinear


def test_a_loaded_model_loads_another_checkpoint(tmp_path):
    model = empty()
    load_checkpoint(model, written(tmp_path / "gptq")[1])
    dense, directory = written(tmp_path / "awq", "awq", seed=2)
    load_checkpoint(model, directory)
    agree(model, dense, 1e-5)


def test_the_layers_of_gpt_2_are_replaced(tmp_path):
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.empty(nf))

    made, W = formats.gptq(4)(np.random.default_rng(0), 96, 64, 32)
    bias = torch.arange(96.0)
    model = nn.Sequential(Conv1D(96, 64))
    load_checkpoint(model, write_directory(tmp_path, {f"0.{key}": t for key, t in made.items()} | {"0.bias": bias}))
    x = torch.eye(64)
    torch.testing.assert_close(model(x), torch.from_numpy(np.ascontiguousarray(W.T, np.float32)) + bias)


def inspected(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_tells_what_a_directory_holds(tmp_path, capsys, name):
    _, tensors = quantized_files(FORMATS[name][0])
    _, directory = written(tmp_path, name)
    code, output = inspected(capsys, directory, "--json")
    found = json.loads(output.out)
    assert code == 0
    assert found["refused"] == {}
    assert len(found["layers"]) == 8
    of_layers = sum(layer["bytes"] for layer in found["layers"])
    assert of_layers + found["plain"]["bytes"] == found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    (first,) = (layer for layer in found["layers"] if layer["name"] == "layers.0.gate_proj")
    own = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("layers.0.gate_proj."))
    assert (first["in_features"], first["out_features"], first["bytes"]) == (HIDDEN, INNER, own)
    assert first["bits_per_weight"] == round(8 * own / (HIDDEN * INNER), 3)


def test_inspect_prints_a_table_and_what_would_be_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, directory = written(tmp_path)
    code, output = inspected(capsys, directory)
    assert code == 0
    assert "config.json says gptq" in output.out
    assert "4 bits, group_size 32" in output.out
    written(tmp_path, change=renamed("q_proj.qweight", "q_proj.Qidxs"))
    code, output = inspected(capsys, directory)
    assert code == 1
    assert "2 would be refused" in output.out
    assert "QuIP#, which is not implemented" in output.out
    code, output = inspected(capsys, tmp_path / "absent")
    assert code == 2
    assert "is not a directory" in output.err


def test_progress_is_shown_where_it_is_asked_for(tmp_path, capsys):
    _, directory = written(tmp_path)
    load_checkpoint(empty(), directory, progress=False)
    assert capsys.readouterr().err == ""
    model = empty()
    load_checkpoint(model, directory, progress=True)
    assert "qlinear: load: 100%" in capsys.readouterr().err
    qlinear.save_pretrained(model, tmp_path / "saved", progress=True)
    assert "qlinear: save: 100%" in capsys.readouterr().err
