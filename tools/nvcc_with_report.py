"""Run nvcc and keep what ptxas reported in a file beside the object.

`nvcc_with_report.py nvcc ARGS… -c x.cu -o x.o` writes x.o.ptxas.txt and prints only what is not
routine. Both builds put it in front of nvcc; ptxas_report.py reads the files.

Kernels in a folder sm90/ are compiled for sm_90a alone where that is one of the architectures:
for the others they are empty, and reading them once more takes as long as compiling them. Those in
a folder sm80/ use nothing that Hopper adds (no wait_for_producer, which would be left out): ptxas
makes Hopper's code from the PTX of sm_80, instruction for instruction what it makes from PTX of its
own, and that half of the compiler's time is saved.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
AMPERE = "-gencode=arch=compute_80,code="


def for_one_file(command: list[str]) -> list[str]:
    """Return nvcc's command with the architectures that the file needs code of its own for."""
    folders = Path(next((argument for argument in command if argument.endswith(".cu")), "")).parts
    if HOPPER not in command:
        return command
    if "sm90" in folders:
        return [flag for flag in command if not flag.startswith("-gencode") or flag == HOPPER]
    if "sm80" in folders and any(flag.startswith(AMPERE) for flag in command):
        return [f"{AMPERE}sm_90" if flag == HOPPER else flag for flag in command]
    return command


def main(command: list[str]) -> int:
    command = for_one_file(command)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "-c" in command and "-o" in command:
        target = command[command.index("-o") + 1]
        Path(f"{target}.ptxas.txt").write_text(result.stdout)
    routine = ("ptxas info", "    0 bytes stack frame")
    for line in result.stdout.splitlines():
        if not line.startswith(routine):
            print(line, file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
