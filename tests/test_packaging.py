"""What an sdist carries, and what setup.py says where something is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import moyu_ext

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "moyu_ext", "python")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
# Runs setup.py, then prints the sources that a build with CUDA compiles.
RUN = """
import json, runpy, sys
names = runpy.run_path("setup.py")
print(json.dumps([*names["CPU_SOURCES"], *names["CUDA_SOURCES"], "moyu_ext/cuda_ops.cpp"]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of all that the project keeps for a build, so that egg-info lands outside of it."""
    folder = tmp_path / "source"
    folder.mkdir()
    # A build has pybind11 from pyproject.toml; an sdist only asks it for its headers.
    (tmp_path / "pybind11.py").write_text("def get_include(): return 'none'\n")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


def setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source.parent), "MOYU_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def included(archive: dict[str, str], name: str) -> set[str]:
    """What a file of the archive includes by a path, as paths from the root."""
    there = re.findall(r'^\s*#\s*include\s*"([^"]+)"', archive[name], re.MULTILINE)
    paths = {os.path.normpath(os.path.join(os.path.dirname(name), path)) for path in there}
    # Not beside it: the CUDA emulator of the C++ tests, which a build never asks for.
    return {path for path in paths if (ROOT / path).exists()}


def test_an_sdist_carries_all_that_a_build_needs(source: Path) -> None:
    done = setup(source, "-q", "sdist", "--formats=tar")
    assert done.returncode == 0, done.stderr
    (packed,) = (source / "dist").iterdir()
    assert packed.name == f"moyu_ext-{moyu_ext.__version__}.tar"
    with tarfile.open(packed) as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        archive = {
            m.name.split("/", 1)[1]: tar.extractfile(m).read().decode(errors="replace")  # type: ignore[union-attr]
            for m in members
        }
    needed, seen = set(json.loads(done.stdout.splitlines()[-1])), set()
    assert {"csrc/cuda/sparse_mlp.cu", "csrc/cpu/dispatch.cpp"} <= needed
    while needed - seen:
        name = (needed - seen).pop()
        assert name in archive, f"{name} is missing"
        seen.add(name)
        needed |= included(archive, name)
    assert "csrc/cuda/common.cuh" in seen and "csrc/moyu.h" in seen
    package = ROOT / "python" / "moyu_ext"
    embedded = [p for p in (package / "embedded").rglob("*") if p.is_file()]
    for path in [*package.rglob("*.py"), package / "py.typed", *embedded]:
        if "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in archive
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "MANIFEST.in"} <= archive.keys()


def test_cuda_without_its_kernels_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "csrc" / "cuda")
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        file = tmp_path / "cuda" / name
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    found = {"MOYU_CUDA": "1", "CUDA_HOME": str(tmp_path / "cuda")}
    done = setup(source, "--version", **found)
    assert done.returncode != 0
    assert "csrc/cuda" in done.stderr and "MOYU_CUDA=0" in done.stderr


def test_the_version_is_stated_once(source: Path) -> None:
    assert setup(source, "--version").stdout.splitlines()[0] == moyu_ext.__version__
