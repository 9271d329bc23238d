"""save_pretrained: what was loaded is written byte for byte, what was quantized here loads again as it is."""

import json

import pytest
import torch
from test_checkpoint import FORMATS, Small, empty, quantized_files, write_directory

import qlinear
from qlinear.checkpoint import load_checkpoint
from qlinear.shards import Shards


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_files(left, right):
    left, right = Shards(left), Shards(right)
    assert set(left) == set(right)
    for name, entry in left.items():
        assert (entry.dtype, entry.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(raw(left.tensor(name)), raw(right.tensor(name))), name


def config_of(directory):
    return json.loads((directory / "config.json").read_text()).get("quantization_config")


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_loaded_is_saved_byte_for_byte(tmp_path, name):
    write, config, _ = FORMATS[name]
    write_directory(tmp_path / "source", quantized_files(write)[1], config)
    model = empty()
    load_checkpoint(model, tmp_path / "source")
    qlinear.save_pretrained(model, tmp_path / "saved", max_shard_size=20_000)
    same_files(tmp_path / "source", tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    if config is not None:
        assert config_of(tmp_path / "saved") == config
    again = empty()
    load_checkpoint(again, tmp_path / "saved")
    qlinear.save_pretrained(again, tmp_path / "again")
    same_files(tmp_path / "source", tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(ids), again(ids))


QUANTIZED = {
    "eetq": {"quantize": "eetq"},
    "gptq": {"quantize": "gptq", "bits": 3, "group_size": 32},
    "gptq-row": {"quantize": "gptq", "bits": 8, "group_size": -1},
    "awq": {"quantize": "awq", "group_size": 16},
    "bitsandbytes": {"quantize": "bitsandbytes", "threshold": 3.5},
    "bitsandbytes-nf4": {"quantize": "bitsandbytes-nf4", "blocksize": 32},
    "bitsandbytes-fp4": {"quantize": "bitsandbytes-fp4"},
    "fp8": {"quantize": "fp8"},
}
METHODS = {"bitsandbytes-nf4": "bitsandbytes", "bitsandbytes-fp4": "bitsandbytes", "gptq-row": "gptq"}
METHODS["fp8"] = "compressed-tensors"


def numbers(module):
    """All that a layer is made of: tensors by their bytes, everything else as it is."""
    return [raw(value).tolist() if isinstance(value, torch.Tensor) else value for value in module._arguments()]


def same_layers(left, right):
    for name, module in left.named_modules():
        other = right.get_submodule(name)
        assert type(module) is type(other)
        if isinstance(module, qlinear.layers._module.QuantizedLinear):
            mine, theirs = numbers(module), numbers(other)
            # "auto" is what it resolves to.
            if isinstance(module, qlinear.QuantLinear):
                mine[7], theirs[7] = module.engine().zero_format, other.engine().zero_format
                mine[6], theirs[6] = (size if size > 0 else module.in_features for size in (mine[6], theirs[6]))
            assert mine == theirs, name


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_was_quantized_here_loads_again(tmp_path, name):
    torch.manual_seed(0)
    model = Small().eval()
    assert qlinear.replace_linear(model, **QUANTIZED[name]).replaced
    qlinear.save_pretrained(model, tmp_path)
    config = config_of(tmp_path)
    assert config["quant_method"] == METHODS.get(name, name)
    assert any(config.get(key) == ["lm_head"] for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore"))
    again = empty()
    load_checkpoint(again, tmp_path)
    same_layers(model, again)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(ids), again(ids))
