"""The house's rules, where a test can tell: what may include, import or contain what."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "moyu_ext"
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
FOLDERS = ("csrc", "moyu_ext", "python", "benchmarks", "tests", "tools")
LONGEST = 500


def files(*folders: str, suffixes: set[str] = CODE) -> list[Path]:
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*"))]
    return [p for p in found if p.suffix in suffixes and "__pycache__" not in p.parts]


def offenders(paths: list[Path], pattern: str) -> list[str]:
    expression = re.compile(pattern, re.MULTILINE)
    return [str(p.relative_to(ROOT)) for p in paths if expression.search(p.read_text())]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    )


def printed(code: str, **environment: str) -> list[str]:
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_there_is_something_to_look_at() -> None:
    assert len(files(*FOLDERS)) > 50 and (ROOT / "csrc" / "moyu.h").exists()


def test_torch_headers_stay_in_the_extension() -> None:
    outside = [
        p for p in files(*FOLDERS) if p.suffix != ".py" and ROOT / "moyu_ext" not in p.parents
    ]
    assert offenders(outside, r'^\s*#\s*include\s*[<"](torch|ATen|c10)/') == []


def test_kernels_know_neither_python_nor_the_extension() -> None:
    assert offenders(files("csrc"), r'#\s*include\s*[<"](Python\.h|pybind11/|.*moyu_ext/)') == []


def test_the_extension_folder_is_no_python_package() -> None:
    assert files("moyu_ext", suffixes={".py", ".pyi", ".so"}) == []


def test_no_build_for_one_machine() -> None:
    build = [
        ROOT / name for name in ("setup.py", "CMakeLists.txt", "CMakePresets.json", "Makefile")
    ]
    sources = files("csrc", "moyu_ext", "benchmarks", "tools")
    assert offenders([p for p in build if p.exists()] + sources, r"-m(arch|cpu|tune)=native") == []


def test_nobody_sets_the_thread_count() -> None:
    assert offenders(files("csrc", "moyu_ext", "python"), r"set_num_(interop_)?threads\s*\(") == []


def test_files_are_short() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in files(*FOLDERS)
        if (n := len(p.read_text().splitlines())) >= LONGEST
    }
    assert long == {}


@pytest.mark.parametrize("module", ["moyu_ext", "moyu_ext.cli"])
def test_import_is_inert(module: str) -> None:
    heavy = "{'transformers', 'matplotlib', 'lm_eval', 'typer'}"
    code = f"import {module}, sys; print(*({heavy} & sys.modules.keys()))"
    assert printed(code) == (["typer"] if module == "moyu_ext.cli" else [])


def test_every_name_is_found_and_listed() -> None:
    code = """
import moyu_ext
print(*(name for name in moyu_ext.__all__ if getattr(moyu_ext, name).__name__ != name))
print(*(moyu_ext._HOMES.keys() - set(moyu_ext.__all__)))
print(moyu_ext.tune.__module__, moyu_ext.generation_perplexity.__module__)
"""
    assert printed(code) == ["moyu_ext.calibration.tune", "moyu_ext.evaluation.perplexity"]


def test_the_operators_need_no_transformers_and_no_gpu_context() -> None:
    code = (
        "import moyu_ext.ops, sys, torch; before = torch.get_num_threads(); "
        "print('transformers' in sys.modules, torch.cuda.is_initialized(), "
        "before == torch.get_num_threads())"
    )
    assert printed(code) == ["False", "False", "True"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/maps")
def test_one_openmp_runtime() -> None:
    code = """
import torch
from moyu_ext import ops
x = torch.randn(256, 2048)
(x @ x.t()).sum().item()
ops.sparse_mlp(x[:1], x, x, x, None, None, None, None, None, None, "silu")
names = {line.split()[-1] for line in open("/proc/self/maps")}
print(*(n for n in names if any(lib in n for lib in ("libgomp", "libomp", "libiomp"))))
"""
    assert len(printed(code)) == 1


def test_forced_instruction_set() -> None:
    code = """
import torch
from moyu_ext import _load, ops
ops.threshold_compact(torch.rand(5), torch.tensor([0.5]))
print(_load._C.isa_name())
"""
    assert printed(code, MOYU_FORCE_ISA="scalar") == ["scalar"]
    missing = python(code, MOYU_FORCE_ISA="sse9000")
    assert missing.returncode != 0
    assert "MOYU_FORCE_ISA" in missing.stderr and "'sse9000'" in missing.stderr
    assert "scalar" in missing.stderr  # what there is to choose from


def schemas() -> list[str]:
    text = (ROOT / "moyu_ext" / "schemas.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


def test_every_schema_has_a_fake_an_opcheck_and_a_meaning() -> None:
    names = schemas()
    assert "sparse_mlp" in names and len(names) >= 5
    fakes = (PACKAGE / "ops.py").read_text()
    meanings = "".join(p.read_text() for p in PACKAGE.rglob("reference.py"))
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in names:
        assert f'register_fake("moyu_ext::{name}")' in fakes, name
        assert re.search(rf"^def {name}\(", meanings, re.MULTILINE), name
        assert re.search(rf"\b(op)?check\(\s*ops\.{name}\b", tests), f"no opcheck of {name}"


def imports(path: Path) -> set[str]:
    """The parts of moyu_ext that a file imports, at its top level or inside functions."""
    package = list(path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("moyu_ext.")}


# From the ground up: a file imports lower floors or its own room, also inside functions.
FLOORS = (
    ("errors", "_cpu", "_files", "_progress", "reference"),
    ("_artifact", "_load", "embedded"),
    ("ops", "routers"),
    ("packing",),
    ("models",),
    ("shadow", "guard", "integrations"),
    ("methods",),
    ("decoding",),
    ("patching",),
    ("calibration",),
    ("evaluation",),
    ("studies", "benchmarking"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward(path: Path) -> set[str]:
    """What a file imports that is neither on a lower floor nor in its own room."""
    here = room(path)
    below = {name for name in FLOOR if FLOOR[name] < FLOOR[here]}
    return imports(path) - below - {here, "_C"}


def test_every_file_is_on_a_floor() -> None:
    doors = {"__init__", "__main__"}  # what the package shows, from every floor
    rooms = {room(path) for path in files("python")} - doors
    assert rooms == FLOOR.keys()


def test_nothing_imports_upward() -> None:
    rooms = [path for path in files("python") if room(path) in FLOOR]
    assert len(rooms) > 100
    assert {str(p.relative_to(PACKAGE)): up for p in rooms if (up := upward(p))} == {}


@pytest.mark.parametrize(
    ("importer", "line", "found"),
    [
        (
            "methods/tda.py",
            "def f():\n    from ..calibration.thresholds import Thresholds",
            "calibration",
        ),
        ("ops.py", "from .models import weights", "models"),
        ("shadow/store.py", "from .. import __version__", "__version__"),
        ("cli/env.py", "import moyu_ext.patching.patch", ""),
    ],
)
def test_an_import_upward_is_seen(
    importer: str, line: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = PACKAGE / importer
    text = path.read_text()
    monkeypatch.setattr(Path, "read_text", lambda self: f"{text}\n\n{line}\n")
    assert upward(path) == ({found} if found else set())
