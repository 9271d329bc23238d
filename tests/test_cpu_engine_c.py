"""The CPU engine's C test (tests/c/test_engine.c), compiled here: every format against its definition in double, on
each instruction set that this processor has, once plain and once under ASan and UBSan."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    *sorted((ROOT / "src/cpu").glob("*.c")),
    *(ROOT / f"src/formats/{name}.c" for name in ("weight", "packed", "fp8", "int8")),
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(
    not shutil.which("gcc") or not (ROOT / "src/cpu").exists(), reason="needs gcc and the source tree"
)


def compiled(folder: Path, flags: list[str]) -> Path:
    """The test's program; its files compiled side by side."""
    # As the extension is compiled: what is fused and what is not is part of the formats.
    common = ["gcc", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *flags]
    sources = [*SOURCES, ROOT / "tests/c/test_engine.c"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([*common, "-c", str(source), "-o", str(target)])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    program = folder / "test_engine"
    subprocess.run([*common, *map(str, objects), "-o", str(program), "-lm", "-lpthread", "-ldl"], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("engine"), ["-O3"])


def passes(program: Path, isa: str, *arguments: str) -> None:
    # A sanitizer must come first; what a caller preloads for an extension is not for this program.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"QLINEAR_CPU_ISA": isa}
    result = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    checked = int(result.stdout.split(" checks")[0].split()[-1])
    assert checked > 1_000_000
    if not result.stdout.startswith(isa):
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
def test_engine_meets_its_definition(program, isa):
    passes(program, isa, "quick")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
def test_engine_over_all_row_counts(program, isa):
    passes(program, isa)


@pytest.mark.slow
def test_engine_under_sanitizers(tmp_path):
    program = compiled(tmp_path, ["-O1", "-g", *SANITIZERS])
    for isa in ("avx512", "avx2", "plain"):
        passes(program, isa, "quick")
