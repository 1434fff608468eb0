"""Run nvcc and keep what ptxas reported in a file beside the object.

`nvcc_with_report.py nvcc ARGS… -c x.cu -o x.o` writes x.o.ptxas.txt and prints only what is not
routine. Both builds put it in front of nvcc; ptxas_report.py reads the files.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
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
