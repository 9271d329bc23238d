"""Other processes that QLINEAR_KERNELS, read once by each, makes run other kernels than those of the GPU at hand."""

import os
import subprocess
import sys


def run(kernels, *command):
    """python with `command`, where kernels is what QLINEAR_KERNELS is; its outputs as text."""
    environment = {**os.environ, "QLINEAR_KERNELS": kernels}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def pass_tests(kernels, file, chosen):
    """Asserts that a file's tests, those that pytest's -k chooses, pass so."""
    done = run(kernels, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
