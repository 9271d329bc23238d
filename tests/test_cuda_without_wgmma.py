"""The kernels of GPUs without wgmma, run on one that has it by QLINEAR_KERNELS=mma: they pass the same tests."""

from pathlib import Path

import forced_kernels
import pytest
import torch
from test_cuda_build import LISTED

from qlinear import _qlinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]

CHOSEN = {
    "test_cuda_products.py": "number_of_rows or stride_and or hundred",
    "test_cuda_w8a8.py": "any_number or codes or outliers_of or nan or graph",
    "test_cuda_w8a8_wgmma.py": "step_of_16 or (every_kernel and (group or int8))",
}


def test_none_of_its_kernels_is_found():
    done = forced_kernels.run("mma", "-c", "from qlinear import _qlinear; print(*_qlinear.cuda_info()['kernels'])")
    of_wgmma = {name for name, source in LISTED if "wgmma" in source}
    assert set(done.stdout.split()) == set(_qlinear.cuda_info()["kernels"]) - of_wgmma


@pytest.mark.parametrize("file", CHOSEN)
def test_the_same_tests_pass(file):
    forced_kernels.pass_tests("mma", Path(__file__).parent / file, CHOSEN[file])
