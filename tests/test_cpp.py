"""The kernels without Python: tests/cpp is built and run, plain, with sanitizers, and for NEON."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moyu_ext import _load

ROOT = Path(__file__).resolve().parents[1]
CPU_SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
CPU_TESTS = sorted((ROOT / "tests" / "cpp").glob("test_cpu_*.cpp"))
CROSS = "aarch64-linux-gnu-g++"


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    return found


def build(target: str, preset: str, folder: Path) -> Path:
    """The executable: by CMake, which builds only what changed, or by one call of the compiler."""
    cxx = compiler()
    if shutil.which("cmake") and (shutil.which("make") or shutil.which("ninja")):
        run(["cmake", "--preset", preset])
        run(["cmake", "--build", "--preset", preset, "--parallel", "2", "--target", target])
        return ROOT / "build" / preset / target
    flags = ["-std=c++20", "-O1", "-fopenmp", "-w"]
    if preset == "sanitize":
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    if target == "test_cpu_kernels":
        sources = [*CPU_SOURCES, *CPU_TESTS]
    else:
        flags += ["-DMOYU_CUDA_EMULATOR", "-Itests/cpp"]
        sources = [ROOT / "tests" / "cpp" / "test_cuda_kernels.cpp"]
    run([cxx, *flags, *sources, "-o", folder / target])
    return folder / target


def check(output: str) -> None:
    last = output.strip().splitlines()[-1]
    passed, failed = (int(word) for word in last.replace(",", "").split() if word.isdecimal())
    assert passed > 1000 and failed == 0, output[-4000:]


def test_cpu_kernels(tmp_path: Path) -> None:
    output = run([build("test_cpu_kernels", "quick", tmp_path)])
    check(output)
    assert f"instruction sets: {' '.join(_load._C.isa_list())}\n" in output


def test_cuda_kernels_on_the_emulator(tmp_path: Path) -> None:
    check(run([build("test_cuda_emulated", "quick", tmp_path)]))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["test_cpu_kernels", "test_cuda_emulated"])
def test_with_sanitizers(target: str, tmp_path: Path) -> None:
    check(run([build(target, "sanitize", tmp_path)]))


def test_neon_compiles() -> None:
    if not shutil.which(CROSS):
        pytest.skip(f"no {CROSS}: install g++-aarch64-linux-gnu")
    for source in CPU_SOURCES:
        run([CROSS, "-std=c++20", "-fopenmp", "-Wall", "-fsyntax-only", source])


@pytest.mark.slow
def test_neon_kernels_in_an_emulator(tmp_path: Path) -> None:
    if not shutil.which(CROSS) or not shutil.which("qemu-aarch64"):
        pytest.skip(f"no {CROSS} or no qemu-aarch64: install g++-aarch64-linux-gnu and qemu-user")
    binary = tmp_path / "test_neon"
    flags = ["-std=c++20", "-O1", "-fopenmp", "-static"]
    run([CROSS, *flags, *CPU_SOURCES, *CPU_TESTS, "-o", binary])
    output = run(["qemu-aarch64", binary])
    check(output)
    assert "instruction sets: neon scalar\n" in output
