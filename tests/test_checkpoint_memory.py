"""What a load takes in memory: on the CPU nothing for what stays as it is in the files, else a layer at a time."""

import importlib.util
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux") or importlib.util.find_spec("safetensors") is None:
    pytest.skip("reads /proc, and writes files by safetensors", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import load

MB = 60


@pytest.mark.parametrize("name", load.SUBJECTS)
def test_a_load_takes_the_model_and_the_largest_layer(tmp_path, name):
    row = load.measure(name, MB, 1, tmp_path)
    assert row.layers >= 3
    # A few MB are the interpreter's own.
    assert row.beyond_mb < row.largest_mb + 4
    is_converted = name in ("awq-gemv", "pack-quantized")
    assert row.model_mb < (MB * 1.3 if is_converted else 4)
