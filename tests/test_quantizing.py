"""python -m qlinear quantize: whole directories rounded to each format, loaded again, and what is refused."""

import json
import os
import weakref

import pytest
import torch
from checkpoint_files import write_directory
from layer_cases import exact

import qlinear
from qlinear import quantizing, rewriting
from qlinear.__main__ import main
from qlinear.inspection import collect
from qlinear.quantizing import FORMATS, quantize_checkpoint
from qlinear.shards import Shards

pytest.importorskip("transformers")

import hf_models

pytestmark = pytest.mark.usefixtures("one_thread")

# The layers that replace_linear makes of the same weights; it makes no other FP8 ones.
REPLACED = {
    "gptq-2": ("gptq", {"bits": 2}), "gptq-3": ("gptq", {"bits": 3}), "gptq-4": ("gptq", {"bits": 4}),
    "gptq-8": ("gptq", {"bits": 8}), "awq": ("awq", {}), "eetq": ("eetq", {}), "nf4": ("bitsandbytes-nf4", {}),
    "fp4": ("bitsandbytes-fp4", {}), "int8": ("bitsandbytes", {}), "fp8": ("fp8", {}),
}  # fmt: skip
BITS = {"gptq-2": 3, "gptq-3": 4, "gptq-4": 5.2, "awq": 5.2, "nf4": 6, "fp4": 6}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    hf_models.dense("llama").save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    (directory / "pytorch_model.bin").write_bytes(b"weights of another kind")
    return directory


TOKENS = torch.tensor([[1, 5, 9, 2, 44]])


@pytest.mark.parametrize("to", FORMATS)
def test_every_format(source, tmp_path, to):
    report = quantize_checkpoint(source, tmp_path / "made", to, group_size=64)
    assert len(report.layers) == 14
    assert report.skipped == [("lm_head", "in skip: lm_head")]
    model = qlinear.from_pretrained(tmp_path / "made", dtype=torch.float32)

    # Bit for bit what replace_linear makes of the loaded model.
    dense = hf_models.dense("llama")
    if to in REPLACED:
        name, options = REPLACED[to]
        twin = hf_models.dense("llama")
        qlinear.replace_linear(twin, name, group_size=64, **options)
        expected, state = twin.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(exact(state[key], expected[key]) for key in expected)
        assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)

    for layer in report.layers:
        weight, made = dense.get_submodule(layer.name).weight, model.get_submodule(layer.name).dequantize(torch.float32)
        assert layer.error == pytest.approx(((made - weight).norm() / weight.norm()).item(), rel=1e-4)
        assert layer.largest == pytest.approx((made - weight).abs().max().item(), rel=1e-6)
        assert 8 * layer.bytes_after / weight.numel() <= BITS.get(to, 9)
        assert layer.bytes_before == 4 * weight.numel()
    held = sum(entry.nbytes for entry in Shards(tmp_path / "made").values())
    assert report.bytes_after == held < report.bytes_before

    found = collect(tmp_path / "made")
    assert found["refused"] == {}
    assert len(found["layers"]) == 14
    assert found["config"]["quant_method"] != "qlinear"
    names = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"
    }  # fmt: skip


def test_fp8_scales_of_a_tensor_and_of_blocks():
    torch.manual_seed(0)
    weight = torch.randn(130, 300)
    weight[:128, :128] = 0
    whole, blocks = quantizing._fp8_tensor(weight, None), quantizing._fp8_block(weight, None)
    assert whole.weight_scale.shape == (1,)
    assert whole.weight_scale.item() == pytest.approx(weight.abs().max().item() / 448)
    assert blocks.weight_scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            part = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            most = part.abs().max().item()
            assert blocks.weight_scale[i, j].item() == pytest.approx(most / 448 if most else 1 / 448)
    for layer in (whole, blocks):
        made = layer.dequantize(torch.float32)
        assert (made[:128, :128] == 0).all()
        assert ((made - weight).abs() <= weight.abs() / 15 + 1e-4).all()
        assert layer.weight.shape == weight.shape


def test_rows_of_zeros_and_denormals_stay_finite(tmp_path):
    weight = torch.zeros(64, 128)
    weight[1] = 1e-42
    weight[2] = torch.randn(128)
    write_directory(tmp_path / "src", {"proj.weight": weight})
    for to in FORMATS:
        quantize_checkpoint(tmp_path / "src", tmp_path / to, to, group_size=32)
        model = torch.nn.ModuleDict({"proj": torch.nn.Linear(128, 64, bias=False)})
        qlinear.load_checkpoint(model, tmp_path / to)
        made = model["proj"].dequantize(torch.float32)
        assert torch.isfinite(made).all()
        # bitsandbytes' double quantization gives a block of zeros the codes' own smallest absmax.
        assert (made[0].abs() <= (0.01 if to == "nf4" else 0)).all()


@pytest.mark.parametrize(("architecture", "count"), [("gpt2", 8), ("bert", 13)])
@pytest.mark.parametrize("to", ["gptq-8", "nf4"])
def test_other_architectures(tmp_path, architecture, count, to):
    hf_models.dense(architecture).save_pretrained(tmp_path / "src")
    report = quantize_checkpoint(tmp_path / "src", tmp_path / "made", to, group_size=32)
    assert len(report.layers) == count
    model, twin = qlinear.from_pretrained(tmp_path / "made", dtype=torch.float32), hf_models.dense(architecture)
    qlinear.replace_linear(twin, REPLACED[to][0], group_size=32, **REPLACED[to][1])
    assert torch.equal(model(TOKENS)[0], twin(TOKENS)[0])
    dense = hf_models.dense(architecture)(TOKENS)[0]
    assert (model(TOKENS)[0] - dense).abs().max() < (0.05 if to == "gptq-8" else 0.5) * dense.abs().max()


def plain_tensors():
    torch.manual_seed(1)
    return {
        "embed_tokens.weight": torch.randn(50, 64),
        "blocks.0.proj.weight": torch.randn(64, 64).half(),
        "blocks.0.proj.bias": torch.randn(64).half(),
        "blocks.0.odd.weight": torch.randn(12, 37),
        "blocks.0.norm.weight": torch.ones(64),
        "blocks.0.conv.weight": torch.randn(4, 4, 3),
        "lm_head.weight": torch.randn(50, 64),
        "step": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
    }


def test_without_a_model_names_tell(tmp_path):
    tensors = plain_tensors()
    write_directory(tmp_path / "src", tensors)
    report = quantize_checkpoint(tmp_path / "src", tmp_path / "made", "eetq")
    assert [layer.name for layer in report.layers] == ["blocks.0.proj"]
    assert dict(report.skipped).keys() == {"blocks.0.odd", "lm_head"}
    assert "64" in dict(report.skipped)["blocks.0.odd"]
    assert "names" in report.notes[0]
    made = Shards(tmp_path / "made")
    for name, tensor in tensors.items():
        if name != "blocks.0.proj.weight":
            assert exact(made.tensor(name), tensor), name
    assert made["blocks.0.proj.weight"].dtype == torch.int8
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert sorted(config["modules_to_not_convert"]) == ["blocks.0.odd", "lm_head"]


def test_matrices_of_no_linear_layer_are_told(tmp_path):
    model = hf_models.dense("llama")
    model.save_pretrained(tmp_path / "src")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.mlp.experts.0.weight"] = torch.randn(64, 64)
    (tmp_path / "src" / "model.safetensors").unlink()
    write_directory(tmp_path / "src", tensors)
    report = quantize_checkpoint(tmp_path / "src", tmp_path / "made", "eetq")
    assert len(report.layers) == 14
    assert report.notes == [
        "1 matrices are no linear layer of the model's class and stay, as model.layers.0.mlp.experts.0"
    ]


def test_options(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "plain", "gptq-2", group_size=32, skip=("self_attn", "lm_head"))
    assert len(report.layers) == 6
    searched = quantize_checkpoint(source, tmp_path / "searched", "gptq-2", group_size=32, search_scales=True)
    found = {layer.name: layer.error for layer in searched.layers}
    assert all(found[layer.name] < layer.error for layer in report.layers)
    quantize_checkpoint(source, tmp_path / "int8", "int8", threshold=3.5)
    assert qlinear.from_pretrained(tmp_path / "int8").model.layers[0].mlp.up_proj.threshold == 3.5
    quantize_checkpoint(source, tmp_path / "nf4", "nf4", blocksize=128)
    assert qlinear.from_pretrained(tmp_path / "nf4").model.layers[0].mlp.up_proj.blocksize == 128


def test_several_files(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "one", "nf4")
    quantize_checkpoint(source, tmp_path / "many", "nf4", max_shard_size=60_000)
    one, many = Shards(tmp_path / "one"), Shards(tmp_path / "many")
    assert len(many.paths) > 3
    assert many.paths[0].name == f"model-00001-of-{len(many.paths):05d}.safetensors"
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert set(one) == set(many)
    assert all(exact(one.tensor(name), many.tensor(name)) for name in one)
    for path in many.paths:
        held = [entry for entry in many.values() if entry.path == path]
        assert len(held) == 1 or sum(entry.nbytes for entry in held) <= 60_000
        # The wide ones are aligned, so that they can be mapped.
        assert all(entry.begin % entry.dtype.itemsize == 0 for entry in held)


def test_read_by_safetensors_itself(source, tmp_path):
    from safetensors.torch import load_file

    quantize_checkpoint(source, tmp_path / "made", "gptq-3")
    shards = Shards(tmp_path / "made")
    assert all(exact(tensor, shards.tensor(name)) for name, tensor in load_file(shards.paths[0]).items())


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="a sanitized build keeps freed memory")
@pytest.mark.parametrize("to", ["gptq-4", "fp8-block"])
def test_one_layer_at_a_time(tmp_path, monkeypatch, to):
    tensors = {f"{i}.proj.weight": torch.randn(1024, 2048) for i in range(24)}
    write_directory(tmp_path / "src", tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    seen, alive = [], []
    add = rewriting.Target.add_layer

    def count(target, name, module):
        # Nothing is left of the layers before this one.
        assert [ref for ref in alive if ref() is not None] == []
        alive[:] = map(weakref.ref, (t for t in (*module.parameters(), *module.buffers()) if t.nbytes > 10_000))
        written = add(target, name, module)
        seen.append(anonymous_bytes())
        return written

    monkeypatch.setattr(rewriting.Target, "add_layer", count)
    quantize_checkpoint(tmp_path / "src", tmp_path / "made", to)
    assert len(seen) == 24
    # A layer has 8 MB, all of them together 200, quantized 25 to 50.
    assert max(seen) - seen[0] < size / 12


# ---- what is refused, and leaves nothing ----


def test_refused(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "made", "eetq")
    before = sorted(path.name for path in (tmp_path / "made").iterdir())
    for arguments, message in (
        ((source, tmp_path / "made", "nf4"), "not an empty directory"),
        ((source, source / "inside", "nf4"), "lies in"),
        ((source, tmp_path / "new", "int5"), "none of gptq-2"),
        ((tmp_path / "made", tmp_path / "new", "nf4"), "quantized already.*eetq"),
        ((tmp_path / "absent", tmp_path / "new", "nf4"), "not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_checkpoint(*arguments)
    with pytest.raises(ValueError, match="group_size"):
        quantize_checkpoint(source, tmp_path / "new", "gptq-4", group_size=0)
    with pytest.raises(TypeError, match="skip"):
        quantize_checkpoint(source, tmp_path / "new", "nf4", skip="lm_head")
    write_directory(tmp_path / "odd", {"proj.weight": torch.randn(12, 37)})
    with pytest.raises(ValueError, match=r"no linear layer can be quantized to eetq: proj: .*64"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "new", "eetq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "odd"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == before


def test_an_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewriting.Target, "add_plain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "new", "nf4")
    assert list(tmp_path.iterdir()) == []


# ---- the command ----


def test_the_command(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "made"), "--to", "gptq-4", "--group-size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    assert "14 layers to gptq-4" in printed
    assert main(["quantize", str(source), str(tmp_path / "more"), "--to", "nf4", "--json", "--skip"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 15
    assert all(0 < layer["error"] < 0.2 for layer in report["layers"])
    assert main(["quantize", str(source), str(tmp_path / "more"), "--to", "nf4"]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert main(["quantize", str(source), str(tmp_path / "new"), "--to", "nf5"]) == 2
    assert "none of" in capsys.readouterr().err
