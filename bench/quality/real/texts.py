"""The texts of the evaluation: prose from Debian's documentation packages, and source code.

Every text has a role: per-head settings are fitted on "tune", methods and defaults chosen on
"screen", what was chosen is judged on "test". Roles share no text.
"""

from __future__ import annotations

import gzip
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# FOLDER/NAME.txt or NAME.txt.gz, as fetch_texts.py writes them.
PROSE = {"tune": ("devref",), "screen": ("reference",), "test": ("cfi", "handbook")}

# Of the texts of "test", characters at their beginning that estimators were developed on.
SKIPPED = 120_000

# Source code: the standard library's modules by their first letter.
CODE = {"tune": "abcd", "screen": "efghijklm", "test": "nopqrstuvwxyz"}

# Tables of data and one module twice.
NOT_CODE = {"_pydecimal.py", "pydoc_data", "this.py"}


def code(role: str) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))
    skipped = ("site-packages", "test", "idlelib", "encodings", "lib2to3", "pydoc_data")
    texts = []
    for path in files:
        name = path.relative_to(root).as_posix()
        if name.startswith(skipped) or path.name in NOT_CODE:
            continue
        if name.lstrip("_")[0] in CODE[role]:
            texts.append(f"# {name}\n" + path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(texts)


def read(folder: Path, role: str) -> dict[str, str]:
    """Text by name: the code and every prose text of the role.

    Raises:
        FileNotFoundError: if a text is missing.
    """
    found = {"code": code(role)}
    for name in PROSE[role]:
        path = folder / f"{name}.txt.gz"
        if path.exists():
            found[name] = gzip.decompress(path.read_bytes()).decode()
        else:
            found[name] = (folder / f"{name}.txt").read_text(encoding="utf-8")
        if role == "test":
            found[name] = found[name][SKIPPED:]
    return found


def windows(
    tokens: dict[str, np.ndarray], length: int, count: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """``count`` windows that do not overlap, from each text in turn, and the text's name.

    Raises:
        ValueError: if the texts hold fewer.
    """
    rooms = {name: len(ids) // length for name, ids in tokens.items()}
    if sum(rooms.values()) < count:
        raise ValueError(
            f"texts: {count} windows of {length} tokens; the texts hold {sum(rooms.values())} "
            "that do not overlap"
        )
    orders = {name: list(rng.permutation(room)) for name, room in rooms.items()}
    given = 0
    while given < count:
        for name, order in orders.items():
            if order and given < count:
                start = int(order.pop()) * length
                yield name, tokens[name][start : start + length]
                given += 1


def tokenize(tokenizer: Any, found: dict[str, str]) -> dict[str, np.ndarray]:
    return {
        name: np.array(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64
        )
        for name, text in found.items()
    }
