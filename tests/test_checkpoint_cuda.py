"""load_checkpoint onto a GPU and save_pretrained from it: packed on the way, and on the way back the files' bytes."""

import pytest
import torch
from checkpoint_cases import FORMATS, TOLERANCES, empty, quantized_files
from checkpoint_files import write_directory

import qlinear
from qlinear.checkpoint import load_checkpoint
from qlinear.layers._module import QuantizedLinear
from qlinear.shards import Shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_it_is_the_dense_model_and_saved_as_it_was(tmp_path, name):
    write, config, kind = FORMATS[name]
    dense, tensors = quantized_files(write)
    write_directory(tmp_path / "source", tensors, config, files=2)
    model = empty()
    report = load_checkpoint(model, tmp_path / "source", device="cuda", progress=False)
    assert {type(model.get_submodule(layer)) for layer in report.replaced} == {kind}
    assert all(tensor.is_cuda for tensor in (*model.norm.parameters(), model.embed.weight))
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        out, expected = model(ids.cuda()).cpu(), dense(ids)
    assert (out - expected).norm() <= TOLERANCES.get(name, 1e-5) * expected.norm()
    for layer in report.replaced:
        weight = model.get_submodule(layer).dequantize(torch.float32).cpu()
        torch.testing.assert_close(weight, dense.get_submodule(layer).weight, rtol=2e-6, atol=1e-7)
    qlinear.save_pretrained(model, tmp_path / "saved", max_shard_size=20_000)
    source, saved = Shards(tmp_path / "source"), Shards(tmp_path / "saved")
    assert set(source) == set(saved)
    for key, entry in source.items():
        left, right = source.tensor(key), saved.tensor(key)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), key
        assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)), (key, entry)


def test_a_loaded_layer_is_packed_and_stays_so_while_it_is_saved(tmp_path):
    write, config, _ = FORMATS["packed"]
    write_directory(tmp_path / "source", quantized_files(write)[1], config)
    model = empty()
    load_checkpoint(model, tmp_path / "source", device="cuda")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    before = [layer.packed.data_ptr() for layer in layers]
    qlinear.save_pretrained(model, tmp_path / "saved")
    assert [layer.packed.data_ptr() for layer in layers] == before
