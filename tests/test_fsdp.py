"""FSDP2 over layers whose packed weight is a Parameter: each process holds its part of it and trains what is beside."""

import fsdp_worker
import pytest
import torch
from fsdp_worker import PROCESSES, SHARDS_INTEGERS
from layer_cases import exact
from processes import spawn


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(
    ("storage", "nested"),
    [
        pytest.param(
            torch.uint8, True, marks=pytest.mark.skipif(not SHARDS_INTEGERS, reason="this torch shards floats only")
        ),
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nf4_layers_train_on_two_processes(tmp_path, storage, nested):
    spawn(fsdp_worker.run, tmp_path, storage, nested, world=PROCESSES)
    seen = torch.load(tmp_path / "seen")
    alone = fsdp_worker.model(storage, nested)
    packed = [block.base.weight.detach().clone() for block in alone]
    losses = fsdp_worker.train(alone, *fsdp_worker.batch())
    assert losses[-1] < 0.9 * losses[0]
    assert seen["losses"] == pytest.approx(losses, rel=1e-5)
    assert seen["held"] == [weight.numel() // PROCESSES for weight in packed]
    # Storage dtypes are views of the same bytes: nothing was cast on the way.
    assert all(map(exact, seen["weights"], packed))
    for ours, theirs in zip(seen["up"], (block.up.weight for block in alone), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert seen["keys"] == list(alone.state_dict())
