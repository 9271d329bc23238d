"""Who may know whom: the include rules of the C folders, the import rules of the Python ones, what files may hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.[ch]"))
KERNELS = sorted(path for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh", ".h"))
MODULES = sorted((ROOT / "python" / "qlinear").rglob("*.py"))

# The parts of src/, and which parts each may include. Tensors, the module and the layers are the ones that know Python.
MAY_INCLUDE = {
    "formats": {"formats", "kernels"},
    "cpu": {"cpu", "formats"},
    "cuda": {"cuda", "formats", "kernels"},
    "tensor": {"tensor", "formats", "cuda"},
    "layers": {"layers", "tensor", "formats", "cpu", "cuda"},
    "module": {"module", "layers", "tensor", "formats", "cpu", "cuda"},
}
KNOWS_PYTHON = {"tensor", "layers", "module"}


def part_of(path):
    """The part that a file of src/ belongs to: its folder, or, at the top, module or tensor (with its helpers)."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    if len(relative.parts) == 3:
        return relative.parts[1]
    return "module" if path.stem == "module" else "tensor"


def includes(path):
    return re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def name(path):
    return str(path.relative_to(ROOT))


def test_the_tree_was_found():
    assert len(SOURCES) > 20
    assert {part_of(path) for path in SOURCES} == set(MAY_INCLUDE)


def test_the_build_lists_every_source():
    listed = re.findall(r"^ +((?:src|kernels)/\S+\.cu?)\b", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    found = [name(path) for path in SOURCES + KERNELS if path.suffix in (".c", ".cu")]
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes_only_what_its_part_may_know(path):
    part = part_of(path)
    for kind, header in includes(path):
        if kind == '"':
            included = (path.parent / header).resolve()
            assert included.is_file(), header
            assert part_of(included) in MAY_INCLUDE[part], header
        elif re.match(r"Python\.h|numpy/", header):
            assert part in KNOWS_PYTHON, header
        else:
            assert not re.match(r"cuda|omp\.h|torch|c10|dlpack", header), header


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_know_only_kernels(path):
    for kind, header in includes(path):
        if kind == '"':
            assert (path.parent / header).resolve().parent == path.parent, header
        else:
            assert re.fullmatch(r"(cuda_(fp16|bf16|fp8|fp4)|stdint|mma)\.?h?|cuda_\w+\.h|stdint\.h", header), header


@pytest.mark.parametrize("path", [path for path in KERNELS if path.suffix == ".h"], ids=name)
def test_what_host_and_device_share_is_plain_c(path):
    assert {header for kind, header in includes(path) if kind == "<"} <= {"stdint.h"}
    assert not re.search(r"__device__|__global__|__half|template", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_has_one_subject(path):
    assert len(path.read_text().splitlines()) <= 650


@pytest.mark.parametrize("path", SOURCES + KERNELS, ids=name)
def test_begins_with_a_comment_on_its_purpose(path):
    # A .c file whose header says it need not say it again.
    files = [path, path.with_suffix(".h")] if path.suffix == ".c" else [path]
    assert any(re.match(r"/\* \S.{15,}", file.read_text()) for file in files if file.exists())


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".h"], ids=name)
def test_headers_are_guarded_by_their_path(path):
    text = path.read_text()
    if path.parent.name == "cpu" and "#ifndef QL_CPU_" not in text:
        pytest.skip("included once for each instruction set")
    guard = "QL_" + re.sub(r"\W", "_", str(path.relative_to(ROOT / "src"))).upper()
    assert f"#ifndef {guard}\n#define {guard}\n" in text


def imported(path):
    """Absolute names of the modules that a Python file imports anywhere in it."""
    package = ("qlinear", *path.relative_to(ROOT / "python" / "qlinear").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_below_the_program_knows_transformers(path):
    if path.stem in ("__main__", "demo", "hf", "hf_quantizer"):
        pytest.skip("the demo and hf make transformers models")
    assert [module for module in imported(path) if module.split(".")[0] in ("transformers", "bitsandbytes")] == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "layers"], ids=name)
def test_layers_know_no_models(path):
    assert [
        module for module in imported(path) if re.match(r"qlinear\.(model|checkpoint|demo|__main__)\b", module)
    ] == []
