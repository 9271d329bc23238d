"""A process of test_data_parallel: quantized layers between learning ones, under DistributedDataParallel."""

import torch
from layer_cases import K, inputs
from torch.nn.parallel import DistributedDataParallel

import qlinear
from qlinear.layers import _packing

PROCESSES, ROWS = 2, 6


def models(device):
    """By name; on the CPU packed as on a GPU, where _packing.wanted says so."""
    torch.manual_seed(0)
    weight = torch.randn(K, K) / 8
    made = {
        "gptq": qlinear.QuantLinear.quantize(weight, None),
        "nf4": qlinear.Linear4bit(weight, None, "nf4"),
        "int8": qlinear.Linear8bitLt(weight, None, has_fp16_weights=False),
    }
    for name, layer in made.items():
        model = torch.nn.Sequential(torch.nn.Linear(K, 16), torch.nn.Linear(16, K), layer).to(device)
        model(inputs(1, K).to(device))
        yield name, model


def gradients(model, x):
    """Of the mean over rows."""
    model(x).square().sum(-1).mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def run(rank, directory, kind):
    """In each of the processes. Writes what rank 0 saw to `directory`/seen."""
    if kind == "cpu":
        _packing.wanted = lambda device: device.type == "cpu"
    else:
        torch.cuda.set_device(rank)
    rows = inputs(ROWS, K).chunk(PROCESSES)[rank].to(kind)
    seen = {}
    for name, model in models(kind):
        seen[name] = gradients(DistributedDataParallel(model, broadcast_buffers=kind == "cpu"), rows)
    if rank == 0:
        torch.save(seen, directory / "seen")
