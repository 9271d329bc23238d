"""scikit-build-core's backend, which besides asks for NVIDIA's compiler wheels where no nvcc is found.

A static list of build requirements cannot ask that question, and machines that have a compiler should not download one.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

# All five of one minor version: ptxas refuses what another version's front end wrote. Each is needed: nvcc's own
# requirements leave out cccl, which cuda_fp16.h includes.
NVCC = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]


def _is_new_enough(nvcc):
    """As CMakeLists.txt asks: 12.8 is the first that knows every architecture."""
    if not nvcc or not Path(nvcc).is_file():
        return False
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", output)
    return bool(found) and (int(found[1]), int(found[2])) >= (12, 8)


def _compiler_wheels(config_settings):
    wanted = (config_settings or {}).get("cmake.define.QLINEAR_CUDA", os.environ.get("QLINEAR_CUDA", "auto"))
    if str(wanted).lower() in ("off", "0", "false", "no"):
        return []
    candidates = os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME", "") + "/bin/nvcc", shutil.which("nvcc")
    return [] if any(map(_is_new_enough, candidates)) else NVCC


def get_requires_for_build_wheel(config_settings=None):
    return _build.get_requires_for_build_wheel(config_settings) + _compiler_wheels(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _build.get_requires_for_build_editable(config_settings) + _compiler_wheels(config_settings)
