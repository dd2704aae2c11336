"""Builds the CUDA kernels for the CPU, lane by lane (emulate.h), as the ops `megatron_lance_emulated::*`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

from tests.shared import REPOSITORY

SOURCES = REPOSITORY / "kernels" / "csrc"
HERE = Path(__file__).parent

# The emulated kernels stand where the CPU kernels of the ops are.
ENTRIES = """
namespace megatron_lance {
void forward_cpu(const Forward& a, int64_t begin, int64_t end) {
  if (begin == 0) megatron_lance_forward_cuda(&a, 0, nullptr);
}
void backward_cpu(const Backward&, int64_t, int64_t) {}
void weight_gradients_cpu(const Backward& a) { megatron_lance_backward_cuda(&a, 0, nullptr); }
}
"""


def _host_source(name: str) -> str:
    """A CUDA source as plain C++: launches and dynamic shared memory replaced."""
    text = (SOURCES / name).read_text(encoding="utf-8")
    text, shared = re.subn(r"extern __shared__ float4 shared\[\];", "float4* shared = emulation::shared.data();", text)
    launch = r"(\w+<[\w, ]+>)<<<([^;]*?), (kThreads|dim3\([^)]*\)), (\w+), stream>>>\((.*?)\);"
    text, launches = re.subn(launch, r"emulation::launch(\2, \3, \4, [&] { \1(\5); });", text)
    assert (shared, launches) == {"mape_fwd.cu": (1, 1), "mape_bwd.cu": (1, 2)}[name], "the sources changed their form"
    return text


def _compile(source: Path, target: Path, *flags: str) -> Path:
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *flags, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def build(folder: Path, cuda_include: Path) -> Path:
    """The shared library.

    Args:
        folder: for what is made.
        cuda_include: CUDA's headers.
    """
    include = [f"-I{HERE}", f"-I{SOURCES}", f"-I{cuda_include}"]
    aligned = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a misaligned access ends the process
    objects = []
    for name in ("mape_fwd.cu", "mape_bwd.cu"):
        text = '#include "emulate.h"\n' + _host_source(name) + (ENTRIES if name == "mape_bwd.cu" else "")
        source = folder / f"{name}.cpp"
        source.write_text(text, encoding="utf-8")
        objects.append(_compile(source, folder / f"{name}.o", *include, *aligned))
    bindings = (SOURCES / "bindings.cpp").read_text(encoding="utf-8")
    bindings = re.sub(r"(STABLE_TORCH_LIBRARY\w*\(megatron_lance)", r"\1_emulated", bindings)
    (folder / "bindings.cpp").write_text(bindings, encoding="utf-8")
    torch_root = Path(torch.__file__).parent
    flags = ["-isystem", str(torch_root / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", *include]
    objects.append(_compile(folder / "bindings.cpp", folder / "bindings.o", *flags))
    library = folder / "emulated.so"
    link = ["g++", "-shared", *map(str, objects), "-o", str(library), f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return library
