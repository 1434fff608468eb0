"""Print the requirements that pyproject.toml lists: `requirements.py build dev hf …`.

"build" is build-system.requires, any other name is an extra. torch is left out: which build of
it to install is the caller's choice.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]


def main(groups: list[str]) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    tables = {
        "build": pyproject["build-system"]["requires"],
        **pyproject["project"]["optional-dependencies"],
    }
    for group in groups:
        for requirement in tables[group]:
            if not requirement.startswith("torch"):
                print(requirement)


if __name__ == "__main__":
    main(sys.argv[1:])
