"""The machine code of the hot kernels, as the build embedded it: the instructions that they were written for are there.

Needs cuobjdump and nvdisasm on the PATH (of the CUDA toolkit, or the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm); no GPU."""

import re
import shutil
import subprocess
from collections import Counter, defaultdict

import pytest
from test_cuda_build import INFO, LISTED, embedded_fatbins, needs_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        not (shutil.which("cuobjdump") and shutil.which("nvdisasm")),
        reason="cuobjdump and nvdisasm are not both on the PATH",
    ),
]

# A source, and what each of its kernels must have.
HOT = {
    "decode": ["HMMA", "LDG128"],
    "wgmma": ["HGMMA", "UTMALDG"],
    "mma": ["HMMA", "LDGSTS128"],
    "w8a8_decode": ["LDGSTS128", "LDS128"],
    "w8a8_mma": ["LDGSTS128", "LDS128"],
    "w8a8_wgmma": ["UTMALDG", "LDS128"],
}
# What some kernels of a source have instead of others: integers by IMMA.
INTEGERS, FLOATS = ["IMMA", "IGMMA"], ["HMMA", "QMMA", "QGMMA"]


def opcode(instruction):
    """The operation without its modifiers, but with the width of those that copy 16 bytes."""
    name = instruction.split()[1] if instruction.startswith("@") else instruction.split()[0]
    parts = name.rstrip(";").split(".")
    return parts[0] + ("128" if "128" in parts else "")


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """{(source, architecture, kernel): how often each of its operations occurs}."""
    folder = tmp_path_factory.mktemp("sass")
    found = defaultdict(Counter)
    for source, fatbin in zip(INFO["images"], embedded_fatbins(), strict=True):
        if source not in HOT:
            continue
        path = folder / f"{source}.fatbin"
        path.write_bytes(fatbin)
        text = subprocess.run(["cuobjdump", "--dump-sass", path], capture_output=True, text=True, check=True).stdout
        architecture = kernel = None
        for line in text.splitlines():
            if match := re.match(r"arch = (\w+)", line):
                architecture = match[1]
            elif match := re.match(r"\s*Function : (\w+)", line):
                kernel = match[1]
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
                found[source, architecture, kernel][opcode(match[1])] += 1
    return found


def test_every_hot_kernel_is_found(machine_code):
    wanted = {(source, name) for name, source in LISTED if source in HOT and source in INFO["images"]}
    assert {(source, kernel) for source, _, kernel in machine_code} == wanted


def test_hot_kernels_have_the_instructions_meant(machine_code):
    for (source, architecture, kernel), operations in machine_code.items():
        missing = [operation for operation in HOT[source] if operation not in operations]
        assert not missing, f"{kernel} for {architecture} has no {missing}"


def test_8_bit_kernels_multiply_what_they_are_for(machine_code):
    for (source, architecture, kernel), operations in machine_code.items():
        if source.startswith("w8a8"):
            wanted = INTEGERS if "int8" in kernel else FLOATS
            assert any(operation in operations for operation in wanted), f"{kernel} for {architecture}"


def test_hot_kernels_use_no_local_memory(machine_code):
    # None on the architecture that they were tuned on; elsewhere a few words that the compiler put aside, but no array.
    for (_, architecture, kernel), operations in machine_code.items():
        count = sum(operations[name] for name in ("LDL", "LDL128", "STL", "STL128"))
        assert count <= (0 if architecture == "sm_90a" else 8), f"{kernel} for {architecture}: {count}"
