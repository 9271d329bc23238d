"""Fixtures that several files ask for by name, mostly for all their tests (pytest.mark.usefixtures)."""

import pytest
import torch
from layer_cases import pack_on_the_cpu


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
