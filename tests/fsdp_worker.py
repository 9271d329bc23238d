"""A process of test_fsdp: NF4 layers with learning ones beside them, sharded over all processes by fully_shard."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qlinear

WIDTH, ROWS, STEPS, PROCESSES = 128, 8, 6, 2
# fully_shard of torch 2.11 makes every parameter one that may want a gradient, which integers cannot.
SHARDS_INTEGERS = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 13)


class Block(torch.nn.Module):
    def __init__(self, storage, nested):
        super().__init__()
        weight, bias = torch.randn(WIDTH, WIDTH) / WIDTH**0.5, torch.randn(WIDTH) / 8
        self.base = qlinear.Linear4bit(weight, bias, "nf4", compress_statistics=nested, quant_storage=storage)
        self.down = torch.nn.Linear(WIDTH, 8, bias=False)
        self.up = torch.nn.Linear(8, WIDTH, bias=False)

    def forward(self, x):
        return torch.nn.functional.gelu(self.base(x) + self.up(self.down(x)))


def model(storage, nested):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block(storage, nested) for _ in range(3)))


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


def train(made, x, y, mean=lambda loss: loss):
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (made(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(mean(loss.detach().clone()).item())
    return losses


def run(rank, directory, storage, nested):
    """In each of the processes. Writes what rank 0 saw to `directory`/seen."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    made = model(storage, nested)
    for block in made:
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh)
    x, y = (part.chunk(PROCESSES)[rank] for part in batch())

    def mean(loss):
        dist.all_reduce(loss)
        return loss / PROCESSES

    losses = train(made, x, y, mean)
    seen = {
        "losses": losses,
        "held": [block.base._parameters["weight"].to_local().numel() for block in made],
        "weights": [block.base._parameters["weight"].full_tensor() for block in made],
        "up": [block.up.weight.full_tensor().detach() for block in made],
        "keys": list(made.state_dict()),
    }
    if rank == 0:
        torch.save(seen, f"{directory}/seen")
