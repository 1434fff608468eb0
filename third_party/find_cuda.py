"""Find the CUDA toolkit and say which GPU architectures to compile for.

As a program: `find_cuda.py nvcc` prints the compiler's path, `find_cuda.py archs` the
architectures, `find_cuda.py gencode` the nvcc flags for them and `find_cuda.py size` those about
the library's size, each as a CMake list.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM_NVCC = (12, 3)
MINIMUM_ARCH = 80
DEFAULT_ARCHS = "80+PTX;90a"


class CudaError(RuntimeError):
    """The CUDA toolkit or a build setting is not usable."""


def cpu_only() -> bool:
    """Whether $PRISM_CPU_ONLY asks for a build without CUDA."""
    value = os.environ.get("PRISM_CPU_ONLY", "")
    if value not in ("", "0", "1"):
        raise CudaError(f"PRISM_CPU_ONLY is {value!r}; allowed are 1, 0 and nothing")
    return value == "1"


def packaged_toolkit(folder: Path) -> Path:
    """Return the toolkit's root among PyPI's CUDA 13 packages installed into `folder`."""
    return folder / "nvidia" / "cu13"


def find_nvcc() -> Path:
    """Return nvcc of $CUDA_HOME, $CUDA_PATH, $PATH, /usr/local/cuda or get_cuda.py."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise CudaError(
                    f"{variable}={home} has no bin/nvcc: point it at a CUDA toolkit, or set "
                    "PRISM_CPU_ONLY=1 to build without CUDA"
                )
            return nvcc
    on_path = shutil.which("nvcc")
    candidates = [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates.append(packaged_toolkit(Path(sys.prefix) / "cuda") / "bin" / "nvcc")
    for nvcc in candidates:
        if nvcc.is_file():
            return nvcc
    raise CudaError(
        "no nvcc was found: install the CUDA toolkit "
        f"({MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]} or newer) and set CUDA_HOME; or run "
        f"`{sys.executable} third_party/get_cuda.py`, which takes CUDA 13.0's compiler from PyPI "
        "(270 MB); or set PRISM_CPU_ONLY=1 to build without CUDA"
    )


def check_nvcc(nvcc: Path) -> str:
    """Return nvcc's version as "major.minor"; raise where it is too old."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise CudaError(f"{nvcc} --version names no release; is it NVIDIA's compiler?")
    if (int(match[1]), int(match[2])) < MINIMUM_NVCC:
        raise CudaError(
            f"{nvcc} is CUDA {match[1]}.{match[2]}; this project needs "
            f"{MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]} or newer: set CUDA_HOME to a newer toolkit"
        )
    return f"{match[1]}.{match[2]}"


def toolkit_root(nvcc: Path) -> Path:
    """Return the folder with the toolkit's include/, as nvcc says: it may be a wrapper script."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    match = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    root = Path(match[1].strip()).resolve() if match else nvcc.resolve().parents[1]
    if not (root / "include" / "cuda_runtime_api.h").is_file():
        raise CudaError(
            f"the toolkit of {nvcc} has no include/cuda_runtime_api.h (looked in {root}): install "
            "the CUDA runtime's development files, or set CUDA_HOME to a complete toolkit"
        )
    return root


def parse_archs(text: str) -> list[str]:
    """Split a list such as "80+PTX;90a" and check every entry."""
    archs = [entry for entry in re.split(r"[;,\s]+", text) if entry]
    if not archs:
        raise CudaError(f'PRISM_CUDA_ARCHS is empty; an example is "{DEFAULT_ARCHS}"')
    for arch in archs:
        match = re.fullmatch(r"(\d{2,3})[af]?(\+PTX)?", arch)
        if match is None:
            raise CudaError(
                f"PRISM_CUDA_ARCHS: {arch!r} is not an architecture; allowed are entries like "
                '80, 90a or 80+PTX, separated by semicolons (compute capability 8.0 is "80")'
            )
        if int(match[1]) < MINIMUM_ARCH:
            raise CudaError(
                f"PRISM_CUDA_ARCHS: {arch!r} is older than {MINIMUM_ARCH}, the oldest supported"
            )
    return list(dict.fromkeys(archs))


def wanted_archs() -> list[str]:
    """Return the architectures of $PRISM_CUDA_ARCHS, or the default ones."""
    return parse_archs(os.environ.get("PRISM_CUDA_ARCHS", DEFAULT_ARCHS))


def gpu_archs() -> list[str]:
    """Return the architectures of this machine's GPUs that kernels can run on, oldest first."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []  # no driver, or one without a GPU
    found = {int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", text)}
    return [
        f"{arch}a" if arch == 90 else str(arch) for arch in sorted(found) if arch >= MINIMUM_ARCH
    ]


def gencode_flags(archs: list[str]) -> list[str]:
    """Return nvcc's flags: machine code for every entry, PTX as well for those with +PTX."""
    flags = []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        if number == "90a":
            flags.append("-DPRISM_HAS_SM90A")  # the Hopper kernels have code
    return flags


def line_info() -> bool:
    """Whether $PRISM_LINEINFO asks for source lines in the kernels, for profilers."""
    value = os.environ.get("PRISM_LINEINFO", "")
    if value not in ("", "0", "1"):
        raise CudaError(f"PRISM_LINEINFO is {value!r}; allowed are 1, 0 and nothing")
    return value == "1"


def size_flags(nvcc_version: str) -> list[str]:
    """Return nvcc's flags about the size of what it makes: source lines and compression."""
    flags = ["-lineinfo"] if line_info() else []
    if tuple(map(int, nvcc_version.split("."))) >= (13, 0):  # older drivers cannot read it
        flags.append("--compress-mode=size")
    return flags


def _main(what: str) -> str:
    if what == "nvcc":
        nvcc = find_nvcc()
        check_nvcc(nvcc)
        return str(nvcc)
    if what == "archs":
        return ";".join(wanted_archs())
    if what == "gencode":
        return ";".join(gencode_flags(wanted_archs()))
    if what == "size":
        return ";".join(size_flags(check_nvcc(find_nvcc())))
    raise CudaError(f"unknown request {what!r}; allowed are nvcc, archs, gencode, size")


if __name__ == "__main__":
    try:
        print(_main(" ".join(sys.argv[1:])))
    except CudaError as error:
        sys.exit(f"error: {error}")
