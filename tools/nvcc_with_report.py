"""Run nvcc and keep what ptxas reported in a file beside the object.

`nvcc_with_report.py nvcc ARGS… -c x.cu -o x.o` writes x.o.ptxas.txt and prints only what is not
routine. Both builds put it in front of nvcc; ptxas_report.py reads the files.

Kernels in a folder sm90/ are compiled for sm_90a alone where that is one of the architectures:
for the others they are empty, and reading them once more takes as long as compiling them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def for_one_file(command: list[str]) -> list[str]:
    """Return nvcc's command without the architectures that the file has no code for."""
    source = next((argument for argument in command if argument.endswith(".cu")), "")
    hopper = [flag for flag in command if flag.startswith("-gencode=arch=compute_90a,")]
    if "sm90" not in Path(source).parts or not hopper:
        return command
    return [flag for flag in command if not flag.startswith("-gencode") or flag in hopper]


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
