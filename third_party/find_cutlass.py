"""Find the CUTLASS headers this project is pinned to, and check that they are that version.

`$CUTLASS_PATH` (a CUTLASS checkout, or its include folder) comes first, then the PyPI package
`nvidia-cutlass`, which carries the headers. Run as a program it prints the include folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

VERSION = "4.2.0"
REQUIREMENT = "nvidia-cutlass==4.2.0.0"


class CutlassError(RuntimeError):
    """CUTLASS is missing, or is not the version that this project is pinned to."""


def find() -> Path:
    """Return the folder that holds cutlass/ and cute/."""
    override = os.environ.get("CUTLASS_PATH")
    if override:
        root = Path(override).expanduser()
        include = root if (root / "cutlass").is_dir() else root / "include"
        origin = f"CUTLASS_PATH={override}"
    else:
        # find_spec reads no code of the package; importing it would pull in its dependencies.
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or not spec.submodule_search_locations:
            raise CutlassError(
                f"the CUTLASS {VERSION} headers are missing: run `pip install {REQUIREMENT}`, "
                "or set CUTLASS_PATH to a CUTLASS checkout"
            )
        include = Path(spec.submodule_search_locations[0]) / "source" / "include"
        origin = f"the installed package nvidia-cutlass ({include})"
    _check_version(include, origin)
    return include.resolve()


def _check_version(include: Path, origin: str) -> None:
    header = include / "cutlass" / "version.h"
    if not header.is_file() or not (include / "cute" / "tensor.hpp").is_file():
        raise CutlassError(
            f"{origin} holds no CUTLASS headers (no cutlass/version.h and cute/tensor.hpp there): "
            f"point CUTLASS_PATH at a CUTLASS {VERSION} checkout, or unset it and run "
            f"`pip install {REQUIREMENT}`"
        )
    text = header.read_text()
    found = tuple(
        int(match[1]) if (match := re.search(rf"#define CUTLASS_{part}\s+(\d+)", text)) else -1
        for part in ("MAJOR", "MINOR")
    )
    wanted = tuple(int(part) for part in VERSION.split(".")[:2])
    if found != wanted:
        raise CutlassError(
            f"{origin} is CUTLASS {found[0]}.{found[1]}, this project needs "
            f"{wanted[0]}.{wanted[1]}: run `pip install {REQUIREMENT}`, or point CUTLASS_PATH at "
            f"a checkout of v{VERSION}"
        )


if __name__ == "__main__":
    try:
        print(find())
    except CutlassError as error:
        sys.exit(f"error: {error}")
