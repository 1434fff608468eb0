"""Check that C++ files include what they use of the standard library.

`check_includes.py [FOLDER …]`, default: all folders.

Standard libraries include each other's headers, each version different ones. A file that leaves
out <cstdint> compiles with one gcc and not with the next, which no single compiler shows.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

USES = {
    "cstdint": r"\b(?:u?int(?:8|16|32|64|ptr)_t|U?INT(?:8|16|32|64)_(?:MAX|MIN|C))\b",
    "climits": r"\b(?:CHAR_BIT|INT_MAX|INT_MIN|LONG_MAX)\b",
    "array": r"\bstd::array\b",
    "initializer_list": r"\bstd::initializer_list\b",
    "limits": r"\bstd::numeric_limits\b",
    "optional": r"\bstd::(?:optional|nullopt)\b",
    "sstream": r"\bstd::[io]?stringstream\b",
    "string": r"\bstd::(?:string|to_string)\b",
    "string_view": r"\bstd::string_view\b",
    "tuple": r"\bstd::(?:tuple|tie|make_tuple|apply)\b",
    "type_traits": r"\bstd::(?:enable_if|is_same|conditional|integral_constant|decay)(?:_[tv])?\b",
    "vector": r"\bstd::vector\b",
}
SUFFIXES = {".h", ".hpp", ".cuh", ".cpp", ".cu"}
# Comments and literals use nothing.
IGNORED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


ROOTS = [Path("csrc"), Path("prism_cuda/include"), Path("tests/cpp"), Path("examples/cpp")]


@functools.cache
def included(path: Path) -> frozenset[str]:
    """Return the standard headers that a file includes, directly or through ours."""
    text = path.read_text()
    names = set(re.findall(r"^\s*#\s*include\s*<(\w+)>", text, re.MULTILINE))
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
        for folder in [path.parent, *ROOTS]:
            if (folder / name).is_file() and folder / name != path:
                names |= included(folder / name)
                break
    return frozenset(names)


def missing(path: Path) -> list[str]:
    """Return the standard headers that a file uses without including them."""
    text = re.sub(r"^\s*#\s*include.*$", "", path.read_text(), flags=re.MULTILINE)
    code = IGNORED.sub(" ", text)
    names = included(path)
    return [name for name, use in USES.items() if name not in names and re.search(use, code)]


def main(folders: list[Path]) -> int:
    problems = 0
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
            for name in missing(path):
                print(f"{path}: uses <{name}> without including it", file=sys.stderr)
                problems += 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main([Path(folder) for folder in sys.argv[1:]] or ROOTS))
