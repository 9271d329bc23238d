"""save_pretrained: what was loaded is written byte for byte, what was quantized here loads again as it is."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_cases import FORMATS, Small, empty, quantized_files
from checkpoint_files import write_directory

import qlinear
from qlinear import saving
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


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def loaded(tmp_path, name="gptq4"):
    write, config, _ = FORMATS[name]
    model = empty()
    load_checkpoint(model, write_directory(tmp_path / "source", quantized_files(write)[1], config))
    return model


def failing_after(monkeypatch, count):
    """Writing fails after some tensors, as on a full disk."""
    write, calls = saving.write_tensor, []

    def failing(out, tensor):
        calls.append(tensor)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        write(out, tensor)

    monkeypatch.setattr(saving, "write_tensor", failing)


def test_after_an_error_a_new_directory_is_absent_and_an_old_one_as_it_was(tmp_path, monkeypatch):
    model = loaded(tmp_path)
    qlinear.save_pretrained(model, tmp_path / "old", max_shard_size=20_000)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    failing_after(monkeypatch, 7)
    for target in (tmp_path / "new", tmp_path / "old", tmp_path / "deep" / "new"):
        with pytest.raises(OSError, match="No space left"):
            qlinear.save_pretrained(model, target)
    assert names_in(tmp_path) == ["deep", "old", "source"]
    assert names_in(tmp_path / "deep") == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


@pytest.mark.parametrize("change", [lambda weight: weight[:-1], torch.Tensor.half], ids=["shape", "dtype"])
def test_a_tensor_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch, change):
    """The header that says its place is written by then."""
    model = loaded(tmp_path)
    write = saving.write_tensor

    def changing(out, tensor):
        model.norm.weight = torch.nn.Parameter(change(model.norm.weight.detach()))
        write(out, tensor)

    monkeypatch.setattr(saving, "write_tensor", changing)
    with pytest.raises(RuntimeError, match=r"norm\.weight: was changed while the model was saved"):
        qlinear.save_pretrained(model, tmp_path / "saved")
    assert names_in(tmp_path) == ["source"]


def test_in_a_directory_that_is_there_the_config_comes_last(tmp_path, monkeypatch):
    """Who reads it meanwhile finds no config that names tensors which are not there yet."""
    model = loaded(tmp_path)
    (tmp_path / "target").mkdir()
    placed, replace = [], Path.replace

    def recorded(path, target):
        placed.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", recorded)
    qlinear.save_pretrained(model, tmp_path / "target", max_shard_size=20_000)
    assert placed[-2:] == ["model.safetensors.index.json", "config.json"]
    assert {Path(name).suffix for name in placed[:-2]} == {".safetensors"}


def test_saving_over_another_checkpoint_leaves_nothing_of_it(tmp_path):
    model = loaded(tmp_path)
    target = tmp_path / "target"
    qlinear.save_pretrained(model, target, max_shard_size=20_000)
    (target / "quantize_config.json").write_text("{}")
    (target / "tokenizer.json").write_text("{}")
    (target / "config.json").write_text('{"hidden_size": 64, "quantization_config": {"quant_method": "awq"}}')
    qlinear.save_pretrained(model, target)
    assert names_in(target) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((target / "config.json").read_text())["hidden_size"] == 64
    same_files(target, tmp_path / "source")
    qlinear.save_pretrained(model, target, max_shard_size=20_000)
    assert "model.safetensors" not in names_in(target)
    assert "model.safetensors.index.json" in names_in(target)
    same_files(target, tmp_path / "source")


def test_a_model_is_saved_over_the_files_that_it_is_mapped_from(tmp_path):
    model = loaded(tmp_path)
    before = model(torch.arange(5))
    expected = {name: raw(tensor).clone() for name, tensor in model.state_dict().items()}
    qlinear.save_pretrained(model, tmp_path / "source")
    assert torch.equal(model(torch.arange(5)), before)
    again = Shards(tmp_path / "source")
    assert all(torch.equal(raw(again.tensor(name)), expected[name]) for name in again)


def test_files_are_readable_by_others_and_by_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = loaded(tmp_path, "nf4-nested")
    qlinear.save_pretrained(model, tmp_path / "saved")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    read = safetensors.load_file(tmp_path / "saved" / "model.safetensors")
    state = model.state_dict()
    del state["lm_head.weight"]
    assert read.keys() == state.keys()
    assert all(torch.equal(raw(read[name]), raw(tensor)) for name, tensor in state.items())
    # Each tensor lies at a multiple of its elements' size: it can be mapped.
    for entry in Shards(tmp_path / "saved").values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_a_file_holds_no_more_than_it_may_but_for_large_tensors(tmp_path):
    model = loaded(tmp_path)
    qlinear.save_pretrained(model, tmp_path / "saved", max_shard_size="7KB")
    for path in (tmp_path / "saved").glob("*.safetensors"):
        entries = Shards(tmp_path / "saved", [path])
        assert sum(entry.nbytes for entry in entries.values()) <= 7000 or len(entries) == 1
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in Shards(tmp_path / "saved").values())


@pytest.mark.parametrize("size", [0, -1, 1.5, "", "5 bananas", "GB", None, True])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be a positive number"):
        qlinear.save_pretrained(Small(), tmp_path / "saved", max_shard_size=size)
    assert names_in(tmp_path) == []


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"embed.weight: is on the meta device"):
        qlinear.save_pretrained(empty(), tmp_path / "saved")
    model = Small()
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"odd: safetensors has no torch.complex64"):
        qlinear.save_pretrained(model, tmp_path / "saved")
    model.odd = torch.eye(2).to_sparse()
    with pytest.raises(TypeError, match=r"odd: safetensors has no torch.sparse_coo tensors"):
        qlinear.save_pretrained(model, tmp_path / "saved")

    class Extra(Small):
        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="_extra_state: a dict in the state dict cannot be written"):
        qlinear.save_pretrained(Extra(), tmp_path / "saved")
    assert names_in(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is not a directory"):
        qlinear.save_pretrained(Small(), tmp_path / "file")


def test_a_model_that_is_not_quantized_and_one_that_learns(tmp_path):
    torch.manual_seed(0)
    model = Small().eval()
    qlinear.save_pretrained(model, tmp_path / "plain")
    assert config_of(tmp_path / "plain") is None
    again = empty()
    assert load_checkpoint(again, tmp_path / "plain").replaced == []
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids), again(ids))
    # Its weight is a float, as any other's.
    layer = qlinear.Linear8bitLt(model.layers[0].v_proj.weight.detach(), None, has_fp16_weights=True)
    model.layers[0].v_proj = layer
    qlinear.save_pretrained(model, tmp_path / "learning")
    again = empty()
    load_checkpoint(again, tmp_path / "learning")
    assert torch.equal(again.layers[0].v_proj.weight, layer.weight)


class Tied(torch.nn.Module):
    """A head that comes before the table whose weight it has, as transformers' models say of theirs."""

    _tied_weights_keys = ("head.weight",)

    def __init__(self):
        super().__init__()
        self.head, self.table = torch.nn.Linear(8, 5, bias=False), torch.nn.Embedding(5, 8)
        self.head.weight = self.table.weight


def test_tied_tensors_are_written_once_under_the_name_that_is_no_copys(tmp_path):
    model, again = Tied(), Tied()
    qlinear.save_pretrained(model, tmp_path)
    assert list(Shards(tmp_path)) == ["table.weight"]
    load_checkpoint(again, tmp_path)
    assert again.head.weight is again.table.weight
    assert torch.equal(again.head.weight, model.head.weight)


def test_a_weight_and_its_transpose_are_two_tensors(tmp_path):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in ("one", "other")})
    model["other"].weight = torch.nn.Parameter(model["one"].weight.detach().t())
    qlinear.save_pretrained(model, tmp_path)
    saved = Shards(tmp_path)
    assert set(saved) == {"one.weight", "other.weight"}
    assert torch.equal(saved.tensor("other.weight"), saved.tensor("one.weight").t())


def test_a_changed_layer_is_saved_as_it_is_now(tmp_path):
    """Symmetric once, not so any more: the config and the storage that it had would not do."""
    model = loaded(tmp_path, "awq-marlin")
    model.layers[0].q_proj.qzeros = model.layers[0].q_proj.qzeros ^ 0x11111111
    qlinear.save_pretrained(model, tmp_path / "saved")
    entries = Shards(tmp_path / "saved")
    assert "layers.0.q_proj.qzeros" in entries
    assert "layers.0.v_proj.qzeros" not in entries
    again = empty()
    load_checkpoint(again, tmp_path / "saved")
    same_layers(model, again)


def test_layers_of_one_format_that_differ_are_listed(tmp_path):
    torch.manual_seed(0)
    model = Small().eval()
    qlinear.replace_linear(model, "gptq", bits=4, group_size=32, filter=lambda name, _: "q_proj" in name)
    qlinear.replace_linear(model, "gptq", bits=3, group_size=64, filter=lambda name, _: "v_proj" in name)
    qlinear.replace_linear(model, "bitsandbytes", threshold=2.0, filter=lambda name, _: "gate" in name)
    qlinear.replace_linear(model, "bitsandbytes-fp4", filter=lambda name, _: "down" in name)
    model.layers[0].down_proj.compute_dtype = torch.bfloat16
    qlinear.save_pretrained(model, tmp_path)
    layers = config_of(tmp_path)["layers"]
    assert layers["layers.1.v_proj"] == {"format": "gptq", "bits": 3, "group_size": 64, "zero_format": "gptq"}
    assert layers["layers.0.gate_proj"] == {"format": "bitsandbytes", "llm_int8_threshold": 2.0}
    assert layers["layers.0.down_proj"]["compute_dtype"] == "bfloat16"
    again = empty()
    load_checkpoint(again, tmp_path)
    assert again.layers[0].down_proj.compute_dtype == torch.bfloat16
    same_layers(model, again)


@pytest.mark.parametrize("activation", ["none", "tensor", "token", "group", "static", "bound"])
@pytest.mark.parametrize("scale", ["channel", "tensor", "blocks"])
def test_how_fp8_layers_quantize_their_inputs_is_kept(tmp_path, activation, scale):
    torch.manual_seed(0)
    shape = {"channel": (64, 1), "tensor": (1,), "blocks": (2, 1)}[scale]
    codes = torch.randn(64, 128).to(torch.float8_e4m3fn)
    layer = qlinear.Fp8Linear(
        codes,
        None,
        torch.rand(shape) + 0.5,
        torch.tensor(0.25) if activation == "static" else None,
        activation="token" if activation == "bound" else activation,
        input_scale_ub=2.0 if activation == "bound" else None,
        block_size=(32, 128),
    )
    model = torch.nn.Sequential(layer)
    qlinear.save_pretrained(model, tmp_path)
    with torch.device("meta"):
        again = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))
    load_checkpoint(again, tmp_path)
    x = torch.randn(3, 128)
    assert torch.equal(model(x), again(x))
    assert again[0].extra_repr() == layer.extra_repr()


def test_copies_of_a_loaded_model_know_where_it_came_from(tmp_path):
    model = loaded(tmp_path, "packed-asymmetric")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        qlinear.save_pretrained(copied, tmp_path / "saved")
        same_files(tmp_path / "source", tmp_path / "saved")


def test_the_working_directory_may_be_saved_into(tmp_path, monkeypatch):
    model = loaded(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    qlinear.save_pretrained(model, ".")
    assert names_in(tmp_path / "here") == sorted(os.listdir()) == ["config.json", "model.safetensors"]
