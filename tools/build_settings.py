"""Print what `make build` compiles here, as a shell script: CPU, this machine's GPUs, or all.

`make CUDA=1` means every architecture that is released; PRISM_CUDA_ARCHS and PRISM_CPU_ONLY mean
what they mean to setup.py. Otherwise the machine decides: kernels for its GPUs, none without one.
Where nvcc is needed and missing it is installed into the virtual environment.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from third_party import find_cuda, get_cuda  # noqa: E402

LEFT_OUT = (
    "prism_cuda: no GPU here, so the CUDA kernels are left out; "
    "`make test CUDA=1` compiles them for every architecture (some 9 minutes on 2 cores)"
)


def settings() -> dict[str, str]:
    """Return the variables that setup.py and CMake are to see."""
    wish = os.environ.get("CUDA", "")
    if wish not in ("", "1"):
        raise find_cuda.CudaError(f"CUDA is {wish!r}; allowed are 1 and nothing")
    if find_cuda.cpu_only():
        if wish:
            raise find_cuda.CudaError("CUDA=1 and PRISM_CPU_ONLY=1 exclude each other")
        return {"PRISM_CPU_ONLY": "1"}
    archs = os.environ.get("PRISM_CUDA_ARCHS", "")
    if not archs and not wish:
        archs = ";".join(find_cuda.gpu_archs())
        if not archs:
            print(LEFT_OUT, file=sys.stderr)
            return {"PRISM_CPU_ONLY": "1"}
    result = {"PRISM_CUDA_ARCHS": archs or find_cuda.DEFAULT_ARCHS}
    for name in ("CUDA_HOME", "CUTLASS_PATH", "PRISM_LINEINFO"):
        if value := os.environ.get(name):
            result[name] = value
    return result


def has_nvcc() -> bool:
    try:
        find_cuda.find_nvcc()
    except find_cuda.CudaError:
        return False
    return True


def main() -> None:
    result = settings()
    in_venv = sys.prefix != sys.base_prefix
    if "PRISM_CPU_ONLY" not in result and "CUDA_HOME" not in result and in_venv and not has_nvcc():
        print("prism_cuda: no nvcc here, taking CUDA 13.0's from PyPI", file=sys.stderr)
        get_cuda.install(Path(sys.prefix) / "cuda")
    for name, value in result.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    try:
        main()
    except find_cuda.CudaError as error:
        sys.exit(f"error: {error}")
