"""Print what ptxas said about every kernel of a build; exit 1 on spills or ptxas warnings.

python tools/ptxas_report.py [FOLDER]      FOLDER defaults to build/
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Advisory codes such as C7510 (serialised wgmma) come as "info", but they cost speed.
WARNING = re.compile(r"warning|\(C7\d{3}\)", re.IGNORECASE)


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    static_smem: int = 0
    stack: int = 0
    spills: int = 0  # bytes stored and loaded


def parse(text: str) -> tuple[list[Kernel], list[str]]:
    """Return the kernels and the warnings of one report."""
    kernels: list[Kernel] = []
    warnings = []
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Kernel(match[1], match[2]))
        elif line.startswith("ptxas") and WARNING.search(line):
            warnings.append(line)
        if kernels and (match := SPILLS.search(line)):
            kernels[-1].stack = int(match[1])
            kernels[-1].spills = int(match[2]) + int(match[3])
        if kernels and (match := REGISTERS.search(line)):
            kernels[-1].registers = int(match[1])
            shared = SHARED.search(line)
            kernels[-1].static_smem = int(shared[1]) if shared else 0
    return kernels, warnings


def demangle(names: list[str]) -> list[str]:
    """Return readable names, or the names as they are where c++filt is missing."""
    try:
        result = subprocess.run(
            ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names
    return result.stdout.splitlines()


def main(folder: Path) -> int:
    reports = sorted(folder.rglob("*.ptxas.txt"))
    if not reports:
        print(f"no *.ptxas.txt under {folder}: build with CUDA first", file=sys.stderr)
        return 2
    kernels: list[Kernel] = []
    warnings = []
    for report in reports:
        found, complaints = parse(report.read_text())
        kernels += found
        warnings += [f"{report.name}: {line}" for line in complaints]
    print(f"{'arch':8} {'registers':>9} {'smem':>7} {'stack':>6} {'spills':>6}  kernel")
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        print(
            f"{kernel.arch:8} {kernel.registers:9} {kernel.static_smem:7} {kernel.stack:6} "
            f"{kernel.spills:6}  {name}"
        )
    for line in warnings:
        print(line)
    spilling = sum(kernel.spills > 0 for kernel in kernels)
    print(f"{len(kernels)} kernels, {spilling} with spills, {len(warnings)} warnings")
    return 1 if spilling or warnings else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build")))
