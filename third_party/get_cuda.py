"""Install CUDA's compiler from PyPI: `get_cuda.py [FOLDER]`, 270 MB, no driver and no root needed.

Without FOLDER it goes into the environment that runs this, where find_cuda.py looks for it. The
packages live in a folder of their own, so they can be of another release than torch's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from third_party.find_cuda import packaged_toolkit  # noqa: E402

# One release: nvcc, what it calls and the headers it compiles belong together.
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)


def install(folder: Path) -> Path:
    """Install the packages into `folder`, unless they are there; return the toolkit's root."""
    root = packaged_toolkit(folder)
    if not (root / "lib64").exists():  # made last: a broken-off installation is repeated
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--disable-pip-version-check", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (root / "lib64").symlink_to("lib")  # nvcc links with what is in lib64
    return root


if __name__ == "__main__":
    print(install(Path(sys.argv[1] if len(sys.argv) > 1 else Path(sys.prefix) / "cuda")))
