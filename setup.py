"""Builds moyu_ext._C: kernels (csrc), operators on LibTorch's stable ABI and a small pybind module.

Environment: MOYU_CUDA=1 builds the CUDA kernels and makes a missing nvcc an error, MOYU_CUDA=0
leaves them out (default: they are built where torch is a CUDA build and nvcc is found, since no
other torch can call them); MOYU_CUDA_ARCHS="80;90" names the GPU architectures, the newest of them
also as PTX.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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

CPU_SOURCES = [
    *(
        f"csrc/cpu/isa_{isa}.cpp"
        for isa in ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon")
    ),
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/huge_pages.cpp",
    "moyu_ext/schemas.cpp",
    "moyu_ext/cpu_ops.cpp",
    "moyu_ext/module.cpp",
    "moyu_ext/decode_step.cpp",
]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
# Ascending, so that the last one, whose PTX newer devices run, is the newest.
CUDA_ARCHS = sorted(
    os.environ.get("MOYU_CUDA_ARCHS", "80;90").split(";"), key=lambda a: int(a.rstrip("af"))
)


def find_cuda() -> Path | None:
    """The CUDA toolkit to build with, or None."""
    wanted = os.environ.get("MOYU_CUDA", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if wanted == "0" or (wanted != "1" and torch.version.cuda is None):
        return None
    root = Path(nvcc).resolve().parent.parent if nvcc else None
    if root is not None and not (root / "include" / "cuda_runtime.h").exists():
        root = Path("/usr/local/cuda")  # nvcc is a wrapper that lies elsewhere
    if root is None or not (root / "include" / "cuda_runtime.h").exists():
        if wanted == "1":
            raise SystemExit("MOYU_CUDA=1, but no nvcc is on PATH, in CUDA_HOME or /usr/local/cuda")
        return None
    return root


CUDA = find_cuda()


class Build(cpp_extension.BuildExtension):
    """torch's build, with the .cu files compiled by nvcc itself.

    cpp_extension compiles CUDA only for a CUDA build of torch; the kernels use no torch header, so
    the same objects serve every torch.
    """

    def build_extensions(self) -> None:
        """Compile the kernels first, then everything else as usual."""
        if CUDA is not None:
            folder = Path(self.build_temp) / "cuda"
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda s: self.compile_cuda(s, folder), CUDA_SOURCES))
            self.extensions[0].extra_objects += objects
        super().build_extensions()

    def compile_cuda(self, source: str, folder: Path) -> str:
        """One .cu file into an object, if anything in csrc is newer than it."""
        target = folder / (Path(source).stem + ".o")
        newest = max(path.stat().st_mtime for path in Path("csrc").rglob("*") if path.is_file())
        if not target.exists() or target.stat().st_mtime < newest:
            archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
            archs.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
            command = [
                f"{CUDA}/bin/nvcc",
                "-O3",
                "-std=c++20",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                *archs,
            ]
            command += ["-c", source, "-o", str(target)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
        return str(target)


def extension() -> cpp_extension.CppExtension:
    """The one shared library."""
    macros = [
        # One build serves every torch from 2.11 on.
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),
        ("MOYU_TORCH_BUILT_WITH", f'"{torch.__version__}"'),
    ]
    sources, include_dirs, link = list(CPU_SOURCES), [pybind11.get_include()], ["-fopenmp"]
    if CUDA is not None and not CUDA_SOURCES:
        # Linked without them, the library would only fail when it is loaded.
        raise SystemExit(
            f"CUDA was found in {CUDA}, but there are no kernels for it: expected csrc/cuda/*.cu "
            f"in {Path.cwd()}. Get the whole source, or set MOYU_CUDA=0 to build for the CPU only."
        )
    if sys.platform == "linux":
        # torch's own C++ runtime, also where LDFLAGS says -static-libstdc++: with a second copy in
        # the process, the first message that holds a number crashes.
        link.append("-l:libstdc++.so.6")
    if CUDA is not None:
        sources.append("moyu_ext/cuda_ops.cpp")
        include_dirs.append(str(CUDA / "include"))
        macros.append(("MOYU_WITH_CUDA", f'"{";".join(CUDA_ARCHS)}+PTX"'))
        # The static runtime, so that the library loads where there is no CUDA at all.
        folders = [CUDA / "lib64", CUDA / "targets" / "x86_64-linux" / "lib"]
        link += [f"-L{folder}" for folder in folders if folder.exists()]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "moyu_ext._C",
        sources,
        include_dirs=include_dirs,
        define_macros=macros,
        extra_compile_args=["-O3", "-std=c++20", "-fopenmp", "-Wno-maybe-uninitialized"],
        extra_link_args=link,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
