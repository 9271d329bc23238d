"""The choices between kernels that were measured, in files: those that come with the package, and those that autotune
found and keeps for the processes to come. They go before the engine's own rules.

The package has a file a GPU model, tables/<gpu>.json, of the products where something is faster than what the rules
choose. autotune's is one a GPU model, driver and version of the package, in $XDG_CACHE_HOME/qlinear (or
~/.cache/qlinear): what was fastest with one of them need not be with the next; it goes before the package's. Both are
read when the first layer on such a GPU is made. A file that is broken, or not what its name says, is left alone with a
warning. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import _qlinear

LAYOUT = 1
TABLES = Path(__file__).parent / "tables"


class Problem(NamedTuple):
    """What a kernel is chosen for: a packed weight and the dtype of x. code: "int4", "table4", ..."""

    code: str
    n: int
    k: int
    group_size: int
    dtype: str


class Choice(NamedTuple):
    """The kernel for up to m rows of x, and its launch parameter, whose meaning is the kernel's."""

    problem: Problem
    m: int
    kernel: str
    parameter: int


_FIELDS = {"code": str, "n": int, "k": int, "group_size": int, "dtype": str, "m": int, "kernel": str, "parameter": int}

_lock = threading.Lock()
_loaded: set[int] = set()


def directory() -> Path:
    """Where autotune's files are. OSError where a process has no home, as one of a user unknown to its container."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    if os.path.isabs(base):
        return Path(base) / "qlinear"
    try:
        return Path.home() / ".cache" / "qlinear"
    except RuntimeError:
        raise FileNotFoundError("there is no home directory: set HOME or XDG_CACHE_HOME") from None


def _machine(device: int) -> dict[str, Any]:
    """What choices are good for, as the file says it."""
    info = _qlinear.cuda_info()
    release = re.search(r"\.so\.(\d[\d.]*)$", info["driver"] or "")
    return {
        "layout": LAYOUT,
        "qlinear": _qlinear.__version__,
        "gpu": info["devices"][device]["name"],
        "driver": release.group(1) if release else str(info["driver_version"]),
    }


def _named(folder: Path, name: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def _file(machine: dict[str, Any]) -> Path:
    return _named(directory(), "-".join(str(machine[key]) for key in ("gpu", "driver", "qlinear")))


def _gpu(machine: dict[str, Any]) -> dict[str, Any]:
    """What the package's own choices are good for."""
    return {key: machine[key] for key in ("layout", "gpu")}


def file(device: int) -> Path:
    """Where the choices for this GPU are kept, whether there are some or not. OSError as of directory."""
    return _file(_machine(device))


def _parse(text: str, machine: dict[str, Any]) -> list[Choice]:
    """ValueError with a sentence where the text is not a file of choices for this machine."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise ValueError("it has no list of choices")
    for key, value in machine.items():
        if content.get(key) != value:
            raise ValueError(f"its {key} is {content.get(key)!r:.60}, here it is {value!r}")
    found = []
    for entry in content["choices"]:
        if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in _FIELDS.items()):
            raise ValueError(f"a choice has {', '.join(_FIELDS)}, not {entry!r:.100}")
        values = {key: entry[key] for key in _FIELDS}
        problem = Problem(*(values.pop(key) for key in Problem._fields))
        found.append(Choice(problem, **values))
    return found


def _read(path: Path, machine: dict[str, Any]) -> list[Choice]:
    """The file's choices; none, and a warning unless there is no file, where it is of no use."""
    try:
        return _parse(path.read_text(encoding="utf-8"), machine)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.warn(f"qlinear: {path} is ignored: {error}", RuntimeWarning, stacklevel=3)
        return []


def apply(device: int, choice: Choice) -> None:
    """From now on such products on this GPU run so. ValueError where the kernel cannot."""
    _qlinear.set_choice(device, *choice.problem, choice.m, choice.kernel, choice.parameter)


def load(device: int) -> None:
    """Takes the file's choices for this GPU, once in a process."""
    if device in _loaded:
        return
    with _lock:
        if device in _loaded:
            return
        _loaded.add(device)
        machine = _machine(device)
        for choice in _read(_named(TABLES, machine["gpu"]), _gpu(machine)):
            # A build may lack the kernel, or all of them be forbidden.
            with contextlib.suppress(ValueError):
                apply(device, choice)
        try:
            path = _file(machine)
        except FileNotFoundError:
            return
        for choice in _read(path, machine):
            try:
                apply(device, choice)
            except (ValueError, OverflowError) as error:
                warnings.warn(f"qlinear: a choice in {path} is ignored: {error}", RuntimeWarning, stacklevel=2)


def _write(path: Path, machine: dict[str, Any], choices: Iterable[Choice]) -> None:
    """Readers see the old file or the new one."""
    entries = [choice.problem._asdict() | choice._asdict() | {"problem": None} for choice in choices]
    for entry in entries:
        del entry["problem"]
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    head = json.dumps(machine)[1:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(f'{{{head}, "choices": [\n  {lines}\n]}}\n')
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def store(device: int, choices: Iterable[Choice]) -> Path:
    """Adds choices to autotune's file, in place of those for the same products. OSError where it cannot be written."""
    machine = _machine(device)
    path = _file(machine)
    kept = {(choice.problem, choice.m): choice for choice in (*_read(path, machine), *choices)}
    _write(path, machine, kept.values())
    return path


def store_table(device: int, choices: Iterable[Choice], measured: Iterable[tuple[Problem, int]]) -> Path:
    """Makes choices the package's own for the products that were measured: those of them without one have none."""
    machine = _gpu(_machine(device))
    path = _named(TABLES, machine["gpu"])
    gone = set(measured)
    kept = [choice for choice in _read(path, machine) if (choice.problem, choice.m) not in gone]
    _write(path, machine, sorted([*kept, *choices]))
    path.chmod(0o644)
    return path
