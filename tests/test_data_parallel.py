"""Copies of a model with quantized layers: in processes that share gradients, and in threads of one."""

import importlib

import data_parallel_worker
import pytest
import torch
from data_parallel_worker import PROCESSES, ROWS
from layer_cases import CASES, K, inputs, make, pack_on_the_cpu
from processes import spawn

import qlinear

# The function of its name hides the module.
replicating = importlib.import_module("torch.nn.parallel.replicate")


def check_gradients(directory, kind):
    """What the processes left there against one process with all of the rows."""
    seen = torch.load(directory / "seen", map_location=kind)
    for name, model in data_parallel_worker.models(kind):
        assert (name == "int8") == (getattr(model[2], "packed", None) is None)
        expected = data_parallel_worker.gradients(model, inputs(ROWS, K).to(kind))
        assert len(seen[name]) == len(expected) == 4
        for ours, alone in zip(seen[name], expected, strict=True):
            assert torch.allclose(ours, alone, rtol=1e-4, atol=1e-5), name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_layers_packed_and_not_under_distributed_data_parallel(tmp_path, monkeypatch):
    spawn(data_parallel_worker.run, tmp_path, "cpu", world=PROCESSES)
    pack_on_the_cpu(monkeypatch)
    check_gradients(tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="fewer NVIDIA GPUs than processes")
def test_the_same_on_two_gpus(tmp_path):
    spawn(data_parallel_worker.run, tmp_path, "cuda", world=PROCESSES, backend="nccl")
    check_gradients(tmp_path, "cuda")


@pytest.fixture
def replicate(monkeypatch):
    """DataParallel's copies, on the CPU: tensors are cloned where they would be sent to GPUs."""

    def clones(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", clones)
    return lambda model: replicating.replicate(model, [0, 1])


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_replicas_of_every_class(case, replicate):
    layer, x = make(case), inputs(3, K)
    for replica in replicate(torch.nn.Sequential(layer)):
        assert torch.equal(replica(x), layer(x))
        assert replica[0].engine() is not layer.engine()
        y, z = (x.clone().requires_grad_() for _ in range(2))
        replica(y).square().sum().backward()
        layer(z).square().sum().backward()
        assert torch.equal(y.grad, z.grad)


def test_replicas_of_a_learning_weight_give_it_their_gradients(replicate):
    torch.manual_seed(0)
    layer, x = qlinear.Linear8bitLt(torch.randn(16, 64) / 8, torch.randn(16)), torch.randn(4, 64)
    torch.cat([replica(part) for replica, part in zip(replicate(layer), x.chunk(2), strict=True)]).sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer(x).sum().backward()
    assert torch.allclose(gradient, layer.weight.grad, rtol=1e-5, atol=1e-5)
