"""Compile every header alone: `check_headers.py [HEADER …]`, default: all of them.

Headers of csrc/kernels go through nvcc's front end, which needs no GPU and generates no code; the
others through the C++ compiler, with torch's headers. With PRISM_CPU_ONLY=1 or without nvcc only
the latter are compiled, and a line says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from third_party import find_cuda, find_cutlass  # noqa: E402


def kernel_command() -> list[str] | None:
    """Return nvcc's front end for one architecture, or None without CUDA."""
    if find_cuda.cpu_only():
        return None
    try:
        nvcc = find_cuda.find_nvcc()
    except find_cuda.CudaError:
        return None
    return [
        *(str(nvcc), "--cuda", "-std=c++17", *find_cuda.gencode_flags(["90a"])),
        *("--expt-relaxed-constexpr", "--expt-extended-lambda", "-o", os.devnull),
        *(f"-I{ROOT / 'csrc'}", f"-I{find_cutlass.find()}"),
    ]


def public_command() -> list[str]:
    """For programs that use libtorch: not by its stable ABI alone, and torch asks for C++20."""
    from torch.utils import cpp_extension

    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra"]
    command += [f"-I{ROOT / 'prism_cuda' / 'include'}"]
    return command + [f"-isystem{path}" for path in cpp_extension.include_paths()]


def torch_command(nvcc: str | None) -> list[str]:
    from torch.utils import cpp_extension

    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    if nvcc is not None:
        command += ["-DUSE_CUDA", "-DPRISM_WITH_CUDA"]
        command.append(f"-isystem{find_cuda.toolkit_root(Path(nvcc)) / 'include'}")
    return command


def compiles(header: Path, command: list[str], suffix: str) -> bool:
    with tempfile.NamedTemporaryFile("w", suffix=suffix) as file:
        # Twice, so that an include guard that is missing shows as well.
        file.write(f'#include "{header}"\n' * 2)
        file.flush()
        result = subprocess.run([*command, file.name], capture_output=True, text=True)
    if result.returncode != 0:
        print(f"{header} does not compile alone:\n{result.stderr}", file=sys.stderr)
    return result.returncode == 0


def main(names: list[str]) -> int:
    headers = [Path(name).resolve() for name in names]
    if not headers:
        folders = (ROOT / "csrc", ROOT / "prism_cuda" / "include")
        headers = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix in (".h", ".cuh")]
    kernel = kernel_command()
    torch = torch_command(kernel[0] if kernel else None)
    jobs = []
    for header in headers:
        if ROOT / "prism_cuda" in header.parents:
            jobs.append((header, public_command(), ".cpp"))
        elif ROOT / "csrc" / "kernels" not in header.parents:
            jobs.append((header, torch, ".cpp"))
        elif kernel is not None:
            jobs.append((header, kernel, ".cu"))
    if kernel is None:
        print(f"without CUDA: {len(headers) - len(jobs)} headers of csrc/kernels not compiled")
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = list(pool.map(lambda job: compiles(*job), jobs))
    print(f"{sum(results)} of {len(jobs)} headers compile alone")
    return 0 if all(results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (find_cuda.CudaError, find_cutlass.CutlassError) as error:
        sys.exit(f"error: {error}")
