"""The C test of launches (tests/c/test_launch.c), compiled with src/cuda/ and a driver that needs no GPU, plain and
under sanitizers; and the declarations of the driver's ABI against NVIDIA's header."""

import os
import shutil
import subprocess
from pathlib import Path

import fake_cuda
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / f"src/cuda/{name}.c" for name in ("device", "driver", "launch", "library")]

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


@pytest.fixture(scope="module", params=["", "address,undefined", "thread"])
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    flags = ["-std=c11", "-O1", "-g"]
    if request.param:
        flags += [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    library = fake_cuda.build(folder)
    path = folder / "test_launch"
    sources = [*SOURCES, ROOT / "tests/c/test_launch.c", library]
    command = ["gcc", *flags, *sources, "-o", path, f"-Wl,-rpath,{folder}", "-lpthread", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and request.param and "cannot find" in done.stderr:
        pytest.skip(f"gcc has no -fsanitize={request.param} here")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("capability", [(), (8, 0), (8, 9), (10, 0), (12, 1)])
def test_launches(program, capability):
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [program, *map(str, capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout.endswith("0 failures\n"), done.stdout + done.stderr
    assert done.returncode == 0


PAIRS = """
#include <cuda.h>
#include <stddef.h>
#include "driver_abi.h"
#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours " is " #theirs)
#define PLACE(field, other) SAME(offsetof(ql_cu_launch_config, field), offsetof(CUlaunchConfig, other))
SAME(sizeof(ql_cu_launch_config), sizeof(CUlaunchConfig));
SAME(sizeof(ql_cu_launch_attribute), sizeof(CUlaunchAttribute));
SAME(offsetof(ql_cu_launch_attribute, value), offsetof(CUlaunchAttribute, value));
PLACE(grid_x, gridDimX);
PLACE(block_x, blockDimX);
PLACE(shared_bytes, sharedMemBytes);
PLACE(stream, hStream);
PLACE(attributes, attrs);
PLACE(attribute_count, numAttrs);
SAME(sizeof(ql_cu_device), sizeof(CUdevice));
SAME(QL_CU_NOT_INITIALIZED, CUDA_ERROR_NOT_INITIALIZED);
SAME(QL_CU_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME(QL_CU_NO_BINARY_FOR_GPU, CUDA_ERROR_NO_BINARY_FOR_GPU);
SAME(QL_CU_UNSUPPORTED_PTX_VERSION, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME(QL_CU_SYSTEM_DRIVER_MISMATCH, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
SAME(QL_CU_GET_PROC_ADDRESS_LEGACY_STREAM, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
SAME(QL_CU_LIBRARY_BINARY_IS_PRESERVED, CU_LIBRARY_BINARY_IS_PRESERVED);
SAME(QL_CU_MULTIPROCESSOR_COUNT, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(QL_CU_L2_CACHE_SIZE, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
SAME(QL_CU_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(QL_CU_COMPUTE_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(QL_CU_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME(QL_CU_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
SAME(QL_CU_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(QL_CU_LAUNCH_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
SAME(QL_CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
"""


def cuda_header():
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parent.parent] if nvcc else []
    roots.append(Path("/usr/local/cuda"))
    return next((root / "include" for root in roots if (root / "include/cuda.h").is_file()), None)


def test_declarations_are_those_of_cuda_h(tmp_path):
    include = cuda_header()
    if not include:
        pytest.skip("there is no cuda.h")
    source = tmp_path / "abi.c"
    source.write_text(PAIRS)
    command = ["gcc", "-std=c11", "-fsyntax-only", f"-I{include}", f"-I{ROOT / 'src/cuda'}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
