"""What the build made: one shared object that needs libc and libm alone, imports anywhere and tells its version."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTENSION = Path(find_spec("qlinear").submodule_search_locations[0]) / "_qlinear.abi3.so"

# Loads the extension by its path, so that the package's __init__, which needs torch, has no part in it.
LOAD = f"""
import importlib.util, os, sys
def load():
    spec = importlib.util.spec_from_file_location("qlinear._qlinear", {str(EXTENSION)!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def run(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", LOAD + code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def binutils(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([*command, EXTENSION], capture_output=True, text=True, check=True).stdout


def distribution():
    try:
        return importlib.metadata.distribution("qlinear")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qlinear is on the path without having been installed")


def test_needs_libc_and_libm_alone():
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", binutils("readelf", "-d")))
    assert "libc.so.6" in needed
    assert needed <= {"libc.so.6", "libm.so.6"}


def test_leaves_no_search_path_behind():
    assert not re.search(r"RPATH|RUNPATH", binutils("readelf", "-d"))


def test_exports_its_entry_point_alone():
    defined = [line.split()[-1] for line in binutils("nm", "-D", "--defined-only").splitlines()]
    assert defined == ["PyInit__qlinear"]


def test_imports_nothing_of_cuda_openmp_or_cxx():
    undefined = [line.split()[-1] for line in binutils("nm", "-D", "--undefined-only").splitlines()]
    assert [name for name in undefined if re.match(r"cu[A-Z]|cuda|GOMP|omp_|_Z|__cxa_throw", name)] == []


def test_stack_is_not_executable():
    stack = re.search(r"GNU_STACK.*\n?.*", binutils("readelf", "-lW")).group()
    assert re.search(r"\bRW\b", stack)
    assert "RWE" not in stack


def test_is_small():
    # Nearly all of it are the kernels of six architectures, 8 MB compressed; this catches a fatbin that is not.
    assert EXTENSION.stat().st_size < 10 << 20
    assert ".debug" not in binutils("readelf", "-SW")


def test_imports_without_torch_and_numpy():
    code = """
class Forbid:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "numpy", "ml_dtypes", "jax", "cupy"), name
sys.meta_path.insert(0, Forbid())
module = load()
print(sorted({"torch", "numpy"} & set(sys.modules)), module.cuda_initialized(), module.fourbit_code("nf4")[15])
"""
    assert run(code) == "[] False 1.0"


def test_importing_opens_no_driver_and_no_openmp_runtime():
    code = """
load()
maps = open("/proc/self/maps").read()
print([name for name in ("libcuda", "libgomp", "libtorch", "libcudart") if name in maps])
"""
    assert run(code) == "[]"


def test_imports_in_a_forked_child():
    code = """
child = os.fork()
if child == 0:
    module = load()
    os._exit(3 if module.cuda_initialized() else 0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0"


def test_import_before_fork_serves_the_child():
    code = """
module = load()
child = os.fork()
if child == 0:
    info = module.cpu_info()
    os._exit(0 if info["threads"] >= 1 and not module.cuda_initialized() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0"


def test_package_imports_without_initializing_cuda():
    assert run("import qlinear, qlinear._qlinear as c; print(c.cuda_initialized())") == "False"


def test_version_is_the_project_s():
    import qlinear._qlinear as extension

    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert extension.__version__ == written


def test_version_is_the_metadata_s():
    import qlinear._qlinear as extension

    assert extension.__version__ == distribution().version


def test_wheel_is_abi3_for_this_platform():
    tags = re.findall(r"^Tag: (.+)$", distribution().read_text("WHEEL"), re.MULTILINE)
    assert tags
    assert all(re.fullmatch(r"cp311-abi3-\w*linux\w*", tag) for tag in tags)


def test_wheel_holds_the_package_alone():
    # bin/ and __pycache__ are the installer's, the editable hook a developer's.
    files = [str(path) for path in distribution().files or []]
    foreign = [
        name for name in files if not re.match(r"qlinear/|qlinear-[^/]+\.dist-info/|\.\./|_qlinear_editable", name)
    ]
    assert foreign == []
    if not any(name.startswith("_qlinear_editable") for name in files):
        assert {"qlinear/_qlinear.abi3.so", "qlinear/_qlinear.pyi", "qlinear/py.typed"} <= set(files)
        assert any(name.endswith("licenses/LICENSE") for name in files)
        assert [name for name in files if name.endswith((".c", ".h", ".cu", ".fatbin"))] == []


def test_requirements_pull_no_cuda():
    hard = [line for line in distribution().requires or [] if "extra ==" not in line]
    assert [line for line in hard if re.match(r"torch\b", line)] == ["torch>=2.4"]
    assert [line for line in hard if re.match(r"nvidia|cuda|triton|jax|cupy", line)] == []


class TestBackend:
    """Which build requirements the in-tree backend asks for."""

    NAMES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")

    @pytest.fixture
    def wheels(self, monkeypatch):
        pytest.importorskip("scikit_build_core")
        monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
        import qlinear_build

        for name in ("CUDACXX", "CUDA_HOME", "QLINEAR_CUDA"):
            monkeypatch.delenv(name, raising=False)
        return qlinear_build._compiler_wheels

    @staticmethod
    def fake_nvcc(folder, release):
        nvcc = folder / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        nvcc.chmod(0o755)
        return nvcc

    def test_none_found(self, wheels, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        asked = wheels(None)
        assert tuple(line.split("==")[0] for line in asked) == self.NAMES
        assert len({line.split("==")[1] for line in asked}) == 1

    def test_switched_off(self, wheels, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert wheels({"cmake.define.QLINEAR_CUDA": "off"}) == []
        monkeypatch.setenv("QLINEAR_CUDA", "OFF")
        assert wheels(None) == []

    @pytest.mark.parametrize("variable", ["PATH", "CUDACXX", "CUDA_HOME"])
    def test_found(self, wheels, monkeypatch, tmp_path, variable):
        monkeypatch.setenv("PATH", "/nonexistent:/bin")
        folder = tmp_path / "bin"
        folder.mkdir()
        nvcc = self.fake_nvcc(folder, "13.0")
        value = {"PATH": f"{folder}:/bin", "CUDACXX": str(nvcc), "CUDA_HOME": str(tmp_path)}[variable]
        monkeypatch.setenv(variable, value)
        assert wheels(None) == []

    def test_found_but_too_old(self, wheels, monkeypatch, tmp_path):
        self.fake_nvcc(tmp_path, "11.8")
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
        assert len(wheels({})) == len(self.NAMES)
