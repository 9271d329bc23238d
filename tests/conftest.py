"""Fixtures that several files ask for by name, mostly for all their tests (pytest.mark.usefixtures)."""

import fake_cuda
import pytest
import torch
from layer_cases import pack_on_the_cpu


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs functions in processes whose driver has no GPU (fake_cuda.c); needs a C compiler."""
    started = fake_cuda.Server(fake_cuda.build(tmp_path_factory.mktemp("driver")))
    yield started
    started.close()


@pytest.fixture(scope="module")
def one_thread():
    """The layers and models of tests are too small for two, which would wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def packed_if_the_case_is(request, monkeypatch):
    """Has the layers of a packed case pack themselves: they owe all that others do."""
    if hasattr(request.node, "callspec") and getattr(request.node.callspec.params.get("case"), "packed", False):
        pack_on_the_cpu(monkeypatch)


@pytest.fixture
def poison():
    """Memory that torch gives out is full of NaN: an output or a part of scratch that nobody wrote would show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
